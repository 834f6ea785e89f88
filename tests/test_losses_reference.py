"""The reference losses themselves: gradcheck, numbers worked by hand, brute force, extreme magnitudes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from qempo_fast.losses import coefficients
from qempo_fast.reference import contrastive, groups, pairs, risk, tokens
from qempo_fast.reference.dqo import dqo_loss

D = torch.float64
OFFSETS = torch.tensor([0, 2, 5, 9])
CU = torch.tensor([0, 3, 3, 4, 9])
_RNG = torch.Generator().manual_seed(1)


def t(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=D)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=D, generator=_RNG)


REWARDS, PHI, OLD, ADVANTAGES = r(9), r(9, 4), r(9), r(4)

# The online loss holds sg(l_i) in its advantage, which finite differences would follow, so it is checked at
# alpha = 0 (its dependence on alpha: golden numbers and enumeration).
GRADCHECK: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "pair": (
        lambda a, b, c, d: pairs.pair_loss(a, b, c, d, alpha=0.7, beta=0.3),
        (r(5), r(5), r(5), r(5)),
    ),
    "pair, smoothed, no reference": (
        lambda a, b: pairs.qempo_pair_loss(a, b, lam=0.7, label_smoothing=0.1, reduction="none"),
        (r(5), r(5)),
    ),
    "variance, ragged": (
        lambda a, b, c: groups.variance_loss(a, b, c, alpha=0.7, beta=0.3, offsets=OFFSETS),
        (r(9), r(9), r(9)),
    ),
    "group, ragged, loo": (
        lambda a, b: groups.group_loss(a, None, b, alpha=0.0, beta=0.0, offsets=OFFSETS),
        (r(9), r(9)),
    ),
    "group, mean": (
        lambda a, b, c: groups.group_loss(a, b, c, alpha=0.0, beta=0.3, group_size=3, baseline="mean"),
        (r(9), r(9), r(9)),
    ),
    "epa": (
        lambda p, s, w, f: contrastive.epa_loss(p, s, w, f, s * 0, w * 0, beta=0.4),
        (r(3), r(3, 2), r(3, 4), r(3)),
    ),
    "poft": (
        lambda a, b: contrastive.poft_loss(a, t(3.0, 5.0, 1.0), b, beta=1.3, gamma=0.2),
        (r(3), r(3, 2)),
    ),
    "rspo, ragged": (lambda a, b: risk.rspo_loss(a, b, k=2, offsets=OFFSETS), (r(9), r(9))),
    "dqo, ragged": (lambda a, b: dqo_loss(a, b, PHI, offsets=OFFSETS), (r(9), r(9))),
    "grpo": (
        lambda a, b: tokens.token_loss(a, OLD, ADVANTAGES, CU, ref_token_logps=b, kl=0.2),
        (OLD + 0.3 * r(9), r(9)),
    ),
    "gspo": (
        lambda a: tokens.grpo_loss(a, OLD, ADVANTAGES, CU, ratio="sequence", normalize="token"),
        (OLD + 0.3 * r(9),),
    ),
    "group_advantages, ragged": (lambda a: groups.group_advantages(a, offsets=OFFSETS), (r(9),)),
}


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name: str) -> None:
    fn, inputs = GRADCHECK[name]
    assert torch.autograd.gradcheck(fn, tuple(x.clone().requires_grad_() for x in inputs))


def test_by_hand() -> None:
    # h = 0.5 * (-1 - -3) - 0.1 * (-2 - -4) = 0.8
    loss = pairs.spl_pair_loss(t(-1.0), t(-3.0), t(-2.0), t(-4.0), alpha=0.5, beta=0.1)
    assert float(loss) == pytest.approx(math.log1p(math.exp(-0.8)), abs=1e-15)
    loss = pairs.spl_pair_loss(t(-1.0), t(-3.0), t(-2.0), t(-4.0), alpha=0.5, beta=0.1, label_smoothing=0.25)
    want = 0.75 * math.log1p(math.exp(-0.8)) + 0.25 * math.log1p(math.exp(0.8))
    assert float(loss) == pytest.approx(want, abs=1e-15)

    # lam = 2: S = (1 + 1, 0 + 2) = (2, 2), so A = 0; with lam = 1, S = (3, 4) and A = (-1, 1) leave-one-out.
    loss, coef = coefficients(groups.qempo_loss, t(-2.0, -4.0), t(1.0, 0.0), lam=2.0, group_size=2)
    assert (float(loss), coef.tolist()) == (0.0, [0.0, 0.0])
    loss, coef = coefficients(groups.qempo_loss, t(-2.0, -4.0), t(1.0, 0.0), lam=1.0, group_size=2)
    assert (float(loss), coef.tolist()) == (1.0, [0.5, -0.5])

    # d = 0.5 l - r = (-2, -2, -2) + (0, 1, 2), centred (-1, 0, 1): 2 / (2 * 2).
    loss = groups.variance_loss(t(-4.0, -2.0, 0.0), None, t(0.0, 0.0, 0.0), alpha=0.5, beta=0.0, group_size=3)
    assert float(loss) == 0.5

    # Max@2 of (0, 1, 3): 0 beats none; 1 beats 0 by 1, half the time; 3 beats 0 by 3 and 1 by 2.
    assert risk.rspo_weights(t(0.0, 1.0, 3.0), k=2, group_size=3).tolist() == [0.0, 0.5, 2.5]

    advantages = groups.group_advantages(t(1.0, 3.0), group_size=2)
    assert advantages.tolist() == pytest.approx([-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4)], abs=1e-15)
    loo = groups.group_advantages(t(1.0, 3.0), group_size=2, scale="none", baseline="loo")
    assert loo.tolist() == [-2.0, 2.0]


def brute_force(rewards: list[float], k: int) -> list[float]:
    out = []
    for i, own in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        gains = [max(own - max(s), 0.0) if s else own for s in itertools.combinations(others, k - 1)]
        out.append(sum(gains) / len(gains))
    return out


@pytest.mark.parametrize("n", [1, 2, 5, 7])
@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_rspo_over_all_subsets(n: int, offset: float) -> None:
    for rewards in (r(n) + offset, r(n).round() + offset, torch.full((n,), 0.7, dtype=D)):
        for k in range(1, n + 1):
            got = risk.rspo_weights(rewards, k=k, group_size=n)
            torch.testing.assert_close(got, t(*brute_force(rewards.tolist(), k)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shift", [-5.0, 5.0])
def test_rspo_ragged_over_all_subsets(shift: float) -> None:
    """Rewards of either sign: the padding of short groups must rank nowhere among them."""
    rewards, offsets = r(12) + shift, torch.tensor([0, 3, 10, 12])
    for k in (1, 2):
        want = [brute_force(part.tolist(), k) for part in rewards.split([3, 7, 2])]
        got = risk.rspo_weights(rewards, k=k, offsets=offsets)
        torch.testing.assert_close(got, t(*itertools.chain(*want)), rtol=1e-13, atol=1e-13)


def test_rspo_large_groups_do_not_overflow() -> None:
    """C(2000, 1000) is 1e600: the recursion forms no binomial."""
    n, k = 2000, 1000
    rewards = r(n)
    weights = risk.rspo_weights(rewards, k=k, group_size=n)
    # Against the binomials themselves, as Python integers.
    ordered, want, total = rewards.sort().values.tolist(), [0.0], 0.0
    for m in range(1, n):
        total += math.comb(m, k - 1) / math.comb(n - 1, k - 1) * (ordered[m] - ordered[m - 1])
        want.append(total)
    torch.testing.assert_close(weights.sort().values, t(*want), rtol=1e-11, atol=0)
    tied = risk.rspo_weights(torch.ones(n, dtype=D), k=k, group_size=n)
    assert (tied == 0).all()


@pytest.mark.parametrize("scale", [1e2, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_probs(scale: float, dtype: torch.dtype) -> None:
    a, b = torch.tensor([-scale, 0.0, -scale], dtype=dtype), torch.tensor([0.0, -scale, -scale], dtype=dtype)
    zero = torch.zeros(3, dtype=dtype)
    loss, (ca, cb) = coefficients(pairs.dpo_loss, (a, b), zero, zero, beta=1.0, reduction="sum")
    assert float(loss) == pytest.approx(scale + math.log(2), rel=1e-6)
    torch.testing.assert_close(ca, torch.tensor([-1.0, 0.0, -0.5], dtype=dtype))
    torch.testing.assert_close(cb, -ca)
    loss, coefs = coefficients(
        contrastive.epa_loss,
        (a, b[:, None], b[:, None]),
        zero,
        zero[:, None],
        zero[:, None],
        beta=1.0,
        reduction="sum",
    )
    assert float(loss) == pytest.approx(scale + math.log(2) + math.log(3), rel=1e-6)
    torch.testing.assert_close(coefs[0], torch.tensor([-1.0, 0.0, -2 / 3], dtype=dtype))
    loss, coef = coefficients(contrastive.poft_loss, a, torch.ones(3, dtype=dtype), zero[:, None], reduction="sum")
    assert float(loss) == pytest.approx(2 * scale + math.log(2), rel=1e-6)
    torch.testing.assert_close(coef, torch.tensor([-1.0, -0.5, -1.0], dtype=dtype))
    for loss_fn in (groups.group_loss, groups.variance_loss):
        loss, coef = coefficients(loss_fn, a, b, zero, alpha=0.1, beta=0.1, group_size=3)
        assert loss.isfinite()
        assert coef.isfinite().all()
        assert abs(float(coef.sum())) < 1e-6 * scale


def test_small_losses_keep_their_digits() -> None:
    """At h = 40 the loss is e^-40: log(sigmoid(h)) and torch's softplus round it to 0 or off by 2e-9."""
    zero = t(0.0)
    for got in (
        pairs.dpo_loss(t(40.0), zero, zero, zero, beta=1.0),
        contrastive.epa_loss(
            t(40.0),
            zero[:, None],
            zero[:0].reshape(1, 0),
            zero,
            zero[:, None],
            zero[:0].reshape(1, 0),
            beta=1.0,
        ),
        contrastive.poft_loss(t(40.0), t(1.0), zero[:, None]),
    ):
        assert float(got) == pytest.approx(math.exp(-40), rel=1e-12)


