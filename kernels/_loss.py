"""What the loss kernels share: exponentials that keep their digits, rows of ragged groups, one sum over all programs.

Scores are few, so a loss is bound by its launches: each is one, and its last program to finish adds up the rest.
Sums and differences of scores are in float64, exponentials in the dtype of the scores. docs/losses_gpu.md says why.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._dpp import fill


@triton.jit
def number(x):
    """The float64 whose bits() were passed."""
    return x.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def product(weight, score):
    """weight times score; 0 where the weight is, though the score be infinite."""
    return tl.where((weight == 0) & (score == score), 0.0, weight * score)


@triton.jit
def total(value, room_ptr, out_ptr):
    """Store the sum of a float64 over all programs, in their order; the last program to arrive computes it."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if room_ptr is None:
        tl.store(out_ptr, value.to(dtype))
    else:
        programs = tl.num_programs(0)
        tl.store(room_ptr + 1 + tl.program_id(0), value.to(tl.int64, bitcast=True))
        # Whichever thread stored, the barrier puts it before the release of the one that counts.
        tl.debug_barrier()
        arrived = tl.atomic_add(room_ptr, 1, sem="acq_rel", scope="gpu")
        if arrived == programs - 1:
            sums = tl.zeros((256,), tl.float64)
            for first in range(0, programs, 256):
                at = first + tl.arange(0, 256)
                sums += tl.load(room_ptr + 1 + at, mask=at < programs, other=0).to(tl.float64, bitcast=True)
            tl.store(out_ptr, tl.sum(sums, 0).to(dtype))
            tl.store(room_ptr, 0)


@triton.jit
def own_rows(B, BLOCK: tl.constexpr):
    """The rows of this program, and which of them there are."""
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return b, b < B


@triton.jit
def store_rows(loss, b, live, room_ptr, out_ptr, REDUCTION: tl.constexpr):
    """Store the losses of rows b, each its own for "none", else the sum of all."""
    if REDUCTION == "none":
        tl.store(out_ptr + b, loss.to(out_ptr.dtype.element_ty), mask=live)
    else:
        total(tl.sum(tl.where(live, loss, 0.0), 0), room_ptr, out_ptr)


@triton.jit
def spans(offsets_ptr, g, G, S, k):
    """First row and size of each group of a block g, cut to [0, S), and whether its offsets are wrong."""
    live = g < G
    if offsets_ptr is None:
        return g * k, tl.where(live, k, 0).to(tl.int64), g < 0
    else:
        begin = tl.load(offsets_ptr + g, mask=live, other=0).to(tl.int64)
        end = tl.load(offsets_ptr + g + 1, mask=live, other=0).to(tl.int64)
        low = tl.minimum(tl.maximum(begin, 0), S)
        high = tl.minimum(tl.maximum(end, 0), S)
        return low, tl.maximum(high - low, 0), (low != begin) | (high != end) | (end < begin)


@triton.jit
def uncovered(coef_ptr, offsets_ptr, G, S, BLOCK: tl.constexpr):
    """NaN into the rows before the first group and behind the last, and NaN to add to the loss where there are any."""
    if offsets_ptr is None:
        return tl.zeros((), tl.float64)
    else:
        begin = tl.load(offsets_ptr).to(tl.int64)
        end = tl.load(offsets_ptr + G).to(tl.int64)
        zero = tl.zeros((), tl.int64)
        fill(coef_ptr, zero, tl.minimum(tl.maximum(begin, 0), S), BLOCK)
        fill(coef_ptr, tl.minimum(tl.maximum(end, 0), S), zero + S, BLOCK)
        return tl.where((begin != 0) | (end != S), float("nan"), 0.0).to(tl.float64)


@triton.jit
def exponential(x):
    """e^x within a few units of rounding: the GPU's float32 exp is 2^x' of a rounded x', off by |x| units."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        # Beyond, the result is 0 or infinity; infinity less infinity would be NaN. A NaN fails both comparisons.
        x = tl.where(x < -200.0, -200.0, tl.where(x > 200.0, 200.0, x))
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        # n times 355/512 is exact; the second number is the rest of log 2.
        r = (x - n * 0.693359375) + n * 2.12194440054690583e-4
        return tl.exp(r) * tl.exp2(n)


@triton.jit
def log1p(x):
    """log(1 + x) of x in [0, 1], as 2 artanh(x / (2 + x)); the first term left out is under half a unit of rounding."""
    terms: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    t = x / (2.0 + x)
    p = tl.full(x.shape, 1.0 / (2 * terms + 1), x.dtype)
    for i in tl.static_range(terms):
        p = p * t * t + 1.0 / (2 * (terms - i) - 1)
    return 2.0 * t * p


@triton.jit
def softplus(x):
    """log(1 + e^x) and its derivative, the sigmoid of x."""
    e = exponential(-tl.abs(x))
    return tl.maximum(x, 0.0) + log1p(e), tl.where(x > 0, 1.0, e) / (1.0 + e)
