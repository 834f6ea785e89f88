"""Triton kernels of the log-prob ops: one pass over a tile of logits, the fused forward of few rows, segment sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels._launch import architecture, row
from ..kernels.add_rows import add_rows, rows_out
from ..kernels.linear_logps_fused import FEW, fused_fwd
from ..kernels.linear_logps_grad import tile_bwd
from ..kernels.linear_logps_select import select_columns
from ..kernels.linear_logps_targets import target_scores
from ..kernels.linear_logps_tiles import COLUMN_ROWS, tile_fwd
from ..kernels.segment_sum import segment_sum_bwd, segment_sum_fwd
from . import _segment_sum
from ._head import Draw, HeadTensors, RowGrads, Tile, tile_view
from ._options import Options, TileSizes, accumulator
from ._policy import POLICIES, Policy
from ._ragged_triton import TritonRagged
from ._row_stats import RowStats
from ._tile_pass import RowSum, TilePass

_Optional = torch.Tensor | None

# Rows of a chunk up to which the fused kernel runs instead of the vendor's GEMM and the tile passes. Not measured yet:
# up to FEW rows reading W is the cost, which one launch does once; above, Triton's GEMM has to beat the vendor's.
_FUSED_ROWS = {"interpreter": 0, "cuda:80": FEW, "cuda:90": FEW, "cuda:100": FEW, "hip:gfx942": FEW}


def _vectors(stats: RowStats) -> list[torch.Tensor | None]:
    return [stats.max, stats.sum, stats.sum_z, stats.sum_sq, stats.target]


def _tile_bwd(tile: Tile, grads: RowGrads, inverse: _Optional, options: Options, **where: torch.Tensor) -> None:
    rows = (grads.lse, grads.grad, grads.grad_entropy, grads.entropy)
    scale = (options.logit_scale, options.softcap)
    tile_bwd(tile.z, tile.bias, tile.inv_temperature, *rows, inverse, tile.targets, *scale, **where)


def _policy(device: torch.device) -> Policy:
    return row(POLICIES, architecture(device))


def _tf32() -> bool:
    """Whether the vendor's float32 GEMM rounds its inputs to TF32."""
    matmul = torch.backends.cuda.matmul
    # Since 2.9; there the older name raises where only the newer was set.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else bool(matmul.allow_tf32)


class _TritonRowSum(RowSum):
    """Rows are stored at their first touch, and the result is written once: no fill, no copy in another dtype."""

    buffer: torch.Tensor | None = None

    def begin(self, block: slice, columns: Sequence[torch.Tensor | None]) -> None:
        self.out = self.sum = self.total[block]
        if self.half:
            # Of the first block, which is the largest.
            if self.buffer is None:
                self.buffer = torch.empty(self.out.shape, dtype=torch.float32, device=self.out.device)
            self.sum = self.buffer[: len(self.out)]
        # A GEMM adds whole slices where they lie; and float32 has no second pass that could leave out what is not seen.
        filled = not self.half or any(c is None for c in columns)
        if filled:
            self.sum.zero_()
        self.seen = torch.full((len(self.out),), filled, dtype=torch.uint8, device=self.out.device)

    def _add(self, at: torch.Tensor, rows: torch.Tensor) -> None:
        add_rows(self.sum, at, rows, self.seen)

    def end(self) -> None:
        if self.half:
            rows_out(self.out, self.sum, self.seen, None)


