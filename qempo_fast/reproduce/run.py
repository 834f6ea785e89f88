"""One reproduction: train and measure behind progress bars, print the tables, write the figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.models.llama.modeling_llama import LlamaModel

import qempo_fast as qf

from ..demo.evaluate import Evaluation, evaluate
from ..demo.model import SplitModel
from ..demo.run import EVALUATION_SEED, INTERRUPTED, THREADS, describe
from ..demo.task import Task
from ..demo.train import Batch, Settings, Step, train
from . import REPRODUCTIONS, claims

EMBEDDED = 100  # answers of which the pairwise cosine distance is taken


class Lab:
    """What an experiment works with: the model and task, the seeds, and the figures it has recorded.

    Attributes:
        rows: rows[model][figure] holds one number a seed, in the order of the seeds.
    """

    def __init__(self, model: SplitModel, task: Task, settings: Settings, progress: Progress) -> None:
        self.model, self.task, self.settings, self._progress = model, task, settings, progress
        self.rows: dict[str, dict[str, list[float]]] = {}

    def train(
        self,
        title: str,
        method: str | Callable[[Batch], torch.Tensor],
        seed: int,
        constraint: qf.QualityConstraint | None = None,
    ) -> LlamaModel:
        """Train the top layers by a method of the demo, or by a loss."""
        bar = self._progress.add_task(f"{title}, seed {seed}", total=self.settings.steps, seen="")
        recent: list[Step] = []

        def on_step(step: Step) -> None:
            recent.append(step)
            last = recent[-5:]
            quality, entropy = (sum(getattr(s, f) for s in last) / len(last) for f in ("quality", "entropy"))
            self._progress.update(bar, advance=1, seen=f"quality {quality:.2f}, entropy {entropy:.1f} nats")

        generator = torch.Generator().manual_seed(seed)
        return train(method, self.model, self.task, self.settings, constraint, generator, on_step)

    def measure(
        self, title: str, policy: LlamaModel, seed: int, *, temperature: float = 1.0, **more: float
    ) -> Evaluation:
        """Measure fresh answers, the same draws for every model of a seed, and record the figures under title."""
        seen = evaluate(
            self.model,
            policy,
            self.task,
            batches=self.settings.evaluation_batches,
            seed=EVALUATION_SEED + seed,
            temperature=temperature,
        )
        self.record(
            title,
            quality=seen.quality,
            distinct=seen.distinct,
            top_share=seen.top_share,
            entropy=seen.entropy,
            kl=seen.kl,
            cosine=float(qf.metrics.embedding_cosine(self.task.embed(seen.answers[:EMBEDDED]))),
            **more,
        )
        return seen

    def record(self, title: str, **figures: float) -> None:
        row = self.rows.setdefault(title, {})
        for name, value in figures.items():
            row.setdefault(name, []).append(value)


def run(
    name: str,
    settings: Settings,
    seeds: Sequence[int],
    *,
    quick: bool,
    out: Path | None,
    console: Console,
    load: Callable[[], tuple[SplitModel, Task]],
) -> int:
    """Run the experiment of that name over the seeds; returns the exit status, 130 where Ctrl-C stopped it."""
    from .experiments import COLUMNS, RUN

    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(THREADS)
    size = f"{'quick: ' if quick else ''}{settings.steps} steps of {settings.samples} answers"
    size += f", {100 * settings.evaluation_batches} answers measured"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[seen]}"),
    )
    try:
        with console.status("loading SmolLM2-135M-Instruct, MiniLM and geonames (about 20 s the first time)"):
            model, task = load()
        console.print(f"{name}: {REPRODUCTIONS[name].claim} ({REPRODUCTIONS[name].paper})", soft_wrap=True)
        with Progress(*columns, console=console) as progress:
            lab = Lab(model, task, settings, progress)
            for seed in seeds:
                RUN[name].each_seed(lab, seed)
        found = RUN[name].claims(lab.rows)
    except KeyboardInterrupt:
        console.print("\nStopped before the end: no result.")
        return INTERRUPTED
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - start
    console.print(claims.figures_table(lab.rows, COLUMNS[name], f"{size}; mean (range over seeds)"))
    console.print(claims.claims_table(found, len(seeds)))
    console.print(f"{seconds:.0f} s. What is measured and what was tried: docs/reproduce.md", soft_wrap=True)
    if out is not None:
        facts = describe(settings, name=name, paper=REPRODUCTIONS[name].paper, quick=quick, seeds=list(seeds))
        _write(out, {**facts, "seconds": seconds, "rows": lab.rows, "claims": [c.as_json() for c in found]})
        console.print(f"Written: {out}", soft_wrap=True)
    return 0


def _write(out: Path, figures: dict[str, Any]) -> None:
    text = json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    out.write_text(text, encoding="utf-8")
