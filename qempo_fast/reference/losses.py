"""EPA, PoFT, RSPO and the GRPO family in plain torch: the definitions that every kernel is tested against.

The (alpha, beta) family is in family.py, DQO in dqo.py. No argument is checked here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .family import reduced
from .groups import centre, from_groups, to_groups
from .segments import segment_sum


def epa_loss(
    positive: torch.Tensor,
    strong: torch.Tensor,
    weak: torch.Tensor,
    ref_positive: torch.Tensor,
    ref_strong: torch.Tensor,
    ref_weak: torch.Tensor,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
) -> torch.Tensor:
    """log(1 + sum_j e^{u_j - u_+}), u = beta (l - f), j over the strong and weak negatives."""
    negatives = torch.cat([strong - ref_strong, weak - ref_weak], dim=1)
    u = beta * (negatives - (positive - ref_positive)[:, None])
    # logsumexp's backward is exp(u - output): unshifted, float32 coefficients at u = 1e5 are 0.2% off.
    top = u.detach().amax(1, keepdim=True)
    margin = top[:, 0] + torch.logsumexp(u - top, dim=1)
    # Not softplus: torch's returns x itself above 20, an error of 2e-9.
    return reduced(-F.logsigmoid(-margin), reduction)


def poft_loss(
    logps: torch.Tensor,
    lengths: torch.Tensor,
    aligned_mean_logps: torch.Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """-log s(h), h = beta l/|y| - beta mean_m(aligned) + gamma."""
    h = beta * (logps / lengths - aligned_mean_logps.mean(1)) + gamma
    return reduced(-F.logsigmoid(h), reduction)


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
    grouped, mask = to_groups(rewards, group_size, offsets)
    size = mask.sum(1, keepdim=True)
    ordered, order = torch.where(mask, grouped, torch.inf).sort(dim=1)
    # w of rank i is sum_{m < i} U_m (r_(m+1) - r_(m)), with U_m = C(m, k-1) / C(n-1, k-1) the share of
    # subsets under rank m + 1: sums of positive terms, so no digits cancel and ties get one weight.
    gaps = torch.where(mask, ordered, 0).diff(dim=1)
    m = torch.arange(1, grouped.shape[1], device=rewards.device)
    # U_{n-1} = 1 and U_m = U_{m+1} (m - k + 2) / (m + 1): no binomial is formed, so none overflows.
    ratio = (m - k + 2).clamp(min=0).to(rewards.dtype) / (m + 1)
    below = torch.where(m < size - 1, ratio, 1).flip(1).cumprod(1).flip(1)
    ranked = F.pad((torch.where(m < size, gaps, 0) * below).cumsum(1), (1, 0))
    weights = torch.zeros_like(grouped).scatter(1, order, ranked)
    return from_groups(weights, mask, offsets)


def rspo_loss(
    logps: torch.Tensor,
    rewards: torch.Tensor,
    *,
    k: int,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    baseline: str = "loo",
) -> torch.Tensor:
    """-mean k w_i l_i; baseline is for k = 1, where no maximum of others serves as one."""
    weights = rspo_weights(rewards, k=k, group_size=group_size, offsets=offsets)
    if k == 1:
        weights = centre(weights, baseline, group_size=group_size, offsets=offsets)
    return reduced(-k * weights * logps, "mean")


def grpo_loss(
    token_logps: torch.Tensor,
    old_token_logps: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    ref_token_logps: torch.Tensor | None = None,
    kl: float = 0.0,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    ratio: str = "token",
    normalize: str | float = "sequence",
) -> torch.Tensor:
    """Sum over tokens of norm_it (-min(rho A, clip(rho) A) + kl (e^d - d - 1)), d = ref - l."""
    total, count = token_logps.shape[0], advantages.shape[0]
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(count, device=lengths.device), lengths, output_size=total)
    length = lengths[sequence].to(token_logps.dtype)
    log_ratio = token_logps - old_token_logps
    if ratio == "sequence":
        log_ratio = (segment_sum(log_ratio, cu_seqlens) / lengths)[sequence]
    advantage = advantages[sequence]
    value = log_ratio.detach().exp()
    clipped = torch.where(advantage > 0, value > 1 + eps_high, value < 1 - eps_low) | (advantage == 0)
    # The exponential that carries the gradient sees 0 at clipped tokens: a ratio of inf would give 0 * inf =
    # NaN.
    live = torch.where(clipped, 0, log_ratio).exp()
    losses = -advantage * torch.where(clipped, value.clamp(1 - eps_low, 1 + eps_high), live)
    if ref_token_logps is not None and kl:
        d = ref_token_logps - token_logps
        losses = losses + kl * (torch.expm1(d) - d)
    if normalize == "sequence":
        return (losses / length).sum() / max(count, 1)
    if normalize == "token":
        return losses.sum() / max(total, 1)
    return losses.sum() / (max(count, 1) * float(normalize))
