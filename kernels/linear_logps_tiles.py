"""The forward's work on one tile of logits that a GEMM wrote: row statistics and column bounds.

Logits z = softcap * tanh(scale * (raw + bias) / softcap) * inv_temperature. Statistics of a row are five vectors, in
this order: max z, sum e^d, sum d e^d or None, sum e^2d or None (d = z - max), and the target's z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import Signature, on_device
from ._launch import architecture, processors, row, tuned
from ._softmax import block_stats, capped, merge

Stats = Sequence[torch.Tensor | None]


class Block(NamedTuple):
    """One program's rows and columns, and its warps."""

    n: int
    v: int
    warps: int


class Sizes(NamedTuple):
    """Launch sizes of both passes over a tile."""

    rows: Block
    columns: Block


# Rows one program of the column pass walks; each such part of a row chunk has its own row of bounds.
COLUMN_ROWS = 128
# Not measured yet: no GPU has run these. Reasoning in docs/linear_logps_gpu.md.
LAUNCH = {
    "interpreter": Sizes(Block(4, 64, 1), Block(64, 64, 1)),
    "cuda:80": Sizes(Block(1, 2048, 4), Block(32, 128, 8)),
    "cuda:90": Sizes(Block(1, 2048, 4), Block(32, 128, 8)),
    "cuda:100": Sizes(Block(1, 2048, 4), Block(32, 128, 8)),
    "hip:gfx942": Sizes(Block(1, 2048, 4), Block(32, 128, 8)),
}
_CANDIDATES = {
    "rows": [Block(n, v, w) for n, v, w in ((1, 1024, 4), (1, 2048, 4), (1, 4096, 8), (1, 8192, 16), (2, 2048, 8))],
    "columns": [Block(n, v, w) for n, v, w in ((16, 128, 4), (32, 64, 4), (32, 128, 4), (32, 128, 8), (64, 128, 8))],
}


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
    N,
    C,
    v0,
    stride_zn,
    split_columns,
    stride_split,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    RUNNING: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # int64: N * V passes 2**31 at 16k x 152k.
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < N
    split = tl.program_id(1)
    at = split.to(tl.int64) * stride_split + n
    acc: tl.constexpr = max_ptr.dtype.element_ty
    peak = tl.full((BLOCK_N,), float("-inf"), acc)
    total = tl.zeros((BLOCK_N,), acc)
    total_z = tl.zeros((BLOCK_N,), acc)
    total_sq = tl.zeros((BLOCK_N,), acc)
    # -inf, not NaN: the target's logit is the maximum over vocabulary shards, all but one without it.
    target_z = tl.full((BLOCK_N,), float("-inf"), acc)
    if RUNNING:
        peak = tl.load(max_ptr + at, mask=live, other=float("-inf"))
        total = tl.load(sum_ptr + at, mask=live, other=0.0)
        if sum_z_ptr is not None:
            total_z = tl.load(sum_z_ptr + at, mask=live, other=0.0)
        if sum_sq_ptr is not None:
            total_sq = tl.load(sum_sq_ptr + at, mask=live, other=0.0)
        target_z = tl.load(target_z_ptr + at, mask=live, other=0.0)
    inv_t = tl.full((BLOCK_N,), 1.0, acc)
    if inv_t_ptr is not None:
        inv_t = tl.load(inv_t_ptr + n, mask=live, other=1.0)
    first = split * split_columns
    end = tl.minimum(first + split_columns, C)
    target = tl.load(target_ptr + n, mask=live, other=-1) - v0
    here = live & (target >= first) & (target < end)
    raw_t = tl.load(z_ptr + n * stride_zn + target, mask=here, other=0.0).to(acc)
    bias_t = None
    if bias_ptr is not None:
        bias_t = tl.load(bias_ptr + target, mask=here, other=0.0)
    target_z = tl.where(here, capped(raw_t, bias_t, SCALE, SOFTCAP) * inv_t, target_z)
    for v in range(first, end, BLOCK_V):
        c = v + tl.arange(0, BLOCK_V)
        inside = c < end
        raw = tl.load(z_ptr + n[:, None] * stride_zn + c[None, :], mask=live[:, None] & inside[None, :], other=0.0).to(
            acc
        )  # (BLOCK_N, BLOCK_V)
        bias = None
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + c, mask=inside, other=0.0)[None, :]
        x = capped(raw, bias, SCALE, SOFTCAP) * inv_t[:, None]
        x = tl.where(inside[None, :], x, float("-inf"))
        b_peak, b_total, b_total_z, b_total_sq = block_stats(x, sum_z_ptr is not None, sum_sq_ptr is not None)
        peak, total, total_z, total_sq = merge(peak, total, total_z, total_sq, b_peak, b_total, b_total_z, b_total_sq)
    tl.store(max_ptr + at, peak, mask=live)
    tl.store(sum_ptr + at, total, mask=live)
    if sum_z_ptr is not None:
        tl.store(sum_z_ptr + at, total_z, mask=live)
    if sum_sq_ptr is not None:
        tl.store(sum_sq_ptr + at, total_sq, mask=live)
    tl.store(target_z_ptr + at, target_z, mask=live)


