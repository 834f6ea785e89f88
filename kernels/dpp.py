"""DPP: log-determinants, gains and baselines of groups of embeddings, and their gradients; for NVIDIA and AMD.

A program per group, the k x k algebra padded to a power of two and kept in registers, in float64. Groups whose
rows depend on each other at a high quality or a small ridge are marked by the first kernel and done again by
the one of dpp_careful.py, with float64 products. Formulae and both paths: docs/dpp.md.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._common import on_device
from ._dpp import (
    BLOCK_D,
    diagonal,
    fill_orphans,
    gram,
    keep_rows,
    load_square,
    log_scale,
    of_column,
    of_row,
    ridge_of,
    rows_of,
    shares,
    signature,
    span,
    store_results,
    store_square,
    sweep,
)
from .dpp_careful import CAREFUL_WARPS, _dpp_careful_kernel

# 1 - R_i^2 = 1 / (A_ii (A^-1)_ii) below which float32 products, off by 1e-7 or so, would be off by more than 2^8
# times that in the answer; and the squared lengths between which they neither overflow nor lose digits.
_INDEPENDENT = tl.constexpr(1.0 / 256)
_SHORTEST, _LONGEST = tl.constexpr(1e-24), tl.constexpr(1e30)


@triton.jit(do_not_specialize=["G", "M", "k", "pitch", "ridge_exponent"])
def _dpp_fwd_kernel(
    x_ptr,
    log_quality_ptr,
    offsets_ptr,
    logdet_ptr,
    gains_ptr,
    baselines_ptr,
    p_ptr,
    q_ptr,
    line_ptr,
    careful_ptr,
    G,
    M,
    k,
    d,
    pitch,
    ridge_high,
    ridge_low,
    ridge_exponent,
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
        in_range = (square >= _SHORTEST) & (square <= _LONGEST)
        scale = tl.exp(log_s - log_d)
        ridge = ridge_of(ridge_high, ridge_low, ridge_exponent) * tl.exp(-2 * log_d)
        unit = scale / tl.where(in_range, length, 1.0)
        a = tl.where(both, unit[:, None] * products * unit[None, :], 0.0)
        own = tl.where(live, scale * scale + ridge, 1.0)
        a = tl.where(same, own[:, None], a)

        negative, pivots = sweep(a, size, BLOCK_K)
        inverse = -diagonal(negative, BLOCK_K)
        # A comparison with NaN is false.
        fine = in_range & (pivots > 0) & (inverse > 0) & (inverse * own * _INDEPENDENT < 1)
        trusted = tl.sum(tl.where(live & ~fine, 1, 0), 0) == 0
        tl.store(careful_ptr + g, tl.where(trusted, 0, 1))
        if trusted:
            root = 1.0 / tl.sqrt(inverse)
            p = tl.where(same, 1.0, -negative * root[:, None] * root[None, :])
            gains = 2 * log_d - tl.log(inverse)
            log_rest = tl.where(both & ~same, tl.log(tl.where(same, 1.0, 1.0 - p * p)), 0.0)
            others = tl.where(both & ~same, gains[None, :], 0.0)
            baselines = tl.sum(others - log_rest, 1)
            logdet = tl.sum(tl.where(live, tl.log(pivots) + 2 * log_d, 0.0), 0)
            store_results(logdet_ptr, gains_ptr, baselines_ptr, g, at, live, size, logdet, gains, baselines)
            keep_rows(line_ptr, at, live, scale / root, ridge * inverse, length)
            store_square(p_ptr, start, size, pitch, p, BLOCK_K)


@triton.jit(do_not_specialize=["G", "M", "k", "pitch"])
def _dpp_bwd_kernel(
    x_ptr,
    offsets_ptr,
    grad_logdet_ptr,
    grad_gains_ptr,
    grad_x_ptr,
    grad_quality_ptr,
    p_ptr,
    q_ptr,
    line_ptr,
    careful_ptr,
    G,
    M,
    k,
    d,
    pitch,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    REST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    start, size, valid = span(offsets_ptr, g, M, k)
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
        grad_logdet = tl.load(grad_logdet_ptr + g).to(tl.float64)
        grad_gains = tl.load(grad_gains_ptr + at, mask=live, other=0.0).to(tl.float64)
        factor = tl.load(line_ptr + 3 * at, mask=live, other=0.0)
        ridge_m = tl.load(line_ptr + 3 * at + 1, mask=live, other=0.0)
        length = tl.load(line_ptr + 3 * at + 2, mask=live, other=0.0)
        p = load_square(p_ptr, start, size, pitch, BLOCK_K)
        q = p * factor[None, :]
        if careful:
            q = load_square(q_ptr, start, size, pitch, BLOCK_K)

        # W_ij = 2 r_i sum_l (gl delta_il + P_il gg_l) Q_lj, the gradient of unit rows.
        w = grad_logdet * q
        weighted = p * grad_gains[None, :]
        for n in range(0, size):
            w += of_column(weighted, n, BLOCK_K)[:, None] * of_row(q, n, BLOCK_K)[None, :]
        w = 2 * factor[:, None] * w
        quality = grad_logdet + grad_gains - ridge_m * (grad_logdet + tl.sum(weighted * p, 1))
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


def split_ridge(ridge: float) -> tuple[float, float, int]:
    """ridge = (high + low) 2^exponent to 48 bits, each a float32."""
    mantissa, exponent = math.frexp(ridge)
    high = float(torch.tensor(mantissa, dtype=torch.float32))
    return high, mantissa - high, exponent


def dpp_fwd(
    x: torch.Tensor,
    log_quality: torch.Tensor | None,
    offsets: torch.Tensor | None,
    k: int,
    ridge: float,
    normalize: bool,
    kept: tuple[torch.Tensor, ...],
    out: tuple[torch.Tensor, ...],
) -> None:
    """Fill out = (logdet, gains, baselines) and kept = (P, Q, rows, careful) of qempo_fast/_dpp_gpu.py.

    Args:
        x: (M, d) contiguous, float32, bfloat16 or float16.
        log_quality: (M,) float64, or None for 0.
        offsets: (G + 1,) int64, or None for groups of k rows.
        k: size of equal groups; unused with offsets.
        ridge: above 0.
        normalize: whether rows are scaled to length 1.
        kept: P and Q (M, pitch) float64, rows (M, 3) float64, careful (G,) int32.
        out: (G,), (M,), (M,) float32.
    """
    groups, pitch = out[0].numel(), kept[0].shape[1]
    for share in shares(k, x.shape[0], offsets is not None) if groups else ():
        common = (k, x.shape[1], pitch, *split_ridge(ridge))
        constants = {"NORMALIZE": normalize, "BLOCK_D": BLOCK_D, **share}
        with on_device(x):
            tensors = (x, log_quality, offsets, *out, *kept)
            # Triton's interpreter multiplies the bits of bfloat16 in tl.dot.
            widen = x.dtype == torch.bfloat16 and not x.is_cuda
            _dpp_fwd_kernel[(groups,)](*tensors, groups, x.shape[0], *common, WIDEN=widen, **constants)
            del constants["REST"]
            constants["num_warps"] = CAREFUL_WARPS
            _dpp_careful_kernel[(groups,)](*tensors, x.shape[0], *common, **constants)


def dpp_bwd(
    x: torch.Tensor,
    offsets: torch.Tensor | None,
    k: int,
    normalize: bool,
    kept: tuple[torch.Tensor, ...],
    grads: tuple[torch.Tensor | None, ...],
) -> None:
    """Fill the gradients of x and log_quality.

    Args:
        x, offsets, k, normalize, kept: as in dpp_fwd, which filled kept.
        grads: incoming of logdet (G,) and gains (M,), float32; of x, to fill, (M, d) in its dtype; of
            log_quality, to fill, (M,) float32 or None.
    """
    groups, pitch = kept[3].numel(), kept[0].shape[1]
    for share in shares(k, x.shape[0], offsets is not None) if groups else ():
        with on_device(x):
            sizes = (groups, x.shape[0], k, x.shape[1], pitch)
            _dpp_bwd_kernel[(groups,)](x, offsets, *grads, *kept, *sizes, NORMALIZE=normalize, BLOCK_D=BLOCK_D, **share)


# 56 scalar registers of k = 32 spill on gfx942, into vector registers.
COMPILE = [
    signature(kernel, x, k, ragged, hot=k <= 16)
    for kernel in (_dpp_fwd_kernel, _dpp_bwd_kernel)
    for x, k, ragged in (("*fp32", 16, False), ("*bf16", 16, False), ("*bf16", 32, False), ("*fp16", 64, True))
]
