"""DQO: unbiased with every baseline, its two-draw optimum in closed form, and what centring the gains destroys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from science import D, Problem, close, descend_groups, every_group, gradient, moments, over_groups, problem, t

import qempo_fast as qf

BASELINES = pytest.mark.parametrize("baseline", ["loo", "reward", "none"])
# Cosines from -0.3 to 0.7: answers that resemble each other more and less.
ROWS = torch.tensor([[1, 0.3, 0, 0], [0.5, 1, 0, 0], [0, 0.2, 1, 0.1], [0, 0, -0.4, 1]], dtype=D)
CASE = Problem(t(0.02, 0.0, 0.03, 0.01), problem(4, seed=4).ref)
START = torch.log_softmax(t(0.5, 0.0, -0.5, 0.2), 0)


def loss(k: int, baseline: str, *, alpha: float = 1.0, beta: float = 0.0, rows: torch.Tensor = ROWS) -> Callable:
    return lambda x, y: qf.dqo_loss(
        x, CASE.rewards[y], rows[y], alpha=alpha, ref_logps=CASE.ref[y], beta=beta, baseline=baseline, group_size=k
    )


def log_dets(k: int, rows: torch.Tensor = ROWS) -> torch.Tensor:
    """log det(L + I) of every group, straight from its Gram matrix; a zero row stays zero."""
    unit = torch.nn.functional.normalize(rows, dim=1)[every_group(4, k)]
    return torch.logdet(unit @ unit.mT + torch.eye(k, dtype=D))


@BASELINES
@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("rows", [ROWS, torch.cat([ROWS[:3], 0 * ROWS[3:]])], ids=["rows", "zero row"])
def test_unbiased(baseline: str, k: int, rows: torch.Tensor) -> None:
    """Four outcomes, with KL: -(1/k) grad of E[sum r + alpha log det(L + I)] - beta k KL."""
    alpha, beta = 1.7, 0.3
    mean, _ = moments(loss(k, baseline, alpha=alpha, beta=beta, rows=rows), START, k)
    value = over_groups(CASE.rewards[every_group(4, k)].sum(1) + alpha * log_dets(k, rows), 4, k)
    want = gradient(lambda lp: value(lp) - beta * k * (lp.exp() * (lp - CASE.ref)).sum(), START)
    close(mean, -want / k, 1e-13)


@BASELINES
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_optimum_of_two_draws(baseline: str, alpha: float) -> None:
    """k = 2: J = 2 p.r + alpha p.M p with M_yz = log(4 - cos^2), so M p = const - r / alpha, a linear system."""
    unit = torch.nn.functional.normalize(ROWS, dim=1)
    matrix = torch.log(4 - (unit @ unit.T).square())
    ones = torch.ones(4, dtype=D)
    a, b = torch.linalg.solve(matrix, torch.stack([ones, CASE.rewards / alpha], 1)).T
    want = a * (1 + b.sum()) / a.sum() - b
    assert float(want.min()) > 0.01
    found = descend_groups(loss(2, baseline, alpha=alpha), START, 2, rate=2 / alpha, steps=3000)
    close(found.exp(), want, 1e-8)


@BASELINES
def test_duplicates_count_once(baseline: str) -> None:
    """Two equal answers and two apart, equal rewards: a third for each of the three that differ."""
    rows = torch.eye(3, dtype=D)[torch.tensor([0, 0, 1, 2])]
    zero = torch.zeros(4, dtype=D)
    found = descend_groups(
        lambda x, y: qf.dqo_loss(x, zero[y], rows[y], baseline=baseline, group_size=2), START, 2, rate=2.0, steps=500
    )
    close(torch.stack([found[:2].exp().sum(), *found[2:].exp()]), torch.full((3,), 1 / 3, dtype=D), 1e-9)


@BASELINES
def test_orthogonal_answers_by_hand(baseline: str) -> None:
    """Orthogonal rows: p = 1/n + (r - mean r) / (alpha log(4/3)), a linear, not an exponential, trade."""
    rewards, alpha = t(0.06, 0.0, -0.02, 0.02), 0.8
    rows = torch.eye(4, dtype=D)
    found = descend_groups(
        lambda x, y: qf.dqo_loss(x, rewards[y], rows[y], alpha=alpha, baseline=baseline, group_size=2),
        START,
        2,
        rate=2 / alpha,
        steps=3000,
    )
    want = 0.25 + (rewards - rewards.mean()) / (alpha * torch.log(t(4 / 3)))
    close(found.exp(), want, 1e-8)


@pytest.mark.parametrize(
    ("k", "gains_alone", "with_rewards"), [(2, 0.188, 0.806), (3, 0.419, 0.923), (4, 0.508, 0.943)]
)
def test_variance_over_random_problems(k: int, gains_alone: float, with_rewards: float) -> None:
    """The geometric mean, over 60 problems, of the variance with "loo" over that with "reward".

    It saves variance on average and not always: b_i is unbiased, not the best baseline.
    """
    rng = torch.Generator().manual_seed(k)
    shares = torch.zeros(2, 60, dtype=D)
    for i in range(60):
        rows, logps = torch.randn(4, 3, dtype=D, generator=rng), torch.randn(4, dtype=D, generator=rng).log_softmax(0)
        rewards = torch.randn(4, dtype=D, generator=rng)
        for j, r in enumerate((0 * rewards, rewards)):
            loo, raw = (
                moments(lambda x, y, b=b, r=r, e=rows: qf.dqo_loss(x, r[y], e[y], baseline=b, group_size=k), logps, k)[
                    1
                ]
                for b in ("loo", "reward")
            )
            shares[j, i] = loo / raw
    means = shares.log().mean(1).exp().tolist()
    assert means == pytest.approx([gains_alone, with_rewards], abs=0.005)
    assert float(shares.max()) > 1.0


def centred(k: int, alpha: float = 1.0) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What GRPO stacked on r + alpha g would do: the bonus centred on its group."""

    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gains = qf.dpp_gains(ROWS[y].reshape(-1, k, 4)).gains.flatten()
        bonus = CASE.rewards[y] + alpha * gains
        return -(qf.group_advantages(bonus, group_size=k, scale="none", baseline="loo") * x).mean()

    return run


def test_centred_gains_of_two_draws_are_nothing() -> None:
    """g_1 = g_2 always: the policy ends where the rewards alone send it, all mass on one answer."""
    reward_only = moments(lambda x, y: qf.rspo_loss(x, CASE.rewards[y], k=1, group_size=2), START, 2)[0]
    close(moments(centred(2), START, 2)[0], reward_only, 1e-15)
    found = descend_groups(centred(2), START, 2, rate=5.0, steps=1500)
    assert float(found.exp().max()) > 0.999


@pytest.mark.parametrize("k", [2, 3, 4])
def test_centred_gains_are_those_of_a_smaller_group(k: int) -> None:
    """g_i - g_j = log det(S without j) - log det(S without i), and the last is free of y_i: centring the gains on the
    others gives, exactly, the gradient for groups of k - 1. So nothing at k = 2, and a bias that shrinks as k grows.
    """

    def exact(size: int) -> torch.Tensor:
        value = CASE.rewards[every_group(4, size)].sum(1)
        if size > 1:
            value = value + log_dets(size)
        return -gradient(over_groups(value, 4, size), START) / size

    got = moments(centred(k), START, k)[0]
    close(got, exact(k - 1), 1e-14)
    error = float((got - exact(k)).norm() / exact(k).norm())
    assert error > {2: 0.5, 3: 0.1, 4: 0.02}[k]
