"""The forward's work on one tile of logits that a GEMM wrote: row statistics and column bounds.

Logits z = softcap * tanh(scale * (raw + bias) / softcap) * inv_temperature. Statistics of a row are those of
linear_logps_merge.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _launch
from ._common import Signature, on_device
from ._launch import cdiv, processors, sizes_of, tuned
from ._softmax import bound_of, capped, joined, lane_stats, nan_max
from .linear_logps_merge import Stats, add_to, merge_splits, new_parts, store_part


class Block(NamedTuple):
    """One program's rows at a time, the 16-byte loads that a lane has of a row at a time, and its warps.

    The lanes of the warps are shared out among the rows: with as many rows as warps no sum of a row leaves its warp.
    """

    n: int
    loads: int
    warps: int


class Sizes(NamedTuple):
    """Launch sizes: of rows where there are many and where there are few, and of columns, with their rows or alone; the
    lanes of a warp."""

    rows: Block
    few: Block
    columns: Block
    lanes: int = 32


# Rows one program of the column pass walks; each such part of a row chunk has its own row of bounds.
COLUMN_ROWS = 128
_CUDA = Sizes(rows=Block(1, 4, 1), few=Block(1, 2, 4), columns=Block(16, 4, 16))
# Not measured yet: no GPU has run these. Reasoning in docs/linear_logps_gpu.md.
LAUNCH = {
    "interpreter": Sizes(Block(4, 2, 4), Block(2, 2, 4), Block(32, 2, 32), lanes=8),
    "cuda:80": _CUDA,
    "cuda:90": _CUDA,
    "cuda:100": _CUDA,
    # 64 KiB of local memory: the last step of the columns takes a block's worth.
    "hip:gfx942": _CUDA._replace(columns=Block(4, 4, 4), lanes=64),
}
_sizes = sizes_of(LAUNCH)
_CANDIDATES = {
    "rows": [Block(n, k, w) for n, k, w in ((1, 4, 1), (4, 4, 4), (1, 2, 4), (1, 4, 4), (1, 4, 8), (1, 8, 1))],
    "columns": [Block(n, k, n) for n, k in ((4, 2), (4, 4), (8, 2), (8, 4), (16, 2), (16, 4))],
}
# Rows a processor from which on a warp takes a row of its own: 16 warps hide each other's loads.
_MANY_ROWS = 16


@triton.jit
def _logps_rows_kernel(
    z_ptr,
    bias_ptr,
    inv_t_ptr,
    target_ptr,
    max_ptr,
    sum_ptr,
    sum_z_ptr,
    sum_sq_ptr,
    target_z_ptr,
    parts_ptr,
    N,
    C,
    v0,
    stride_zn,
    split_columns,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
):
    acc: tl.constexpr = max_ptr.dtype.element_ty
    kind: tl.constexpr = z_ptr.dtype.element_ty
    vector: tl.constexpr = 128 // kind.primitive_bitwidth
    # int64: N * V passes 2**31 at 16k x 152k.
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < N
    split = tl.program_id(1)
    inv_t = tl.full((BLOCK_N,), 1.0, acc)
    if inv_t_ptr is not None:
        inv_t = tl.load(inv_t_ptr + n, mask=live, other=1.0)
    first = split * split_columns
    end = tl.minimum(first + split_columns, C)
    low = float("-inf")
    peak = tl.full((BLOCK_N, LANES), low, acc)
    total = tl.zeros((BLOCK_N, LANES), acc)
    total_z = tl.zeros((BLOCK_N, LANES), acc)
    total_sq = tl.zeros((BLOCK_N, LANES), acc)
    r, c = _places(LOADS, BLOCK_N, LANES, vector)
    # A row past the end is the last one again, and is not stored.
    row = z_ptr + tl.minimum(tl.program_id(0).to(tl.int64) * BLOCK_N + r, N - 1) * stride_zn
    for v in range(first, end, LOADS * LANES * vector):
        raw = _raw(row, v + c, end)
        x = _logits(raw, v + c, end, bias_ptr, SCALE, SOFTCAP, acc, LOADS, BLOCK_N, LANES, vector)
        if inv_t_ptr is not None:
            x *= inv_t[None, :, None, None]
        peak, total, total_z, total_sq = lane_stats(
            x, peak, total, total_z, total_sq, sum_z_ptr is not None, sum_sq_ptr is not None
        )
    peak, total, total_z, total_sq = joined(
        peak, total, total_z, total_sq, 1, sum_z_ptr is not None, sum_sq_ptr is not None
    )
    target_z, here = _target_logit(z_ptr, bias_ptr, target_ptr, n, live, v0, first, end, stride_zn, SCALE, SOFTCAP, acc)
    # -inf, not NaN: the target's logit is the maximum over vocabulary shards, all but one without it.
    target_z = tl.where(here, target_z * inv_t, low)
    if parts_ptr is not None:
        store_part(
            parts_ptr, n, live, N, split, peak, total, total_z, total_sq, target_z,
            sum_z_ptr is not None, sum_sq_ptr is not None,
        )  # fmt: skip
    else:
        add_to(
            max_ptr, sum_ptr, sum_z_ptr, sum_sq_ptr, target_z_ptr, n, live, peak, total, total_z, total_sq, target_z,
            here,
        )  # fmt: skip


@triton.jit
def _places(LOADS: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Rows (loads * rows, 1) and columns (loads * rows, lanes * entries of a load) of a block, from 0.

    Two dimensions, because Triton versions differ in which of more they give to the lanes first. So the columns go to
    the lanes of a warp, the rows to the warps, and a lane's loads of one row are its own.
    """
    i = tl.arange(0, LOADS * BLOCK_N)[:, None]
    return i % BLOCK_N, i // BLOCK_N * (LANES * VECTOR) + tl.arange(0, LANES * VECTOR)[None, :]


