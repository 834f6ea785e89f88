"""EPA's and PoFT's losses with their coefficients, each in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import Signature
from ._launch import cdiv, power_of_2
from ._loss import exponential, log1p, number, own_rows, softplus, store_rows
from ._loss_launch import LAUNCH, bits, block_of, launch, scalar, tile


@triton.jit
def _scores(ptr, ref_ptr, b, n, first, B, COLUMNS: tl.constexpr):
    """l_j - f_j of columns first and on of the negatives of rows b, (ROWS, COLUMNS), minus infinity outside; where."""
    j = first + tl.arange(0, COLUMNS)[None, :]
    at = b[:, None] * n + j
    live = (b[:, None] < B) & (j < n)
    u = tl.load(ptr + at, mask=live, other=0.0).to(tl.float64)
    u -= tl.load(ref_ptr + at, mask=live, other=0.0).to(tl.float64)
    return tl.where(live, u, float("-inf")), at, live


@triton.jit
def _chances(u, top, beta, dtype: tl.constexpr):
    """e^(beta (u - top)); 1 where they are equal, though they be infinite."""
    return exponential((beta * tl.where(u == top, 0.0, u - top)).to(dtype))


@triton.jit
def _gather(ptr, ref_ptr, b, n, B, beta, top, sums, COLUMNS: tl.constexpr):
    """top, the largest l_j - f_j, and sum_j e^(beta (l_j - f_j - top)) with one more tensor of negatives in."""
    for first in range(0, n, COLUMNS):
        u, _, _ = _scores(ptr, ref_ptr, b, n, first, B, COLUMNS)
        higher = tl.maximum(top, tl.max(u, 1))
        # -inf - -inf would be NaN where nothing finite has come yet.
        base = tl.where(higher > float("-inf"), higher, 0.0)
        new = tl.sum(_chances(u, base[:, None], beta, sums.dtype), 1)
        sums = sums * _chances(top, base, beta, sums.dtype) + new
        top = higher
    return top, sums


@triton.jit
def _spread(ptr, ref_ptr, coef_ptr, b, n, B, beta, top, weight, COLUMNS: tl.constexpr):
    """Store the coefficients weight e^(beta (l_j - f_j - top)) of one tensor of negatives."""
    dtype: tl.constexpr = coef_ptr.dtype.element_ty
    for first in range(0, n, COLUMNS):
        u, at, live = _scores(ptr, ref_ptr, b, n, first, B, COLUMNS)
        coef = _chances(u, top[:, None], beta, dtype).to(tl.float64) * weight[:, None]
        tl.store(coef_ptr + at, coef.to(dtype), mask=live)


@triton.jit(do_not_specialize=["B", "strong", "weak", "beta"])
def _epa_loss_kernel(
    positive_ptr,
    strong_ptr,
    weak_ptr,
    ref_positive_ptr,
    ref_strong_ptr,
    ref_weak_ptr,
    coef_positive_ptr,
    coef_strong_ptr,
    coef_weak_ptr,
    out_ptr,
    room_ptr,
    B: tl.int64,
    strong: tl.int64,
    weak: tl.int64,
    beta: tl.int64,
    REDUCTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = positive_ptr.dtype.element_ty
    b, live = own_rows(B, ROWS)
    scale = number(beta)
    own = tl.load(positive_ptr + b, mask=live, other=0.0).to(tl.float64)
    own -= tl.load(ref_positive_ptr + b, mask=live, other=0.0).to(tl.float64)
    top = tl.full((ROWS,), float("-inf"), tl.float64)
    sums = tl.zeros((ROWS,), dtype)
    top, sums = _gather(strong_ptr, ref_strong_ptr, b, strong, B, scale, top, sums, COLUMNS)
    top, sums = _gather(weak_ptr, ref_weak_ptr, b, weak, B, scale, top, sums, COLUMNS)

    # Infinite tops have been counted: one has the whole chance, several have no shares. No negative at all, no sum.
    sums = tl.where((top == float("inf")) & (sums > 1), float("nan"), sums + tl.where(top == float("-inf"), 1.0, 0.0))
    # Only here the positive comes in: a mask fill there costs the negatives no digit.
    ahead = scale * (top - own)
    # m = ahead + log sums. e^-|m| comes from the two factors: m rounded at 80 would be off by 80 units.
    e = exponential(-tl.abs(ahead).to(dtype))
    e = tl.where(ahead > 0, e / sums, e * sums)
    positive = (ahead > 0) | (e > 1)
    e = tl.where((ahead <= 0) & (e > 1), 1.0 / e, e)
    m = tl.where(positive, ahead + tl.log(sums).to(tl.float64), 0.0)
    loss = m + log1p(e).to(tl.float64)
    chance = tl.where(positive, 1.0, e) / (1.0 + e)
    slope = chance.to(tl.float64) * scale
    weight = (chance / sums).to(tl.float64) * scale
    if REDUCTION == "mean":
        share = tl.full((), 1.0, tl.float64) / B
        loss *= share
        slope *= share
        weight *= share
    tl.store(coef_positive_ptr + b, (-slope).to(dtype), mask=live)
    _spread(strong_ptr, ref_strong_ptr, coef_strong_ptr, b, strong, B, scale, top, weight, COLUMNS)
    _spread(weak_ptr, ref_weak_ptr, coef_weak_ptr, b, weak, B, scale, top, weight, COLUMNS)
    store_rows(loss, b, live, room_ptr, out_ptr, REDUCTION)


@triton.jit(do_not_specialize=["B", "models", "beta", "gamma"])
def _poft_loss_kernel(
    logps_ptr,
    lengths_ptr,
    aligned_ptr,
    coef_ptr,
    out_ptr,
    room_ptr,
    B: tl.int64,
    models: tl.int64,
    beta: tl.int64,
    gamma: tl.int64,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = logps_ptr.dtype.element_ty
    b, live = own_rows(B, BLOCK)
    aligned = tl.zeros((BLOCK,), tl.float64)
    for m in range(0, models):
        aligned += tl.load(aligned_ptr + b * models + m, mask=live, other=0.0).to(tl.float64)
    each = 1.0 / tl.load(lengths_ptr + b, mask=live, other=1.0).to(tl.float64)
    own = tl.load(logps_ptr + b, mask=live, other=0.0).to(tl.float64) * each
    h = number(beta) * (own - aligned / models) + number(gamma)
    loss, slope = softplus((-h).to(dtype))
    loss = loss.to(tl.float64)
    coef = -number(beta) * slope.to(tl.float64) * each
    if REDUCTION == "mean":
        share = tl.full((), 1.0, tl.float64) / B
        loss *= share
        coef *= share
    tl.store(coef_ptr + b, coef.to(dtype), mask=live)
    store_rows(loss, b, live, room_ptr, out_ptr, REDUCTION)


def epa_loss_fwd(
    positive, strong, weak, ref_positive, ref_strong, ref_weak, *, beta=0.1, reduction="mean"
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """log(1 + sum_j e^{u_j - u_+}), u = beta (l - f), j over the strong and weak negatives, and its derivatives.

    Args:
        positive, ref_positive: (B,) contiguous, float32 or float64.
        strong, ref_strong: (B, n_strong), like them.
        weak, ref_weak: (B, n_weak), like them; one of n_strong and n_weak may be 0.
        beta: KL coefficient.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, a scalar or (B,), and its derivatives by positive, strong and weak, in their shapes.
    """
    n = positive.shape[0]
    coefs = (torch.empty_like(positive), torch.empty_like(strong), torch.empty_like(weak))
    if n == 0:
        return positive.new_zeros(() if reduction != "none" else 0), coefs
    out = scalar(positive) if reduction != "none" else positive.new_empty(n)
    elements, warps = block_of(positive.device)
    rows, columns = tile(n * max(strong.shape[1], weak.shape[1]), n, elements)
    programs = cdiv(n, rows)
    launch(
        _epa_loss_kernel,
        programs,
        (positive, strong, weak, ref_positive, ref_strong, ref_weak),
        (*coefs, out),
        (n, strong.shape[1], weak.shape[1], bits(beta)),
        (reduction, rows, columns),
        warps,
        summed=reduction != "none",
    )
    return out, coefs


def poft_loss_fwd(
    logps, lengths, aligned_mean_logps, *, beta=1.0, gamma=0.0, reduction="mean"
) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
    """-log s(h), h = beta l/|y| - beta mean_m(aligned) + gamma, and its derivative.

    Args:
        logps, lengths: (B,) contiguous, float32 or float64.
        aligned_mean_logps: (B, n_models), like them.
        beta, gamma: scale and margin.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, a scalar or (B,), and its derivative by logps, (B,).
    """
    n = logps.shape[0]
    coef = torch.empty_like(logps)
    if n == 0:
        return logps.new_zeros(() if reduction != "none" else 0), (coef,)
    out = scalar(logps) if reduction != "none" else logps.new_empty(n)
    elements, warps = block_of(logps.device)
    block = min(elements, power_of_2(n))
    programs = cdiv(n, block)
    launch(
        _poft_loss_kernel,
        programs,
        (logps, lengths, aligned_mean_logps),
        (coef, out),
        (n, aligned_mean_logps.shape[1], bits(beta), bits(gamma)),
        (reduction, block),
        warps,
        summed=reduction != "none",
    )
    return out, (coef,)


def _signature(kernel: triton.JITFunction, real: str, reduction: str, negatives: int) -> Signature:
    elements, warps = LAUNCH["cuda:90"]
    types = {n: real for n in kernel.arg_names if n.endswith("_ptr")} | {"room_ptr": "*i64"}
    types |= dict.fromkeys(("B", "strong", "weak", "models", "beta", "gamma"), "i64")
    rows, columns = tile(4096 * negatives, 4096, elements)
    constants = {"REDUCTION": reduction, "ROWS": rows, "COLUMNS": columns, "BLOCK": elements}
    if reduction == "none":
        constants |= {"room_ptr": None}
    names = set(kernel.arg_names)
    types = {n: t for n, t in types.items() if n in names and n not in constants}
    return Signature(kernel, types, {n: c for n, c in constants.items() if n in names}, hot=True, num_warps=warps)


COMPILE = [
    _signature(_epa_loss_kernel, "*fp32", "mean", 4),
    _signature(_epa_loss_kernel, "*fp32", "mean", 1024),
    _signature(_epa_loss_kernel, "*fp32", "none", 32),
    _signature(_epa_loss_kernel, "*fp64", "sum", 8),
    _signature(_poft_loss_kernel, "*fp32", "mean", 1),
    _signature(_poft_loss_kernel, "*fp64", "none", 1),
]
