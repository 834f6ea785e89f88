"""The (alpha, beta) family's loss of preference pairs, with its coefficients, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import Signature
from ._launch import cdiv, power_of_2
from ._loss import number, own_rows, softplus, store_rows
from ._loss_launch import LAUNCH, bits, block_of, launch, scalar


@triton.jit(do_not_specialize=["B", "alpha", "beta", "smoothing"])
def _pair_loss_kernel(
    chosen_ptr,
    rejected_ptr,
    ref_chosen_ptr,
    ref_rejected_ptr,
    coef_chosen_ptr,
    coef_rejected_ptr,
    out_ptr,
    room_ptr,
    B: tl.int64,
    alpha: tl.int64,
    beta: tl.int64,
    smoothing: tl.int64,
    REDUCTION: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = chosen_ptr.dtype.element_ty
    b, live = own_rows(B, BLOCK)
    weight = number(alpha)
    chosen = tl.load(chosen_ptr + b, mask=live, other=0.0).to(tl.float64)
    h = weight * (chosen - tl.load(rejected_ptr + b, mask=live, other=0.0).to(tl.float64))
    if ref_chosen_ptr is not None:
        chosen = tl.load(ref_chosen_ptr + b, mask=live, other=0.0).to(tl.float64)
        h -= number(beta) * (chosen - tl.load(ref_rejected_ptr + b, mask=live, other=0.0).to(tl.float64))
    h = h.to(dtype)
    loss, slope = softplus(-h)
    loss = loss.to(tl.float64)
    slope = -slope.to(tl.float64)
    if SMOOTH:
        # Without label smoothing 0 times an infinite loss would be NaN.
        e = number(smoothing)
        wrong, wrong_slope = softplus(h)
        loss = (1.0 - e) * loss + e * wrong.to(tl.float64)
        slope = (1.0 - e) * slope + e * wrong_slope.to(tl.float64)
    coef = weight * slope
    if REDUCTION == "mean":
        share = tl.full((), 1.0, tl.float64) / B
        coef *= share
        loss *= share
    tl.store(coef_chosen_ptr + b, coef.to(dtype), mask=live)
    tl.store(coef_rejected_ptr + b, (-coef).to(dtype), mask=live)
    store_rows(loss, b, live, room_ptr, out_ptr, REDUCTION)


def pair_loss_fwd(
    chosen, rejected, ref_chosen, ref_rejected, *, alpha, beta, label_smoothing=0.0, reduction="mean"
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """-(1 - e) log s(h) - e log s(-h), h = alpha (l_w - l_l) - beta (f_w - f_l), and its derivatives.

    Args:
        chosen, rejected: (B,) contiguous, float32 or float64.
        ref_chosen, ref_rejected: like them, or None for 0.
        alpha, beta: of the family.
        label_smoothing: e.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, a scalar or (B,), and its derivatives by chosen and by rejected, (B,) each.
    """
    n = chosen.shape[0]
    coefs = (torch.empty_like(chosen), torch.empty_like(rejected))
    if n == 0:
        return chosen.new_zeros(() if reduction != "none" else 0), coefs
    out = scalar(chosen) if reduction != "none" else chosen.new_empty(n)
    elements, warps = block_of(chosen.device)
    block = min(elements, power_of_2(n))
    programs = cdiv(n, block)
    if ref_rejected is None or not beta:
        ref_chosen = ref_rejected = None
    launch(
        _pair_loss_kernel,
        programs,
        (chosen, rejected, ref_chosen, ref_rejected),
        (*coefs, out),
        (n, bits(alpha), bits(beta), bits(label_smoothing)),
        (reduction, label_smoothing != 0, block),
        warps,
        summed=reduction != "none",
    )
    return out, coefs


def _signature(real: str, reduction: str, several: bool, full: bool) -> Signature:
    block, warps = LAUNCH["cuda:90"]
    pointers = ["chosen_ptr", "rejected_ptr", "coef_chosen_ptr", "coef_rejected_ptr", "out_ptr"]
    pointers += ["ref_chosen_ptr", "ref_rejected_ptr"] if full else []
    types = dict.fromkeys(pointers, real) | {"B": "i64", "alpha": "i64", "beta": "i64", "smoothing": "i64"}
    types |= {"room_ptr": "*i64"} if several else {}
    constants = {"REDUCTION": reduction, "SMOOTH": full, "BLOCK": block}
    missing = dict.fromkeys(n for n in _pair_loss_kernel.arg_names if n.endswith("_ptr") and n not in types)
    return Signature(_pair_loss_kernel, types, constants | missing, hot=True, num_warps=warps)


COMPILE = [
    _signature("*fp32", "mean", False, True),
    _signature("*fp32", "mean", True, True),
    _signature("*fp32", "none", False, False),
    _signature("*fp64", "sum", True, True),
]
