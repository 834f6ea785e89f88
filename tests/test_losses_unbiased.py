"""What the group losses estimate: expected gradients over every group, against autograd of the objective."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qempo_fast import reference
from qempo_fast.losses import coefficients, dqo_loss, gvpo_loss, rspo_loss, spl_loss
from qempo_fast.reference.dpp import dpp_gains

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())
D = torch.float64
THETA = torch.tensor([0.2, -0.3, 0.1], dtype=D)
REWARDS = torch.tensor([0.0, 1.0, 0.4], dtype=D)
REF = torch.log_softmax(torch.tensor([0.5, 0.0, -0.5], dtype=D), 0)
EMBEDDINGS = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-0.8, 0.6]], dtype=D)


def groups(k: int) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(3)] * k).reshape(-1, k)


def moments(loss: Callable[..., torch.Tensor], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over on-policy groups of the loss's gradient in theta, and the trace of its covariance."""
    every = groups(k)
    logps = torch.log_softmax(THETA, 0)
    # The loss is a mean over all groups given; one group's own coefficients are that many times larger.
    coef = coefficients(lambda x: loss(x, every.flatten()), logps[every].flatten())[1] * len(every)
    score = torch.eye(3, dtype=D) - logps.exp()
    grads = (coef.reshape(every.shape)[..., None] * score[every]).sum(1)
    weight = logps[every].sum(1).exp()[:, None]
    mean = (weight * grads).sum(0)
    return mean, (weight * (grads - mean).square()).sum()


def gradient(objective: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(objective(torch.log_softmax(theta, 0)), theta)[0]


def close(label: str, got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13, msg=lambda m: f"{label}: {m}")


def over_groups(k: int, value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """E of a value per group, as a function of log pi."""
    return lambda logps: (logps[groups(k)].sum(1).exp() * value).sum()


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize(("baseline", "factor"), [("loo", 1.0), ("none", 1.0), ("mean", None)])
def test_online(k: int, baseline: str, factor: float | None) -> None:
    alpha, beta = 0.7, 0.3
    mean, _ = moments(
        lambda x, y: spl_loss(x, REF[y], REWARDS[y], alpha=alpha, beta=beta, group_size=k, baseline=baseline),
        k,
    )
    want = gradient(lambda lp: (lp.exp() * (REWARDS - alpha * lp + beta * REF)).sum())
    close(baseline, mean, -want * ((k - 1) / k if factor is None else factor))


def test_loo_saves_variance() -> None:
    def variance(baseline: str) -> torch.Tensor:
        return moments(
            lambda x, y: spl_loss(x, REF[y], REWARDS[y] + 2.0, alpha=0.7, beta=0.3, group_size=4, baseline=baseline),
            4,
        )[1]

    assert variance("loo") < 0.1 * variance("none")


def test_gvpo_on_policy() -> None:
    golden = GOLDEN["gvpo_on_policy_identity"]
    beta, k = golden["inputs"]["beta"], golden["inputs"]["k"]
    mean, _ = moments(lambda x, y: gvpo_loss(x, REF[y], REWARDS[y], beta=beta, group_size=k), k)
    close("golden", mean, torch.tensor(golden["outputs"]["expected_gvpo_grad"], dtype=D))
    want = gradient(lambda lp: (lp.exp() * (REWARDS - beta * (lp - REF))).sum())
    close("-beta grad of E r - beta KL", mean, -beta * want)


@pytest.mark.parametrize(("k", "n"), [(1, 2), (2, 3), (3, 3), (2, 5), (4, 5)])
@pytest.mark.parametrize("rewards", [REWARDS, torch.tensor([0.0, 1.0, 0.0], dtype=D)], ids=["max", "pass"])
def test_rspo(k: int, n: int, rewards: torch.Tensor) -> None:
    mean, _ = moments(lambda x, y: rspo_loss(x, rewards[y], k=k, group_size=n), n)
    close("RSPO", mean, -gradient(over_groups(k, rewards[groups(k)].max(1).values)))
    if (k, n) == (2, 3) and rewards is REWARDS:
        close("golden", -mean, torch.tensor(GOLDEN["maxk_unbiased"]["outputs"]["exact_grad"], dtype=D))


def dqo(k: int, baseline: str, *, beta: float = 0.0, rewards: torch.Tensor = REWARDS) -> Callable[..., torch.Tensor]:
    return lambda x, y: dqo_loss(
        x,
        rewards[y],
        EMBEDDINGS[y],
        alpha=0.8,
        ref_logps=REF[y],
        beta=beta,
        baseline=baseline,
        group_size=k,
    )


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("beta", [0.0, 0.4])
@pytest.mark.parametrize("baseline", ["loo", "reward", "none"])
def test_dqo(k: int, beta: float, baseline: str) -> None:
    mean, _ = moments(dqo(k, baseline, beta=beta), k)
    every = groups(k)
    gram = EMBEDDINGS[every] @ EMBEDDINGS[every].transpose(1, 2)
    logdet = torch.logdet(gram + torch.eye(k, dtype=D))
    diversity = over_groups(k, REWARDS[every].sum(1) + 0.8 * logdet)
    want = gradient(lambda lp: diversity(lp) - beta * k * (lp.exp() * (lp - REF)).sum())
    close(baseline, mean, -want / k)


@pytest.mark.parametrize(("k", "share"), [(2, 0.24), (3, 0.52), (4, 0.54)])
def test_dqo_loo_saves_variance(k: int, share: float) -> None:
    """The shares that docs/losses/dqo.md quotes; rewards of zero leave the gains alone."""
    zero = torch.zeros(3, dtype=D)
    raw, loo = (moments(dqo(k, b, rewards=zero), k)[1] for b in ("none", "loo"))
    assert float(loo / raw) == pytest.approx(share, abs=0.005)


def test_group_centred_gains_are_biased() -> None:
    for k in (2, 3):
        every = groups(k)
        gains = dpp_gains(EMBEDDINGS[every]).gains
        exact = gradient(over_groups(k, torch.logdet(EMBEDDINGS[every] @ EMBEDDINGS[every].mT + torch.eye(k, dtype=D))))
        centred = (gains - gains.mean(1, keepdim=True)).flatten()
        zero = torch.zeros(len(centred), dtype=D)
        mean, _ = moments(
            lambda x, y, bonus=centred, zero=zero: reference.groups.group_loss(
                x, None, zero, alpha=0.0, beta=0.0, baseline="none", bonus=bonus
            ),
            k,
        )
        assert (k * mean + exact).abs().max() > 1e-3
        if k == 2:
            assert mean.abs().max() < 1e-15
            golden = GOLDEN["dqo_unbiased"]["outputs"]
            close("golden", exact, torch.tensor(golden["exact_grad"], dtype=D))


def test_dqo_gain_bounds() -> None:
    """log(1 + 1/k) <= g <= log 2, the minimum at all duplicates: read off DQO's own coefficients."""
    k = 4
    for rows, want in ((torch.ones(k, 3), math.log(1 + 1 / k)), (torch.eye(k), math.log(2))):
        _, coef = coefficients(
            dqo_loss, torch.zeros(k, dtype=D), torch.zeros(k, dtype=D), rows.to(D)[None], baseline="none"
        )
        close("gain", -k * coef, torch.full((k,), want, dtype=D))
