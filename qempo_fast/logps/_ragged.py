"""What a backend brings to log-probs over kept sets: products, statistics and gradients of ragged entries.

Entry e of M is one token ids[e] in the set of one row. Everything here is O(M) or O(M D); nothing is (N, V).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ._head import RowGrads, Tile, finished
from ._options import Options, accumulator
from ._row_stats import LOWEST, RowStats
from ._tile_pass import RowSum, TilePass

_Optional = torch.Tensor | None

# Entries of the rows of the weight that plain torch gathers at once.
_GATHERED = 2**22


class Entries(NamedTuple):
    """ids (M,) int64, offsets (n + 1,) int64, rows (M,) int64: the row of each entry."""

    ids: torch.Tensor
    offsets: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, offsets: torch.Tensor) -> Entries:
        """offsets from 0 to len(ids), never falling."""
        rows = torch.arange(len(offsets) - 1, device=ids.device, dtype=torch.int64)
        # With its size known nothing is read back.
        return cls(ids, offsets, rows.repeat_interleave(offsets.diff(), output_size=len(ids)))

    def of_rows(self, index: torch.Tensor, count: int | None = None) -> tuple[torch.Tensor, Entries]:
        """(which entries, the entries) of some rows, which are numbered anew; count of entries where it is known."""
        lengths = self.offsets.diff()[index]
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        rows = torch.arange(len(index), device=index.device, dtype=torch.int64)
        rows = rows.repeat_interleave(lengths, output_size=count)
        at = (self.offsets[:-1][index] - offsets[:-1])[rows]
        at += torch.arange(len(at), device=at.device, dtype=torch.int64)
        return at, Entries(self.ids[at], offsets, rows)

    def places(self, targets: torch.Tensor) -> torch.Tensor:
        """(n,) where in its row's set each target is, -1 where it is not."""
        n, m = len(targets), len(self.ids)
        if not n:
            return targets.new_empty(0)
        at = torch.arange(m, device=self.ids.device, dtype=torch.int64) - self.offsets[self.rows]
        # Misses go to a row of their own: to pick the hits by a mask is to read their number.
        to = torch.where(self.ids == targets[self.rows], self.rows, n)
        return targets.new_full((n + 1,), -1).scatter_(0, to, at)[:n]


class RaggedPass:
    """In torch operators, for any device; backends replace methods by kernels."""

    # Entries of a GEMM that take as long as one ragged product of the same width, measured at D = 576.
    product_cost: float = 60.0

    def cost(self, hidden: torch.Tensor) -> float:
        """Entries of a GEMM on these rows that one ragged product takes as long as."""
        return self.product_cost

    def row_sum(self, tiles: TilePass, weight: torch.Tensor) -> RowSum:
        """The sum that becomes dweight; in half precision its float32 rows are those of kept tokens alone."""
        return RowSum(tiles.empty(weight.shape, weight.dtype, weight.device))

    def dots(self, hidden: torch.Tensor, weight: torch.Tensor, entries: Entries) -> torch.Tensor:
        """(M,) hidden[row] . weight[id] in the dtype of sums."""
        acc = accumulator(hidden.dtype)
        out = torch.empty(len(entries.ids), dtype=acc, device=hidden.device)
        for part in _blocks(len(out), hidden.shape[1]):
            w, h = weight[entries.ids[part]].to(acc), hidden[entries.rows[part]].to(acc)
            torch.sum(w * h, 1, out=out[part])
        return out

    def to_hidden(self, dz: torch.Tensor, weight: torch.Tensor, entries: Entries, n: int) -> torch.Tensor:
        """(n, D) sum over each row's entries of dz weight[id], in the dtype of sums."""
        acc = accumulator(weight.dtype)
        out = torch.zeros(n, weight.shape[1], dtype=acc, device=weight.device)
        for part in _blocks(len(dz), weight.shape[1]):
            out.index_add_(0, entries.rows[part], weight[entries.ids[part]].to(acc) * dz[part].unsqueeze(1))
        return out

    def to_weight(self, dz: torch.Tensor, hidden: torch.Tensor, entries: Entries, total: RowSum) -> None:
        """total[id] += dz hidden[row] over all entries."""
        acc = accumulator(hidden.dtype)
        # Each id at most once in what is added: entries by id, and of each block the rows of one id summed first.
        ids, order = entries.ids.sort(stable=True)
        for part in _blocks(len(dz), hidden.shape[1]):
            some, at = ids[part].unique_consecutive(return_inverse=True)
            x = hidden[entries.rows[order[part]]].to(acc) * dz[order[part]].unsqueeze(1)
            total._add(some, x.new_zeros(len(some), x.shape[1]).index_add_(0, at, x))

    def forward(
        self, z: torch.Tensor, inv_temperature: _Optional, entries: Entries, places: torch.Tensor, options: Options
    ) -> RowStats:
        """Statistics of each row over its set; a target that is not in it has a logit of -inf."""
        n = len(places)
        stats = RowStats.new(n, z.dtype, z.device, options.entropy, options.sum_sq)
        if not n:
            return stats
        inv_t = None if inv_temperature is None else inv_temperature[entries.rows]
        x = finished(z.unsqueeze(1), None, inv_t, options).squeeze(1)
        total = _segments(entries.offsets)
        stats.max.copy_(total(x, "max", -torch.inf))
        top = stats.max[entries.rows]
        d = torch.where(top == -torch.inf, -torch.inf, x - top)
        e = d.exp()
        stats.sum.copy_(total(e, "sum", 0.0))
        if stats.sum_z is not None:
            stats.sum_z.copy_(total(e * d.clamp_min(LOWEST), "sum", 0.0))
        if stats.sum_sq is not None:
            stats.sum_sq.copy_(total(e * e, "sum", 0.0))
        if len(x):
            at = (entries.offsets[:-1] + places).clamp(0, len(x) - 1)
            stats.target.copy_(torch.where(places >= 0, x[at], -torch.inf))
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
        """(M,) gradient with respect to raw logits z."""
        out = z.clone().unsqueeze(1)
        if not len(z):
            return z.clone()
        at = torch.arange(len(z), device=z.device, dtype=torch.int64) - entries.offsets[entries.rows]
        target = torch.where(at == places[entries.rows], 0, -1)
        inv_t = None if inv_temperature is None else inv_temperature[entries.rows]
        # A tile of one column: what is said of a target and of a cap there is said once.
        tiles.backward(Tile(out, None, inv_t, target), grads.rows(entries.rows), None, None, options)
        return out.squeeze(1)


def _blocks(m: int, width: int) -> Iterator[slice]:
    step = max(1, _GATHERED // width)
    for a in range(0, m, step):
        yield slice(a, min(a + step, m))


def _segments(offsets: torch.Tensor) -> Callable[[torch.Tensor, str, float], torch.Tensor]:
    """In float64: torch adds one value after another."""

    def reduce(x: torch.Tensor, how: str, initial: float) -> torch.Tensor:
        return torch.segment_reduce(x.double(), how, offsets=offsets, initial=initial, unsafe=True)

    return reduce
