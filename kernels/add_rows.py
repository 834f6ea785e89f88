"""The weight gradient as a sum of rows that arrive by index: rows added in float32, and the sum written out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import Signature, on_device
from ._launch import power_of_2

# A program has a whole row, in steps of at most so many entries: 16 of each thread.
_BLOCK = 2048


@triton.jit(do_not_specialize=["first"])
def _add_rows_kernel(
    total_ptr,
    at_ptr,
    rows_ptr,
    seen_ptr,
    D,
    first,
    stride_total,
    stride_rows,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    to = first + i
    if at_ptr is not None:
        to = tl.load(at_ptr + i)
    # Entries of the sum so far: all of a row or none, as a number, because the interpreter masks by no scalar.
    known = tl.where(tl.load(seen_ptr + to) != 0, D, 0)
    # Every thread has read the mark before one sets it.
    tl.debug_barrier()
    tl.store(seen_ptr + to, 1)
    for start in range(0, D, BLOCK_D):
        # Four entries a lane also of 16-bit rows: eight would be exchanged between lanes, with four barriers a step.
        d = tl.max_contiguous(start + tl.arange(0, BLOCK_D), 4)
        new = tl.load(rows_ptr + i * stride_rows + d, mask=d < D, other=0.0).to(tl.float32)
        old = tl.load(total_ptr + to * stride_total + d, mask=d < known, other=0.0)
        # Not 0 + new in a row not seen: -0 would become 0.
        tl.store(total_ptr + to * stride_total + d, tl.where(d < known, old + new, new), mask=d < D)


@triton.jit
def _rows_out_kernel(
    out_ptr,
    total_ptr,
    seen_ptr,
    place_ptr,
    D,
    stride_out,
    stride_total,
    BLOCK_D: tl.constexpr,
):
    v = tl.program_id(0).to(tl.int64)
    at = v
    if place_ptr is not None:
        at = tl.load(place_ptr + v)
    seen = tl.load(seen_ptr + at, mask=at >= 0, other=0)
    known = tl.where(seen != 0, D, 0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(total_ptr + at * stride_total + d, mask=d < known, other=0.0)
        tl.store(out_ptr + v * stride_out + d, x.to(out_ptr.dtype.element_ty), mask=d < D)


def _block(width: int) -> tuple[int, int]:
    """Entries of a step and warps of a program for rows of this width."""
    block = min(_BLOCK, max(256, power_of_2(width)))
    return block, max(1, block // 512)


def add_rows(total: torch.Tensor, at: torch.Tensor | int, rows: torch.Tensor, seen: torch.Tensor) -> None:
    """total[at] += rows in float32, where a row that is not seen yet is stored and marked.

    Args:
        total: (R, D) float32, last stride 1; rows that are not seen hold anything.
        at: (m,) int64, each at most once, or the first of m rows.
        rows: (m, D) bfloat16, float16 or float32, last stride 1.
        seen: (R,) uint8.
    """
    m, width = rows.shape
    if not m:
        return
    block, warps = _block(width)
    index, first = (None, at) if isinstance(at, int) else (at, 0)
    with on_device(total):
        _add_rows_kernel[(m,)](
            *(total, index, rows, seen, width, first, total.stride(0), rows.stride(0), block), num_warps=warps
        )


def rows_out(out: torch.Tensor, total: torch.Tensor, seen: torch.Tensor, place: torch.Tensor | None) -> None:
    """out[v] = total[place[v]] in the dtype of out, 0 where place[v] is negative or that row is not seen.

    Args:
        out: (V, D), last stride 1; each row is written once.
        total: (R, D) float32, last stride 1.
        seen: (R,) uint8.
        place: (V,) int64, or None for 0, 1, ..., V - 1.
    """
    rows, width = out.shape
    if not rows:
        return
    block, warps = _block(width)
    with on_device(out):
        _rows_out_kernel[(rows,)](
            *(out, total, seen, place, width, out.stride(0), total.stride(0), block), num_warps=warps
        )


COMPILE = [
    *(
        Signature(
            _add_rows_kernel,
            {"total_ptr": "*fp32", "rows_ptr": rows, "seen_ptr": "*u8", "D": "i32", "first": "i32"}
            | {"stride_total": "i32", "stride_rows": "i32"}
            | ({"at_ptr": "*i64"} if at else {}),
            {"BLOCK_D": _BLOCK} | ({} if at else {"at_ptr": None}),
            hot=True,
            num_warps=4,
            aligned=("D", "stride_total", "stride_rows"),
        )
        for rows, at in (("*bf16", True), ("*fp16", True), ("*fp32", True), ("*bf16", False), ("*fp32", False))
    ),
    *(
        Signature(
            _rows_out_kernel,
            {"out_ptr": out, "total_ptr": "*fp32", "seen_ptr": "*u8", "D": "i32"}
            | {"stride_out": "i32", "stride_total": "i32"}
            | ({"place_ptr": "*i64"} if place else {}),
            {"BLOCK_D": _BLOCK} | ({} if place else {"place_ptr": None}),
            hot=True,
            num_warps=4,
            aligned=("D", "stride_out", "stride_total"),
        )
        for out, place in (("*bf16", True), ("*fp16", True), ("*bf16", False))
    ),
]
