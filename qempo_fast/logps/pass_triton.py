"""The row and column pass over a tile of logits in Triton, and the fused forward for a few rows."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels._launch import architecture, row
from ..kernels.linear_logps_fused import FEW, fused_fwd
from ..kernels.linear_logps_grad import tile_bwd
from ..kernels.linear_logps_select import select_columns
from ..kernels.linear_logps_tiles import COLUMN_ROWS, columns_fwd, rows_fwd
from .chunked import HeadTensors
from .options import Options, TileSizes
from .stats import RowStats
from .tile_pass import TilePass

# (rows, columns) of the logits buffer, sampled and exact. Not measured yet on any GPU. In half precision these 16 to 64
# MiB fit the last cache (A100 40, H100 50, B200 126, MI300X 256) between the GEMM that writes and the pass that reads.
_TILES = {
    "interpreter": ((48, 96), (64, 160)),
    "cuda:80": ((1024, 8192), (2048, 8192)),
    "cuda:90": ((1024, 16384), (4096, 4096)),
    "cuda:100": ((1024, 16384), (4096, 8192)),
    "hip:gfx942": ((1024, 32768), (4096, 16384)),
}

# Rows of a chunk up to which the fused kernel runs instead of the vendor's GEMM and the tile passes. Not measured yet:
# up to FEW rows reading W is the cost, which one launch does once; above, Triton's GEMM has to beat the vendor's.
_FUSED_ROWS = {"interpreter": 0, "cuda:80": FEW, "cuda:90": FEW, "cuda:100": FEW, "hip:gfx942": FEW}


def _vectors(stats: RowStats) -> list[torch.Tensor | None]:
    return [stats.max, stats.sum, stats.sum_z, stats.sum_sq, stats.target]


class TritonPass(TilePass):
    """Same contract as CpuPass; on a GPU, or on CPU tensors in Triton's interpreter."""

    name = "triton"

    def sizes(self, sampled: bool) -> TileSizes:
        # Of the current device: the GPUs of one process are of one kind.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return TileSizes(*row(_TILES, architecture(device))[0 if sampled else 1])

    def new_columns(self, vocabulary: int, like: RowStats) -> torch.Tensor:
        # Every entry is written before it is read: a chunk visits each of its columns once.
        return like.max.new_empty(-(-len(like.max) // COLUMN_ROWS), vocabulary)

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
        scale, softcap = options.logit_scale, options.softcap
        rows_fwd(z, bias, inv_temperature, targets, _vectors(stats), v0, scale, softcap)
        if columns is not None:
            assert floor is not None
            columns_fwd(z, bias, inv_temperature, _vectors(stats), floor, columns, v0, scale, softcap)

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

    def select(
        self,
        columns: torch.Tensor,
        forced: torch.Tensor,
        tau: float,
        mean_entropy: torch.Tensor | None,
        seed: int,
        chunk: int,
        first_column: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return select_columns(columns, forced, tau, mean_entropy, hash((seed, chunk)) % 2**62, first_column)

    def count(self, draws: list[Any]) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        counts = torch.stack([d[2] for d in draws]).tolist() if draws else []
        return [(d[0][: int(n)], d[1][: int(n)], expected) for d, (n, expected) in zip(draws, counts, strict=True)]
