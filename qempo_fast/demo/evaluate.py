"""What a policy recommends: quality, distinct cities, entropy and pass@n over fresh samples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from transformers.models.llama.modeling_llama import LlamaModel

import qempo_fast as qf

from .model import SplitModel
from .task import Answer, Task

BATCH = 100
PASS_AT = (1, 4, 16, 64)


@dataclass(frozen=True)
class Evaluation:
    """Figures over len(answers) fresh samples, drawn in batches of 100."""

    quality: float  # share of answers that are one real city
    distinct: float  # different cities in 100 answers, mean over the batches
    distinct_range: tuple[int, int]
    top_share: float  # share of all answers that name the most frequent city
    entropy: float  # nats an answer: -mean log pi(y), the stop token included
    city_entropy: float | None  # the same over the right answers only; None where there is none
    kl: float  # nats, to the base model
    tokens: float
    pass_at: dict[int, float]
    answers: list[Answer]


@torch.no_grad()
def evaluate(
    model: SplitModel, policy: LlamaModel, task: Task, *, batches: int, seed: int, temperature: float = 1.0
) -> Evaluation:
    """Draw batches x 100 answers, every token at temperature, and measure them."""
    generator = torch.Generator().manual_seed(seed)
    answers: list[Answer] = []
    logps, reference, lengths, distinct = [], [], [], []
    for _ in range(batches):
        rollout = model.sample(policy, BATCH, generator, temperature=temperature)
        batch, _ = task.judge(rollout)
        scores = model.logps(policy, rollout, temperature=temperature)
        answers += batch
        logps.append(scores.logps)
        reference.append(model.logps(model.reference, rollout).logps)
        lengths.append(scores.lengths)
        distinct.append(len({a.city for a in batch if a.city}))
    lp, n = torch.cat(logps), len(answers)
    right = torch.tensor([a.city is not None for a in answers], dtype=torch.bool, device="cpu")
    names = Counter(a.city for a in answers if a.city)
    return Evaluation(
        quality=float(right.double().mean()),
        distinct=sum(distinct) / batches,
        distinct_range=(min(distinct), max(distinct)),
        top_share=names.most_common(1)[0][1] / n if names else 0.0,
        entropy=-float(lp.mean()),
        city_entropy=-float(lp[right].mean()) if names else None,
        kl=float((lp - torch.cat(reference)).mean()),
        tokens=float(torch.cat(lengths).double().mean()),
        pass_at=pass_at(answers, task.cities.targets),
        answers=answers,
    )


def pass_at(answers: list[Answer], targets: dict[str, str]) -> dict[int, float]:
    """Chance that n answers hold a city in the one country a traveller has in mind, mean over the target countries."""
    by_country = Counter(a.city.country for a in answers if a.city)
    hits = torch.tensor([by_country[code] for code in targets], dtype=torch.int64, device="cpu")
    return {n: float(qf.metrics.pass_at_k(len(answers), hits, n).mean()) for n in PASS_AT if n <= len(answers)}
