"""Token and sequence log-probs in plain torch: the definition that every backend is compared with.

The (N, V) logits are kept by autograd here; the public ops never keep them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .segments import segment_sum


class TokenLogps(NamedTuple):
    """Per-token results, shaped like targets; entropy and sum_sq are None unless asked for."""

    logps: torch.Tensor
    entropy: torch.Tensor | None
    sum_sq: torch.Tensor | None


class TokenScores(NamedTuple):
    """TokenLogps and what else there is of a row, shaped like targets, columns (..., K); None unless asked for.

    top1 is bool. lse, columns and mean_logits are differentiable.
    """

    logps: torch.Tensor
    entropy: torch.Tensor | None
    sum_sq: torch.Tensor | None
    lse: torch.Tensor | None
    columns: torch.Tensor | None
    top1: torch.Tensor | None
    mean_logits: torch.Tensor | None


class SequenceLogps(NamedTuple):
    """Per-sequence sums (S,) or averages, counted tokens (S,) int64, and the token log-probs (N,)."""

    logps: torch.Tensor
    entropy: torch.Tensor | None
    lengths: torch.Tensor
    token_logps: torch.Tensor


class WeightedLogps(NamedTuple):
    """loss (), the weighted sum, and what it is of, shaped like targets and detached; entropy None unless asked for."""

    loss: torch.Tensor
    logps: torch.Tensor
    entropy: torch.Tensor | None


class WeightedSequenceLogps(NamedTuple):
    """loss (), the weighted sum of sequences; sums, lengths and token log-probs as SequenceLogps has them, detached."""

    loss: torch.Tensor
    logps: torch.Tensor
    entropy: torch.Tensor | None
    lengths: torch.Tensor
    token_logps: torch.Tensor


def finish_head(
    raw: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """z = softcap * tanh(logit_scale * raw / softcap) / temperature; temperature broadcasts against raw."""
    z = raw * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def _column(temperature: float | torch.Tensor) -> float | torch.Tensor:
    if not isinstance(temperature, torch.Tensor):
        return temperature
    return temperature.reshape(()) if temperature.numel() == 1 else temperature.unsqueeze(-1)


def _kept(z: torch.Tensor, support: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor | None:
    """Like z (..., V) True in each position's set ids[offsets[i] : offsets[i + 1]]; None for all."""
    if support is None:
        return None
    ids, offsets = (x.long() for x in support)
    rows = torch.arange(len(offsets) - 1, device=z.device, dtype=torch.int64).repeat_interleave(offsets.diff())
    keep = torch.zeros(len(offsets) - 1, z.shape[-1], dtype=torch.bool, device=z.device)
    keep[rows, ids] = True
    return keep.view(z.shape)


def _alone(z: torch.Tensor, keep: torch.Tensor | None, fill: float) -> torch.Tensor:
    return z if keep is None else z.masked_fill(~keep, fill)


def _from_scores(z: torch.Tensor, targets: torch.Tensor, ignore_index: int, entropy: bool, sum_sq: bool) -> TokenLogps:
    counted = targets != ignore_index
    z = torch.where(counted.unsqueeze(-1), z, torch.zeros((), dtype=z.dtype, device=z.device))
    log_p = torch.log_softmax(z, dim=-1)
    logps = log_p.gather(-1, targets.where(counted, 0).long().unsqueeze(-1)).squeeze(-1)
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    h = ss = None
    if entropy:
        # A masked logit has p log p = 0; filling keeps 0 * -inf out of both directions. Not of -inf alone: under the
        # dtype's least number, a mask fill too, the backward's product with a coefficient above 1 overflows.
        p = log_p.exp()
        h = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
        h = torch.where(counted, h, zero)
    if sum_sq:
        ss = torch.where(counted, torch.logsumexp(2 * log_p.detach(), dim=-1), zero)
    return TokenLogps(torch.where(counted, logps, zero), h, ss)


