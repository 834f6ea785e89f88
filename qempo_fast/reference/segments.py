"""Sums over segments in plain torch."""

from __future__ import annotations

import torch


def segment_sum(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """out_s = sum of values[cu_seqlens[s] : cu_seqlens[s + 1]]; half precision is summed in float32.

    Args:
        values: (N,) floating point.
        cu_seqlens: (S + 1,) int32 or int64, from 0 to N.
    """
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    if cu_seqlens.numel() == 1:
        return values.sum().reshape(1)[:0]  # S = 0: empty, with the graph connected
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), initial=0.0, unsafe=True)
