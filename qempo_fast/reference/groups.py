"""Groups of samples in plain torch: layout, baselines, group advantages.

A group is the k responses to one prompt. Groups lie one after another in (S,) tensors, of equal size
(``group_size``) or ragged (``offsets``, (G + 1,)).
"""

from __future__ import annotations

import torch

# The constant that GRPO adds to the standard deviation (2402.03300; TRL's grpo_trainer).
STD_EPS = 1e-4


def to_groups(
    x: torch.Tensor, group_size: int | None, offsets: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(S,) to (G, n), n the largest group, with 0 in the padding; and the mask of what is not padding."""
    if offsets is None:
        grouped = x.unflatten(0, (-1, group_size))
        return grouped, torch.ones_like(grouped, dtype=torch.bool)
    sizes = offsets[1:] - offsets[:-1]
    width = int(sizes.max()) if sizes.numel() else 1
    column = torch.arange(width, device=x.device)
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


def group_advantages(
    rewards: torch.Tensor,
    *,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    scale: str = "std",
    baseline: str = "mean",
) -> torch.Tensor:
    """(r - baseline) / (std + 1e-4) within each group, std with n - 1; or r - baseline."""
    centred = centre(rewards, baseline, group_size=group_size, offsets=offsets)
    if scale == "none":
        return centred
    deviations, mask = to_groups(centre(rewards, "mean", group_size=group_size, offsets=offsets), group_size, offsets)
    size = mask.sum(1, keepdim=True)
    std = (deviations.square().sum(1, keepdim=True) / (size - 1)).sqrt()
    return centred / from_groups((std + STD_EPS).expand_as(deviations), mask, offsets)