@triton.jit
def _raw(row, c, end):
    return tl.load(row + c, mask=c < end, other=float("-inf"))


@triton.jit
def _logits(
    raw,
    c,
    end,
    bias_ptr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    acc: tl.constexpr,
    LOADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """(loads, rows, lanes, entries of a load) logits before the temperature, -inf from column end on."""
    inside = c < end
    half: tl.constexpr = raw.dtype.primitive_bitwidth == 16
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=inside, other=0.0)
    x = capped(raw.to(acc), bias, SCALE, SOFTCAP, half)
    if SOFTCAP is not None or SCALE <= 0:
        x = tl.where(inside, x, float("-inf"))
    return tl.reshape(x, (LOADS, BLOCK_N, LANES, VECTOR))


@triton.jit
def _one_a_lane(x, BLOCK_N: tl.constexpr, LANES: tl.constexpr):
    return tl.reshape(tl.broadcast_to(x[:, None], (BLOCK_N, LANES)), (BLOCK_N * LANES,))


@triton.jit
def _target_logit(
    z_ptr,
    bias_ptr,
    target_ptr,
    n,
    live,
    v0,
    first,
    end,
    stride_zn,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    acc: tl.constexpr,
):
    """Of rows n the target's logit before the temperature, and whether columns first to end of the tile have it."""
    half: tl.constexpr = z_ptr.dtype.element_ty.primitive_bitwidth == 16
    target = tl.load(target_ptr + n, mask=live, other=-1) - v0
    here = live & (target >= first) & (target < end)
    raw = tl.load(z_ptr + n * stride_zn + target, mask=here, other=0.0).to(acc)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + target, mask=here, other=0.0)
    return capped(raw, bias, SCALE, SOFTCAP, half), here