def test_large_losses_keep_their_digits() -> None:
    """At a margin of 20.5 torch's softplus drops the e^-20.5 = 1.2e-9."""
    zero, none = t(0.0), t(0.0)[:0].reshape(1, 0)
    got = contrastive.epa_loss(t(-20.5), zero[:, None], none, zero, zero[:, None], none, beta=1.0)
    assert float(got) == pytest.approx(20.5 + math.log1p(math.exp(-20.5)), rel=1e-15)


def test_grpo_clips_by_hand() -> None:
    """Ratio 1.25 of a good token and 0.75 of a bad one, on either side of each bound."""
    new, old, advantages = t(math.log(1.25), math.log(0.75)), t(0.0, 0.0), t(1.0, -1.0)
    for low, high, want in (
        (0.2, 0.2, (0.0, 0.0)),
        (0.2, 0.3, (-0.625, 0.0)),
        (0.3, 0.2, (0.0, 0.375)),
        (0.3, 0.3, (-0.625, 0.375)),
    ):
        kw = {"eps_low": low, "eps_high": high}
        _, coef = coefficients(tokens.grpo_loss, new, old, advantages, torch.tensor([0, 1, 2]), **kw)
        torch.testing.assert_close(coef, t(*want), rtol=1e-14, atol=0)
        # The other way round nothing is clipped: the minimum keeps the harmful side.
        _, coef = coefficients(tokens.grpo_loss, new, old, -advantages, torch.tensor([0, 1, 2]), **kw)
        torch.testing.assert_close(coef, t(0.625, -0.375), rtol=1e-14, atol=0)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_grpo_with_an_overflowing_ratio(ratio: str) -> None:
    """exp(1000) is inf; where it is clipped, or the advantage is 0, no NaN may reach the gradient."""
    new, old = t(1000.0, 0.0, 0.0), t(0.0, 0.0, 0.0)
    cu = torch.tensor([0, 1, 2, 3])
    for advantage in (1.0, 0.0):
        advantages = t(advantage, 1.0, -1.0)
        loss, coef = coefficients(tokens.grpo_loss, new, old, advantages, cu, ratio=ratio)
        assert float(loss) == pytest.approx(-(1.2 * advantage) / 3)
        torch.testing.assert_close(coef, t(0.0, -1 / 3, 1 / 3))
