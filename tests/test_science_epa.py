"""EPA's population optimum, log(p / q), for several numbers of negatives, of two kinds, and with a reference."""

from __future__ import annotations

import pytest
import torch
from science import D, close, descend, t

from qempo_fast.losses import coefficients, dpo_loss, epa_loss

P = t(0.5, 0.25, 0.15, 0.1)
Q = t(0.1, 0.2, 0.3, 0.4)
REF = t(0.3, 0.4, 0.2, 0.1).log()


def population(strong: int, weak: int, weak_from: torch.Tensor, beta: float) -> torch.Tensor:
    """log-probs where positives come from P, strong negatives from Q and weak ones from weak_from."""
    size = 1 + strong + weak
    drawn = torch.cartesian_prod(*[torch.arange(4)] * size)
    sources = [P] + [Q] * strong + [weak_from] * weak
    weight = torch.stack([source[drawn[:, i]] for i, source in enumerate(sources)]).prod(0)
    pos, s, v = drawn[:, 0], drawn[:, 1 : 1 + strong], drawn[:, 1 + strong :]

    def loss(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return (weight * epa_loss(a, b, c, REF[pos], REF[s], REF[v], beta=beta, reduction="none")).sum()

    def step(logps: torch.Tensor) -> torch.Tensor:
        _, (ca, cb, cc) = coefficients(loss, (logps[pos], logps[s], logps[v]))
        per = torch.zeros(4, dtype=D)
        for index, coef in ((pos, ca), (s, cb), (v, cc)):
            per.index_add_(0, index.flatten(), coef.flatten())
        return per - per.sum() * logps.exp()

    return descend(step, REF, rate=4 / beta**2, steps=2000)


@pytest.mark.parametrize(("strong", "weak"), [(1, 0), (3, 0), (1, 2), (0, 2)])
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_implicit_reward_is_the_log_ratio(strong: int, weak: int, beta: float) -> None:
    """Slope 1 in log(p / q) whatever the number of negatives, where all of them come from q."""
    found = population(strong, weak, Q, beta)
    implicit, want = beta * (found - REF), (P / Q).log()
    close(implicit - implicit.mean(), want - want.mean(), 1e-8)
    optimum = REF.exp() * (P / Q) ** (1 / beta)
    close(found.exp(), optimum / optimum.sum(), 1e-8)


def test_two_kinds_of_negatives_move_the_optimum() -> None:
    """Weak negatives from elsewhere contrast with another distribution: log(p / q) no longer."""
    found = population(1, 1, t(0.25, 0.25, 0.25, 0.25), 1.0)
    implicit, want = found - REF, (P / Q).log()
    assert float((implicit - implicit.mean() - want + want.mean()).abs().max()) > 0.1


def test_one_strong_negative_is_dpo_in_every_coefficient() -> None:
    rng = torch.Generator().manual_seed(0)
    w, x, fw, fx = 5 * torch.randn(4, 7, dtype=D, generator=rng) - 20
    none = w.new_zeros(7, 0)
    want, (cw, cx) = coefficients(dpo_loss, (w, x), fw, fx, beta=0.3)
    got, (cp, cs, cn) = coefficients(epa_loss, (w, x[:, None], none), fw, fx[:, None], none, beta=0.3)
    close(got, want, 1e-14)
    close(cp, cw, 1e-14)
    close(cs[:, 0], cx, 1e-14)
    assert cn.shape == (7, 0)
    # The same negative as a weak one instead.
    close(coefficients(epa_loss, (w, none, x[:, None]), fw, none, fx[:, None], beta=0.3)[1][2][:, 0], cx, 1e-14)
