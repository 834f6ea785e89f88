"""The (alpha, beta) family: on-policy descent of each online loss reaches the method's closed-form optimum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from science import Problem, close, descend_groups, descend_pairs, entropy, kl, problem, t

import qempo_fast as qf

FIVE = problem(5)
# Twelve nats between the best and the worst: the optimum is sharp, and gives some responses 1e-6.
WIDE = problem(4, seed=3, spread=4.0)
Call = Callable[..., torch.Tensor]


def optimum(case: Problem, alpha: float, beta: float) -> torch.Tensor:
    """log pi* written out here, apart from the library: beta / alpha log pi_ref + r / alpha - log Z."""
    return torch.log_softmax((case.rewards + beta * case.ref) / alpha, 0)


# name: (alpha, beta, loss(log-probs, responses, problem, k)), each with why it is here.
ONLINE: dict[str, tuple[float, float, Call]] = {
    # KL-RLHF.
    "rlhf": (0.5, 0.5, lambda x, y, c, k: qf.spl_loss(x, c.ref[y], c.rewards[y], alpha=0.5, beta=0.5, group_size=k)),
    # The ratios that the SPL paper tries, least and greatest.
    "spl 1.1": (
        0.55,
        0.5,
        lambda x, y, c, k: qf.spl_loss(x, c.ref[y], c.rewards[y], alpha=0.55, beta=0.5, group_size=k),
    ),
    "spl 11": (2.2, 0.2, lambda x, y, c, k: qf.spl_loss(x, c.ref[y], c.rewards[y], alpha=2.2, beta=0.2, group_size=k)),
    # beta > alpha: the reference is sharpened, which no QEMPO-KL does.
    "spl, beta > alpha": (
        0.4,
        0.9,
        lambda x, y, c, k: qf.spl_loss(x, c.ref[y], c.rewards[y], alpha=0.4, beta=0.9, group_size=k),
    ),
    "qempo": (0.4, 0.0, lambda x, y, c, k: qf.qempo_loss(x, c.rewards[y], lam=2.5, group_size=k)),
    # lam = 1 / (alpha - beta), mu = beta / (alpha - beta).
    "qempo-kl": (
        0.6,
        0.35,
        lambda x, y, c, k: qf.qempo_kl_loss(x, c.ref[y], c.rewards[y], lam=4.0, mu=1.4, group_size=k),
    ),
}


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize(("case", "k"), [(FIVE, 2), (FIVE, 3), (WIDE, 2)], ids=["k2", "k3", "wide"])
def test_online(name: str, case: Problem, k: int) -> None:
    alpha, beta, loss = ONLINE[name]
    # The mean is 1/k of the group's sum, and so is the gradient; Newton's own step would be 1 / alpha.
    found = descend_groups(lambda x, y: loss(x, y, case, k), case.ref, k, rate=0.7 / alpha)
    close(found, optimum(case, alpha, beta), 1e-9)


@pytest.mark.parametrize("baseline", ["mean", "none"])
def test_every_baseline_has_the_same_optimum(baseline: str) -> None:
    found = descend_groups(
        lambda x, y: qf.spl_loss(
            x, FIVE.ref[y], FIVE.rewards[y], alpha=0.6, beta=0.35, baseline=baseline, group_size=2
        ),
        FIVE.ref,
        2,
        rate=0.7 / 0.6,
    )
    close(found, optimum(FIVE, 0.6, 0.35), 1e-9)


def bradley_terry(rewards: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(rewards[:, None] - rewards)


PAIRS: dict[str, tuple[float, float, Call]] = {
    "dpo": (0.5, 0.5, lambda *a, **k: qf.dpo_loss(*a, beta=0.5, **k)),
    "spl 1.1": (0.55, 0.5, lambda *a, **k: qf.spl_pair_loss(*a, alpha=0.55, beta=0.5, **k)),
    "spl 11": (2.2, 0.2, lambda *a, **k: qf.spl_pair_loss(*a, alpha=2.2, beta=0.2, **k)),
    "spl, beta > alpha": (0.4, 0.9, lambda *a, **k: qf.spl_pair_loss(*a, alpha=0.4, beta=0.9, **k)),
    # alpha < 1 sharpens and alpha > 1 flattens: (alpha, beta) = (a b, b).
    "hdpo 0.8": (0.4, 0.5, lambda *a, **k: qf.hdpo_loss(*a, alpha=0.8, beta=0.5, **k)),
    "hdpo 1.5": (0.75, 0.5, lambda *a, **k: qf.hdpo_loss(*a, alpha=1.5, beta=0.5, **k)),
    "qempo": (0.4, 0.0, lambda w, x, _, __, **k: qf.qempo_pair_loss(w, x, lam=2.5, **k)),
    "qempo-kl": (0.6, 0.35, lambda *a, **k: qf.qempo_kl_pair_loss(*a, lam=4.0, mu=1.4, **k)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("sampler", [None, t(0.4, 0.3, 0.15, 0.1, 0.05)], ids=["even", "skewed"])
def test_pairs_with_bradley_terry_labels(name: str, sampler: torch.Tensor | None) -> None:
    """In population form the optimum does not depend on how pairs are drawn, only on who wins."""
    alpha, beta, loss = PAIRS[name]
    found = descend_pairs(loss, FIVE.ref, bradley_terry(FIVE.rewards), rate=4 / alpha**2, sampler=sampler)
    close(found, optimum(FIVE, alpha, beta), 1e-9)


def test_label_smoothing_is_a_share_of_flipped_labels() -> None:
    """Clean labels smoothed by e, and labels flipped with probability e, have one optimum: h = logit of the mixture."""
    ref, p, e, beta = t(0.3, 0.7).log(), 0.8, 0.15, 0.5
    clean = torch.tensor([[0.5, p], [1 - p, 0.5]], dtype=torch.float64)
    flipped = (1 - e) * clean + e * clean.T
    mixed = (1 - e) * p + e * (1 - p)
    log_odds = torch.log(ref.exp()[0] / ref.exp()[1]) + torch.log(t(mixed / (1 - mixed)))[0] / beta
    for preference, smoothing in ((clean, e), (flipped, 0.0)):
        found = descend_pairs(
            lambda *a, s=smoothing, **k: qf.dpo_loss(*a, beta=beta, label_smoothing=s, **k), ref, preference, rate=8.0
        )
        close(found[0] - found[1], log_odds, 1e-10)


def test_held_quality_at_the_solved_multipliers() -> None:
    """Training at solve_qempo's lam and mu ends at its R and K, its entropy, and above KL-RLHF's."""
    # Here rewards and reference disagree, so that the cap binds.
    case = problem(5, seed=5)
    rlhf = optimum(case, 0.5, 0.5).exp()
    floor, cap = float((rlhf * case.rewards).sum()), 1.1 * kl(rlhf, case.ref)
    qempo = qf.solve_qempo(case.rewards, min_reward=floor)
    held = qf.solve_qempo(case.rewards, case.ref, min_reward=floor, max_kl=cap)
    assert qempo.lam > 0
    assert held.mu > 0
    # k = 2 from the uniform policy, not from the reference.
    start = torch.zeros(5, dtype=torch.float64)
    a = descend_groups(
        lambda x, y: qf.qempo_loss(x, case.rewards[y], lam=qempo.lam, group_size=2), start, 2, rate=0.7 * qempo.lam
    ).exp()
    b = descend_groups(
        lambda x, y: qf.qempo_kl_loss(x, case.ref[y], case.rewards[y], lam=held.lam, mu=held.mu, group_size=2),
        start,
        2,
        rate=0.7 * held.lam / (1 + held.mu),
    ).exp()
    for p in (a, b):
        assert abs(float((p * case.rewards).sum()) - floor) < 1e-9
    assert abs(kl(b, case.ref) - cap) < 1e-9
    assert entropy(a) > entropy(b) + 0.01 > entropy(rlhf) + 0.02