@triton.jit
def _logps_merge_kernel(
    part_max_ptr,
    part_sum_ptr,
    part_sum_z_ptr,
    part_sum_sq_ptr,
    part_target_z_ptr,
    max_ptr,
    sum_ptr,
    sum_z_ptr,
    sum_sq_ptr,
    target_z_ptr,
    N,
    splits,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < N
    peak = tl.load(max_ptr + n, mask=live, other=float("-inf"))
    total = tl.load(sum_ptr + n, mask=live, other=0.0)
    total_z = total * 0.0
    total_sq = total * 0.0
    if sum_z_ptr is not None:
        total_z = tl.load(sum_z_ptr + n, mask=live, other=0.0)
    if sum_sq_ptr is not None:
        total_sq = tl.load(sum_sq_ptr + n, mask=live, other=0.0)
    target_z = tl.load(target_z_ptr + n, mask=live, other=0.0)
    at = n
    # In the order of the splits: the same sum whichever finished first.
    for _ in range(splits):
        p_peak = tl.load(part_max_ptr + at, mask=live, other=float("-inf"))
        p_total = tl.load(part_sum_ptr + at, mask=live, other=0.0)
        p_total_z = p_total * 0.0
        p_total_sq = p_total * 0.0
        if sum_z_ptr is not None:
            p_total_z = tl.load(part_sum_z_ptr + at, mask=live, other=0.0)
        if sum_sq_ptr is not None:
            p_total_sq = tl.load(part_sum_sq_ptr + at, mask=live, other=0.0)
        peak, total, total_z, total_sq = merge(peak, total, total_z, total_sq, p_peak, p_total, p_total_z, p_total_sq)
        p_target = tl.load(part_target_z_ptr + at, mask=live, other=0.0)
        # Not tl.maximum, which would lose a NaN.
        target_z = tl.where(p_target == float("-inf"), target_z, p_target)
        at += N
    tl.store(max_ptr + n, peak, mask=live)
    tl.store(sum_ptr + n, total, mask=live)
    if sum_z_ptr is not None:
        tl.store(sum_z_ptr + n, total_z, mask=live)
    if sum_sq_ptr is not None:
        tl.store(sum_sq_ptr + n, total_sq, mask=live)
    tl.store(target_z_ptr + n, target_z, mask=live)


@triton.jit
def _logps_columns_kernel(
    z_ptr,
    bias_ptr,
    inv_t_ptr,
    max_ptr,
    sum_ptr,
    floor_ptr,
    columns_ptr,
    N,
    C,
    stride_zn,
    stride_columns,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PART_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program owns its columns for all rows of its part and stores their maximum: nothing to merge atomically.
    part = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = c < C
    acc: tl.constexpr = max_ptr.dtype.element_ty
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=inside, other=0.0)[None, :]
    best = tl.full((BLOCK_N, BLOCK_V), float("-inf"), acc)
    for first in range(0, PART_ROWS, BLOCK_N):
        n = part * PART_ROWS + first + tl.arange(0, BLOCK_N)
        live = n < N
        raw = tl.load(z_ptr + n[:, None] * stride_zn + c[None, :], mask=live[:, None] & inside[None, :], other=0.0).to(
            acc
        )
        inv_t = 1.0
        if inv_t_ptr is not None:
            inv_t = tl.load(inv_t_ptr + n, mask=live, other=1.0)[:, None]
        x = capped(raw, bias, SCALE, SOFTCAP) * inv_t
        bound = tl.load(max_ptr + n, mask=live, other=0.0) + tl.log(tl.load(sum_ptr + n, mask=live, other=1.0))
        bound = tl.maximum(bound, tl.load(floor_ptr + n, mask=live, other=0.0))
        best = tl.maximum(best, tl.where(live[:, None], x - bound[:, None], float("-inf")))
    tl.store(columns_ptr + part * stride_columns + c, tl.max(best, 0), mask=inside)


def tile_shape(z: torch.Tensor) -> str:
    return f"{z.shape[0]} x {z.shape[1]} {str(z.dtype).removeprefix('torch.')}"


def rows_fwd(
    z: torch.Tensor,
    bias: torch.Tensor | None,
    inv_t: torch.Tensor | None,
    targets: torch.Tensor,
    stats: Stats,
    v0: int,
    scale: float,
    softcap: float | None,
) -> None:
    """Add one tile of logits to the running statistics of its rows.

    Args:
        z: (n, c) raw logits, last stride 1.
        bias: (c,) in the dtype of the statistics, or None.
        inv_t: (n,) likewise.
        targets: (n,) int64, numbered as column v0 + j is; any other value is in another tile.
        stats: five (n,) vectors, updated in place.
        v0: number of the tile's first column.
        scale, softcap: of the head.
    """
    n, c = z.shape

    def run(block: Block, out: Stats) -> None:
        blocks = triton.cdiv(n, block.n)
        # Four programs a processor hide each other's loads; with fewer rows than that the columns are split.
        splits = max(1, min(triton.cdiv(c, block.v), triton.cdiv(4 * processors(z.device), blocks)))
        per_split = triton.cdiv(triton.cdiv(c, block.v), splits) * block.v
        splits = triton.cdiv(c, per_split)
        parts = out if splits == 1 else [None if s is None else s.new_empty(splits, n) for s in out]
        _logps_rows_kernel[(blocks, splits)](
            *(z, bias, inv_t, targets, *parts, n, c, v0, z.stride(0), per_split, n, scale, softcap),
            RUNNING=splits == 1,
            BLOCK_N=block.n,
            BLOCK_V=block.v,
            num_warps=block.warps,
        )
        if splits > 1:
            merge_splits(parts, out)

    default = row(LAUNCH, architecture(z.device)).rows
    with on_device(z):
        block = tuned(
            *("linear_logps rows", tile_shape(z), z.device, default, _CANDIDATES["rows"]),
            lambda b: run(b, [None if s is None else s.clone() for s in stats]),
        )
        run(block, stats)


def merge_splits(parts: Stats, stats: Stats) -> None:
    """Add statistics (splits, n) of disjoint column ranges to the running ones, in the order of the ranges."""
    first = parts[0]
    assert first is not None
    splits, n = first.shape
    with on_device(first):
        _logps_merge_kernel[(triton.cdiv(n, 128),)](*parts, *stats, n, splits, BLOCK_N=128, num_warps=4)


def columns_fwd(
    z: torch.Tensor,
    bias: torch.Tensor | None,
    inv_t: torch.Tensor | None,
    stats: Stats,
    floor: torch.Tensor,
    columns: torch.Tensor,
    v0: int,
    scale: float,
    softcap: float | None,
) -> None:
    """Log bound of each column of one tile: max over rows of z - max(running log-sum-exp, floor).

    Args:
        z, bias, inv_t, scale, softcap: as rows_fwd has them.
        stats: the statistics that rows_fwd left.
        floor: (n,) a lower bound of the final log-sum-exp.
        columns: (ceil(n / COLUMN_ROWS), V); columns v0 to v0 + c are written.
        v0: number of the tile's first column.
    """
    n, c = z.shape

    def run(block: Block) -> None:
        _logps_columns_kernel[(triton.cdiv(c, block.v), columns.shape[0])](
            *(z, bias, inv_t, stats[0], stats[1], floor, columns[:, v0:], n, c, z.stride(0), columns.stride(0)),
            *(scale, softcap),
            PART_ROWS=COLUMN_ROWS,
            BLOCK_N=block.n,
            BLOCK_V=block.v,
            num_warps=block.warps,
        )

    default = row(LAUNCH, architecture(z.device)).columns
    with on_device(z):
        # Running twice writes the same maxima.
        run(tuned("linear_logps columns", tile_shape(z), z.device, default, _CANDIDATES["columns"], run))


def _forms(z: str, acc: str, full: bool) -> list[Signature]:
    """A plain head or one with everything, at the sizes of the GPU rows of LAUNCH."""
    sizes = LAUNCH["cuda:90"]
    optional = ["bias_ptr", "inv_t_ptr"]
    sums = ["sum_z_ptr", "sum_sq_ptr"]
    head: dict[str, object] = {"SCALE": 0.5, "SOFTCAP": 30.0} if full else {"SCALE": 1.0, "SOFTCAP": None}

    def pointers(names: Sequence[str], extra: Sequence[str]) -> dict[str, str]:
        return dict.fromkeys([*names, *(extra if full else [])], acc)

    def nothing(extra: Sequence[str]) -> dict[str, object]:
        return {} if full else dict.fromkeys(extra)

    rows = [
        Signature(
            _logps_rows_kernel,
            {"z_ptr": z, "target_ptr": "*i64", "stride_zn": "i64"}
            | pointers(["max_ptr", "sum_ptr", "target_z_ptr"], optional + sums)
            | dict.fromkeys(["N", "C", "v0", "split_columns", "stride_split"], "i32"),
            head | nothing(optional + sums) | {"RUNNING": running, "BLOCK_N": sizes.rows.n, "BLOCK_V": sizes.rows.v},
            hot=acc == "*fp32",
            num_warps=sizes.rows.warps,
            aligned=("C", "v0", "split_columns", "stride_zn"),
        )
        for running in (True, False)
    ]
    columns = Signature(
        _logps_columns_kernel,
        {"z_ptr": z, "N": "i32", "C": "i32", "stride_zn": "i64", "stride_columns": "i64"}
        | pointers(["max_ptr", "sum_ptr", "floor_ptr", "columns_ptr"], optional),
        head | nothing(optional) | {"PART_ROWS": COLUMN_ROWS, "BLOCK_N": sizes.columns.n, "BLOCK_V": sizes.columns.v},
        hot=acc == "*fp32",
        num_warps=sizes.columns.warps,
        aligned=("C", "stride_zn", "stride_columns"),
    )
    return [*rows, columns]


_VECTORS = [f"{p}{v}_ptr" for p in ("part_", "") for v in ("max", "sum", "sum_z", "sum_sq", "target_z")]
COMPILE = [
    *_forms("*bf16", "*fp32", False),
    *_forms("*fp16", "*fp32", False),
    *_forms("*fp32", "*fp32", True),
    *_forms("*bf16", "*fp32", True),
    *_forms("*fp64", "*fp64", True),
    *(
        Signature(_logps_merge_kernel, dict.fromkeys(_VECTORS, acc) | {"N": "i32", "splits": "i32"}, {"BLOCK_N": 128})
        for acc in ("*fp32", "*fp64")
    ),
]
