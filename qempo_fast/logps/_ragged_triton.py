"""Ragged products, statistics and gradients by Triton kernels."""

from __future__ import annotations

import torch

from ..kernels._launch import architecture, row
from ..kernels.support_logps import kept_dots, kept_sums, support_bwd, support_fwd
from ._head import RowGrads
from ._options import Options, accumulator
from ._policy import POLICIES
from ._ragged import Entries, RaggedPass
from ._row_stats import RowStats
from ._tile_pass import RowSum, TilePass

_Optional = torch.Tensor | None

# Tokens whose rows of dweight are summed at once, in the dtype of sums, before they go to the whole.
_TOKENS = 8192


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class TritonRagged(RaggedPass):
    """Same contract as RaggedPass; on a GPU, or on CPU tensors in Triton's interpreter."""

    def cost(self, hidden: torch.Tensor) -> float:
        """A product reads a row of the weight, from memory where the weight is larger than the cache."""
        rates, size = row(POLICIES, architecture(hidden.device)).rates, hidden.element_size()
        return self.product_cost if rates is None else size * rates.of(size) / (2 * rates.bandwidth)

    def dots(self, hidden: torch.Tensor, weight: torch.Tensor, entries: Entries) -> torch.Tensor:
        z = torch.empty(len(entries.ids), dtype=accumulator(hidden.dtype), device=hidden.device)
        kept_dots(_flat(hidden), _flat(weight), entries.ids, entries.rows, z)
        return z

    def to_hidden(self, dz: torch.Tensor, weight: torch.Tensor, entries: Entries, n: int) -> torch.Tensor:
        return kept_sums(_flat(weight), dz, entries.ids, None, entries.offsets)

    def to_weight(self, dz: torch.Tensor, hidden: torch.Tensor, entries: Entries, total: RowSum) -> None:
        ids, order = entries.ids.sort(stable=True)
        some, counts = ids.unique_consecutive(return_counts=True)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        for a in range(0, len(some), _TOKENS):
            part = offsets[a : a + _TOKENS + 1].contiguous()
            total._add(some[a : a + _TOKENS], kept_sums(_flat(hidden), dz, entries.rows, order, part))

    def forward(
        self, z: torch.Tensor, inv_temperature: _Optional, entries: Entries, places: torch.Tensor, options: Options
    ) -> RowStats:
        stats = RowStats.new(len(places), z.dtype, z.device, options.entropy, options.sum_sq)
        rows = [stats.max, stats.sum, stats.sum_z, stats.sum_sq, stats.target]
        support_fwd(z, inv_temperature, entries.offsets, places, rows, options.logit_scale, options.softcap)
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
        out = z.clone()
        support_bwd(
            *(out, inv_temperature, entries.offsets, places, grads.lse, grads.grad, grads.grad_entropy, grads.entropy),
            *(options.logit_scale, options.softcap),
        )
        return out
