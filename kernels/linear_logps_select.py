"""The columns that each row chunk of the sampled gradient keeps: draw and compaction, of all chunks at once.

Column j is kept with probability q_j = min(1, u_j / tau), u_j from its bound; docs/linear_logps.md has the derivation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import Signature, on_device
from ._launch import cdiv
from ._softmax import nan_max

_BLOCK = 1024


@triton.jit
def _uniform(seed_low, seed_high, row, column):
    """53 bits of (0, 1) as float64, of (seed, row, column), 64 bits each: Philox with these as key and counter."""
    seed = (seed_high.to(tl.uint64) << 32) | (seed_low.to(tl.uint64) & 0xFFFFFFFF)
    column_low = column.to(tl.uint32)
    none = column_low * 0
    high, low, _, _ = tl.philox(
        seed, column_low, (column >> 32).to(tl.uint32), none + row.to(tl.uint32), none + (row >> 32).to(tl.uint32)
    )
    high = (high.to(tl.uint32, bitcast=True) >> 5).to(tl.float64)
    low = (low.to(tl.uint32, bitcast=True) >> 6).to(tl.float64)
    # Never 0: a keep probability may be 1e-13, which 32 bits cannot tell from 0, and one of 1e-45 has no inverse.
    return (high * 67108864.0 + low + 0.5) * 1.1102230246251565e-16


@triton.jit(do_not_specialize=["parts", "seed_low", "seed_high", "first_column", "first_row", "step_rows"])
def _logps_keep_kernel(
    columns_ptr,
    forced_ptr,
    inverse_ptr,
    kept_ptr,
    expected_ptr,
    mean_entropy_ptr,
    rows_ptr,
    V,
    parts,
    stride_chunk,
    stride_part,
    stride_forced,
    tau,
    seed_low,
    seed_high,
    first_column,
    first_row,
    step_rows,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = j < V
    # Each part is the maximum over some of the rows: their order cannot change the result.
    best = tl.full((BLOCK,), float("-inf"), columns_ptr.dtype.element_ty)
    at = columns_ptr + chunk * stride_chunk + j
    for _ in range(parts):
        best = nan_max(best, tl.load(at, mask=live, other=float("-inf")))
        at += stride_part
    u = tl.exp(best)
    if mean_entropy_ptr is not None:
        # x (1 - log x) rises on (0, 1], so the bound of p also bounds p (1 + |log p + H|).
        u = tl.where(u > 1.0, 1.0, u)
        u = tl.where(u > 0, u * (1.0 - tl.log(u) + tl.load(mean_entropy_ptr + chunk)), u)
    forced = tl.load(forced_ptr + chunk * stride_forced + j, mask=live, other=0) != 0
    sure = forced | (u >= tau) | (u != u)
    q = tl.where(sure, 1.0, u / tau)
    row = first_row + chunk * step_rows
    if rows_ptr is not None:
        row = tl.load(rows_ptr + chunk)
    uniform = _uniform(seed_low, seed_high, row, j + first_column)
    keep = live & (sure | (uniform < q.to(tl.float64)))
    # 0 where the column is not kept: 1 / q is at least 1.
    tl.store(inverse_ptr + chunk * V + j, tl.where(keep, 1.0 / q, 0.0), mask=live)
    block = chunk * tl.num_programs(0) + tl.program_id(0)
    tl.store(kept_ptr + block, tl.sum(keep.to(tl.int32), 0))
    # More than any share of the vocabulary: a row with NaN or infinity has a gradient of NaN in every column.
    q = tl.where((best != best) | (best == float("inf")), float("inf"), q)
    tl.store(expected_ptr + block, tl.sum(tl.where(live, q, 0.0).to(tl.float64), 0))


@triton.jit
def _logps_compact_kernel(
    inverse_ptr,
    kept_ptr,
    expected_ptr,
    index_ptr,
    kept_inverse_ptr,
    counts_ptr,
    V,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    chunk = tl.program_id(1).to(tl.int64)
    j = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Where this block's columns begin: all programs of a chunk add the same numbers in the same order.
    before = tl.zeros((), tl.int32)
    kept = tl.zeros((), tl.int32)
    expected = tl.zeros((), tl.float64)
    for first in range(0, blocks, BLOCK):
        b = first + tl.arange(0, BLOCK)
        count = tl.load(kept_ptr + chunk * blocks + b, mask=b < blocks, other=0)
        before += tl.sum(tl.where(b < block, count, 0), 0)
        kept += tl.sum(count, 0)
        expected += tl.sum(tl.load(expected_ptr + chunk * blocks + b, mask=b < blocks, other=0.0), 0)
    if block == 0:
        tl.store(counts_ptr + 2 * chunk, kept.to(tl.float64))
        tl.store(counts_ptr + 2 * chunk + 1, expected)
    inverse = tl.load(inverse_ptr + chunk * V + j, mask=j < V, other=0.0)
    keep = inverse > 0
    at = chunk * V + before + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(index_ptr + at, j, mask=keep)
    tl.store(kept_inverse_ptr + at, inverse, mask=keep)


def _signed(bits: int) -> int:
    """The low 32 bits as a signed number: Triton types an argument by its value, and i32 must fit each seed."""
    return (bits & 0xFFFFFFFF) - ((bits & 0x80000000) << 1)


def select_columns(
    columns: torch.Tensor,
    forced: torch.Tensor,
    tau: float,
    mean_entropy: torch.Tensor | None,
    seed: int,
    rows: torch.Tensor | range,
    first_column: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns kept by each row chunk, ascending, 1 / their keep probabilities, and how many; nothing is read back.

    The draw of a column depends on seed, its chunk's first row and its number in the whole vocabulary alone.

    Args:
        columns: (chunks, parts, V) float32 or float64, log of the column bounds, maximised over parts here; last
            stride 1.
        forced: (chunks, V) uint8, nonzero where a column is always kept; last stride 1.
        tau: keep threshold, above 0.
        mean_entropy: (chunks,) of the dtype of columns, mean entropy of the rows; None without the entropy gradient.
        seed: 64 bits.
        rows: first row of each chunk: a range, or (chunks,) int64.
        first_column: number of column 0 in the whole vocabulary.

    Returns:
        (chunks, V) int64 and (chunks, V) in the dtype of columns, of which a row is written as far as there are kept
        columns, and (chunks, 2) float64: how many those are, and the sum of all keep
        probabilities, infinite where a bound is NaN.
    """
    chunks, parts, vocabulary = columns.shape
    device, blocks = columns.device, cdiv(vocabulary, _BLOCK)
    inverse = columns.new_empty((chunks, vocabulary))
    kept = torch.empty((chunks, blocks), dtype=torch.int32, device=device)
    expected = torch.empty((chunks, blocks), dtype=torch.float64, device=device)
    index = torch.empty((chunks, vocabulary), dtype=torch.int64, device=device)
    kept_inverse = torch.empty_like(inverse)
    counts = torch.empty((chunks, 2), dtype=torch.float64, device=device)
    numbers, (first_row, step) = (rows, (0, 0)) if isinstance(rows, torch.Tensor) else (None, (rows.start, rows.step))
    with on_device(columns):
        _logps_keep_kernel[(blocks, chunks)](
            *(columns, forced, inverse, kept, expected, mean_entropy, numbers, vocabulary, parts),
            *(columns.stride(0), columns.stride(1), forced.stride(0), tau, _signed(seed), _signed(seed >> 32)),
            *(first_column, first_row, step, _BLOCK),
        )
        _logps_compact_kernel[(blocks, chunks)](
            inverse, kept, expected, index, kept_inverse, counts, vocabulary, _BLOCK
        )
    return index, kept_inverse, counts


