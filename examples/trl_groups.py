"""TRL's GRPOTrainer with a diversity loss: one import and one argument differ from plain TRL.

python examples/trl_groups.py --loss dqo
python examples/trl_groups.py --loss grpo              # TRL's own loss, to compare
python examples/trl_groups.py --loss qempo_kl          # lam and mu from a QualityConstraint
python examples/trl_groups.py --loss dqo --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from trl import GRPOConfig
from trl_toy import QUIET, embed, model_and_tokenizer, prompts, reward

import qempo_fast as qf
from qempo_fast.integrations.trl import GroupTrainer, QualityConstraintCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=("grpo", "dqo", "qempo_kl"), default="dqo")
    parser.add_argument("--model", help="a model of the hub or a folder; a tiny one is made here without it")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    seen: list[str] = []

    def keep(completions: list[str], **_: object) -> list[float]:
        seen.extend(completions)
        return reward(completions)

    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = model_and_tokenizer(options.model, Path(folder) / "model")
        batch = {"per_device_train_batch_size": 32, "num_generations": 16, "max_completion_length": 3}
        extra = {}
        if options.loss == "dqo":
            extra["loss_kwargs"] = {"alpha": 0.3}
        elif options.loss == "qempo_kl":
            # (1 + mu) * nats / step: nats, the most entropy that an answer can have; step, what one word more is worth
            # in the reward. docs/losses.md, "The line to start from", has what lower ceilings give here.
            words, mu = batch["max_completion_length"], 1.0
            nats, step = words * math.log(len(tokenizer)), 1 / words
            ceiling = (1 + mu) * nats / step
            held = {"lam": ceiling, "lam_max": ceiling, "mu": mu, "lr": 1.0, "step": "multiplicative"}
            constraint = qf.QualityConstraint(min_reward=0.9, **held)
            extra["callbacks"] = [QualityConstraintCallback(constraint)]
        rate = 1e-6 if options.model else 1e-2
        args = GRPOConfig(folder, max_steps=options.steps, learning_rate=rate, **batch, **QUIET)
        trainer = GroupTrainer(
            *(model, keep, args),
            train_dataset=prompts(64),
            processing_class=tokenizer,
            loss=options.loss,
            embedder=embed,
            **extra,
        )
        trainer.train()
    first, last = seen[:32], seen[-64:]
    mean = [sum(reward(texts)) / len(texts) for texts in (first, last)]
    print(f"{options.loss}: reward {mean[0]:.2f} -> {mean[1]:.2f}, {len(set(last))} distinct answers in {len(last)}")


if __name__ == "__main__":
    main()