@triton.jit
def _logps_columns_kernel(
    z_ptr,
    bias_ptr,
    inv_t_ptr,
    target_ptr,
    max_ptr,
    sum_ptr,
    floor_ptr,
    columns_ptr,
    parts_ptr,
    N,
    C,
    v0,
    stride_zn,
    stride_columns,
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PART_ROWS: tl.constexpr,
    LOADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
):
    # One program owns its columns for all rows of its part and stores their maximum: nothing to merge atomically. With
    # parts_ptr it also has those rows' statistics over its columns, for the merge: the tile is then read once.
    acc: tl.constexpr = max_ptr.dtype.element_ty
    kind: tl.constexpr = z_ptr.dtype.element_ty
    vector: tl.constexpr = 128 // kind.primitive_bitwidth
    rows: tl.constexpr = parts_ptr is not None
    low = float("-inf")
    first_row = tl.program_id(1).to(tl.int64) * PART_ROWS
    first = tl.program_id(0) * (LOADS * LANES * vector)
    r, c = _places(LOADS, BLOCK_N, LANES, vector)
    c += first
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    plane = splits.to(tl.int64) * N
    if rows:
        m0 = first_row + tl.arange(0, PART_ROWS)
        end = tl.minimum(first + LOADS * LANES * vector, C)
        found, here = _target_logit(
            z_ptr, bias_ptr, target_ptr, m0, m0 < N, v0, first, end, stride_zn, SCALE, SOFTCAP, acc
        )
        if inv_t_ptr is not None:
            found *= tl.load(inv_t_ptr + m0, mask=m0 < N, other=1.0)
        tl.store(parts_ptr + 2 * plane + m0 * splits + split, tl.where(here, found, low), mask=m0 < N)
    best = tl.full((LOADS, BLOCK_N, LANES, vector), low, acc)
    raw = _raw(z_ptr + tl.minimum(first_row + r, N - 1) * stride_zn, c, C)
    for i in range(0, PART_ROWS, BLOCK_N):
        # The next rows: their loads go out before the sums of these, whose exchange between lanes they overlap.
        following = _raw(z_ptr + tl.minimum(first_row + i + BLOCK_N + r, N - 1) * stride_zn, c, C)
        n = first_row + i + tl.arange(0, BLOCK_N)
        # A row past the end is the last one again, and changes no maximum.
        real = tl.minimum(n, N - 1)
        x = _logits(raw, c, C, bias_ptr, SCALE, SOFTCAP, acc, LOADS, BLOCK_N, LANES, vector)
        if inv_t_ptr is not None:
            x *= tl.load(inv_t_ptr + real)[None, :, None, None]
        bound = bound_of(tl.load(max_ptr + real), tl.load(sum_ptr + real), tl.load(floor_ptr + real))
        best = nan_max(best, x - bound[None, :, None, None])
        if rows:
            # A row's lanes all hold its sums and its first one stores them: a store by (rows,) alone would first bring
            # them to one warp, with four barriers.
            lane = tl.arange(0, BLOCK_N * LANES)
            m = first_row + i + lane // LANES
            one = (lane % LANES == 0) & (m < N)
            to = parts_ptr + m * splits + split
            none = tl.zeros((BLOCK_N, LANES), acc)
            peak, total, total_z, total_sq = lane_stats(x, none + low, none, none, none, ENTROPY, SUM_SQ)
            peak, total, total_z, total_sq = joined(peak, total, total_z, total_sq, 1, ENTROPY, SUM_SQ)
            tl.store(to, _one_a_lane(peak, BLOCK_N, LANES), mask=one)
            tl.store(to + plane, _one_a_lane(total, BLOCK_N, LANES), mask=one)
            if ENTROPY:
                tl.store(to + 3 * plane, _one_a_lane(total_z, BLOCK_N, LANES), mask=one)
            if SUM_SQ:
                tl.store(to + (3 + ENTROPY) * plane, _one_a_lane(total_sq, BLOCK_N, LANES), mask=one)
        raw = following
    bounds = tl.reshape(tl.reduce(best, 1, nan_max), (LOADS, LANES * vector))
    c = first + tl.arange(0, LOADS)[:, None] * (LANES * vector) + tl.arange(0, LANES * vector)[None, :]
    at = columns_ptr + tl.program_id(1).to(tl.int64) * stride_columns + v0 + c
    tl.store(at, bounds, mask=c < C)


