"""Device functions that the log-prob kernels share: the head's last steps and the online softmax."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    # exp(x) - 1 keeps no digit near 0: Taylor there. The first term left out, x^terms / (terms + 1)!, is under
    # half a unit of rounding at |x| = 1/2.
    terms: tl.constexpr = 14 if x.dtype == tl.float64 else 8
    p = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(terms - 1):
        p = 1.0 + p * x * (1.0 / (terms - i))
    return tl.where(tl.abs(x) < 0.5, x * p, tl.exp(x) - 1.0)


@triton.jit
def exp(x, FAST: tl.constexpr = True):
    """e^x; 0 under 2^-126 in float32."""
    # exp2 is one instruction of the GPU; tl.exp is four, the others for results that small, which add nothing here.
    # Triton 3.9 fails on exp2 where it gives loads and products warps of their own.
    return tl.exp2(x * 1.4426950408889634) if FAST and x.dtype != tl.float64 else tl.exp(x)


@triton.jit
def capped(raw, bias, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HALF: tl.constexpr, FAST: tl.constexpr = True):
    """Logits before the temperature; bias is a block that fits raw, or None. HALF: raw was rounded to 16 bits."""
    x = raw
    if bias is not None:
        x = x + bias
    if SCALE != 1.0:
        x = x * SCALE
    if SOFTCAP is not None:
        if HALF and SOFTCAP <= 256.0:
            # tanh y = 1 - 2 / (1 + e^2y) is off by 2e-7, by twice that with exp2 and reciprocal of a GPU, and a logit
            # by as much of the cap: less than the rounding of a bfloat16 from 2^-12 of the cap on, of a float16 from
            # 2^-9 on; of a cap of 256 it is 1e-4. The digits near 0 that expm1 keeps took half of the instructions.
            x = SOFTCAP - (2.0 * SOFTCAP) / (1.0 + exp(x * (2.0 / SOFTCAP), FAST))
        else:
            # tanh y = -expm1(-2y) / (2 + expm1(-2y)) for y >= 0; Triton has no tanh of its own on every target.
            m = expm1(tl.abs(x) * (-2.0 / SOFTCAP))
            t = SOFTCAP * (-m / (2.0 + m))
            x = tl.where(x < 0, -t, t)
    return x


@triton.jit
def _moved(total, total_z, shift, k):
    """Sum of d e^d after the maximum has risen by -shift, k = e^shift."""
    # Beside a mask fill of float32's least number the shift times a sum is -inf, and 0 * -inf is NaN.
    return k * (total_z + total * tl.maximum(shift, -1000.0))


@triton.jit
def nan_max(a, b):
    """The larger; NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bound_of(peak, total, floor):
    """The larger of a log-sum-exp, rounded down, and floor; NaN where total is."""
    # Rounded up, beside a peak of -1e9 it is up to 64 above what it bounds, and no column would ever be kept.
    log_sum = tl.log(total)
    lse = peak + log_sum
    ulp: tl.constexpr = 2.3e-16 if lse.dtype == tl.float64 else 1.2e-7
    lse = tl.where(lse - peak > log_sum, tl.maximum(peak, lse - ulp * tl.abs(lse)), lse)
    return tl.where(floor > lse, floor, lse)


@triton.jit
def merge(peak_a, sum_a, sum_z_a, sum_sq_a, peak_b, sum_b, sum_z_b, sum_sq_b, FAST: tl.constexpr = True):
    """Statistics of two disjoint sets of columns as one: max, sum e^d, sum d e^d, sum e^2d with d = z - max."""
    peak = tl.maximum(peak_a, peak_b)
    low = float("-inf")
    # A side without a finite logit has sum 0, and -inf - -inf would be NaN.
    shift_a = tl.where(peak_a > low, peak_a - peak, 0.0)
    shift_b = tl.where(peak_b > low, peak_b - peak, 0.0)
    k_a = exp(shift_a, FAST)
    k_b = exp(shift_b, FAST)
    total = k_a * sum_a + k_b * sum_b
    total_z = _moved(sum_a, sum_z_a, shift_a, k_a) + _moved(sum_b, sum_z_b, shift_b, k_b)
    total_sq = k_a * k_a * sum_sq_a + k_b * k_b * sum_sq_b
    return peak, total, total_z, total_sq


@triton.jit
def block_stats(x, ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr, FAST: tl.constexpr = True):
    """Statistics of each row of x (rows, columns); -inf adds nothing."""
    peak = tl.max(x, 1)
    d = x - tl.where(peak > float("-inf"), peak, 0.0)[:, None]
    e = exp(d, FAST)
    total = tl.sum(e, 1)
    total_z = total * 0.0
    total_sq = total * 0.0
    if ENTROPY:
        # 0 * -inf is NaN: a masked logit has e = 0.
        total_z = tl.sum(tl.where(e > 0, e * d, 0.0), 1)
    if SUM_SQ:
        total_sq = tl.sum(e * e, 1)
    return peak, total, total_z, total_sq


@triton.jit
def lane_stats(x, peak, total, total_z, total_sq, ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr):
    """Statistics (rows, lanes) with x (loads, rows, lanes, entries of a load) added, each lane's to its own.

    No lane waits for another: a row's are brought together once, by joined().
    """
    low = float("-inf")
    best = tl.maximum(peak, tl.max(tl.max(x, 3), 0))
    new = tl.where(best > low, best, 0.0)
    shift = tl.where(peak > low, peak - new, 0.0)
    k = exp(shift)
    d = x - new[None, :, :, None]
    e = exp(d)
    if ENTROPY:
        total_z = _moved(total, total_z, shift, k) + tl.sum(tl.sum(tl.where(e > 0, e * d, 0.0), 3), 0)
    if SUM_SQ:
        total_sq = k * k * total_sq + tl.sum(tl.sum(e * e, 3), 0)
    total = k * total + tl.sum(tl.sum(e, 3), 0)
    return best, total, total_z, total_sq


@triton.jit
def joined(peak, total, total_z, total_sq, AXIS: tl.constexpr, ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr):
    """Statistics of disjoint sets of columns, which lie along an axis of two, as one: a fixed tree of sums."""
    low = float("-inf")
    best = tl.max(peak, AXIS)
    shift = tl.where(peak > low, peak - tl.expand_dims(best, AXIS), 0.0)
    k = exp(shift)
    all_z = tl.zeros_like(best)
    all_sq = tl.zeros_like(best)
    if ENTROPY:
        all_z = tl.sum(_moved(total, total_z, shift, k), AXIS)
    if SUM_SQ:
        all_sq = tl.sum(k * k * total_sq, AXIS)
    return best, tl.sum(k * total, AXIS), all_z, all_sq
