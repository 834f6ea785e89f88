"""DPP: log-determinants, gains and baselines of groups of embeddings, and their gradients; for NVIDIA and AMD.

A program per group, the k x k algebra padded to a power of two and kept in registers, in float64. Groups whose
rows depend on each other at a high quality or a small ridge are marked by the first kernel and done again by
the one of dpp_careful.py, with float64 products. Formulae and both paths: docs/dpp.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import on_device
from ._dpp import (
    diagonal,
    fill_orphans,
    gram,
    keep_rows,
    kept_in,
    load_square,
    log_scale,
    of_column,
    of_row,
    rows_of,
    shares,
    signature,
    span,
    store_results,
    store_square,
    sweep,
)
from ._launch import architecture
from .dpp_careful import _dpp_careful_kernel


# Types beside the arguments save the launch from asking for them, and ridge from coming as float32, which 1e-50 leaves.
@triton.jit(do_not_specialize=["G", "M", "k"])
def _dpp_fwd_kernel(
    x_ptr,
    log_quality_ptr,
    offsets_ptr,
    logdet_ptr,
    gains_ptr,
    baselines_ptr,
    kept_ptr,
    G: tl.int64,
    M: tl.int64,
    k: tl.int32,
    d,
    ridge: tl.float64,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    REST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    start, size, valid = span(offsets_ptr, g, M, k)
    p_ptr, _, line_ptr, careful_ptr, pitch = kept_in(kept_ptr, offsets_ptr, M, k)
    if REST and offsets_ptr is not None:
        fill_orphans(gains_ptr, offsets_ptr, g, G, M, start, size, valid, 1, BLOCK_D)
        fill_orphans(baselines_ptr, offsets_ptr, g, G, M, start, size, valid, 1, BLOCK_D)
        if not valid:
            tl.store(logdet_ptr + g, float("nan"))
    if valid & (size >= LOW) & (size <= HIGH):
        i = tl.arange(0, BLOCK_K)
        live = i < size
        same = i[:, None] == i[None, :]
        both = live[:, None] & live[None, :]
        at = start + i
        products = gram(x_ptr, start, size, d, WIDEN, BLOCK_K, BLOCK_D)
        square = diagonal(products, BLOCK_K)
        length = tl.sqrt(square)
        log_s = log_scale(log_quality_ptr, at, live, length, NORMALIZE)
        log_d = tl.maximum(log_s, 0.0)
        # Squared lengths between which float32 products neither overflow nor lose digits.
        in_range = (square >= 1e-24) & (square <= 1e30)
        scale = tl.exp(log_s - log_d)
        ridges = (tl.zeros((), tl.float64) + ridge) * tl.exp(-2 * log_d)
        unit = scale / tl.where(in_range, length, 1.0)
        a = tl.where(both, unit[:, None] * products * unit[None, :], 0.0)
        own = tl.where(live, scale * scale + ridges, 1.0)
        a = tl.where(same, own[:, None], a)

        negative, pivots = sweep(a, size, BLOCK_K)
        inverse = -diagonal(negative, BLOCK_K)
        # Where 1 - R_i^2 = 1 / (A_ii (A^-1)_ii) is below 1 / 256, float32 products, off by 1e-7 or so, would be off by
        # more than 2^8 times that in the answer. A comparison with NaN is false.
        fine = in_range & (pivots > 0) & (inverse > 0) & (inverse * own < 256)
        trusted = tl.sum(tl.where(live & ~fine, 1, 0), 0) == 0
        tl.store(careful_ptr + g, tl.where(trusted, 0.0, 1.0).to(tl.float64))
        if trusted:
            root = 1.0 / tl.sqrt(inverse)
            p = tl.where(same, 1.0, -negative * root[:, None] * root[None, :])
            gains = 2 * log_d - tl.log(inverse)
            log_rest = tl.where(both & ~same, tl.log(tl.where(same, 1.0, 1.0 - p * p)), 0.0)
            others = tl.where(both & ~same, gains[None, :], 0.0)
            baselines = tl.sum(others - log_rest, 1)
            logdet = tl.sum(tl.where(live, tl.log(pivots) + 2 * log_d, 0.0), 0)
            store_results(logdet_ptr, gains_ptr, baselines_ptr, g, at, live, size, logdet, gains, baselines)
            keep_rows(line_ptr, at, live, scale / root, ridges * inverse, length)
            store_square(p_ptr, start, size, pitch, p, BLOCK_K)


@triton.jit(do_not_specialize=["G", "M", "k"])
def _dpp_bwd_kernel(
    x_ptr,
    offsets_ptr,
    grad_logdet_ptr,
    grad_gains_ptr,
    grad_x_ptr,
    grad_quality_ptr,
    kept_ptr,
    G: tl.int64,
    M: tl.int64,
    k: tl.int32,
    d,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    REST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    start, size, valid = span(offsets_ptr, g, M, k)
    p_ptr, q_ptr, line_ptr, careful_ptr, pitch = kept_in(kept_ptr, offsets_ptr, M, k)
    if REST and offsets_ptr is not None:
        fill_orphans(grad_x_ptr, offsets_ptr, g, G, M, start, size, valid, d, BLOCK_D)
        if grad_quality_ptr is not None:
            fill_orphans(grad_quality_ptr, offsets_ptr, g, G, M, start, size, valid, 1, BLOCK_D)
    if valid & (size >= LOW) & (size <= HIGH):
        i = tl.arange(0, BLOCK_K)
        live = i < size
        same = i[:, None] == i[None, :]
        at = start + i
        careful = tl.load(careful_ptr + g) != 0
        # A gradient that is not there is 0.
        grad_logdet = tl.zeros((), tl.float64)
        if grad_logdet_ptr is not None:
            grad_logdet += tl.load(grad_logdet_ptr + g).to(tl.float64)
        factor = tl.load(line_ptr + 3 * at, mask=live, other=0.0)
        ridge_m = tl.load(line_ptr + 3 * at + 1, mask=live, other=0.0)
        length = tl.load(line_ptr + 3 * at + 2, mask=live, other=0.0)
        p = load_square(p_ptr, start, size, pitch, BLOCK_K)
        q = p * factor[None, :]
        if careful:
            q = load_square(q_ptr, start, size, pitch, BLOCK_K)

        # W_ij = 2 r_i sum_l (gl delta_il + P_il gg_l) Q_lj, the gradient of unit rows.
        w = grad_logdet * q
        quality = grad_logdet - ridge_m * grad_logdet
        if grad_gains_ptr is not None:
            grad_gains = tl.load(grad_gains_ptr + at, mask=live, other=0.0).to(tl.float64)
            weighted = p * grad_gains[None, :]
            for n in range(0, size):
                w += of_column(weighted, n, BLOCK_K)[:, None] * of_row(q, n, BLOCK_K)[None, :]
            quality = grad_logdet + grad_gains - ridge_m * (grad_logdet + tl.sum(weighted * p, 1))
        w = 2 * factor[:, None] * w
        # A row of zeros has no direction in which its quality could count.
        quality = tl.where(length == 0, 0.0, quality)
        if grad_quality_ptr is not None:
            tl.store(grad_quality_ptr + at, quality.to(tl.float32), mask=live)
        if NORMALIZE:
            w -= tl.where(same, 2 * quality[:, None], 0.0)
        inverse = tl.where(length == 0, 0.0, 1.0 / tl.where(length == 0, 1.0, length))
        w = w * inverse[:, None] * inverse[None, :]
        if careful:
            for c in range(0, d, BLOCK_D):
                e = c + tl.arange(0, BLOCK_D)
                sums = tl.zeros((BLOCK_K, BLOCK_D), tl.float64)
                for j in range(0, size):
                    row = tl.load(x_ptr + (start + j) * d + e, mask=e < d, other=0.0).to(tl.float64)
                    sums += of_column(w, j, BLOCK_K)[:, None] * row[None, :]
                out = grad_x_ptr + at[:, None] * d + e[None, :]
                mask = live[:, None] & (e[None, :] < d)
                tl.store(out, sums.to(tl.float32).to(grad_x_ptr.dtype.element_ty), mask=mask)
        else:
            weights = w.to(tl.float32)
            for c in range(0, d, BLOCK_D):
                x = rows_of(x_ptr, start, size, d, c, BLOCK_K, BLOCK_D).to(tl.float32)
                # W in bfloat16 would lose what the gradient keeps: the product is float32's for all.
                sums = tl.dot(weights, x, input_precision="ieee")
                e = c + tl.arange(0, BLOCK_D)
                out = grad_x_ptr + at[:, None] * d + e[None, :]
                mask = live[:, None] & (e[None, :] < d)
                tl.store(out, sums.to(grad_x_ptr.dtype.element_ty), mask=mask)


def dpp_fwd(x, log_quality, offsets, groups, k, ridge, normalize, kept, out) -> None:
    """Fill out = (logdet, gains, baselines) and kept.

    Args:
        x: (G, k, d), or (M, d) with offsets; contiguous, float32, bfloat16 or float16.
        log_quality: as many as rows, any float dtype, contiguous; None for 0.
        offsets: (G + 1,) int64, or None for groups of k rows.
        groups: G, at least 1.
        k: size of equal groups; 0 with offsets.
        ridge: above 0.
        normalize: whether rows are scaled to length 1.
        kept: float64, laid out by kept_parts of qempo_fast/dpp/_gpu.py.
        out: (G,), (M,), (M,) float32.
    """
    rows = groups * k or x.shape[0]
    tensors = (x, log_quality, offsets, *out, kept)
    sizes = (rows, k, x.shape[-1], ridge)
    # Triton's interpreter multiplies the bits of bfloat16 in tl.dot.
    widen = x.dtype == torch.bfloat16 and architecture(x.device) == "interpreter"
    with on_device(x):
        for share in shares(k, rows <= 16):
            _dpp_fwd_kernel[(groups,)](*tensors, groups, *sizes, NORMALIZE=normalize, WIDEN=widen, **share.direct)
            _dpp_careful_kernel[(groups,)](*tensors, *sizes, NORMALIZE=normalize, **share.careful)


def dpp_bwd(x, offsets, groups, k, normalize, kept, grads) -> None:
    """Fill the gradients of x and log_quality.

    Args:
        x, offsets, groups, k, normalize, kept: as in dpp_fwd, which filled kept.
        grads: incoming of logdet (G,) and gains (M,), float32, or None for 0; of x, to fill, like x; of log_quality, to
            fill, (M,) float32 or None.
    """
    rows = groups * k or x.shape[0]
    with on_device(x):
        for share in shares(k, rows <= 16):
            sizes = (groups, rows, k, x.shape[-1])
            _dpp_bwd_kernel[(groups,)](x, offsets, *grads, kept, *sizes, NORMALIZE=normalize, **share.direct)


# 56 scalar registers of k = 32 spill on gfx942, into vector registers.
COMPILE = [
    signature(kernel, x, k, ragged, hot=k <= 16)
    for kernel in (_dpp_fwd_kernel, _dpp_bwd_kernel)
    for x, k, ragged in (("*fp32", 16, False), ("*bf16", 16, False), ("*bf16", 32, False), ("*fp16", 64, True))
] + [
    signature(_dpp_bwd_kernel, "*fp32", 16, False, (lone,), hot=True) for lone in ("grad_logdet_ptr", "grad_gains_ptr")
]
