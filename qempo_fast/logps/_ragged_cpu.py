"""Ragged products, statistics and gradients in native code, for float32, bfloat16 and float64."""

from __future__ import annotations

import torch

from .. import _C
from .._door import address, dense, maybe
from ._head import RowGrads
from ._options import Options, accumulator
from ._ragged import Entries, RaggedPass
from ._row_stats import RowStats
from ._tile_pass import RowSum, TilePass

_Optional = torch.Tensor | None

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


class CpuRagged(RaggedPass):
    """Same contract as RaggedPass; products of float16, which _C lacks, are those of plain torch."""

    # A row of the weight is read once for all rows of a block that keep it: where a quarter of them did, 2.4 to 4.3.
    product_cost = 2.0

    def cost(self, hidden: torch.Tensor) -> float:
        return self.product_cost if hidden.dtype in _DTYPES else super().cost(hidden)

    def row_sum(self, tiles: TilePass, weight: torch.Tensor) -> RowSum:
        return tiles.row_sum(weight)

    def dots(self, hidden: torch.Tensor, weight: torch.Tensor, entries: Entries) -> torch.Tensor:
        if hidden.dtype not in _DTYPES:
            return super().dots(hidden, weight, entries)
        hidden, weight = dense("hidden", hidden), dense("weight", weight)
        acc, dtype = accumulator(hidden.dtype), hidden.dtype
        z = torch.empty(len(entries.ids), dtype=acc, device="cpu")
        _C.kept_dots(
            *_kept(dtype, entries, *weight.shape),
            *(address(hidden, dtype, hidden.numel()), address(weight, dtype, weight.numel())),
            *(address(z, acc, len(z)), torch.get_num_threads()),
        )
        return z

    def to_hidden(self, dz: torch.Tensor, weight: torch.Tensor, entries: Entries, n: int) -> torch.Tensor:
        if weight.dtype not in _DTYPES:
            return super().to_hidden(dz, weight, entries, n)
        weight, dtype, width = dense("weight", weight), weight.dtype, weight.shape[1]
        out = torch.empty(n, width, dtype=dz.dtype, device="cpu")
        _C.kept_to_hidden(
            *_kept(dtype, entries, *weight.shape),
            *(address(dz, dz.dtype, len(dz)), address(weight, dtype, weight.numel())),
            *(address(out, dz.dtype, n * width), torch.get_num_threads()),
        )
        return out

    def to_weight(self, dz: torch.Tensor, hidden: torch.Tensor, entries: Entries, total: RowSum) -> None:
        if hidden.dtype not in _DTYPES:
            super().to_weight(dz, hidden, entries, total)
            return
        # A sum of CpuPass, with marks of the rows that hold something.
        seen: torch.Tensor = total.seen  # type: ignore[attr-defined]
        hidden, dtype = dense("hidden", hidden), hidden.dtype
        vocabulary, width = total.sum.shape
        _C.kept_to_weight(
            *_kept(dtype, entries, vocabulary, width),
            *(address(dz, dz.dtype, len(dz)), address(hidden, dtype, hidden.numel())),
            *(address(total.sum, dz.dtype, vocabulary * width), address(seen, torch.uint8, vocabulary)),
            torch.get_num_threads(),
        )

    def forward(
        self, z: torch.Tensor, inv_temperature: _Optional, entries: Entries, places: torch.Tensor, options: Options
    ) -> RowStats:
        n, acc = len(places), z.dtype
        stats = RowStats.new(n, acc, z.device, options.entropy, options.sum_sq)
        _C.ragged_fwd(
            *_rows(z, inv_temperature, entries, options),
            address(places, torch.int64, n),
            address(stats.max, acc, n),
            address(stats.sum, acc, n),
            maybe(stats.sum_z, acc, n),
            maybe(stats.sum_sq, acc, n),
            address(stats.target, acc, n),
            torch.get_num_threads(),
        )
        return stats

    def backward(
        self,
        tiles: TilePass,
        z: torch.Tensor,
        inv_temperature: _Optional,
        entries: Entries,
        places: torch.Tensor,
        grads: RowGrads,
        options: Options,
    ) -> torch.Tensor:
        n, acc, out = len(places), z.dtype, z.clone()
        _C.ragged_bwd(
            *_rows(out, inv_temperature, entries, options),
            address(grads.lse, acc, 2 * n),
            address(grads.grad, acc, n),
            maybe(grads.grad_entropy, acc, n),
            maybe(grads.entropy, acc, n),
            address(places, torch.int64, n),
            torch.get_num_threads(),
        )
        return out


def _kept(dtype: torch.dtype, entries: Entries, vocabulary: int, width: int) -> tuple[int, ...]:
    ids, offsets = entries.ids, entries.offsets
    at = address(ids, torch.int64, len(ids)), address(offsets, torch.int64, len(offsets))
    return _DTYPES[dtype], *at, len(offsets) - 1, width, vocabulary


def _rows(
    z: torch.Tensor, inv_temperature: _Optional, entries: Entries, options: Options
) -> tuple[bool | int | float | None, ...]:
    n = len(entries.offsets) - 1
    longest = int(entries.offsets.diff().amax()) if n else 0
    return (
        z.dtype == torch.float64,
        address(z, z.dtype, len(entries.ids)),
        address(entries.offsets, torch.int64, n + 1),
        n,
        longest,
        maybe(inv_temperature, z.dtype, n),
        options.logit_scale,
        options.softcap or 0.0,
    )
