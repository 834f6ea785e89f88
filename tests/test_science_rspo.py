"""RSPO: its expected gradient against Pass@k and Max@k in closed form; an optimum of its own, reached by descent."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from science import D, close, descend, gradient, moments, problem, t

import qempo_fast as qf

LOGPS = problem(4, seed=2).ref


def max_at_k(rewards: torch.Tensor, k: int, logps: torch.Tensor) -> torch.Tensor:
    """E of the best of k draws from the distribution function: sum over values v of v (F(v)^k - F(v-)^k)."""
    total, below = torch.zeros((), dtype=D), torch.zeros((), dtype=D)
    for value in rewards.unique():
        upto = logps.exp()[rewards <= value].sum()
        total, below = total + value * (upto**k - below**k), upto
    return total


# (k, n): the least group, one to spare, k = n = 1 draw, many to spare.
SIZES = pytest.mark.parametrize(("k", "n"), [(1, 2), (2, 2), (2, 4), (3, 4), (4, 4), (3, 6), (5, 6)])


@SIZES
@pytest.mark.parametrize("shift", [0.0, -7.0])
def test_max_at_k(k: int, n: int, shift: float) -> None:
    """Rewards with a tie, then all negative: the weights are differences, so a constant changes nothing."""
    rewards = t(0.3, 2.0, 0.3, -1.0) + shift
    mean, _ = moments(lambda x, y: qf.rspo_loss(x, rewards[y], k=k, group_size=n), LOGPS, n)
    close(mean, -gradient(lambda lp: max_at_k(rewards, k, lp), LOGPS), 1e-13)


@SIZES
def test_pass_at_k(k: int, n: int) -> None:
    """grad J = E[k (1 - p)^(k - 1) r grad l], p the chance of one right answer."""
    rewards = t(1.0, 0.0, 1.0, 0.0)
    p = LOGPS.exp()
    right = float((p * rewards).sum())
    want = k * (1 - right) ** (k - 1) * p * (rewards - right)
    mean, _ = moments(lambda x, y: qf.rspo_loss(x, rewards[y], k=k, group_size=n), LOGPS, n)
    close(mean, -want, 1e-13)


# Three kinds of prompt that the policy cannot tell apart; answer j is right for kind j.
SHARES = t(0.4, 0.35, 0.25)


@pytest.mark.parametrize(("k", "n"), [(2, 3), (3, 3), (4, 5), (8, 8)])
def test_optimum_over_prompts_that_look_alike(k: int, n: int) -> None:
    """J = 1 - sum_j w_j (1 - p_j)^k, so 1 - p_j ~ w_j^(-1 / (k - 1)): more tries, more even."""
    odds = SHARES ** (-1 / (k - 1))
    want = 1 - 2 * odds / odds.sum()
    rewards = torch.eye(3, dtype=D)

    def step(logps: torch.Tensor) -> torch.Tensor:
        parts = [moments(lambda x, y, r=r: qf.rspo_loss(x, r[y], k=k, group_size=n), logps, n)[0] for r in rewards]
        return (SHARES[:, None] * torch.stack(parts)).sum(0)

    # J's curvature falls like the chance that k tries all fail.
    rate = 2.0 / float((SHARES * (1 - want) ** (k - 2)).sum() * k)
    found = descend(step, t(0.0, 1.0, 0.0), rate=rate, steps=1500, tol=1e-11)
    close(found.exp(), want, 1e-8)


def test_one_try_goes_to_the_commonest() -> None:
    """k = 1, the mean reward, has no such balance: its best policy answers with the commonest alone."""
    rewards = torch.eye(3, dtype=D)

    def step(logps: torch.Tensor) -> torch.Tensor:
        parts = [moments(lambda x, y, r=r: qf.rspo_loss(x, r[y], k=1, group_size=2), logps, 2)[0] for r in rewards]
        return (SHARES[:, None] * torch.stack(parts)).sum(0)

    found = descend(step, torch.zeros(3, dtype=D), rate=20.0, steps=1000)
    assert float(found.exp()[0]) > 0.999


def test_no_hitchhiking() -> None:
    """A sample that is best of no k-subset has weight 0 exactly, and weights rise with the reward."""
    rewards = t(0.1, 0.9, 0.4, 0.4, -2.0, 3.0)
    for k in range(2, 7):
        _, coef = qf.coefficients(qf.rspo_loss, torch.full((6,), -1.0, dtype=D), rewards, k=k, group_size=6)
        ordered = -coef[rewards.argsort()]
        assert bool((ordered[: k - 1] == 0).all())
        assert all(low <= high for low, high in pairwise(ordered.tolist()))
    # k = n: only the best, by how much it beats the second.
    close(coef, t(0, 0, 0, 0, 0, -2.1), 1e-14)
