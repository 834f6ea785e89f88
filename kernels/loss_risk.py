"""RSPO's loss with its coefficients in one launch: each group is sorted in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import Signature
from ._dpp import fill
from ._launch import cdiv, power_of_2
from ._loss import product, spans, total, uncovered
from ._loss_launch import LAUNCH, block_of, flat, launch, scalar
from .loss_groups import group_loss_fwd

# Responses of the largest group that is sorted in registers.
LARGEST = 1024


@triton.jit
def _groups(logps_ptr, rewards_ptr, coef_ptr, low, size, wrong, share, k, COLUMNS: tl.constexpr):
    """Store the coefficients of groups (ROWS,) of up to COLUMNS; their sum of coefficients times log-probs."""
    dtype: tl.constexpr = coef_ptr.dtype.element_ty
    p = tl.broadcast_to(tl.arange(0, COLUMNS)[None, :], (size.shape[0], COLUMNS))
    at = low[:, None] + p
    live = p < size[:, None]
    r = tl.load(rewards_ptr + at, mask=live, other=float("inf"))
    # Rewards are not checked on a GPU unless asked: NaN, of which there is no order, makes its own group NaN. So
    # does infinity, which is the padding, and a group smaller than k.
    broken = wrong | (tl.sum(tl.where(live & (r - r != 0), 1, 0), 1) > 0) | ((size > 0) & (size < k))
    r = tl.where(broken[:, None], 0.0, r)
    ordered = tl.sort(r, 1)
    # w of rank p is sum_{m <= p} U_m (r_(m) - r_(m-1)), m counting from 0 the responses below, and U_m =
    # C(m, k-1) / C(n-1, k-1): 1 for the last, then U_m = U_{m+1} (m - k + 2) / (m + 1). qempo_fast/reference/losses.py.
    m = tl.arange(0, COLUMNS)
    ratio = (tl.maximum(m - k + 2, 0).to(tl.float64) / (m + 1).to(tl.float64))[None, :]
    below = tl.cumprod(tl.where(p < size[:, None] - 1, ratio, 1.0), 1, reverse=True)
    # The coefficients' own memory is where the program's threads show each other their values, with a barrier
    # between: tl.gather shuffles, n^2 / 32 instructions a thread, and 1024 responses took minutes to compile.
    tl.store(coef_ptr + at, ordered, mask=live)
    tl.debug_barrier()
    before = tl.load(coef_ptr + at - 1, mask=live & (p > 0), other=0.0).to(tl.float64)
    gap = tl.where(live & (p > 0), ordered.to(tl.float64) - before, 0.0)
    # Back to each response's own place: ties have one weight, so any rank of its reward will do. The first is found
    # by bisection.
    rank = tl.zeros_like(p)
    for i in tl.static_range(1, 11):
        if COLUMNS >> i > 0:
            middle = rank + (COLUMNS >> i) - 1
            lower = tl.load(coef_ptr + low[:, None] + middle, mask=middle < size[:, None], other=float("inf")) < r
            rank = tl.where(lower, rank + (COLUMNS >> i), rank)
    tl.debug_barrier()
    tl.store(coef_ptr + at, (tl.cumsum(gap * below, 1) * -share).to(dtype), mask=live)
    tl.debug_barrier()
    coef = tl.load(coef_ptr + low[:, None] + rank, mask=live, other=0.0)
    coef = tl.where(broken[:, None], float("nan"), coef)
    tl.debug_barrier()
    tl.store(coef_ptr + at, coef, mask=live)
    own = tl.load(logps_ptr + at, mask=live, other=0.0).to(tl.float64)
    # An empty group has no coefficient to show that it is wrong.
    terms = tl.where(live, product(coef.to(tl.float64), own), 0.0)
    return tl.sum(tl.sum(terms, 1) + tl.where(wrong, float("nan"), 0.0), 0)


@triton.jit(do_not_specialize=["G", "S", "n", "k"])
def _rspo_loss_kernel(
    logps_ptr,
    rewards_ptr,
    offsets_ptr,
    coef_ptr,
    out_ptr,
    room_ptr,
    # In 64 bits these two made the form of ragged groups spill.
    G: tl.int32,
    S: tl.int32,
    n: tl.int64,
    k: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEST: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    share = tl.full((), 1.0, tl.float64) * k / S
    low, size, wrong = spans(offsets_ptr, pid * ROWS + tl.arange(0, ROWS), G, S, n)
    # The rare group that is wider than the tile waits for the loop below.
    fits = tl.where(size <= COLUMNS, size, 0)
    value = _groups(logps_ptr, rewards_ptr, coef_ptr, low, fits, wrong, share, k, COLUMNS)
    if WIDEST > COLUMNS:
        for r in range(0, ROWS):
            begin, width, bad = spans(offsets_ptr, pid * ROWS + r + tl.arange(0, 1), G, S, n)
            longest = tl.max(width, 0)
            if longest > WIDEST:
                first = tl.max(begin, 0)
                fill(coef_ptr, first, first + longest, COLUMNS)
                value += float("nan")
            elif longest > COLUMNS:
                value += _groups(logps_ptr, rewards_ptr, coef_ptr, begin, width, bad, share, k, WIDEST)
    if pid == 0:
        value += uncovered(coef_ptr, offsets_ptr, G, S, COLUMNS)
    total(value, room_ptr, out_ptr)


def _widths(n: int, groups: int, ragged: bool, elements: int) -> tuple[int, int, int]:
    """Rows and columns of a tile and the widest group taken: where sizes lie on the device, twice the average, and
    all samples but at most LARGEST, which bounds any."""
    # Sorting takes registers: 8 bytes spill on sm_80 with the other losses' tile.
    elements //= 2
    widest = min(power_of_2(n if ragged else n // groups), LARGEST)
    columns = min(power_of_2(2 * cdiv(n, groups)), widest)
    return min(max(elements // columns, 1), power_of_2(groups)), columns, widest


def rspo_loss_fwd(
    logps, rewards, *, k, group_size=None, offsets=None, baseline="loo"
) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
    """-mean k w_i l_i, w_i the mean over (k-1)-subsets T of the others of (r_i - max_T r)_+, and -k w_i / S.

    Args:
        logps, rewards: (S,) contiguous, float32 or float64.
        k: samples whose best counts, at least 1.
        group_size: of equal groups, at most 1024; or
        offsets: (G + 1,) int32 or int64. A group that is wrong, empty, smaller than k or larger than 1024 makes
            the loss and its own coefficients NaN.
        baseline: for k = 1, as in group_loss_fwd.

    Returns:
        The loss, a scalar, and its derivative by logps, (S,).
    """
    if k == 1:
        return group_loss_fwd(
            logps, None, rewards, alpha=0.0, beta=0.0, group_size=group_size, offsets=offsets, baseline=baseline
        )
    n = logps.shape[0]
    groups = offsets.shape[0] - 1 if offsets is not None else n // (group_size or 1)
    if n == 0 or groups == 0:
        return logps.new_zeros(()), (torch.full_like(logps, float("nan")),)
    coef, out = torch.empty_like(logps), scalar(logps)
    elements, warps = block_of(logps.device)
    rows, columns, widest = _widths(n, groups, offsets is not None, elements)
    programs = cdiv(groups, rows)
    launch(
        _rspo_loss_kernel,
        programs,
        (logps, rewards, flat(offsets)),
        (coef, out),
        (groups, n, group_size or 0, k),
        (rows, columns, widest),
        warps,
    )
    return out, (coef,)


def _signature(real: str, n: int, offsets: str | None) -> Signature:
    elements, warps = LAUNCH["cuda:90"]
    rows, columns, widest = _widths(4096, 4096 // n, offsets is not None, elements)
    types = dict.fromkeys(("logps_ptr", "rewards_ptr", "coef_ptr", "out_ptr"), real)
    types |= {"room_ptr": "*i64"} | dict.fromkeys(("G", "S"), "i32") | dict.fromkeys(("n", "k"), "i64")
    types |= {"offsets_ptr": offsets} if offsets else {}
    constants = {"ROWS": rows, "COLUMNS": columns, "WIDEST": widest} | ({} if offsets else {"offsets_ptr": None})
    # 83 scalar registers of the second width spill on gfx942, into vector registers.
    return Signature(_rspo_loss_kernel, types, constants, hot=columns == widest, num_warps=warps)


COMPILE = [
    _signature("*fp32", 8, None),
    _signature("*fp32", 1024, None),
    _signature("*fp32", 16, "*i64"),
    _signature("*fp64", 16, None),
]
