"""The experiments: what is trained and measured for one seed, and the directions that the papers claim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import qempo_fast as qf

from ..demo.evaluate import Evaluation
from ..demo.run import FULL
from ..demo.train import Batch, Settings, make_constraint
from .claims import Claim, Columns, Rows, best_at, compare
from .lab import Lab

# The same slack in quality that the demo's constraint has; a quality near 0.98 has a standard error of 0.007.
QUALITY_MARGIN = FULL.quality_margin
# KL-RLHF's coefficient, and SPL's beta: one answer right or wrong is worth 50 nats.
BETA = 0.02
# Of alpha to beta. SPL at a ratio T is the RLHF optimum at the sequence temperature T. Above 2 a right answer is worth
# under 25 nats of entropy, and 6 tokens hold 65: the optimum is then text that earns nothing.
SPL_RATIOS = (1.5, 2.0)
TEMPERATURES = (1.1, 1.2, 1.35, 1.5, 2.0)
PASS_K = 4
MEAN, RSPO = "mean reward", f"RSPO, k = {PASS_K}"
# International arrivals of 2019 in millions (UNWTO), the ten first: how likely a traveller wants each country.
ARRIVALS = {
    **{"FR": 90.9, "ES": 83.5, "US": 79.4, "CN": 65.7, "IT": 64.5},
    **{"TR": 51.2, "MX": 45.0, "TH": 39.9, "DE": 39.6, "GB": 39.4},
}
WANTED = {country: n / sum(ARRIVALS.values()) for country, n in ARRIVALS.items()}


def settings(name: str, quick: bool) -> Settings:
    """The demo's settings, but for the task whose rewards are rare."""
    full = replace(FULL, samples=64) if name == "rspo-passk" else FULL
    return replace(full, steps=20, samples=FULL.samples, evaluation_batches=2) if quick else full


def rlhf(lab: Lab) -> Callable[[Batch], torch.Tensor]:
    """KL-regularised reward, E[r] - BETA KL(pi || pi_ref): the family at alpha = beta."""
    return spl(lab, 1.0)


def spl(lab: Lab, ratio: float) -> Callable[[Batch], torch.Tensor]:
    def loss(batch: Batch) -> torch.Tensor:
        return qf.spl_loss(
            batch.scores.logps,
            batch.reference,
            batch.rewards,
            alpha=ratio * BETA,
            beta=BETA,
            group_size=lab.settings.group_size,
        )

    return loss


# ---- DQO against GRPO


def _dqo_seed(lab: Lab, seed: int) -> None:
    lab.measure("base", lab.model.reference, seed)
    for method, title in (("grpo", "GRPO"), ("grpo+dqo", "GRPO + DQO")):
        lab.measure(title, lab.train(title, method, seed), seed)


def _dqo_claims(rows: Rows) -> list[Claim]:
    pair = ("GRPO + DQO", "GRPO")
    return [
        compare("DQO names more distinct cities in 100 answers than GRPO", rows, "distinct", *pair),
        compare("DQO's answers lie further apart (cosine distance)", rows, "cosine", *pair),
        compare("DQO's quality is not below GRPO's", rows, "quality", *pair, margin=QUALITY_MARGIN),
    ]


# ---- SPL against a token temperature


def _spl_seed(lab: Lab, seed: int) -> None:
    policy = lab.train("RLHF", rlhf(lab), seed)
    lab.measure("RLHF", policy, seed)
    for temperature in TEMPERATURES:
        lab.measure(_warm(temperature), policy, seed, temperature=temperature)
    for ratio in SPL_RATIOS:
        lab.measure(_soft(ratio), lab.train(_soft(ratio), spl(lab, ratio), seed), seed)


def _warm(temperature: float) -> str:
    return f"RLHF at temperature {temperature:g}"


def _soft(ratio: float) -> str:
    return f"SPL, alpha / beta = {ratio:g}"


def _spl_claims(rows: Rows) -> list[Claim]:
    found = []
    for figure, what in (("distinct", "distinct cities"), ("cosine", "cosine distance")):
        for ratio in SPL_RATIOS:
            soft = rows[_soft(ratio)]
            differences = []
            for i, (quality, diversity) in enumerate(zip(soft["quality"], soft[figure], strict=True)):
                warm = [rows["RLHF"], *(rows[_warm(t)] for t in TEMPERATURES)]
                curve = [(row["quality"][i], row[figure][i]) for row in warm]
                differences.append(diversity - best_at(curve, quality))
            text = f"SPL at {ratio:g}: more {what} than RLHF at any token temperature with its quality"
            found.append(Claim(text, "paper", tuple(differences)))
    return found


# ---- RSPO against the mean reward


def _travellers(seed: int, groups: int) -> Callable[[Batch], torch.Tensor]:
    """Rewards of a batch: each group of answers is for one traveller, whose country the model is not told."""
    generator = torch.Generator().manual_seed(seed)
    countries, weights = list(WANTED), torch.tensor(list(WANTED.values()), dtype=torch.float32, device="cpu")

    def rewards(batch: Batch) -> torch.Tensor:
        drawn = torch.multinomial(weights, groups, replacement=True, generator=generator).tolist()
        per_group = len(batch.answers) // groups
        wanted = [countries[g] for g in drawn for _ in range(per_group)]
        hits = [a.city is not None and a.city.country == w for a, w in zip(batch.answers, wanted, strict=True)]
        return torch.tensor(hits, dtype=torch.float32, device="cpu")

    return rewards


