"""Sums over consecutive segments of a vector: token log-probs into sequence log-probs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import Signature, on_device
from ._launch import cdiv

_BLOCK = 1024


@triton.jit
def _segment_sum_fwd_kernel(values_ptr, cu_ptr, out_ptr, N, BLOCK: tl.constexpr):
    # One program per segment, one fixed order of additions: two runs agree bitwise, as atomics would not.
    s = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_ptr + s).to(tl.int64)
    end = tl.load(cu_ptr + s + 1).to(tl.int64)
    # Offsets are not checked on a GPU unless asked: a wrong segment becomes NaN and reads nothing outside.
    valid = (start >= 0) & (start <= end) & (end <= N)
    end = tl.where(valid, end, start)
    # Whatever is summed: a lane of float32 loses digits with each of its N / BLOCK additions.
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, end, BLOCK):
        offs = first + tl.arange(0, BLOCK)  # int64: N may pass 2**31
        total += tl.load(values_ptr + offs, mask=offs < end, other=0.0).to(tl.float64)
    tl.store(out_ptr + s, tl.where(valid, tl.sum(total, 0), float("nan")))


@triton.jit
def _segment_sum_bwd_kernel(grad_ptr, cu_ptr, out_ptr, N, S, steps, BLOCK: tl.constexpr):
    # A program per block of tokens, not per segment: a single long sequence still fills the device.
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = t < N
    low = tl.zeros((BLOCK,), tl.int64)
    high = tl.zeros((BLOCK,), tl.int64) + S
    # Last s with cu[s] <= t, so that empty segments before t's own are passed over.
    for _ in range(steps):
        mid = (low + high) // 2
        right = tl.load(cu_ptr + mid) <= t
        low = tl.where(right, mid, low)
        high = tl.where(right, high, mid)
    inside = (tl.load(cu_ptr + low) <= t) & (t < tl.load(cu_ptr + low + 1))
    grad = tl.load(grad_ptr + low, mask=live, other=0.0)
    tl.store(out_ptr + t, tl.where(inside, grad, float("nan")), mask=live)


def segment_sum_fwd(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sum of each segment, out_s = sum_{cu_s <= t < cu_{s+1}} values_t.

    Args:
        values: (N,), any float dtype.
        cu_seqlens: (S + 1,), int32 or int64, from 0 to N, never falling; on the device of values.

    Returns:
        (S,) float32, float64 for float64 values; sums are kept in float64.
    """
    n_segments = cu_seqlens.numel() - 1
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    out = torch.empty(n_segments, dtype=dtype, device=values.device)
    if n_segments:
        with on_device(values):
            _segment_sum_fwd_kernel[(n_segments,)](
                values.contiguous(), cu_seqlens.contiguous(), out, values.numel(), BLOCK=_BLOCK
            )
    return out


def segment_sum_bwd(grad: torch.Tensor, cu_seqlens: torch.Tensor, n: int) -> torch.Tensor:
    """Gradient of segment_sum_fwd: each of the n tokens gets its segment's entry of grad.

    Args:
        grad: (S,), any float dtype.
        cu_seqlens: (S + 1,), int32 or int64, as the forward had it.
        n: number of tokens N.

    Returns:
        (n,) in grad's dtype; NaN for a token that no segment holds.
    """
    n_segments = cu_seqlens.numel() - 1
    if n_segments == 0:
        return grad.new_full((n,), float("nan"))
    out = grad.new_empty(n)
    if n:
        with on_device(grad):
            _segment_sum_bwd_kernel[(cdiv(n, _BLOCK),)](
                *(grad.contiguous(), cu_seqlens.contiguous(), out, n, n_segments),
                steps=n_segments.bit_length(),
                BLOCK=_BLOCK,
            )
    return out


COMPILE = [
    *(
        Signature(
            _segment_sum_fwd_kernel,
            {"values_ptr": values, "cu_ptr": cu, "out_ptr": out, "N": "i64"},
            {"BLOCK": _BLOCK},
            hot=True,
        )
        for values, cu, out in (
            ("*fp32", "*i32", "*fp32"),
            ("*bf16", "*i64", "*fp32"),
            ("*fp64", "*i64", "*fp64"),
        )
    ),
    *(
        Signature(
            _segment_sum_bwd_kernel,
            {"grad_ptr": grad, "cu_ptr": cu, "out_ptr": grad, "N": "i64", "S": "i32", "steps": "i32"},
            {"BLOCK": _BLOCK},
            hot=True,
        )
        for grad, cu in (("*fp32", "*i32"), ("*fp64", "*i64"))
    ),
]
