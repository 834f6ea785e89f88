"""TRL's DPOTrainer with another pair loss: one import and one argument differ from plain TRL.

python examples/trl_preference.py --loss spl
python examples/trl_preference.py --loss dpo --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from datasets import Dataset
from trl import DPOConfig
from trl_toy import COLOURS, OTHERS, PROMPT, QUIET, model_and_tokenizer

from qempo_fast.integrations.trl import PreferenceTrainer

SETTINGS = {
    "dpo": {},
    "spl": {"alpha": 0.2},
    "hdpo": {"alpha": 1.5},
    "qempo": {"lam": 10.0},
    "qempo_kl": {"lam": 20.0, "mu": 1.0},
    "epa": {"n_weak": 2},
}


def pairs(n: int) -> Dataset:
    draw = random.Random(0)
    rows = []
    for _ in range(n):
        chosen, rejected = (" ".join(draw.choices(words, k=3)) for words in (COLOURS, OTHERS))
        rows.append({"prompt": PROMPT + " ", "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=tuple(SETTINGS), default="spl")
    parser.add_argument("--model", help="a model of the hub or a folder; a tiny one is made here without it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = model_and_tokenizer(options.model, Path(folder) / "model")
        rate = 1e-6 if options.model else 3e-3
        args = DPOConfig(folder, max_steps=30, per_device_train_batch_size=8, learning_rate=rate, **QUIET)
        trainer = PreferenceTrainer(
            model,
            args=args,
            train_dataset=pairs(64),
            processing_class=tokenizer,
            loss=options.loss,
            loss_kwargs=SETTINGS[options.loss],
        )
        trainer.train()
    logged = [row for row in trainer.state.log_history if "rewards/margins" in row]
    margins = [row["rewards/margins"] for row in logged]
    print(f"{options.loss}: reward margin {margins[0]:.3f} -> {margins[-1]:.3f} over {trainer.state.global_step} steps")


if __name__ == "__main__":
    main()
