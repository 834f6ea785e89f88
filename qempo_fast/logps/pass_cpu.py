"""The row and column pass over a tile of logits, in native code."""

from __future__ import annotations

import torch

from .. import _C
from .options import Options, TileSizes
from .stats import RowStats
from .tile_pass import TilePass

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


def _ptr(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class CpuPass(TilePass):
    """forward/backward/select of one call; float16 tiles, which _C lacks, are widened to float32."""

    def sizes(self, sampled: bool) -> TileSizes:
        # 16 MiB of float32 either way. Sampling wants few rows per column choice (kept share .074/.104/.139 at
        # 256/512/1024 rows); the exact backward wants many rows per pass over dW.
        return TileSizes(512, 8192) if sampled else TileSizes(2048, 2048)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype, device=device)
        _C.ask_huge_pages(out.data_ptr(), out.nbytes)
        return out.zero_()

    def add_rows(self, out: torch.Tensor, at: torch.Tensor, rows: torch.Tensor) -> None:
        rows = rows.float() if rows.dtype == torch.float16 else rows.contiguous()
        _C.add_rows(
            _DTYPES[rows.dtype], out.data_ptr(), at.data_ptr(), rows.data_ptr(), *rows.shape, torch.get_num_threads()
        )

    def new_columns(self, vocabulary: int, like: RowStats) -> torch.Tensor:
        return like.max.new_full((torch.get_num_threads(), vocabulary), -torch.inf)

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
        if z.dtype == torch.float16:
            z = z.float()
        n, c = z.shape
        rows = [_ptr(x) for x in (stats.max, stats.sum, stats.sum_z, stats.sum_sq, stats.target, floor)]
        _C.logps_fwd(
            _DTYPES[z.dtype],
            z.data_ptr(),
            z.stride(0),
            n,
            c,
            v0,
            _ptr(bias),
            _ptr(inv_temperature),
            options.logit_scale,
            options.softcap or 0.0,
            targets.data_ptr(),
            rows,
            _ptr(columns),
            0 if columns is None else columns.shape[1],
            torch.get_num_threads(),
        )

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
        options: Options,
    ) -> None:
        if z.dtype == torch.float16:
            wide = z.float()
            self.backward(wide, bias, inv_temperature, lse, grad, grad_entropy, entropy, inverse, target, options)
            z.copy_(wide)
            return
        n, c = z.shape
        _C.logps_bwd(
            _DTYPES[z.dtype],
            z.data_ptr(),
            z.stride(0),
            n,
            c,
            _ptr(bias),
            _ptr(inv_temperature),
            options.logit_scale,
            options.softcap or 0.0,
            _ptr(lse),
            _ptr(grad),
            _ptr(grad_entropy),
            _ptr(entropy),
            _ptr(inverse),
            target.data_ptr(),
            torch.get_num_threads(),
        )

    def select(
        self,
        columns: torch.Tensor,
        forced: torch.Tensor,
        tau: float,
        mean_entropy: float | None,
        seed: int,
        chunk: int,
        first_column: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        vocabulary = columns.shape[1]
        kept = torch.empty(vocabulary, dtype=torch.int64)
        inverse = columns.new_empty(vocabulary)
        count = _C.logps_select(
            columns.dtype == torch.float64,
            columns.data_ptr(),
            columns.shape[0],
            vocabulary,
            tau,
            -1.0 if mean_entropy is None else mean_entropy,
            forced.data_ptr(),
            seed,
            chunk,
            first_column,
            kept.data_ptr(),
            inverse.data_ptr(),
        )
        return kept[:count].clone(), inverse[:count].clone()