def pass_wanted(seen: Evaluation, k: int) -> float:
    """Chance that k answers hold a city in a traveller's country, over the travellers of WANTED."""
    by_country = Counter(a.city.country for a in seen.answers if a.city)
    hits = torch.tensor([by_country[c] for c in WANTED], dtype=torch.int64, device="cpu")
    weights = torch.tensor(list(WANTED.values()), dtype=torch.float64, device="cpu")
    return float(weights @ qf.metrics.pass_at_k(len(seen.answers), hits, k))


def _rspo_seed(lab: Lab, seed: int) -> None:
    size = lab.settings.group_size

    def loss_of(method: str) -> Callable[[Batch], torch.Tensor]:
        # The same travellers for every method.
        wanted = _travellers(seed, lab.settings.samples // size)

        def loss(batch: Batch) -> torch.Tensor:
            rewards, token_logps = wanted(batch), batch.scores.token_logps
            if method == "GRPO":
                advantages = qf.group_advantages(rewards, group_size=size)
                return qf.grpo_loss(token_logps, token_logps.detach(), advantages, batch.rollout.cu_seqlens)
            return qf.rspo_loss(batch.scores.logps, rewards, k=1 if method == MEAN else PASS_K, group_size=size)

        return loss

    policies = {"base": lab.model.reference}
    for title in ("GRPO", MEAN, RSPO):
        policies[title] = lab.train(title, loss_of(title), seed)
    for title, policy in policies.items():
        seen = lab.measure(title, policy, seed)
        lab.record(title, **{f"pass{n}": pass_wanted(seen, n) for n in (1, PASS_K, 16)})


def _rspo_claims(rows: Rows) -> list[Claim]:
    figure = f"pass{PASS_K}"
    return [
        compare(f"RSPO's pass@{PASS_K} is above GRPO's", rows, figure, RSPO, "GRPO"),
        compare(f"RSPO's pass@{PASS_K} is above that of the mean reward", rows, figure, RSPO, MEAN),
        compare("GRPO's pass@1 is not below RSPO's", rows, "pass1", "GRPO", RSPO, source="derived", margin=0.0),
    ]


# ---- QEMPO against RLHF


def _qempo_seed(lab: Lab, seed: int) -> None:
    seen = lab.measure("RLHF", lab.train("RLHF", rlhf(lab), seed), seed)
    # The paper sets R and K to what RLHF reached. Without K mu stays at 0, and that is QEMPO.
    for title, max_kl in (("QEMPO-KL", max(seen.kl, 0.0)), ("QEMPO", None)):
        constraint = make_constraint(
            "qempo-kl",
            lab.settings,
            min_reward=seen.quality - QUALITY_MARGIN,
            max_kl=max_kl,
            vocabulary=lab.model.head.shape[0],
        )
        policy = lab.train(title, "qempo-kl", seed, constraint)
        lab.measure(title, policy, seed, lam=float(constraint.lam), mu=float(constraint.mu))


def _qempo_claims(rows: Rows) -> list[Claim]:
    return [
        compare("QEMPO's entropy is above RLHF's", rows, "entropy", "QEMPO", "RLHF"),
        compare("QEMPO-KL's entropy is above RLHF's", rows, "entropy", "QEMPO-KL", "RLHF"),
        compare("QEMPO's entropy is not below QEMPO-KL's", rows, "entropy", "QEMPO", "QEMPO-KL", margin=0.0),
        compare("QEMPO's quality is not below RLHF's", rows, "quality", "QEMPO", "RLHF", margin=QUALITY_MARGIN),
        compare("QEMPO-KL's quality is not below RLHF's", rows, "quality", "QEMPO-KL", "RLHF", margin=QUALITY_MARGIN),
    ]


@dataclass(frozen=True)
class Experiment:
    each_seed: Callable[[Lab, int], None]
    claims: Callable[[Rows], list[Claim]]


RUN = {
    "dqo-cities": Experiment(_dqo_seed, _dqo_claims),
    "spl-temperature": Experiment(_spl_seed, _spl_claims),
    "rspo-passk": Experiment(_rspo_seed, _rspo_claims),
    "qempo-entropy": Experiment(_qempo_seed, _qempo_claims),
}

_QUALITY: Columns = (("quality", "quality", 3), ("distinct", "cities in 100", 1))
_REST: Columns = (("top_share", "top", 2), ("entropy", "nats", 2))
COLUMNS: dict[str, Columns] = {
    "dqo-cities": (*_QUALITY, *_REST, ("cosine", "cosine distance", 3)),
    "spl-temperature": (*_QUALITY, ("entropy", "nats", 2), ("cosine", "cosine distance", 3)),
    "rspo-passk": (
        *(("pass1", "pass@1", 3), (f"pass{PASS_K}", f"pass@{PASS_K}", 3), ("pass16", "pass@16", 3)),
        *_QUALITY,
        ("entropy", "nats", 2),
    ),
    "qempo-entropy": (*_QUALITY, ("entropy", "nats", 2), ("kl", "KL to base", 2), ("lam", "lam", 0), ("mu", "mu", 2)),
}
