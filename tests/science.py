"""Tabular policies: exact expectations over every group, and descent along the coefficients of a public loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from qempo_fast.losses import coefficients

D = torch.float64
# loss(log-probs of the drawn responses, which responses they are) -> scalar
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Problem(NamedTuple):
    """A finite set of responses: rewards and the reference's log-probs, both (n,) float64."""

    rewards: torch.Tensor
    ref: torch.Tensor


def t(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=D)


def problem(n: int, seed: int = 0, spread: float = 1.0) -> Problem:
    rng = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, n, dtype=D, generator=rng)
    return Problem(spread * draw[0], torch.log_softmax(draw[1], 0))


def close(got: torch.Tensor, want: torch.Tensor, tol: float) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tol)


def entropy(p: torch.Tensor) -> float:
    return float(-torch.xlogy(p, p).sum())


def kl(p: torch.Tensor, ref: torch.Tensor) -> float:
    return float((torch.xlogy(p, p) - p * ref).sum())


def every_group(n: int, k: int) -> torch.Tensor:
    """(n^k, k): all ordered draws of k of n responses."""
    return torch.cartesian_prod(*[torch.arange(n)] * k).reshape(-1, k)


def group_coefficients(loss: Loss, logps: torch.Tensor, k: int) -> torch.Tensor:
    """(n^k, k): the coefficients of each possible group on its own."""
    every = every_group(len(logps), k)
    # The public losses average over the groups given; a group's own coefficients are that many times larger.
    coef = coefficients(lambda x: loss(x, every.flatten()), logps[every].flatten())[1]
    return coef.reshape(every.shape) * len(every)


def moments(
    loss: Loss, logps: torch.Tensor, k: int, sampler: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over groups of k draws of the loss's gradient in the softmax's logits, and its covariance's trace.

    The draws are the policy's own, or those of sampler (n,), probabilities.
    """
    every, coef = every_group(len(logps), k), group_coefficients(loss, logps, k)
    drawn = logps.exp() if sampler is None else sampler
    weight = drawn[every].prod(1)[:, None]
    score = torch.eye(len(logps), dtype=D) - logps.exp()
    grads = (coef[..., None] * score[every]).sum(1)
    mean = (weight * grads).sum(0)
    return mean, (weight * (grads - mean).square()).sum()


def gradient(objective: Callable[[torch.Tensor], torch.Tensor], logps: torch.Tensor) -> torch.Tensor:
    """Autograd of objective(log-probs) in the softmax's logits."""
    theta = logps.detach().clone().requires_grad_()
    return torch.autograd.grad(objective(torch.log_softmax(theta, 0)), theta)[0]


def over_groups(value: torch.Tensor, n: int, k: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """E of one value per group of every_group(n, k), as a function of the log-probs."""
    return lambda logps: (logps[every_group(n, k)].sum(1).exp() * value).sum()


def descend(
    step: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, *, rate: float, steps: int, tol: float = 1e-12
) -> torch.Tensor:
    """Log-probs after theta <- theta - rate * step(log-probs), until no entry of the step exceeds tol."""
    theta = start.clone()
    for _ in range(steps):
        move = step(torch.log_softmax(theta, 0))
        theta -= rate * move
        if float(move.abs().max()) <= tol:
            break
    return torch.log_softmax(theta, 0)


def descend_groups(
    loss: Loss,
    start: torch.Tensor,
    k: int,
    *,
    rate: float,
    steps: int = 400,
    sampler: torch.Tensor | None = None,
) -> torch.Tensor:
    """descend() along the expected gradient of a group loss, each entry divided by how often its response is drawn."""

    def step(logps: torch.Tensor) -> torch.Tensor:
        return moments(loss, logps, k, sampler)[0] / (logps.exp() if sampler is None else sampler)

    return descend(step, start, rate=rate, steps=steps)


def descend_pairs(
    loss: Callable[..., torch.Tensor],
    ref: torch.Tensor,
    preference: torch.Tensor,
    *,
    rate: float,
    steps: int = 2000,
    sampler: torch.Tensor | None = None,
) -> torch.Tensor:
    """descend() from the reference on a pair loss over every pair, weighted by preference (n, n), P(row beats column).

    loss takes chosen, rejected, ref_chosen, ref_rejected and reduction. Pairs are drawn evenly or from sampler (n,).
    """
    n = len(ref)
    w, x = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    drawn = torch.full((n,), 1 / n, dtype=D) if sampler is None else sampler
    weight = (drawn[:, None] * drawn * preference).flatten()

    def step(logps: torch.Tensor) -> torch.Tensor:
        _, (cw, cx) = coefficients(
            lambda a, b: (weight * loss(a, b, ref[w], ref[x], reduction="none")).sum(), (logps[w], logps[x])
        )
        per = torch.zeros(n, dtype=D).index_add(0, w, cw).index_add(0, x, cx)
        return (per - per.sum() * logps.exp()) / drawn

    return descend(step, ref, rate=rate, steps=steps)