class TritonPass(TilePass):
    """Same contract as CpuPass; on a GPU, or on CPU tensors in Triton's interpreter."""

    name = "triton"
    # 16 bytes in half precision: cuBLAS takes its slow kernels where rows start elsewhere, and Triton short loads.
    align = 8
    together = True

    def sizes(
        self, sampled: bool, hidden: torch.Tensor | None = None, wide: bool = False, fixed: bool = False
    ) -> TileSizes:
        # Without rows the current device's: the GPUs of one process are of one kind.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if hidden is None else hidden.device
        policy = _policy(device)
        rows, width, size = (policy.chunk, 1, 2) if hidden is None else (*hidden.shape, hidden.element_size())
        logit = 4 if wide else size
        found = policy.sampled(rows, width, size, COLUMN_ROWS, logit) if sampled else policy.exact(rows, logit)
        return policy.fixed(found, logit) if fixed else found

    def ordered(self, hidden: torch.Tensor, vocabulary: int) -> bool:
        return _policy(hidden.device).ordered(2 * hidden.numel() * vocabulary, hidden.element_size())

    def targets(self, head: HeadTensors, options: Options, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight, n = head.hidden, head.weight, len(head.targets)
        floor = torch.empty(n, dtype=accumulator(hidden.dtype), device=hidden.device)
        forced = torch.zeros(-(-n // chunk), len(weight), dtype=torch.uint8, device=hidden.device)
        target_scores(
            *(hidden, weight, head.bias, head.inv_temperature, head.targets, floor, forced, chunk),
            *(options.logit_scale, options.softcap),
        )
        return floor, forced

    def new_columns(self, vocabulary: int, like: RowStats) -> torch.Tensor:
        # Every entry is written before it is read: a chunk visits each of its columns once.
        parts = -(-len(like.max) // COLUMN_ROWS)
        chunk = max(1, _policy(like.max.device).chunk // COLUMN_ROWS)
        padded = parts + (-parts % chunk if parts > chunk else 0)
        columns = like.max.new_empty(padded, vocabulary)
        if padded > parts:
            columns[parts:].fill_(-torch.inf)  # of a last chunk that is short
        return columns

    def forward(
        self, tile: Tile, stats: RowStats, floor: _Optional, columns: _Optional, v0: int, options: Options
    ) -> None:
        if columns is not None:
            columns = columns[: -(-len(tile.z) // COLUMN_ROWS)]
        tile_fwd(*tile, _vectors(stats), floor, columns, v0, options.logit_scale, options.softcap, options.fixed)

    def fused(
        self,
        chunk: HeadTensors,
        stats: RowStats,
        floor: torch.Tensor | None,
        columns: torch.Tensor | None,
        options: Options,
    ) -> bool:
        """Statistics and column bounds of a row chunk over all columns in one launch; False to run tiles."""
        hidden, weight = chunk.hidden, chunk.weight
        # How many programs share the vocabulary depends on the rows.
        if hidden.dtype == torch.float64 or not hidden.numel() or options.fixed:
            return False
        if hidden.dtype == torch.float32 and _tf32():
            return False
        if len(hidden) > row(_FUSED_ROWS, architecture(hidden.device)):
            return False
        fused_fwd(
            *(hidden, weight, chunk.bias, chunk.inv_temperature, chunk.targets, _vectors(stats), floor, columns),
            *(options.logit_scale, options.softcap, options.wide),
        )
        return True

    def backward(self, tile: Tile, grads: RowGrads, inverse: _Optional, row_sum: _Optional, options: Options) -> None:
        _tile_bwd(tile, grads, inverse, options)
        if row_sum is not None:
            torch.sum(tile.z, 1, dtype=row_sum.dtype, out=row_sum)

    def slopes(
        self,
        tile: Tile,
        grads: RowGrads,
        inverse: _Optional,
        row_sum: _Optional,
        options: Options,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if tile.z.dtype == dtype:
            return super().slopes(tile, grads, inverse, row_sum, options, dtype)
        # Rounded where it is made: in place and then copied would be 14 bytes an entry, not 6.
        n, c = tile.z.shape
        out = tile_view(tile.z.new_empty(n * (c + -c % self.align), dtype=dtype), n, c, self.align)
        _tile_bwd(tile, grads, inverse, options, out=out)
        if row_sum is not None:
            torch.sum(out, 1, dtype=row_sum.dtype, out=row_sum)
        return out

    def logits_gradient(self, tile: Tile, counted: torch.Tensor, grads: RowGrads, options: Options) -> torch.Tensor:
        z = tile.z if tile.z.stride(-1) == 1 else tile.z.contiguous()
        out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        _tile_bwd(tile._replace(z=z), grads, None, options, live=counted, out=out)
        return out

    def row_sum(self, weight: torch.Tensor) -> RowSum:
        if weight.dtype == torch.float64:
            return super().row_sum(weight)
        return _TritonRowSum(self.empty(weight.shape, weight.dtype, weight.device))

    def select(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        columns, *rest = draw
        return select_columns(columns.view(len(draw.rows), -1, columns.shape[1]), *rest)

    def count(self, draws: list[Any]) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        if not draws:
            return []
        read = iter(torch.cat([d[2] for d in draws]).tolist() if len(draws) > 1 else draws[0][2].tolist())
        out = []
        for index, inverse, _ in draws:
            for at, scale in zip(index, inverse, strict=True):
                n, expected = next(read)
                out.append((at[: int(n)], scale[: int(n)], expected))
        return out


linear_logps = logps_from_logits = TritonPass
support_logps = TritonRagged


def segment_sum(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return _segment_sum.segment_sum((segment_sum_fwd, segment_sum_bwd), values, cu_seqlens)
