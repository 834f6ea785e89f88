"""Samples of another policy: which losses keep their optimum, and which only look as if they did."""

from __future__ import annotations

import pytest
import torch
from science import close, descend_groups, gradient, moments, problem, t

import qempo_fast as qf

CASE = problem(5)
SAMPLERS = {
    "even": t(0.2, 0.2, 0.2, 0.2, 0.2),
    "the reference": CASE.ref.exp(),
    # Rarely draws what the optimum wants most (the best response has 0.05).
    "against": torch.softmax(-1.2 * CASE.rewards, 0),
}


def optimum(alpha: float, beta: float) -> torch.Tensor:
    return torch.log_softmax((CASE.rewards + beta * CASE.ref) / alpha, 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("k", [2, 3])
def test_gvpo(sampler: str, k: int) -> None:
    found = descend_groups(
        lambda x, y: qf.gvpo_loss(x, CASE.ref[y], CASE.rewards[y], beta=0.5, group_size=k),
        torch.zeros_like(CASE.ref),
        k,
        rate=0.7 / 0.25,
        sampler=SAMPLERS[sampler],
    )
    close(found, optimum(0.5, 0.5), 1e-9)


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.35), (0.4, 0.9), (0.4, 0.0)], ids=["kl", "sharper", "qempo"])
def test_variance(alpha: float, beta: float) -> None:
    found = descend_groups(
        lambda x, y: qf.variance_loss(x, CASE.ref[y], CASE.rewards[y], alpha=alpha, beta=beta, group_size=2),
        torch.zeros_like(CASE.ref),
        2,
        rate=0.7 / alpha**2,
        sampler=SAMPLERS["against"],
    )
    close(found, optimum(alpha, beta), 1e-9)


def spl(baseline: str, k: int = 2):  # type: ignore[no-untyped-def]
    return lambda x, y: qf.spl_loss(
        x, CASE.ref[y], CASE.rewards[y], alpha=0.6, beta=0.35, baseline=baseline, group_size=k
    )


def test_the_online_loss_is_not_the_objectives_gradient() -> None:
    """Off-policy its expected gradient is q (S - E_q S), not p (S - E_p S): another direction, not only size."""
    logps, q = CASE.ref, SAMPLERS["against"]
    shaped = CASE.rewards - 0.6 * logps + 0.35 * CASE.ref
    got = moments(spl("loo"), logps, 2, q)[0]
    close(got, -q * (shaped - (q * shaped).sum()), 1e-14)
    want = -gradient(lambda lp: (lp.exp() * (CASE.rewards - 0.6 * lp + 0.35 * CASE.ref)).sum(), logps)
    close(moments(spl("loo"), logps, 2)[0], want, 1e-14)
    cosine = torch.nn.functional.cosine_similarity(got, want, dim=0)
    assert float(cosine) < 0.95


def test_without_a_baseline_the_online_loss_goes_elsewhere() -> None:
    """Its fixed point is q S = p E_q S, which is not S = const."""
    q = SAMPLERS["the reference"]
    target = optimum(0.6, 0.35)
    assert float(moments(spl("none"), target, 2, q)[0].abs().max()) > 0.05
    assert float(moments(spl("none"), target, 2)[0].abs().max()) < 1e-15
    found = descend_groups(spl("none"), CASE.ref, 2, rate=0.1, steps=3000, sampler=q)
    assert float((found - target).exp().sub(1).abs().max()) > 0.2


@pytest.mark.parametrize("baseline", ["loo", "mean"])
def test_with_a_group_baseline_it_is_the_variance_loss(baseline: str) -> None:
    """Centred on its own group, its coefficients are the variance loss's over alpha, so for any sampler it stops
    at the same optimum. That holds for S_i from the present log-probs alone, as the public losses take it."""
    q = SAMPLERS["against"]
    found = descend_groups(spl(baseline), torch.zeros_like(CASE.ref), 2, rate=0.7 / 0.6, sampler=q)
    close(found, optimum(0.6, 0.35), 1e-9)


def test_stale_coefficients_move_the_fixed_point() -> None:
    """S_i at the sampler's log-probs instead: the loss becomes a plain policy gradient, and nothing stops it."""
    q = SAMPLERS["the reference"]
    old = q.log()

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # The shaped reward frozen at the old log-probs, as if rewards had been prepared once.
        return qf.rspo_loss(x, CASE.rewards[y] - 0.6 * old[y] + 0.35 * CASE.ref[y], k=1, group_size=2)

    found = descend_groups(loss, CASE.ref, 2, rate=0.2, steps=300, sampler=q)
    assert float(moments(loss, optimum(0.6, 0.35), 2, q)[0].abs().max()) > 0.05
    assert float(found.exp().max()) > 0.999
