"""The row and column pass over a tile of logits, in native code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .. import _C
from ._head import Draw, RowGrads, Tile
from ._options import Options, TileSizes
from ._row_stats import RowStats
from ._tile_pass import RowSum, TilePass

_Optional = torch.Tensor | None

# Sampling: few rows to a column choice, and kept tiles of 2048 that stay in the last cache, out of a quarter of a
# vocabulary of 49152 at a time (docs/linear_logps.md has the shares and errors). Exact: at 2048 rows and more the
# bfloat16 GEMMs ran at half their rate. 512 x 8192 is 16 MiB.
SAMPLED, EXACT = TileSizes(512, 8192, 256, 2048, 12288), TileSizes(1024, 2048)
# Of dweight in a block: 64 MiB in float32. For a width of 4096 that is 4096 columns, which took 0.8 of the time of
# 12288 where a third of them was kept.
BLOCK_ENTRIES = 2**24
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


def _ptr(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class _CpuRowSum(RowSum):
    """Rows are stored at their first touch and the rest zeroed at the end: one pass over the result, not two."""

    buffer: torch.Tensor | None = None

    def begin(self, block: slice, columns: Sequence[torch.Tensor | None]) -> None:
        self.out = self.sum = self.total[block]
        if self.half:
            # Of the first block, which is the largest: the float32 sums of a block stay in the cache.
            if self.buffer is None:
                self.buffer = torch.empty(self.out.shape)
            self.sum = self.buffer[: len(self.out)]
        whole = any(c is None for c in columns)
        self.seen = torch.full((len(self.out),), whole, dtype=torch.uint8)
        if whole:
            self.sum.zero_()

    def _add(self, at: torch.Tensor, rows: torch.Tensor) -> None:
        rows = rows.float() if rows.dtype == torch.float16 else rows.contiguous()
        addresses = [_ptr(x) for x in (self.sum, self.seen, at, rows)]
        _C.add_rows(_DTYPES[rows.dtype], *addresses, *rows.shape, torch.get_num_threads())

    def end(self) -> None:
        n, d, threads = *self.out.shape, torch.get_num_threads()
        if self.out.dtype == torch.bfloat16:
            _C.round_rows(self.out.data_ptr(), self.seen.data_ptr(), self.sum.data_ptr(), n, d, threads)
            return
        _C.zero_unseen(self.sum.data_ptr(), self.seen.data_ptr(), n, d * self.sum.element_size(), threads)
        if self.half:
            self.out.copy_(self.sum)


class CpuPass(TilePass):
    """forward/backward/select of one call; float16 tiles, which _C lacks, are widened to float32."""

    name = "cpu"

    def sizes(self, sampled: bool, hidden: torch.Tensor | None = None) -> TileSizes:
        if not sampled:
            return EXACT
        if hidden is None or not SAMPLED.block:
            return SAMPLED
        return replace(SAMPLED, block=min(SAMPLED.block, max(1, BLOCK_ENTRIES // max(1, hidden.shape[1]))))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        # In huge pages where the system gives them.
        out = torch.empty(shape, dtype=dtype, device=device)
        _C.ask_huge_pages(out.data_ptr(), out.nbytes)
        return out

    def gather(self, weight: torch.Tensor, at: torch.Tensor, out: torch.Tensor) -> None:
        if not weight.is_contiguous():
            super().gather(weight, at, out)
            return
        row = weight.shape[1] * weight.element_size()
        addresses = (out.data_ptr(), weight.data_ptr(), at.data_ptr())
        _C.gather_rows(*addresses, len(at), len(at), row, torch.get_num_threads())
        out[len(at) :].zero_()

    def row_sum(self, weight: torch.Tensor) -> RowSum:
        return _CpuRowSum(self.empty(weight.shape, weight.dtype, weight.device))

    def new_columns(self, vocabulary: int, like: RowStats) -> torch.Tensor:
        return like.max.new_full((torch.get_num_threads(), vocabulary), -torch.inf)

    def forward(
        self, tile: Tile, stats: RowStats, floor: _Optional, columns: _Optional, v0: int, options: Options
    ) -> None:
        z, bias, inv_temperature, targets = tile
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

    def backward(self, tile: Tile, grads: RowGrads, inverse: _Optional, row_sum: _Optional, options: Options) -> None:
        z, bias, inv_temperature, target = tile
        if inverse is not None:
            z = z[:, : len(inverse)]  # what is behind has a gradient of 0 already
        if z.dtype == torch.float16:
            wide = z.float()
            self.backward(tile._replace(z=wide), grads, inverse, row_sum, options)
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
            _ptr(grads.lse),
            _ptr(grads.grad),
            _ptr(grads.grad_entropy),
            _ptr(grads.entropy),
            _ptr(inverse),
            target.data_ptr(),
            _ptr(row_sum),
            torch.get_num_threads(),
        )

    def select(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor, float]:
        columns, forced, tau, mean_entropy, seed, rows, first_column = draw
        vocabulary = columns.shape[1]
        kept = torch.empty(vocabulary, dtype=torch.int64)
        inverse = columns.new_empty(vocabulary)
        count, expected = _C.logps_select(
            columns.dtype == torch.float64,
            columns.data_ptr(),
            columns.shape[0],
            vocabulary,
            tau,
            -1.0 if mean_entropy is None else float(mean_entropy),
            forced.data_ptr(),
            seed,
            rows.start,
            first_column,
            kept.data_ptr(),
            inverse.data_ptr(),
            torch.get_num_threads(),
        )
        return kept[:count].clone(), inverse[:count].clone(), expected


linear_logps = logps_from_logits = CpuPass
