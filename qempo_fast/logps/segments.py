"""Sums over the segments of a flat tensor."""

from __future__ import annotations

import torch

from .. import _backends, _check
from . import op


def segment_sum(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sum a flat tensor over segments; deterministic, differentiable in values.

    out_s = sum_{i = cu_seqlens[s]}^{cu_seqlens[s + 1] - 1} values_i, in float64 whatever values are, and rounded once
    at the end; 0 for an empty segment.

    Args:
        values: (N,) float16, bfloat16, float32 or float64.
        cu_seqlens: (S + 1,) int32 or int64, from 0 to N without a fall, as flash-attn's varlen functions take it.

    Returns:
        (S,) float32, or float64 for float64 values.

    Raises:
        TypeError, ValueError: for a wrong dtype, rank, device or offsets that fall or do not cover values.
    """
    _check.tensor("values", values, ndim=1)
    _check.offsets("cu_seqlens", cu_seqlens, values.shape[0], values.device)
    return summed(values, cu_seqlens)


def summed(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """segment_sum of arguments that are checked."""
    if _check.traced(values):
        return op.segments(values, cu_seqlens, _backends.choose("segment_sum", values.device))
    return _backends.kernel("segment_sum", values.device)(values, cu_seqlens)