COMPILE = [
    *(
        Signature(
            _logps_keep_kernel,
            {"columns_ptr": real, "forced_ptr": "*u8", "inverse_ptr": real, "kept_ptr": "*i32", "expected_ptr": "*fp64"}
            | dict.fromkeys(["V", "parts", "seed_low", "seed_high", "first_column", "first_row", "step_rows"], "i32")
            | dict.fromkeys(["stride_chunk", "stride_part", "stride_forced"], "i64")
            | {"tau": "fp32"}
            | ({"mean_entropy_ptr": real} if entropy else {})
            | ({"rows_ptr": "*i64"} if given else {}),
            {"BLOCK": _BLOCK} | ({} if entropy else {"mean_entropy_ptr": None}) | ({} if given else {"rows_ptr": None}),
            aligned=("V", "stride_chunk", "stride_part"),
        )
        for real, entropy, given in (("*fp32", False, False), ("*fp32", True, False), ("*fp64", True, True))
    ),
    *(
        Signature(
            _logps_compact_kernel,
            {"inverse_ptr": real, "kept_ptr": "*i32", "expected_ptr": "*fp64", "index_ptr": "*i64", "V": "i32"}
            | {"kept_inverse_ptr": real, "counts_ptr": "*fp64"},
            {"BLOCK": _BLOCK},
            aligned=("V",),
        )
        for real in ("*fp32", "*fp64")
    ),
]
