"""Methods that are special cases of others: equal losses and equal coefficients, at ordinary and extreme sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from science import D

import qempo_fast as qf

OFFSETS = torch.tensor([0, 2, 7, 12])
SIZES = torch.tensor([2, 5, 5])
# Sizes of (log-probs, rewards, alpha and beta); responses of 1e4 tokens have |l| of 1e5.
SCALES = {
    "plain": (20.0, 1.0, 1.0),
    "long": (1e5, 1.0, 1.0),
    "tiny rewards": (20.0, 1e-8, 1.0),
    "huge rewards": (20.0, 1e8, 1.0),
    "small beta": (1e3, 1.0, 1e-4),
}


def draw(*shape: int, scale: float, seed: int) -> torch.Tensor:
    return -scale * torch.rand(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def same(left: Callable[..., torch.Tensor], right: Callable[..., torch.Tensor], logps: Any, factor: Any = 1.0) -> None:
    """left = right in loss where factor is 1, and left's coefficients = factor times right's."""
    loss, coef = qf.coefficients(left, logps)
    want, truth = qf.coefficients(right, logps)
    if isinstance(factor, float) and factor == 1.0:
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-300)
    for got, expected in zip(*((c,) if isinstance(c, torch.Tensor) else c for c in (coef, truth)), strict=True):
        scaled = factor * expected
        assert float(scaled.abs().max()) > 0.0
        torch.testing.assert_close(got, scaled, rtol=1e-11, atol=1e-12 * float(scaled.abs().max()))


@pytest.mark.parametrize("size", SCALES)
def test_pairs(size: str) -> None:
    spread, _, unit = SCALES[size]
    w, x, fw, fx = draw(4, 9, scale=spread, seed=1)
    a, b = 0.3 * unit, 0.2 * unit
    same(
        lambda p, q: qf.spl_pair_loss(p, q, fw, fx, alpha=b, beta=b),
        lambda p, q: qf.dpo_loss(p, q, fw, fx, beta=b),
        (w, x),
    )
    same(
        lambda p, q: qf.hdpo_loss(p, q, fw, fx, alpha=1.0, beta=b),
        lambda p, q: qf.dpo_loss(p, q, fw, fx, beta=b),
        (w, x),
    )
    same(
        lambda p, q: qf.hdpo_loss(p, q, fw, fx, alpha=1.5, beta=b),
        lambda p, q: qf.spl_pair_loss(p, q, fw, fx, alpha=1.5 * b, beta=b),
        (w, x),
    )
    same(
        lambda p, q: qf.qempo_kl_pair_loss(p, q, fw, fx, lam=1 / a, mu=0.0),
        lambda p, q: qf.qempo_pair_loss(p, q, lam=1 / a),
        (w, x),
    )
    # lam = 1 / (alpha - beta), mu = beta / (alpha - beta), as smoothed too.
    same(
        lambda p, q: qf.qempo_kl_pair_loss(p, q, fw, fx, lam=1 / (a - b), mu=b / (a - b), label_smoothing=0.1),
        lambda p, q: qf.spl_pair_loss(p, q, fw, fx, alpha=a, beta=b, label_smoothing=0.1),
        (w, x),
    )
    none = w.new_zeros(9, 0)
    same(
        lambda p, q: qf.epa_loss(p, q[:, None], none, fw, fx[:, None], none, beta=b),
        lambda p, q: qf.dpo_loss(p, q, fw, fx, beta=b),
        (w, x),
    )


@pytest.mark.parametrize("size", SCALES)
@pytest.mark.parametrize("layout", [{"group_size": 4}, {"offsets": OFFSETS}], ids=["equal", "ragged"])
def test_groups(size: str, layout: dict[str, Any]) -> None:
    spread, reward, unit = SCALES[size]
    lp, f = draw(2, 12, scale=spread, seed=2)
    r = draw(12, scale=reward, seed=3)
    a, b = 0.3 * unit, 0.2 * unit
    same(
        lambda x: qf.variance_loss(x, f, r, alpha=b, beta=b, **layout),
        lambda x: qf.gvpo_loss(x, f, r, beta=b, **layout),
        lp,
    )
    same(
        lambda x: qf.qempo_kl_loss(x, f, r, lam=1 / a, mu=0.0, **layout),
        lambda x: qf.qempo_loss(x, r, lam=1 / a, **layout),
        lp,
    )
    same(
        lambda x: qf.qempo_kl_loss(x, f, r, lam=1 / (a - b), mu=b / (a - b), **layout),
        lambda x: qf.spl_loss(x, f, r, alpha=a, beta=b, **layout),
        lp,
    )
    # Each sample's own group: loo is mean times k / (k - 1), and the variance loss averages over groups, not samples.
    k = SIZES.repeat_interleave(SIZES).to(D) if "offsets" in layout else torch.full((12,), 4, dtype=D)
    same(
        lambda x: qf.spl_loss(x, f, r, alpha=a, beta=b, **layout),
        lambda x: qf.spl_loss(x, f, r, alpha=a, beta=b, baseline="mean", **layout),
        lp,
        k / (k - 1),
    )
    same(
        lambda x: qf.spl_loss(x, f, r, alpha=a, beta=b, **layout),
        lambda x: qf.variance_loss(x, f, r, alpha=a, beta=b, **layout),
        lp,
        k * 3 / (12 * a),
    )


@pytest.mark.parametrize("layout", [{"group_size": 6}, {"offsets": torch.tensor([0, 4, 12])}], ids=["equal", "ragged"])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_max_at_k_of_right_and_wrong_is_pass_at_k(k: int, layout: dict[str, Any]) -> None:
    """w_i = r_i C(n - c, k - 1) / C(n - 1, k - 1), whatever numbers stand for wrong and right."""
    right = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0], dtype=D)
    groups = right.split(6) if "group_size" in layout else right.split([4, 8])
    want = torch.cat([g * math.comb(len(g) - int(g.sum()), k - 1) / math.comb(len(g) - 1, k - 1) for g in groups])
    logps = draw(12, scale=20.0, seed=4)
    for low, high in ((0.0, 1.0), (-3.0, 5.0), (0.0, 1e-8)):
        _, coef = qf.coefficients(qf.rspo_loss, logps, low + (high - low) * right, k=k, **layout)
        torch.testing.assert_close(coef, -k / 12 * (high - low) * want, rtol=1e-12, atol=0)


def test_dqo_without_diversity_is_kl_rlhf() -> None:
    lp, f = draw(2, 12, scale=20.0, seed=5)
    r, rows = draw(12, scale=1.0, seed=6), draw(12, 3, scale=1.0, seed=7)
    same(
        lambda x: qf.dqo_loss(x, r, rows, alpha=0.0, ref_logps=f, beta=0.2, offsets=OFFSETS),
        lambda x: qf.spl_loss(x, f, r, alpha=0.2, beta=0.2, offsets=OFFSETS),
        lp,
    )


def test_on_policy_policy_gradients_are_one() -> None:
    """At ratio 1: Dr.GRPO over lengths T and T_max is QEMPO's limit lam = inf, mean-centred, over T_max."""
    token_logps = draw(12, scale=2.0, seed=8)
    cu, rewards = torch.tensor([0, 3, 5, 9, 12]), draw(4, scale=1.0, seed=9)
    advantages = qf.group_advantages(rewards, group_size=2, scale="none", baseline="mean")
    _, coef = qf.coefficients(qf.grpo_loss, token_logps, token_logps, advantages, cu, normalize=7.0)
    sums = qf.segment_sum(token_logps, cu)
    _, sequence = qf.coefficients(qf.rspo_loss, sums, rewards, k=1, baseline="mean", group_size=2)
    torch.testing.assert_close(coef, (sequence / 7.0).repeat_interleave(cu.diff()), rtol=1e-13, atol=0)
    # GSPO, whose ratio is the sequence's, has GRPO's coefficients there.
    one = qf.coefficients(qf.grpo_loss, token_logps, token_logps, advantages, cu)[1]
    two = qf.coefficients(qf.grpo_loss, token_logps, token_logps, advantages, cu, ratio="sequence")[1]
    torch.testing.assert_close(two, one, rtol=1e-13, atol=0)