def logps_from_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    support: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> TokenLogps:
    """log softmax(logits / temperature) at targets, over support's sets; half precision is computed in float32."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    z = _alone(wide / _column(temperature), _kept(wide, support), -torch.inf)
    return _from_scores(z, targets, ignore_index, entropy, sum_sq=False)


def linear_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    sum_sq: bool = False,
    support: tuple[torch.Tensor, torch.Tensor] | None = None,
    columns: torch.Tensor | None = None,
    lse: bool = False,
    top1: bool = False,
    mean_logits: bool = False,
    label_smoothing: float = 0.0,
    logits_dtype: torch.dtype | None = None,
) -> TokenLogps | TokenScores:
    """log softmax(z) at targets, and with columns (..., K) at these; lse = logsumexp(z); mean_logits = mean_j z_j.

    top1: z[target] = max_j z_j. label_smoothing e: logps are (1 - e) log p[target] + e mean_j log p_j.

    z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature; entropy is -sum_j p_j log p_j,
    sum_sq is log sum_j p_j^2 (detached). Half precision: logits in that dtype, as a model gives them, then float32; or
    of float32 products with logits_dtype=torch.float32. support: (ids, offsets) of the kept tokens of each position; z
    is -inf at every other.
    """
    if logits_dtype is not None:
        hidden, weight = hidden.to(logits_dtype), weight.to(logits_dtype)
        bias = None if bias is None else bias.to(logits_dtype)
    raw = torch.nn.functional.linear(hidden, weight, bias)
    if raw.dtype in (torch.float16, torch.bfloat16):
        raw = raw.float()
    keep = _kept(raw, support)
    # Before the cap too: the gradient of what is dropped is 0 there, and 0 times the slope of a NaN is NaN.
    raw = _alone(raw, keep, 0.0)
    z = finish_head(raw, logit_scale=logit_scale, softcap=softcap, temperature=_column(temperature))
    z = _alone(z, keep, -torch.inf)
    tokens = _from_scores(z, targets, ignore_index, entropy, sum_sq)
    counted = (targets != ignore_index).unsqueeze(-1)
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    z = torch.where(counted, z, zero)
    if label_smoothing:
        even = torch.log_softmax(z, -1).mean(-1)
        smoothed = (1 - label_smoothing) * tokens.logps + label_smoothing * even
        tokens = tokens._replace(logps=torch.where(counted.squeeze(-1), smoothed, zero))
    if columns is None and not (lse or top1 or mean_logits):
        return tokens

    def rows(x: torch.Tensor) -> torch.Tensor:
        return torch.where(counted, x, zero).squeeze(-1)

    picked = None
    if columns is not None:
        wanted = counted & (columns != ignore_index)
        picked = torch.log_softmax(z, -1).gather(-1, columns.where(wanted, 0).long())
        picked = torch.where(wanted, picked, zero)
    at = z.gather(-1, targets.where(counted.squeeze(-1), 0).long().unsqueeze(-1))
    return TokenScores(
        *tokens,
        rows(torch.logsumexp(z, -1, keepdim=True)) if lse else None,
        picked,
        ((at == z.amax(-1, keepdim=True)) & counted).squeeze(-1) if top1 else None,
        rows(z.mean(-1, keepdim=True)) if mean_logits else None,
    )


def weighted_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    coef: torch.Tensor,
    *,
    coef_entropy: torch.Tensor | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    **head: object,
) -> WeightedLogps:
    """sum_i coef_i logps_i + coef_entropy_i entropy_i over the counted rows that have a coefficient."""
    asked = entropy or coef_entropy is not None
    tokens = linear_logps(hidden, weight, targets, ignore_index=ignore_index, entropy=asked, **head)  # type: ignore[arg-type]
    counted = targets != ignore_index
    total = _sum(coef.where(counted, 0.0), tokens.logps)
    if coef_entropy is not None and tokens.entropy is not None:
        total = total + _sum(coef_entropy.where(counted, 0.0), tokens.entropy)
    return WeightedLogps(total, tokens.logps.detach(), None if tokens.entropy is None else tokens.entropy.detach())


def _sum(coef: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    # A row without a coefficient may hold an infinity, and 0 * inf is NaN.
    still = values.detach()
    return (coef * torch.where(coef != 0, values, still.where(still.isfinite(), 0.0))).sum()


def sequence_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    average: bool = False,
    ignore_index: int = -100,
    entropy: bool = False,
    **head: object,
) -> SequenceLogps:
    """Segment sums (or averages over counted tokens; 0 where there is none) of linear_logps."""
    tokens = linear_logps(hidden, weight, targets, ignore_index=ignore_index, entropy=entropy, **head)  # type: ignore[arg-type]
    return reduce_sequences(tokens, targets, cu_seqlens, average, ignore_index)


def weighted_sequence_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    coef: torch.Tensor,
    *,
    coef_entropy: torch.Tensor | None = None,
    entropy: bool = False,
    **head: object,
) -> WeightedSequenceLogps:
    """sum_s coef_s logps_s + coef_entropy_s entropy_s over the sequences that have a coefficient."""
    asked = entropy or coef_entropy is not None
    out = sequence_logps(hidden, weight, targets, cu_seqlens, entropy=asked, **head)  # type: ignore[arg-type]
    total = _sum(coef, out.logps)
    if coef_entropy is not None and out.entropy is not None:
        total = total + _sum(coef_entropy, out.entropy)
    h = None if out.entropy is None else out.entropy.detach()
    return WeightedSequenceLogps(total, out.logps.detach(), h, out.lengths, out.token_logps.detach())


def reduce_sequences(
    tokens: TokenLogps | TokenScores,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    average: bool,
    ignore_index: int,
    total: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = segment_sum,
) -> SequenceLogps:
    """Token results to sequence results; total sums over segments."""
    lengths = total((targets != ignore_index).double(), cu_seqlens).long()
    sums = [None if x is None else total(x, cu_seqlens) for x in (tokens.logps, tokens.entropy)]
    if average:
        sums = [None if x is None else x / lengths.clamp_min(1) for x in sums]
    assert sums[0] is not None
    return SequenceLogps(sums[0], sums[1], lengths, tokens.logps)
