"""The columns that one row chunk of the sampled gradient keeps: draw, prefix sum, compaction.

Column j is kept with probability q_j = min(1, u_j / tau), u_j from its bound; docs/linear_logps.md has the derivation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import Signature, on_device

_BLOCK = 1024


@triton.jit(do_not_specialize=["parts", "seed_low", "seed_high", "first_column"])
def _logps_keep_kernel(
    columns_ptr,
    forced_ptr,
    keep_ptr,
    inverse_ptr,
    V,
    parts,
    tau,
    mean_entropy_ptr,
    seed_low,
    seed_high,
    first_column,
    BLOCK: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = j < V
    # Each part is the maximum over some of the rows: their order cannot change the result.
    best = tl.full((BLOCK,), float("-inf"), columns_ptr.dtype.element_ty)
    at = columns_ptr + j
    for _ in range(parts):
        best = tl.maximum(best, tl.load(at, mask=live, other=float("-inf")))
        at += V
    u = tl.exp(best)
    if mean_entropy_ptr is not None:
        # x (1 - log x) rises on (0, 1], so the bound of p also bounds p (1 + |log p + H|).
        u = tl.minimum(u, 1.0)
        u = tl.where(u > 0, u * (1.0 - tl.log(u) + tl.load(mean_entropy_ptr)), 0.0)
    forced = tl.load(forced_ptr + j, mask=live, other=0) != 0
    sure = forced | (u >= tau) | (u != u)
    q = tl.where(sure, 1.0, u / tau)
    # The stream is (seed, column in the whole vocabulary): ranks draw independently, and a draw is repeatable.
    seed = (seed_high.to(tl.uint64) << 32) | (seed_low.to(tl.uint64) & 0xFFFFFFFF)
    high, low, _, _ = tl.randint4x(seed, j + first_column)
    high = (high.to(tl.uint32, bitcast=True) >> 5).to(tl.float64)
    low = (low.to(tl.uint32, bitcast=True) >> 6).to(tl.float64)
    # 53 bits, never 0: q may be 1e-13, which 32 bits cannot tell from 0, and a kept q of 1e-45 has no inverse.
    uniform = (high * 67108864.0 + low + 0.5) * 1.1102230246251565e-16
    keep = live & (sure | (uniform < q.to(tl.float64)))
    tl.store(keep_ptr + j, keep.to(tl.int32), mask=live)
    tl.store(inverse_ptr + j, 1.0 / q, mask=live)


@triton.jit
def _logps_compact_kernel(keep_ptr, end_ptr, inverse_ptr, index_ptr, kept_inverse_ptr, V, BLOCK: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = j < V
    keep = tl.load(keep_ptr + j, mask=live, other=0) != 0
    at = tl.load(end_ptr + j, mask=live, other=1) - 1
    tl.store(index_ptr + at, j, mask=keep)
    tl.store(kept_inverse_ptr + at, tl.load(inverse_ptr + j, mask=live, other=0.0), mask=keep)


def _signed(bits: int) -> int:
    """The low 32 bits as a signed number: Triton types an argument by its value, and i32 must fit each seed."""
    return (bits & 0xFFFFFFFF) - ((bits & 0x80000000) << 1)


def select_columns(
    columns: torch.Tensor,
    forced: torch.Tensor,
    tau: float,
    mean_entropy: torch.Tensor | None,
    seed: int,
    first_column: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns kept by one row chunk, ascending, 1 / their keep probabilities, and how many; nothing is read back.

    Args:
        columns: (parts, V) float32 or float64, log of the column bounds, maximised over parts here.
        forced: (V,) uint8, nonzero where a column is always kept.
        tau: keep threshold, above 0.
        mean_entropy: () of the dtype of columns, mean entropy of the rows; None without the entropy gradient.
        seed: 64 bits.
        first_column: number of column 0 in the whole vocabulary.

    Returns:
        (V,) int64 and (V,) in the dtype of columns, written as far as there are kept columns, and (2,) float64: how
        many those are, and the sum of all keep probabilities.
    """
    parts, vocabulary = columns.shape
    keep = torch.empty(vocabulary, dtype=torch.int32, device=columns.device)
    inverse = columns.new_empty(vocabulary)
    index = torch.empty(vocabulary, dtype=torch.int64, device=columns.device)
    kept_inverse = torch.empty_like(inverse)
    grid = (triton.cdiv(vocabulary, _BLOCK),)
    with on_device(columns):
        _logps_keep_kernel[grid](
            *(columns, forced, keep, inverse, vocabulary, parts, tau, mean_entropy),
            *(_signed(seed), _signed(seed >> 32), first_column),
            BLOCK=_BLOCK,
        )
        end = keep.cumsum(0)
        _logps_compact_kernel[grid](keep, end, inverse, index, kept_inverse, vocabulary, BLOCK=_BLOCK)
    return index, kept_inverse, torch.stack([end[-1].double(), inverse.double().reciprocal().sum()])


COMPILE = [
    *(
        Signature(
            _logps_keep_kernel,
            {"columns_ptr": real, "forced_ptr": "*u8", "keep_ptr": "*i32", "inverse_ptr": real, "V": "i32"}
            | {"parts": "i32", "tau": "fp32", "seed_low": "i32", "seed_high": "i32", "first_column": "i32"}
            | ({"mean_entropy_ptr": real} if entropy else {}),
            {"BLOCK": _BLOCK} | ({} if entropy else {"mean_entropy_ptr": None}),
        )
        for real, entropy in (("*fp32", False), ("*fp32", True), ("*fp64", True))
    ),
    *(
        Signature(
            _logps_compact_kernel,
            {"keep_ptr": "*i32", "end_ptr": "*i64", "inverse_ptr": real, "index_ptr": "*i64", "V": "i32"}
            | {"kept_inverse_ptr": real},
            {"BLOCK": _BLOCK},
        )
        for real in ("*fp32", "*fp64")
    ),
]
