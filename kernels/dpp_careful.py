"""DPP groups whose rows depend on each other at a high quality or a small ridge; the algorithm of docs/dpp.md.

Rounding of L would drown what is left of such a row, e^-1000 of it at log_quality 1000. Pivoted elimination of
the cosines gives L = N diag(delta) N^T with N unit triangular; with Y = N^-1, e = min(1, sqrt(ridge / delta)),
h = min(1, delta / ridge) and E = diag(e) Y, ridge (L + ridge I)^-1 = E^T H^-1 E, H = diag(h) + E E^T, where H is
well conditioned and a dependent row has delta = 0 exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._dpp import (
    CAREFUL_WARPS,
    dependence_floor,
    diagonal,
    gram_careful,
    keep_rows,
    kept_in,
    log_scale,
    of_column,
    of_row,
    outer_sum,
    signature,
    span,
    store_results,
    store_square,
)


@triton.jit
def cosines(gram, length, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    product = length[:, None] * length[None, :]
    cosine = gram / tl.where(product == 0, 1.0, product)
    return tl.where(product == 0, 0.0, tl.where(i[:, None] == i[None, :], 1.0, cosine))


@triton.jit
def _eliminate(a, log_s, floor, size, BLOCK: tl.constexpr):
    """Elimination by largest s^2 v (v: squared sine to the rows before): log delta, and N^-1 without its scale."""
    i = tl.arange(0, BLOCK)
    inverse = tl.where(i[:, None] == i[None, :], 1.0, tl.zeros((BLOCK, BLOCK), tl.float64))
    log_delta = tl.full((BLOCK,), float("-inf"), tl.float64)
    for _ in range(0, size):
        v = diagonal(a, BLOCK)
        # Rows whose v falls below rounding are dependent and stop there.
        live = (i < size) & (log_delta == float("-inf")) & (v > floor)
        score = tl.where(live, 2 * log_s + tl.log(tl.where(live, v, 1.0)), float("-inf"))
        best = tl.max(score, 0)
        # The lowest index of the best; BLOCK where no row is live.
        p = tl.min(tl.where(live & (score == best), i, BLOCK), 0)
        row = of_row(a, p, BLOCK)
        pivot = tl.sum(tl.where(i == p, row, 0.0), 0)
        weight = of_column(a, p, BLOCK) / tl.where(pivot == 0, 1.0, pivot)
        weight = tl.where(live & (i != p), weight, 0.0)
        a -= weight[:, None] * row[None, :]
        inverse -= weight[:, None] * of_row(inverse, p, BLOCK)[None, :]
        log_delta = tl.where(i == p, score, log_delta)
    return inverse, log_delta


@triton.jit
def _solve(h, e, z, size, BLOCK: tl.constexpr):
    """H = C C^T: the diagonal of C, C^-1 e and C^-1 z."""
    i = tl.arange(0, BLOCK)
    root = tl.full((BLOCK,), 1.0, tl.float64)
    for p in range(0, size):
        row = of_row(h, p, BLOCK)
        pivot = tl.sum(tl.where(i == p, row, 0.0), 0)
        weight = tl.where(i > p, of_column(h, p, BLOCK) / pivot, 0.0)
        h -= weight[:, None] * row[None, :]
        e -= weight[:, None] * of_row(e, p, BLOCK)[None, :]
        z -= weight[:, None] * of_row(z, p, BLOCK)[None, :]
        root = tl.where(i == p, tl.sqrt(pivot), root)
    return root, e / root[:, None], z / root[:, None]


@triton.jit
def _log_rest(u, p, size, BLOCK: tl.constexpr):
    """log(1 - P_ij^2) from unit columns u: 1 - |P| = |u_i -+ u_j|^2 / 2 keeps its digits near 0."""
    sign = tl.where(p < 0, -1.0, 1.0)
    top = tl.zeros((BLOCK, BLOCK), tl.float64)
    for c in range(0, size):
        row = of_row(u, c, BLOCK)
        top = tl.maximum(top, tl.abs(row[:, None] - sign * row[None, :]))
    # Divided by the largest first: differences reach e^-500, whose squares leave the range.
    safe = tl.where(top > 0, top, 1.0)
    sums = tl.zeros((BLOCK, BLOCK), tl.float64)
    for c in range(0, size):
        row = of_row(u, c, BLOCK)
        ratio = (row[:, None] - sign * row[None, :]) / safe
        sums += ratio * ratio
    return 2 * tl.log(top) + tl.log(sums / 2) + tl.log(1 + tl.abs(p))


@triton.jit(do_not_specialize=["M", "k"])
def _dpp_careful_kernel(
    x_ptr,
    log_quality_ptr,
    offsets_ptr,
    logdet_ptr,
    gains_ptr,
    baselines_ptr,
    kept_ptr,
    M: tl.int64,
    k: tl.int32,
    d,
    ridge: tl.float64,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    start, size, valid = span(offsets_ptr, g, M, k)
    p_ptr, q_ptr, line_ptr, careful_ptr, pitch = kept_in(kept_ptr, offsets_ptr, M, k)
    served = valid & (size >= LOW) & (size <= HIGH)
    if tl.load(careful_ptr + g, mask=served, other=0) != 0:
        i = tl.arange(0, BLOCK_K)
        live = i < size
        same = i[:, None] == i[None, :]
        at = start + i
        log_ridge = tl.log(tl.zeros((), tl.float64) + ridge)
        gram = gram_careful(x_ptr, start, size, d, BLOCK_K, BLOCK_D)
        length = tl.sqrt(diagonal(gram, BLOCK_K))
        log_s = log_scale(log_quality_ptr, at, live, length, NORMALIZE)
        floor = dependence_floor(size)
        y, log_delta = _eliminate(cosines(gram, length, BLOCK_K), log_s, floor, size, BLOCK_K)

        scale = tl.exp(tl.minimum((log_ridge - log_delta) / 2, 0.0))
        # A weight that is only rounding must not meet s_i / s_j = e^500.
        y = tl.where(tl.abs(y) <= floor, 0.0, y * tl.exp(log_s[:, None] - log_s[None, :]))
        e = scale[:, None] * tl.where(same, 1.0, y)
        independent = (log_delta > float("-inf"))[:, None] & (e != 0)
        z = tl.where(independent, e * tl.exp(log_s)[None, :], 0.0)
        transposed = tl.trans(e)
        h = outer_sum(transposed, transposed, size, BLOCK_K)
        # 1 on the padding.
        light = tl.where(live, tl.exp(tl.minimum(log_delta - log_ridge, 0.0)), 1.0)
        h += tl.where(same, light[:, None], 0.0)
        root, e, z = _solve(h, e, z, size, BLOCK_K)
        logdet = tl.where(live, 2 * tl.log(root) + tl.maximum(log_delta, log_ridge), 0.0)

        top = tl.max(tl.abs(e), 0)
        u = e / top[None, :]
        norm = tl.sqrt(tl.sum(u * u, 0))
        u = u / norm[None, :]
        gains = log_ridge - 2 * (tl.log(top) + tl.log(norm))
        # NaN and infinity reach every result of the group.
        finite = (length * 0 == 0) & (log_s < float("inf"))
        broken = tl.sum(tl.where(live & ~finite, 1, 0), 0) > 0
        gains = tl.where(broken, float("nan"), gains)
        p = outer_sum(u, u, size, BLOCK_K)
        without = gains[None, :] - _log_rest(u, p, size, BLOCK_K)
        baselines = tl.sum(tl.where(same | ~live[None, :], 0.0, without), 1)
        logdet = tl.where(broken, float("nan"), tl.sum(logdet, 0))
        store_results(logdet_ptr, gains_ptr, baselines_ptr, g, at, live, size, logdet, gains, baselines)
        factor = tl.exp(log_s - gains / 2)
        keep_rows(line_ptr, at, live, factor, tl.exp(log_ridge - gains), length)
        store_square(p_ptr, start, size, pitch, tl.where(same, 1.0, p), BLOCK_K)
        q = outer_sum(u, z, size, BLOCK_K) / tl.sqrt(tl.zeros((), tl.float64) + ridge)
        store_square(q_ptr, start, size, pitch, q, BLOCK_K)


# The rare path: spills there are not felt.
COMPILE = [
    signature(_dpp_careful_kernel, x, k, ragged, num_warps=CAREFUL_WARPS)
    for x, k, ragged in (("*fp32", 16, False), ("*bf16", 64, True))
]
