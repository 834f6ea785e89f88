"""RSPO in plain torch: the policy gradient of the best of k samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .family import product, reduced, widened
from .groups import centre, from_groups, to_groups


def rspo_weights(
    rewards: torch.Tensor,
    *,
    k: int,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """w_i = mean over (k-1)-subsets T of the others of (r_i - max_T r)_+; r_i where k = 1."""
    if k == 1:
        return rewards
    # In float64: the shares are products of as many ratios as a group has samples, and so are the sums.
    grouped, mask = to_groups(widened(rewards), group_size, offsets)
    size = mask.sum(1, keepdim=True)
    ordered, order = torch.where(mask, grouped, torch.inf).sort(dim=1)
    # w of rank i is sum_{m < i} U_m (r_(m+1) - r_(m)), with U_m = C(m, k-1) / C(n-1, k-1) the share of
    # subsets under rank m + 1: sums of positive terms, so no digits cancel and ties get one weight.
    gaps = torch.where(mask, ordered, 0).diff(dim=1)
    m = torch.arange(1, grouped.shape[1], dtype=torch.int64, device=rewards.device)
    # U_{n-1} = 1 and U_m = U_{m+1} (m - k + 2) / (m + 1): no binomial is formed, so none overflows.
    ratio = (m - k + 2).clamp(min=0).to(grouped.dtype) / (m + 1)
    below = torch.where(m < size - 1, ratio, 1).flip(1).cumprod(1).flip(1)
    ranked = F.pad((torch.where(m < size, gaps, 0) * below).cumsum(1), (1, 0))
    weights = torch.zeros_like(grouped).scatter(1, order, ranked)
    return from_groups(weights, mask, offsets).to(rewards.dtype)


def rspo_loss(
    logps: torch.Tensor,
    rewards: torch.Tensor,
    *,
    k: int,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    baseline: str = "loo",
) -> torch.Tensor:
    """-mean k w_i l_i; baseline is for k = 1, where no maximum of others serves as one.

    A log-prob of -inf is paid for by its weight: 0 where that is 0.
    """
    weights = rspo_weights(rewards, k=k, group_size=group_size, offsets=offsets)
    if k == 1:
        weights = centre(weights, baseline, group_size=group_size, offsets=offsets)
    return reduced(product(-k * weights, logps), "mean")
