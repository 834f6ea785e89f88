"""The row and column pass over a tile of logits in Triton, and the fused forward for a few rows."""

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
from .head import HeadTensors
from .options import Options, TileSizes, accumulator
from .policy import POLICIES, Policy
from .row_sum import RowSum
from .stats import RowStats
from .tile_pass import TilePass

# Rows of a chunk up to which the fused kernel runs instead of the vendor's GEMM and the tile passes. Not measured yet:
# up to FEW rows reading W is the cost, which one launch does once; above, Triton's GEMM has to beat the vendor's.
_FUSED_ROWS = {"interpreter": 0, "cuda:80": FEW, "cuda:90": FEW, "cuda:100": FEW, "hip:gfx942": FEW}


def _vectors(stats: RowStats) -> list[torch.Tensor | None]:
    return [stats.max, stats.sum, stats.sum_z, stats.sum_sq, stats.target]


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

    def sizes(self, sampled: bool, hidden: torch.Tensor | None = None) -> TileSizes:
        # Without rows the current device's: the GPUs of one process are of one kind.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if hidden is None else hidden.device
        policy = _policy(device)
        rows, width, size = (policy.chunk, 1, 2) if hidden is None else (*hidden.shape, hidden.element_size())
        return policy.sampled(rows, width, size, COLUMN_ROWS) if sampled else policy.exact(rows, size)

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
        self,
        z: torch.Tensor,
        bias: torch.Tensor | None,
        inv_temperature: torch.Tensor | None,
        targets: torch.Tensor,
        stats: RowStats,
        floor: torch.Tensor | None,
        columns: torch.Tensor | None,
        v0: int,
        options: Options,
    ) -> None:
        if columns is not None:
            columns = columns[: -(-len(z) // COLUMN_ROWS)]
        tile_fwd(
            *(z, bias, inv_temperature, targets, _vectors(stats), floor, columns),
            *(v0, options.logit_scale, options.softcap),
        )

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
        if hidden.dtype == torch.float64 or not hidden.numel():
            return False
        if hidden.dtype == torch.float32 and _tf32():
            return False
        if len(hidden) > row(_FUSED_ROWS, architecture(hidden.device)):
            return False
        fused_fwd(
            *(hidden, weight, chunk.bias, chunk.inv_temperature, chunk.targets, _vectors(stats), floor, columns),
            *(options.logit_scale, options.softcap),
        )
        return True

    def backward(
        self,
        z: torch.Tensor,
        bias: torch.Tensor | None,
        inv_temperature: torch.Tensor | None,
        lse: torch.Tensor,
        grad: torch.Tensor,
        grad_entropy: torch.Tensor | None,
        entropy: torch.Tensor | None,
        inverse: torch.Tensor | None,
        target: torch.Tensor,
        row_sum: torch.Tensor | None,
        options: Options,
    ) -> None:
        tile_bwd(
            *(z, bias, inv_temperature, lse, grad, grad_entropy, entropy, inverse, target),
            *(options.logit_scale, options.softcap),
        )
        if row_sum is not None:
            torch.sum(z, 1, dtype=row_sum.dtype, out=row_sum)

    def logits_gradient(
        self,
        z: torch.Tensor,
        targets: torch.Tensor,
        counted: torch.Tensor,
        inv_temperature: torch.Tensor | None,
        lse: torch.Tensor,
        grad: torch.Tensor,
        grad_entropy: torch.Tensor | None,
        entropy: torch.Tensor | None,
        options: Options,
    ) -> torch.Tensor:
        z = z if z.stride(-1) == 1 else z.contiguous()
        out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        tile_bwd(
            *(z, None, inv_temperature, lse, grad, grad_entropy, entropy, None, targets),
            *(options.logit_scale, options.softcap),
            live=counted,
            out=out,
        )
        return out

    def row_sum(self, weight: torch.Tensor) -> RowSum:
        if weight.dtype == torch.float64:
            return super().row_sum(weight)
        return _TritonRowSum(self.empty(weight.shape, weight.dtype, weight.device))

    def select(
        self,
        columns: torch.Tensor,
        forced: torch.Tensor,
        tau: float,
        mean_entropy: torch.Tensor | None,
        seed: int,
        rows: range,
        first_column: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = columns.view(len(rows), -1, columns.shape[1])
        return select_columns(parts, forced, tau, mean_entropy, seed, rows, first_column)

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
