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
def capped(raw, bias, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits before the temperature; bias is a (1, columns) block or None."""
    x = raw
    if bias is not None:
        x = x + bias
    if SCALE != 1.0:
        x = x * SCALE
    if SOFTCAP is not None:
        # tanh y = -expm1(-2y) / (2 + expm1(-2y)) for y >= 0; Triton has no tanh of its own on every target.
        m = expm1(tl.abs(x) * (-2.0 / SOFTCAP))
        t = SOFTCAP * (-m / (2.0 + m))
        x = tl.where(x < 0, -t, t)
    return x


@triton.jit
def merge(peak_a, sum_a, sum_z_a, sum_sq_a, peak_b, sum_b, sum_z_b, sum_sq_b):
    """Statistics of two disjoint sets of columns as one: max, sum e^d, sum d e^d, sum e^2d with d = z - max."""
    peak = tl.maximum(peak_a, peak_b)
    low = float("-inf")
    # A side without a finite logit has sum 0, and -inf - -inf would be NaN.
    shift_a = tl.where(peak_a > low, peak_a - peak, 0.0)
    shift_b = tl.where(peak_b > low, peak_b - peak, 0.0)
    k_a = tl.exp(shift_a)
    k_b = tl.exp(shift_b)
    total = k_a * sum_a + k_b * sum_b
    total_z = k_a * (sum_z_a + sum_a * shift_a) + k_b * (sum_z_b + sum_b * shift_b)
    total_sq = k_a * k_a * sum_sq_a + k_b * k_b * sum_sq_b
    return peak, total, total_z, total_sq


@triton.jit
def block_stats(x, ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr):
    """Statistics of each row of x (rows, columns); -inf adds nothing."""
    peak = tl.max(x, 1)
    d = x - tl.where(peak > float("-inf"), peak, 0.0)[:, None]
    e = tl.exp(d)
    total = tl.sum(e, 1)
    total_z = total * 0.0
    total_sq = total * 0.0
    if ENTROPY:
        # 0 * -inf is NaN: a masked logit has e = 0.
        total_z = tl.sum(tl.where(e > 0, e * d, 0.0), 1)
    if SUM_SQ:
        total_sq = tl.sum(e * e, 1)
    return peak, total, total_z, total_sq
