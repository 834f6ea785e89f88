"""Groups of samples in plain torch: layout, baselines, advantages, and the (alpha, beta) family's two group losses.

A group is the k responses to one prompt. Groups lie one after another in (S,) tensors, of equal size
(``group_size``) or ragged (``offsets``, (G + 1,)).
"""

from __future__ import annotations

from typing import Any

import torch

from .family import AlphaBeta, product, reduced, widened

# The constant that GRPO adds to the standard deviation (2402.03300; TRL's grpo_trainer).
STD_EPS = 1e-4


def to_groups(
    x: torch.Tensor, group_size: int | None, offsets: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(S,) to (G, n), n the largest group, with 0 in the padding; and the mask of what is not padding."""
    if offsets is None:
        assert group_size is not None
        # Not unflatten: torch.compile cannot trace it under a default device, not even torch.set_default_device("cpu").
        grouped = x.reshape(-1, group_size)
        return grouped, torch.ones_like(grouped, dtype=torch.bool)
    sizes = offsets[1:] - offsets[:-1]
    width = int(sizes.max()) if sizes.numel() else 1
    column = torch.arange(width, dtype=torch.int64, device=x.device)
    mask = column < sizes[:, None]
    index = torch.where(mask, offsets[:-1, None] + column, 0)
    return torch.where(mask, x[index], torch.zeros((), dtype=x.dtype, device=x.device)), mask


def from_groups(x: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """(G, n) back to (S,)."""
    return x.reshape(-1) if offsets is None else x[mask]


def centre(
    values: torch.Tensor, baseline: str, *, group_size: int | None = None, offsets: torch.Tensor | None = None
) -> torch.Tensor:
    """Subtract the baseline: the group mean, the mean of the others ("loo"), or nothing."""
    if baseline == "none":
        return values
    grouped, mask = to_groups(values, group_size, offsets)
    size = mask.sum(1, keepdim=True).to(values.dtype)
    centred = grouped - grouped.sum(1, keepdim=True) / size
    if baseline == "loo":
        centred = centred * (size / (size - 1))
    return from_groups(centred, mask, offsets)


def _deviation(centred: torch.Tensor, size: torch.Tensor, any_size: bool) -> torch.Tensor:
    """(G, 1) of (G, n) with n - 1; any_size: where squares of 1e154 and more would be infinite."""
    if any_size:
        unit = centred.abs().amax(1, keepdim=True).clamp(min=1)
        return unit * _deviation(centred / unit, size, False)
    return (centred.square().sum(1, keepdim=True) / (size - 1)).sqrt()


def group_advantages(
    rewards: torch.Tensor,
    *,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    scale: str = "std",
    baseline: str = "mean",
) -> torch.Tensor:
    """(r - baseline) / (std + 1e-4) within each group, std with n - 1; or r - baseline.

    In float64, as this is also what runs on a GPU: float32's sum of 8 rewards of 1e7 is off by units, and its squares
    of 1e20 are infinite.
    """
    exact = widened(rewards)
    centred = centre(exact, baseline, group_size=group_size, offsets=offsets)
    if scale == "none":
        return centred.to(rewards.dtype)
    if scale != "std":
        raise ValueError(f"scale: wanted 'none' or 'std', got {scale!r}")
    deviations, mask = to_groups(centre(exact, "mean", group_size=group_size, offsets=offsets), group_size, offsets)
    std = _deviation(deviations, mask.sum(1, keepdim=True), rewards.dtype == torch.float64)
    return (centred / from_groups((std + STD_EPS).expand_as(deviations), mask, offsets)).to(rewards.dtype)


def policy_gradient_loss(logps: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """-mean A_i l_i; a log-prob of -inf is paid for by its advantage: 0 where that is 0."""
    return reduced(product(-advantages, logps), "mean")


def group_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    rewards: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    baseline: str = "loo",
    bonus: torch.Tensor | None = None,
) -> torch.Tensor:
    """-mean A_i l_i, A_i = S_i - baseline + bonus_i, S_i = r_i - alpha sg(l_i) + beta f_i.

    NaN or infinite on purpose: the coefficients of a group that holds an infinite S_i, as its mean is infinite, and the
    loss with them. Other groups keep theirs, and so does the group where alpha or beta, the weight of -inf, is 0.
    """
    shaped = rewards - alpha * logps.detach() if alpha else rewards
    if ref_logps is not None and beta:
        shaped = shaped + beta * ref_logps
    advantages = centre(shaped, baseline, group_size=group_size, offsets=offsets)
    if bonus is not None:
        advantages = advantages + bonus
    return policy_gradient_loss(logps, advantages)


def variance_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    rewards: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over groups of sum_i d_i^2 / (2 (k - 1)), d_i the group-centred alpha l_i - beta f_i - r_i.

    NaN or infinite on purpose: as group_loss.
    """
    residual = alpha * logps - rewards
    if ref_logps is not None and beta:
        residual = residual - beta * ref_logps
    centred = centre(residual, "mean", group_size=group_size, offsets=offsets)
    d, mask = to_groups(centred, group_size, offsets)
    return reduced(d.square().sum(1) / (2 * (mask.sum(1) - 1)), "mean")


# The members; **kw is group_size, offsets and baseline.


def spl_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    rewards: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    **kw: Any,
) -> torch.Tensor:
    return group_loss(logps, ref_logps, rewards, alpha=alpha, beta=beta, **kw)


def qempo_loss(logps: torch.Tensor, rewards: torch.Tensor, *, lam: float, **kw: Any) -> torch.Tensor:
    return group_loss(logps, None, rewards, **AlphaBeta.of_qempo(lam)._asdict(), **kw)


def qempo_kl_loss(
    logps: torch.Tensor, ref_logps: torch.Tensor, rewards: torch.Tensor, *, lam: float, mu: float, **kw: Any
) -> torch.Tensor:
    return group_loss(logps, ref_logps, rewards, **AlphaBeta.of_qempo(lam, mu)._asdict(), **kw)


def gvpo_loss(
    logps: torch.Tensor, ref_logps: torch.Tensor, rewards: torch.Tensor, *, beta: float = 0.1, **kw: Any
) -> torch.Tensor:
    return variance_loss(logps, ref_logps, rewards, **AlphaBeta.of_kl(beta)._asdict(), **kw)
