"""What an experiment works with: it trains and measures models, shows how far it is, and keeps the figures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.progress import Progress
from transformers.models.llama.modeling_llama import LlamaModel

import qempo_fast as qf

from ..demo.evaluate import Evaluation, evaluate
from ..demo.model import SplitModel
from ..demo.run import EVALUATION_SEED, last_steps
from ..demo.task import Task
from ..demo.train import Batch, Settings, Step, train

EMBEDDED = 100  # answers of which the pairwise cosine distance is taken


class Lab:
    """The model and task of an experiment, and the figures it has recorded.

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
        steps: list[Step] = []

        def on_step(step: Step) -> None:
            steps.append(step)
            self._progress.update(bar, advance=1, seen=last_steps(steps))

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
