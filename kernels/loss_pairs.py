"""The (alpha, beta) family's loss of preference pairs, with its coefficients, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import Signature, on_device
from ._launch import architecture, row
from ._loss import LAUNCH, bits, number, scratch, softplus, total


@triton.jit(do_not_specialize=["B", "alpha", "beta", "smoothing"])
def _pair_loss_kernel(
    chosen_ptr,
    rejected_ptr,
    ref_chosen_ptr,
    ref_rejected_ptr,
    coef_chosen_ptr,
    coef_rejected_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    B,
    alpha,
    beta,
    smoothing,
    REDUCTION: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = chosen_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = b < B
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
    if REDUCTION == "none":
        tl.store(out_ptr + b, loss.to(dtype), mask=live)
    else:
        total(tl.sum(tl.where(live, loss, 0.0), 0), partial_ptr, counter_ptr, out_ptr)


def pair_loss_fwd(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor | None,
    ref_rejected: torch.Tensor | None,
    *,
    alpha: float,
    beta: float,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
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
    out = chosen.new_empty(() if reduction != "none" else n)
    elements, warps = row(LAUNCH, architecture(chosen.device))
    block = min(elements, triton.next_power_of_2(n))
    programs = triton.cdiv(n, block)
    references = (None, None) if ref_chosen is None or ref_rejected is None else (ref_chosen, ref_rejected)
    with on_device(chosen):
        _pair_loss_kernel[(programs,)](
            *(chosen, rejected, *references, *coefs, out),
            *(scratch(programs, chosen.device) if reduction != "none" else (None, None)),
            *(n, bits(alpha), bits(beta), bits(label_smoothing)),
            REDUCTION=reduction,
            SMOOTH=label_smoothing != 0,
            BLOCK=block,
            num_warps=warps,
        )
    return out, coefs


def _signature(real: str, reduction: str, several: bool, full: bool) -> Signature:
    block, warps = LAUNCH["cuda:90"]
    pointers = ["chosen_ptr", "rejected_ptr", "coef_chosen_ptr", "coef_rejected_ptr", "out_ptr"]
    pointers += ["ref_chosen_ptr", "ref_rejected_ptr"] if full else []
    types = dict.fromkeys(pointers, real) | {"B": "i32", "alpha": "i64", "beta": "i64", "smoothing": "i64"}
    types |= {"partial_ptr": "*fp64", "counter_ptr": "*i32"} if several else {}
    constants = {"REDUCTION": reduction, "SMOOTH": full, "BLOCK": block}
    missing = dict.fromkeys(n for n in _pair_loss_kernel.arg_names if n.endswith("_ptr") and n not in types)
    return Signature(_pair_loss_kernel, types, constants | missing, hot=True, num_warps=warps)


COMPILE = [
    _signature("*fp32", "mean", False, True),
    _signature("*fp32", "mean", True, True),
    _signature("*fp32", "none", False, False),
    _signature("*fp64", "sum", True, True),
]
