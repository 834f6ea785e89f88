"""The forward of linear -> log-softmax -> gather over (rows, vocabulary) tiles, one logits buffer at a time.

It costs one GEMM, 2NDV. backward.py has the gradients; docs/linear_logps.md the derivations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..reference.logps import finish_head
from . import last
from .gemm import linear
from .options import Options, accumulator
from .stats import RowStats
from .tile_pass import TilePass

# Past this kept share the gather costs more than the columns it saves.
BREAK_EVEN = 0.8


@dataclass(frozen=True)
class HeadTensors:
    """hidden (N, D), weight (V, D), bias (V), targets (N) in the shard's own numbering, 1 / temperature (N)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    inv_temperature: torch.Tensor | None

    def rows(self, index: slice | torch.Tensor) -> HeadTensors:
        t = None if self.inv_temperature is None else self.inv_temperature[index]
        return HeadTensors(self.hidden[index], self.weight, self.bias, self.targets[index], t)


@dataclass(frozen=True)
class Kept:
    """Columns kept for one row chunk, ascending, with 1 / keep probability; None: all of them."""

    columns: torch.Tensor | None
    inverse: torch.Tensor | None


# Raw logits of exact steps that fit the memory budget, by (first row, first column) of the tile.
Logits = dict[tuple[int, int], torch.Tensor]


def part_of(x: torch.Tensor | None, a: int, b: int) -> torch.Tensor | None:
    return None if x is None else x[a:b]


def _target_scores(head: HeadTensors, options: Options) -> torch.Tensor:
    """(N,) logit of each row's target, -inf where it is in another shard."""
    here = (head.targets >= 0) & (head.targets < head.weight.shape[0])
    at = head.targets.where(here, 0)
    acc = accumulator(head.hidden.dtype)
    raw = (head.hidden.to(acc) * head.weight[at].to(acc)).sum(-1)
    raw = raw if head.bias is None else raw + head.bias[at]
    temperature = 1.0 if head.inv_temperature is None else 1 / head.inv_temperature
    z = finish_head(raw, logit_scale=options.logit_scale, softcap=options.softcap, temperature=temperature)
    return z.where(here, -torch.inf)


@dataclass(frozen=True)
class _Chunk:
    """Rows a to b of a block, which share one choice of columns where the gradient is sampled."""

    a: int
    b: int
    head: HeadTensors
    stats: RowStats
    floor: torch.Tensor | None
    columns: torch.Tensor | None


def _chunks(tiles: TilePass, block: HeadTensors, stats: RowStats, options: Options, rows: int) -> list[_Chunk]:
    sampled = options.tau is not None
    floor = _target_scores(block, options) if sampled else None
    out = []
    for a in range(0, len(block.targets), rows):
        b = min(a + rows, len(block.targets))
        part = stats.rows(a, b)
        columns = tiles.new_columns(block.weight.shape[0], part) if sampled else None
        out.append(_Chunk(a, b, block.rows(slice(a, b)), part, part_of(floor, a, b), columns))
    return out


def forward(
    tiles: TilePass, head: HeadTensors, options: Options, first_column: int, logits: Logits | None = None
) -> tuple[RowStats, list[Kept]]:
    """Row statistics over this weight's columns and, where options.tau is set, the kept columns of each row chunk.

    Tiles of raw logits go into logits where it is given.
    """
    n, vocabulary = head.hidden.shape[0], head.weight.shape[0]
    stats = RowStats.new(n, accumulator(head.hidden.dtype), head.hidden.device, options.entropy, options.sum_sq)
    size = tiles.sizes(options.tau is not None)
    buffer = head.hidden.new_empty(min(size.rows, n) * min(size.columns, vocabulary)) if logits is None else None
    draws = []
    for a in range(0, n, size.rows):
        b = min(a + size.rows, n)
        block = head.rows(slice(a, b))
        chunks = _chunks(tiles, block, stats.rows(a, b), options, size.chunk)
        one = chunks[0]
        # A pass may have one launch for all of the vocabulary; then there are no tiles.
        whole = len(chunks) == 1 and tiles.fused(one.head, one.stats, one.floor, one.columns, options)
        for v in range(0, 0 if whole else vocabulary, size.columns):
            w = head.weight[v : v + size.columns]
            out = None if buffer is None else buffer[: (b - a) * len(w)].view(b - a, len(w))
            z = linear(block.hidden, w, out)
            bias = part_of(head.bias, v, v + len(w))
            for c in chunks:
                rows = c.head
                tiles.forward(
                    *(z[c.a : c.b], bias, rows.inv_temperature, rows.targets, c.stats, c.floor, c.columns),
                    *(v, options),
                )
            if logits is not None:
                logits[a, v] = z
        draws += [_draw(tiles, c, options, a + c.a, first_column) for c in chunks if c.columns is not None]
    kept = [_kept(*draw, vocabulary) for draw in tiles.count(draws)]
    last.record(tiles.name, n, vocabulary, options.tau, options.seed, size.chunk, kept, bool(logits))
    return stats, kept


def _draw(tiles: TilePass, chunk: _Chunk, options: Options, a: int, first_column: int) -> tuple[Any, ...]:
    """What tiles.select makes of the chunk's bounds. Nothing is read back: on a GPU each value read is a stall."""
    targets, vocabulary = chunk.head.targets, chunk.head.weight.shape[0]
    # One more entry for the targets of other shards: to pick this one's by a mask is to read their number.
    forced = torch.zeros(vocabulary + 1, dtype=torch.uint8, device=targets.device)
    forced.index_fill_(0, targets.where((targets >= 0) & (targets < vocabulary), vocabulary), 1)
    entropy = chunk.stats.entropy()
    mean_entropy = None if entropy is None else entropy.nan_to_num(0.0).mean().clamp(min=0.0)
    return tiles.select(
        *(chunk.columns, forced[:vocabulary], options.tau, mean_entropy),
        *(options.seed, a, first_column),
    )


def _kept(index: torch.Tensor, inverse: torch.Tensor, expected: float, vocabulary: int) -> Kept:
    # Not the number drawn: to drop a draw because it is large leaves the others short, which is a bias (28 standard
    # errors over 2000 draws at V = 37, where the number varies much).
    return Kept(None, None) if expected > BREAK_EVEN * vocabulary else Kept(index, inverse)
