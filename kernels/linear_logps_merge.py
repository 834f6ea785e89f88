"""Running statistics of a row, and the merge of those that several programs have of parts of its columns.

They are five vectors, in this order: max z, sum e^d, sum d e^d or None, sum e^2d or None (d = z - max), and the
target's z.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._common import Signature, on_device
from ._launch import cdiv
from ._softmax import joined, merge

Stats = Sequence[torch.Tensor | None]
# Rows of a program, and ranges that it takes at a time.
_ROWS, _SPLITS = 16, 32


@triton.jit
def store_part(
    parts_ptr,
    n,
    live,
    N,
    split,
    peak,
    total,
    total_z,
    total_sq,
    target_z,
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
):
    """Statistics of rows n over range `split` of as many as the grid's second axis has, as new_parts has them."""
    splits = tl.num_programs(1)
    plane = splits.to(tl.int64) * N
    at = parts_ptr + n * splits + split
    tl.store(at, peak, mask=live)
    tl.store(at + plane, total, mask=live)
    tl.store(at + 2 * plane, target_z, mask=live)
    if ENTROPY:
        tl.store(at + 3 * plane, total_z, mask=live)
    if SUM_SQ:
        tl.store(at + (3 + ENTROPY) * plane, total_sq, mask=live)


@triton.jit
def add_to(
    max_ptr,
    sum_ptr,
    sum_z_ptr,
    sum_sq_ptr,
    target_z_ptr,
    n,
    live,
    peak,
    total,
    total_z,
    total_sq,
    target_z,
    here,
):
    """Statistics of more columns of rows n, which have the target where `here`, added to the running ones in memory."""
    r_peak = tl.load(max_ptr + n, mask=live, other=float("-inf"))
    r_total = tl.load(sum_ptr + n, mask=live, other=0.0)
    r_total_z = r_total * 0.0
    r_total_sq = r_total * 0.0
    if sum_z_ptr is not None:
        r_total_z = tl.load(sum_z_ptr + n, mask=live, other=0.0)
    if sum_sq_ptr is not None:
        r_total_sq = tl.load(sum_sq_ptr + n, mask=live, other=0.0)
    peak, total, total_z, total_sq = merge(r_peak, r_total, r_total_z, r_total_sq, peak, total, total_z, total_sq)
    tl.store(max_ptr + n, peak, mask=live)
    tl.store(sum_ptr + n, total, mask=live)
    if sum_z_ptr is not None:
        tl.store(sum_z_ptr + n, total_z, mask=live)
    if sum_sq_ptr is not None:
        tl.store(sum_sq_ptr + n, total_sq, mask=live)
    tl.store(target_z_ptr + n, target_z, mask=live & here)


# A single range would become the constant 1, which has no .to().
@triton.jit(do_not_specialize=["splits"])
def _logps_merge_kernel(
    parts_ptr,
    max_ptr,
    sum_ptr,
    sum_z_ptr,
    sum_sq_ptr,
    target_z_ptr,
    N,
    splits,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    acc: tl.constexpr = max_ptr.dtype.element_ty
    entropy: tl.constexpr = sum_z_ptr is not None
    sum_sq: tl.constexpr = sum_sq_ptr is not None
    low = float("-inf")
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < N
    plane = splits.to(tl.int64) * N
    peak = tl.full((BLOCK_N,), low, acc)
    total = tl.zeros((BLOCK_N,), acc)
    total_z = tl.zeros((BLOCK_N,), acc)
    total_sq = tl.zeros((BLOCK_N,), acc)
    target_z = tl.zeros((BLOCK_N,), acc)
    here = tl.zeros((BLOCK_N,), tl.int32)
    # In the order of the splits, by a fixed tree within BLOCK_S of them: the same sum whichever finished first.
    for first in range(0, splits, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        inside = live[:, None] & (s < splits)[None, :]
        at = parts_ptr + n[:, None] * splits + s[None, :]
        p_peak = tl.load(at, mask=inside, other=low)
        p_total = tl.load(at + plane, mask=inside, other=0.0)
        p_target = tl.load(at + 2 * plane, mask=inside, other=low)
        p_total_z = p_total * 0.0
        p_total_sq = p_total * 0.0
        if entropy:
            p_total_z = tl.load(at + 3 * plane, mask=inside, other=0.0)
        if sum_sq:
            p_total_sq = tl.load(at + (3 + entropy) * plane, mask=inside, other=0.0)
        p_peak, p_total, p_total_z, p_total_sq = joined(p_peak, p_total, p_total_z, p_total_sq, 1, entropy, sum_sq)
        peak, total, total_z, total_sq = merge(peak, total, total_z, total_sq, p_peak, p_total, p_total_z, p_total_sq)
        # One split at most has it. A sum, not a maximum, which would lose a NaN.
        target_z += tl.sum(tl.where(p_target == low, 0.0, p_target), 1)
        here = tl.maximum(here, tl.max((p_target != low).to(tl.int32), 1))
    add_to(
        max_ptr, sum_ptr, sum_z_ptr, sum_sq_ptr, target_z_ptr, n, live, peak, total, total_z, total_sq, target_z,
        here > 0,
    )  # fmt: skip


def new_parts(stats: Stats, n: int, splits: int) -> torch.Tensor:
    """Room for those of each of `splits` column ranges: max, sum, target and the optional sums, (n, splits) each."""
    first = stats[0]
    assert first is not None
    return first.new_empty((3 + (stats[2] is not None) + (stats[3] is not None), n, splits))


def merge_splits(parts: torch.Tensor, stats: Stats) -> None:
    """Add those of disjoint column ranges, as new_parts has them, to the running ones, in the order of the ranges."""
    _, n, splits = parts.shape
    with on_device(parts):
        _logps_merge_kernel[(cdiv(n, _ROWS),)](parts, *stats, n, splits, _ROWS, _SPLITS, num_warps=4)


def _form(acc: str, full: bool) -> Signature:
    sums = ["sum_z_ptr", "sum_sq_ptr"]
    return Signature(
        _logps_merge_kernel,
        dict.fromkeys(["parts_ptr", "max_ptr", "sum_ptr", "target_z_ptr", *(sums if full else [])], acc)
        | {"N": "i32", "splits": "i32"},
        {"BLOCK_N": _ROWS, "BLOCK_S": _SPLITS} | ({} if full else dict.fromkeys(sums)),
    )


COMPILE = [_form("*fp32", False), _form("*fp32", True), _form("*fp64", True)]