def tile_shape(z: torch.Tensor) -> str:
    return f"{z.shape[0]} x {z.shape[1]} {str(z.dtype).removeprefix('torch.')}"


def _rows(z, bias, inv_t, targets, stats, v0, scale, softcap, fixed) -> None:
    """Add one tile of logits to the running statistics of its rows."""
    n, c = z.shape
    sizes = _sizes(z.device)

    def run(block: Block, out: Stats) -> None:
        lanes = sizes.lanes * block.warps // block.n
        width = block.loads * lanes * 16 // z.element_size()
        blocks, turns = cdiv(n, block.n), cdiv(c, width)
        # Four programs a processor hide each other's loads; with fewer rows than that the columns are split.
        per_split = cdiv(turns, 1 if fixed else max(1, min(turns, cdiv(4 * processors(z.device), blocks)))) * width
        splits = cdiv(c, per_split)
        parts = None if splits == 1 else new_parts(out, n, splits)
        _logps_rows_kernel[(blocks, splits)](
            *(z, bias, inv_t, targets, *out, parts, n, c, v0, z.stride(0), per_split, scale, softcap),
            *(block.loads, block.n, lanes),
            num_warps=block.warps,
        )
        if parts is not None:
            merge_splits(parts, out)

    block = sizes.rows if n >= _MANY_ROWS * processors(z.device) and not fixed else sizes.few
    if _launch.AUTOTUNE and not fixed:
        block = tuned(
            *("linear_logps rows", tile_shape(z), z.device, block, _CANDIDATES["rows"]),
            lambda b: run(b, [None if s is None else s.clone() for s in stats]),
        )
    run(block, stats)


