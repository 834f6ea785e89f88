"""Greedy choice of diverse rows from each group by incremental Cholesky: a program per group, all of it in float64.

Float32 products would order rows whose gains differ by less than 1e-7. Formulae: docs/dpp.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import on_device
from ._dpp import dependence_floor, diagonal, gram_careful, log_scale, of_column, shares, signature, span
from .dpp_careful import cosines


@triton.jit(do_not_specialize=["M", "k", "n"])
def _dpp_select_kernel(
    x_ptr,
    log_quality_ptr,
    offsets_ptr,
    picks_ptr,
    M: tl.int64,
    k: tl.int32,
    d,
    n: tl.int32,
    ridge: tl.float64,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    start, size, valid = span(offsets_ptr, g, M, k)
    possible = valid & (n <= size)
    if ~possible & REST:
        # What cannot be chosen from, in a number that no position has.
        for step in range(0, n):
            tl.store(picks_ptr + g * n + step, tl.full((), -1, tl.int64))
    if possible & (size >= LOW) & (size <= HIGH):
        i = tl.arange(0, BLOCK_K)
        live = i < size
        gram = gram_careful(x_ptr, start, size, d, BLOCK_K, BLOCK_D)
        length = tl.sqrt(diagonal(gram, BLOCK_K))
        log_s = log_scale(log_quality_ptr, start + i, live, length, True)
        finite = (length * 0 == 0) & (log_s < float("inf"))
        broken = tl.sum(tl.where(live & ~finite, 1, 0), 0) > 0
        a = cosines(gram, length, BLOCK_K)
        log_ridge = tl.log(tl.zeros((), tl.float64) + ridge)
        floor = dependence_floor(size)
        left = live
        for step in range(0, n):
            v = diagonal(a, BLOCK_K)
            signal = tl.where(v > floor, 2 * log_s + tl.log(tl.where(v > floor, v, 1.0)), float("-inf"))
            gain = tl.maximum(signal, log_ridge) + tl.log(1 + tl.exp(-tl.abs(signal - log_ridge)))
            gain = tl.where(left, gain, float("-inf"))
            # Gains within 1e-10 are a tie, which the lowest index wins.
            p = tl.min(tl.where(gain >= tl.max(gain, 0) - 1e-10, i, BLOCK_K), 0)
            tl.store(picks_ptr + g * n + step, tl.where(broken, -1, p).to(tl.int64))
            left = left & (i != p)
            # s / sqrt(ridge + s^2 v), not by way of the gain: rounding of one near 500 would leave a repetition 1e-13.
            weight = tl.where(v > floor, 1.0 / tl.sqrt(v + tl.exp(log_ridge - 2 * log_s)), 0.0)
            c = of_column(a, p, BLOCK_K) * tl.sum(tl.where(i == p, weight, 0.0), 0)
            a -= c[:, None] * c[None, :]


def dpp_select(x, log_quality, offsets, groups, k, ridge, picks) -> None:
    """Fill picks (G, n) int64, positions within each group; -1 for a group that is not finite or has wrong offsets.

    Args:
        x, log_quality, offsets, groups, k, ridge: as in dpp_fwd of kernels/dpp.py.
        picks: to fill.
    """
    rows = groups * k or x.shape[0]
    sizes = (rows, k, x.shape[-1], picks.shape[1], ridge)
    with on_device(x):
        for share in shares(k, rows <= 16):
            _dpp_select_kernel[(groups,)](x, log_quality, offsets, picks, *sizes, **share.direct)


# Not on a training step's path: spills are not felt.
COMPILE = [
    signature(_dpp_select_kernel, x, k, ragged)
    for x, k, ragged in (("*fp32", 16, False), ("*bf16", 32, False), ("*fp16", 64, True))
]
