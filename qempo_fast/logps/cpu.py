"""The row and column pass over a tile of logits, in native code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .. import _C, _check
from .._door import address, dense, maybe
from .._door import tile as rows_of
from . import _segment_sum
from ._head import Draw, RowGrads, Tile
from ._options import Options, TileSizes, accumulator
from ._ragged_cpu import CpuRagged
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


class _CpuRowSum(RowSum):
    """Rows are stored at their first touch and the rest zeroed at the end: one pass over the result, not two."""

    buffer: torch.Tensor | None = None

    def begin(self, block: slice, columns: Sequence[torch.Tensor | None]) -> None:
        self.out = self.sum = self.total[block]
        if self.half:
            # Of the first block, which is the largest: the float32 sums of a block stay in the cache.
            if self.buffer is None:
                self.buffer = torch.empty(self.out.shape, dtype=torch.float32, device="cpu")
            self.sum = self.buffer[: len(self.out)]
        whole = any(c is None for c in columns)
        self.seen = torch.full((len(self.out),), whole, dtype=torch.uint8, device="cpu")
        if whole:
            self.sum.zero_()

    def _add(self, at: torch.Tensor, rows: torch.Tensor) -> None:
        rows = dense("rows", rows.float() if rows.dtype == torch.float16 else rows)
        n, d = rows.shape
        kind = torch.float64 if rows.dtype == torch.float64 else torch.float32
        _C.add_rows(
            _DTYPES[rows.dtype],
            address(self.sum, kind, len(self.out) * d),
            address(self.seen, torch.uint8, len(self.out)),
            address(at, torch.int64, n),
            address(rows, rows.dtype, n * d),
            n,
            d,
            torch.get_num_threads(),
        )

    def end(self) -> None:
        n, d, threads = *self.out.shape, torch.get_num_threads()
        seen, total = address(self.seen, torch.uint8, n), address(self.sum, self.sum.dtype, n * d)
        if self.out.dtype == torch.bfloat16:
            _C.round_rows(address(self.out, torch.bfloat16, n * d), seen, total, n, d, threads)
            return
        _C.zero_unseen(total, seen, n, d * self.sum.element_size(), threads)
        if self.half:
            self.out.copy_(self.sum)


class CpuPass(TilePass):
    """forward/backward/select of one call; float16 tiles, which _C lacks, are widened to float32."""

    name = "cpu"

    def sizes(
        self, sampled: bool, hidden: torch.Tensor | None = None, wide: bool = False, fixed: bool = False
    ) -> TileSizes:
        if not sampled:
            return EXACT
        size = replace(SAMPLED, columns=EXACT.columns, kept=SAMPLED.kept_columns) if fixed else SAMPLED
        if hidden is None or not SAMPLED.block:
            return size
        return replace(size, block=min(SAMPLED.block, max(1, BLOCK_ENTRIES // max(1, hidden.shape[1]))))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        # In huge pages where the system gives them.
        out = torch.empty(shape, dtype=dtype, device=device)
        _C.ask_huge_pages(address(out, dtype, out.numel()), out.nbytes)
        return out

    def gather(self, weight: torch.Tensor, at: torch.Tensor, out: torch.Tensor) -> None:
        if not weight.is_contiguous() or weight.is_neg():
            super().gather(weight, at, out)
            return
        n, d = len(at), weight.shape[1]
        _C.gather_rows(
            address(out, weight.dtype, len(out) * d),
            address(weight, weight.dtype, weight.numel()),
            address(at, torch.int64, n),
            n,
            n,
            d * weight.element_size(),
            torch.get_num_threads(),
        )
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
            z = z.to(torch.float32, memory_format=torch.contiguous_format)  # a view may overlap itself
        (n, c), acc, threads = z.shape, accumulator(z.dtype), torch.get_num_threads()
        vocabulary = 0 if columns is None else columns.shape[1]
        _C.logps_fwd(
            _DTYPES[z.dtype],
            *rows_of(z, z.dtype),
            n,
            c,
            v0,
            maybe(bias, acc, c),
            maybe(inv_temperature, acc, n),
            options.logit_scale,
            options.softcap or 0.0,
            address(targets, torch.int64, n),
            address(stats.max, acc, n),
            address(stats.sum, acc, n),
            maybe(stats.sum_z, acc, n),
            maybe(stats.sum_sq, acc, n),
            address(stats.target, acc, n),
            maybe(floor, acc, n),
            maybe(columns, acc, threads * vocabulary),
            vocabulary,
            threads,
        )

    def backward(self, tile: Tile, grads: RowGrads, inverse: _Optional, row_sum: _Optional, options: Options) -> None:
        z, bias, inv_temperature, target = tile
        if inverse is not None:
            z = z[:, : len(inverse)]  # what is behind has a gradient of 0 already
        if z.dtype == torch.float16:
            wide = z.to(torch.float32, memory_format=torch.contiguous_format)
            self.backward(tile._replace(z=wide), grads, inverse, row_sum, options)
            z.copy_(wide)
            return
        (n, c), acc = z.shape, accumulator(z.dtype)
        _C.logps_bwd(
            _DTYPES[z.dtype],
            *rows_of(z, z.dtype),
            n,
            c,
            maybe(bias, acc, c),
            maybe(inv_temperature, acc, n),
            options.logit_scale,
            options.softcap or 0.0,
            address(grads.lse, acc, 2 * n),
            address(grads.grad, acc, n),
            maybe(grads.grad_entropy, acc, n),
            maybe(grads.entropy, acc, n),
            maybe(inverse, acc, c),
            address(target, torch.int64, n),
            maybe(row_sum, acc, n),
            torch.get_num_threads(),
        )

    def select(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor, float]:
        columns, forced, tau, mean_entropy, seed, rows, first_column = draw
        copies, vocabulary = columns.shape
        kept = torch.empty(vocabulary, dtype=torch.int64, device="cpu")
        inverse = columns.new_empty(vocabulary)
        count, expected = _C.logps_select(
            columns.dtype == torch.float64,
            address(columns, columns.dtype, copies * vocabulary),
            copies,
            vocabulary,
            tau,
            -1.0 if mean_entropy is None else float(mean_entropy),
            address(forced, torch.uint8, vocabulary),
            seed,
            rows.start,
            first_column,
            address(kept, torch.int64, vocabulary),
            address(inverse, columns.dtype, vocabulary),
            torch.get_num_threads(),
        )
        return kept[:count].clone(), inverse[:count].clone(), expected


linear_logps = logps_from_logits = CpuPass
support_logps = CpuRagged


def _segments(backward: bool, x: torch.Tensor, cu_seqlens: torch.Tensor, n: int) -> torch.Tensor:
    """The sums of n tokens, or the gradient of each token from that of the sums."""
    x, count = x.to(accumulator(x.dtype)), cu_seqlens.shape[0] - 1
    given, made = (count, n) if backward else (n, count)
    out = torch.empty(made, dtype=x.dtype, device="cpu")
    if not _C.segment_sum(
        x.dtype == torch.float64,
        backward,
        address(x, x.dtype, given),
        n,
        address(cu_seqlens, cu_seqlens.dtype, count + 1),
        cu_seqlens.dtype == torch.int64,
        count,
        address(out, x.dtype, made),
        torch.get_num_threads(),
    ):
        _check.bad_value("cu_seqlens", f"offsets from 0 to {n} that never fall", "others")
    return out


def _sums(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return _segments(False, values, cu_seqlens, values.shape[0])


def _spread(grad: torch.Tensor, cu_seqlens: torch.Tensor, n: int) -> torch.Tensor:
    return _segments(True, grad, cu_seqlens, n)


def segment_sum(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return _segment_sum.segment_sum((_sums, _spread), values, cu_seqlens)
