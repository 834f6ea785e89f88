"""The GRPO family in plain torch: surrogates of importance ratios, token by token or sequence by sequence."""

from __future__ import annotations

from typing import Any

import torch

from .segments import segment_sum


def _clip(log_ratio: torch.Tensor, advantage: torch.Tensor, eps_low: float, eps_high: float) -> torch.Tensor:
    """-min(rho A, clip(rho) A)."""
    value = log_ratio.detach().exp()
    clipped = torch.where(advantage > 0, value > 1 + eps_high, value < 1 - eps_low) | (advantage == 0)
    # The exponential that carries the gradient sees 0 at clipped tokens: a ratio of inf would give 0 * inf =
    # NaN. So would a ceiling beyond the dtype.
    ceiling = min(1 + eps_high, torch.finfo(value.dtype).max)
    live = torch.where(clipped, 0, log_ratio).exp()
    return -advantage * torch.where(clipped, value.clamp(1 - eps_low, ceiling), live)


# Losses of a log-ratio, log rho, and an advantage, by name.
SURROGATES = {"clip": _clip}


def token_loss(
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
    surrogate: str = "clip",
) -> torch.Tensor:
    """Sum over tokens of norm_it (surrogate(log rho, A) + kl (e^d - d - 1)), d = ref - l.

    Log-probs of -inf have the limits: a ratio of 0 or infinity is clipped as any other, an advantage of 0 pays for
    none, and the KL is infinite, with a slope of kl where the reference's is -inf and of -inf where the policy's is.
    NaN on purpose: -inf less -inf, a token that both policies, or policy and reference, exclude.
    """
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate: wanted {' or '.join(map(repr, SURROGATES))}, got {surrogate!r}")
    total, count = token_logps.shape[0], advantages.shape[0]
    lengths = cu_seqlens.diff()
    each = torch.arange(count, dtype=torch.int64, device=lengths.device)
    sequence = torch.repeat_interleave(each, lengths, output_size=total)
    length = lengths[sequence].to(token_logps.dtype)
    log_ratio = token_logps - old_token_logps
    if ratio == "sequence":
        log_ratio = (segment_sum(log_ratio, cu_seqlens) / lengths)[sequence]
    losses = SURROGATES[surrogate](log_ratio, advantages[sequence], eps_low, eps_high)
    if ref_token_logps is not None and kl:
        d = ref_token_logps - token_logps
        # At d = inf, infinity less infinity; expm1 carries both the limit and its slope.
        losses = losses + kl * (torch.expm1(d) - torch.where(d == torch.inf, 0, d))
    if normalize == "sequence":
        return (losses / length).sum() / max(count, 1)
    if normalize == "token":
        return losses.sum() / max(total, 1)
    return losses.sum() / (max(count, 1) * float(normalize))


def grpo_loss(
    token_logps: torch.Tensor,
    old_token_logps: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    **settings: Any,
) -> torch.Tensor:
    """token_loss of the clipped surrogate."""
    return token_loss(token_logps, old_token_logps, advantages, cu_seqlens, surrogate="clip", **settings)