def _columns(z, bias, inv_t, targets, stats, floor, columns, v0, scale, softcap, rows) -> None:
    """Log bounds of the columns of one tile, and with rows what _rows does."""
    n, c = z.shape
    sizes = _sizes(z.device)

    def run(block: Block) -> torch.Tensor | None:
        lanes = sizes.lanes * block.warps // block.n
        splits = cdiv(c, block.loads * lanes * 16 // z.element_size())
        parts = new_parts(stats, n, splits) if rows else None
        _logps_columns_kernel[(splits, columns.shape[0])](
            *(z, bias, inv_t, targets, stats[0], stats[1], floor, columns, parts, n, c, v0),
            *(z.stride(0), columns.stride(0), rows and stats[2] is not None, rows and stats[3] is not None),
            *(scale, softcap, COLUMN_ROWS, block.loads, block.n, lanes),
            num_warps=block.warps,
        )
        return parts

    def timed(block: Block) -> None:
        run(block)

    block = sizes.columns
    if _launch.AUTOTUNE:
        block = tuned("linear_logps columns", tile_shape(z), z.device, block, _CANDIDATES["columns"], timed)
    parts = run(block)
    if parts is not None:
        merge_splits(parts, stats)


def tile_fwd(z, bias, inv_t, targets, stats, floor, columns, v0, scale, softcap, fixed=False) -> None:
    """Add one tile of logits to the running statistics of its rows, and where wanted bound its columns.

    The log bound of a column for each COLUMN_ROWS rows is their maximum of z - max(log-sum-exp of the tiles before this
    one, floor): the tile is read once. The first tile, v0 = 0, has none before it and takes its own log-sum-exp, by a
    second look.

    Args:
        z: (n, c) raw logits, last stride 1.
        bias: (c,) in the dtype of the statistics, or None.
        inv_t: (n,) likewise.
        targets: (n,) int64, numbered as column v0 + j is; any other value is in another tile.
        stats: five (n,) vectors, updated in place.
        floor: (n,) a lower bound of the final log-sum-exp; with columns.
        columns: (ceil(n / COLUMN_ROWS), V), of which columns v0 to v0 + c are written, or None.
        v0: number of the tile's first column.
        scale, softcap: of the head.
        fixed: a row's statistics are summed in one order, however many rows there are and with columns or without:
            every tile by two looks.
    """
    with on_device(z):
        if columns is None or v0 == 0 or fixed:
            _rows(z, bias, inv_t, targets, stats, v0, scale, softcap, fixed)
        if columns is not None:
            assert floor is not None
            _columns(z, bias, inv_t, targets, stats, floor, columns, v0, scale, softcap, v0 != 0 and not fixed)


def _forms(z: str, acc: str, full: bool, arch: str = "cuda:90") -> list[Signature]:
    """A plain head or one with everything, at the sizes of one maker's rows of LAUNCH."""
    sizes, targets = LAUNCH[arch], (arch.partition(":")[0],)
    optional = ["bias_ptr", "inv_t_ptr"]
    sums = ["sum_z_ptr", "sum_sq_ptr"]
    head: dict[str, object] = {"SCALE": 0.5, "SOFTCAP": 30.0} if full else {"SCALE": 1.0, "SOFTCAP": None}

    def launch(block: Block) -> dict[str, object]:
        return {"LOADS": block.loads, "BLOCK_N": block.n, "LANES": sizes.lanes * block.warps // block.n}

    def nothing(*names: str) -> dict[str, object]:
        return dict.fromkeys(names)

    found = []
    for block, split in ((sizes.rows, False), (sizes.few, False), (sizes.few, True)):
        pointers = ["max_ptr", "sum_ptr", "target_z_ptr", *(["parts_ptr"] if split else [])]
        found.append(
            Signature(
                _logps_rows_kernel,
                {"z_ptr": z, "target_ptr": "*i64", "stride_zn": "i64"}
                | dict.fromkeys([*pointers, *(optional + sums if full else [])], acc)
                | dict.fromkeys(["N", "C", "v0", "split_columns"], "i32"),
                head | nothing(*([] if split else ["parts_ptr"]), *([] if full else optional + sums)) | launch(block),
                hot=acc == "*fp32",
                num_warps=block.warps,
                aligned=("C", "v0", "split_columns", "stride_zn"),
                targets=targets,
            )
        )
    for rows in (True, False):
        pointers = ["max_ptr", "sum_ptr", "floor_ptr", "columns_ptr", *(["parts_ptr"] if rows else [])]
        found.append(
            Signature(
                _logps_columns_kernel,
                {"z_ptr": z, "target_ptr": "*i64", "stride_zn": "i64", "stride_columns": "i64"}
                | dict.fromkeys([*pointers, *(optional if full else [])], acc)
                | dict.fromkeys(["N", "C", "v0"], "i32"),
                head
                | nothing(*([] if rows else ["parts_ptr"]), *([] if full else optional))
                | {"ENTROPY": rows and full, "SUM_SQ": rows and full, "PART_ROWS": COLUMN_ROWS}
                | launch(sizes.columns),
                hot=acc == "*fp32",
                num_warps=sizes.columns.warps,
                aligned=("C", "v0", "stride_zn", "stride_columns"),
                targets=targets,
            )
        )
    return found


COMPILE = [
    *_forms("*bf16", "*fp32", False),
    *_forms("*fp16", "*fp32", False),
    *_forms("*fp32", "*fp32", True),
    *_forms("*bf16", "*fp32", True),
    *_forms("*fp64", "*fp64", True),
    *_forms("*bf16", "*fp32", False, "hip:gfx942"),
    *_forms("*fp32", "*fp32", True, "hip:gfx942"),
    *_forms("*bf16", "*fp32", True, "hip:gfx942"),
]
