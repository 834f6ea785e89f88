"""SPL's proportional representation, in closed form for two outcomes and for many, and the printed form refuted."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from science import close, descend_groups, descend_pairs, t

import qempo_fast as qf


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def by_pairs(ref: torch.Tensor, p: float, alpha: float, beta: float) -> torch.Tensor:
    preference = torch.stack([t(0.5, p), t(1 - p, 0.5)])
    return descend_pairs(
        lambda *a, **k: qf.spl_pair_loss(*a, alpha=alpha, beta=beta, **k), ref, preference, rate=2 / alpha**2
    )


def online(ref: torch.Tensor, p: float, alpha: float, beta: float) -> torch.Tensor:
    # A Bradley-Terry preference p is a reward gap of logit p.
    rewards = t(logit(p), 0.0)
    return descend_groups(
        lambda x, y: qf.spl_loss(x, ref[y], rewards[y], alpha=alpha, beta=beta, group_size=2),
        ref,
        2,
        rate=0.7 / alpha,
    )


def by_variance(ref: torch.Tensor, p: float, alpha: float, beta: float) -> torch.Tensor:
    rewards = t(logit(p), 0.0)
    return descend_groups(
        lambda x, y: qf.variance_loss(x, ref[y], rewards[y], alpha=alpha, beta=beta, group_size=3),
        ref,
        3,
        rate=0.7 / alpha**2,
        sampler=t(0.5, 0.5),
    )


FORMS = pytest.mark.parametrize("form", [by_pairs, online, by_variance])
Form = Callable[[torch.Tensor, float, float, float], torch.Tensor]
EVEN = t(0.5, 0.5).log()


@FORMS
@pytest.mark.parametrize("p", [0.5, 0.8, 0.97])
@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_a_share_p_of_preferences_gets_a_share_p_of_answers(form: Form, p: float, beta: float) -> None:
    """alpha = 1 and an even reference: pi = p whatever beta is."""
    close(form(EVEN, p, 1.0, beta).exp(), t(p, 1 - p), 1e-9)


@FORMS
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.5), (0.3, 0.1), (0.2, 0.6), (1.3, 0.0)])
def test_odds(form: Form, alpha: float, beta: float) -> None:
    """odds = (reference odds)^(beta / alpha) (p / (1 - p))^(1 / alpha)."""
    ref, p = t(0.9, 0.1).log(), 0.35
    want = beta / alpha * logit(0.9) + logit(p) / alpha
    found = form(ref, p, alpha, beta)
    close(found[0] - found[1], t(want)[0], 1e-9)


@pytest.mark.parametrize(("beta", "share"), [(1.0, 0.800), (0.5, 0.941), (0.1, 0.999999)])
def test_dpo_sharpens_a_preference_of_080(beta: float, share: float) -> None:
    found = descend_pairs(
        lambda *a, **k: qf.dpo_loss(*a, beta=beta, **k),
        EVEN,
        torch.stack([t(0.5, 0.8), t(0.2, 0.5)]),
        rate=2 / beta**2,
    )
    assert float(found.exp()[0]) == pytest.approx(share, abs=10 ** -(6 if share > 0.99 else 3))


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_printed_form_is_refuted(beta: float) -> None:
    """pi_ref^(p^(1 / beta)), in circulation as the optimum at alpha = beta, is not it; pi_ref p^(1 / beta) is."""
    ref, p = t(0.7, 0.3), t(0.8, 0.2)
    found = by_pairs(ref.log(), 0.8, beta, beta).exp()
    right = ref * p ** (1 / beta)
    wrong = ref ** (p ** (1 / beta))
    close(found, right / right.sum(), 1e-9)
    assert float((found - wrong / wrong.sum()).abs().max()) > 0.2


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_many_outcomes(beta: float) -> None:
    """Luce's choice rule, p proportional to exp(r): SPL at alpha = 1 from an even reference answers with p itself."""
    p = t(0.4, 0.3, 0.2, 0.07, 0.03)
    preference = p[:, None] / (p[:, None] + p)
    ref = torch.full((5,), 0.2, dtype=torch.float64).log()
    found = descend_pairs(lambda *a, **k: qf.spl_pair_loss(*a, alpha=1.0, beta=beta, **k), ref, preference, rate=4.0)
    close(found.exp(), p, 1e-9)
    # DPO at its default beta gives nearly everything to the first.
    dpo = torch.softmax(p.log() / 0.1, 0)
    close(qf.target_distribution(p.log(), ref, alpha=0.1, beta=0.1), dpo, 1e-12)
    assert float(dpo[0]) > 0.94
