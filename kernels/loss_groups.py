"""The (alpha, beta) family's losses of groups, online and squared, with their coefficients, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import Signature
from ._launch import cdiv
from ._loss import number, spans, total, uncovered
from ._loss_launch import LAUNCH, bits, block_of, flat, launch, scalar, tile


@triton.jit
def _shaped(logps_ptr, ref_ptr, rewards_ptr, at, live, alpha, beta, SHAPED: tl.constexpr):
    """S_i = r_i - alpha l_i + beta f_i, and l_i; SHAPED False leaves l_i out."""
    own = tl.load(logps_ptr + at, mask=live, other=0.0).to(tl.float64)
    s = tl.load(rewards_ptr + at, mask=live, other=0.0).to(tl.float64)
    if SHAPED:
        s -= number(alpha) * own
    if ref_ptr is not None:
        s += number(beta) * tl.load(ref_ptr + at, mask=live, other=0.0).to(tl.float64)
    return s, own


@triton.jit(do_not_specialize=["G", "S", "k", "alpha", "beta"])
def _group_loss_kernel(
    logps_ptr,
    ref_ptr,
    rewards_ptr,
    bonus_ptr,
    offsets_ptr,
    coef_ptr,
    out_ptr,
    room_ptr,
    G: tl.int64,
    S: tl.int64,
    k: tl.int64,
    alpha: tl.int64,
    beta: tl.int64,
    SHAPED: tl.constexpr,
    BASELINE: tl.constexpr,
    VARIANCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    low, size, wrong = spans(offsets_ptr, pid * ROWS + tl.arange(0, ROWS), G, S, k)
    # The largest group is not known on the host: each program walks as far as its own needs.
    longest = tl.max(size, 0)
    count = size.to(tl.float64)
    column = tl.arange(0, COLUMNS)[None, :]
    baseline = tl.where(wrong, float("nan"), 0.0).to(tl.float64)
    if BASELINE != "none":
        # A sum in float64 is exact to 1e-16 of its terms: 1e5 nats leave a reward of 1e-8 some digits.
        for first in range(0, longest, COLUMNS):
            live = first + column < size[:, None]
            at = low[:, None] + first + column
            s, _ = _shaped(logps_ptr, ref_ptr, rewards_ptr, at, live, alpha, beta, SHAPED)
            baseline += tl.sum(s, 1)
        baseline /= tl.maximum(count, 1.0)
    # Divisions are by row: one of float64 costs as much as the rest of an element.
    share = tl.full((), 1.0, tl.float64) / S
    factor = tl.full((ROWS,), 1.0, tl.float64)
    if BASELINE == "loo":
        factor = count / (count - 1.0)
    if VARIANCE:
        factor = 1.0 / ((count - 1.0) * G)
    # An empty group has no mean, and no row to show it but the loss.
    loss = tl.where(wrong, float("nan"), 0.0).to(tl.float64)
    for first in range(0, longest, COLUMNS):
        at = low[:, None] + first + column
        live = first + column < size[:, None]
        s, own = _shaped(logps_ptr, ref_ptr, rewards_ptr, at, live, alpha, beta, SHAPED)
        d = s - baseline[:, None]
        if VARIANCE:
            coef = -number(alpha) * d * factor[:, None]
            loss += 0.5 * tl.sum(tl.where(live, d * d, 0.0), 1) * factor
        else:
            a = d * factor[:, None]
            if bonus_ptr is not None:
                a += tl.load(bonus_ptr + at, mask=live, other=0.0).to(tl.float64)
            coef = -a * share
            # What weighs nothing pays nothing, though its log-prob be infinite.
            loss += tl.sum(tl.where(live & (coef != 0), coef * own, 0.0), 1)
        tl.store(coef_ptr + at, coef.to(coef_ptr.dtype.element_ty), mask=live)
    value = tl.sum(loss, 0)
    if pid == 0:
        value += uncovered(coef_ptr, offsets_ptr, G, S, COLUMNS)
    total(value, room_ptr, out_ptr)


def _launch(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    rewards: torch.Tensor,
    bonus: torch.Tensor | None,
    ab: tuple[float, float],
    group_size: int | None,
    offsets: torch.Tensor | None,
    baseline: str,
    variance: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
    """Both losses: they differ in their last lines."""
    alpha, beta = ab
    n = logps.shape[0]
    if baseline == "none":
        group_size, offsets = 1, None
    groups = offsets.shape[0] - 1 if offsets is not None else n // (group_size or 1)
    if n == 0 or groups == 0:
        # Rows that no group holds: only offsets that nobody checked leave some.
        return logps.new_zeros(()), (torch.full_like(logps, float("nan")),)
    coef, out = torch.empty_like(logps), scalar(logps)
    elements, warps = block_of(logps.device)
    rows, columns = tile(n, groups, elements)
    programs = cdiv(groups, rows)
    launch(
        _group_loss_kernel,
        programs,
        # What weighs nothing stays out: 0 times an infinite log-prob would be NaN.
        (logps, ref_logps if beta else None, rewards, flat(bonus), flat(offsets)),
        (coef, out),
        (groups, n, group_size or 0, bits(alpha), bits(beta)),
        (alpha != 0, baseline, variance, rows, columns),
        warps,
    )
    return out, (coef,)


def group_loss_fwd(
    logps, ref_logps, rewards, *, alpha, beta, group_size=None, offsets=None, baseline="loo", bonus=None
) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
    """-mean A_i l_i, A_i = S_i - baseline + bonus_i, S_i = r_i - alpha l_i + beta f_i, and -A_i / S.

    Args:
        logps, rewards: (S,) contiguous, float32 or float64.
        ref_logps, bonus: like them, or None for 0.
        alpha, beta: of the family.
        group_size: of equal groups; or
        offsets: (G + 1,) int32 or int64. A wrong or empty group makes the loss and its own coefficients NaN.
        baseline: "loo", "mean" or "none", which needs no groups.

    Returns:
        The loss, a scalar, and its derivative by logps, (S,).
    """
    return _launch(logps, ref_logps, rewards, bonus, (alpha, beta), group_size, offsets, baseline, False)


def variance_loss_fwd(
    logps, ref_logps, rewards, *, alpha, beta, group_size=None, offsets=None
) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
    """Mean over groups of sum d_i^2 / (2 (k - 1)), d_i the mean of S less S_i, and alpha d_i / ((k - 1) G).

    Arguments and results as in group_loss_fwd.
    """
    return _launch(logps, ref_logps, rewards, None, (alpha, beta), group_size, offsets, "mean", True)


def _signature(real: str, k: int, offsets: str | None, baseline: str, variance: bool, bonus: bool) -> Signature:
    elements, warps = LAUNCH["cuda:90"]
    rows, columns = tile(4096, 4096 // k, elements)
    pointers = ["logps_ptr", "ref_ptr", "rewards_ptr", "coef_ptr", "out_ptr", *(["bonus_ptr"] if bonus else [])]
    types = dict.fromkeys(pointers, real) | {"room_ptr": "*i64"}
    types |= {"G": "i64", "S": "i64", "k": "i64", "alpha": "i64", "beta": "i64"}
    types |= {"offsets_ptr": offsets} if offsets else {}
    constants = {
        "SHAPED": baseline != "none",
        "BASELINE": baseline,
        "VARIANCE": variance,
        "ROWS": rows,
        "COLUMNS": columns,
    }
    missing = dict.fromkeys(n for n in _group_loss_kernel.arg_names if n.endswith("_ptr") and n not in types)
    return Signature(_group_loss_kernel, types, constants | missing, hot=True, num_warps=warps)


COMPILE = [
    _signature("*fp32", 8, None, "loo", False, True),
    _signature("*fp32", 8, "*i64", "loo", False, False),
    _signature("*fp32", 1024, "*i32", "mean", False, False),
    _signature("*fp32", 1, None, "none", False, False),
    _signature("*fp32", 8, None, "mean", True, False),
    _signature("*fp64", 8, "*i64", "mean", True, False),
]
