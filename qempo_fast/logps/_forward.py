"""The forward of linear -> log-softmax -> gather over (rows, vocabulary) tiles, one logits buffer at a time.

It costs one GEMM, 2NDV. _backward.py has the gradients; docs/linear_logps.md the derivations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from . import stats as latest
from ._gemm import fixed, linear
from ._head import Draw, HeadTensors, Kept, Logits, RowGrads, Tile, part_of, tile_view
from ._options import Options, TileSizes, accumulator
from ._pilots import MANY, Chosen, choose
from ._row_stats import LOWEST, RowStats
from ._tile_pass import TilePass


@dataclass(frozen=True)
class Span:
    """Rows a to b of a block, which a pass takes at once: a chunk, which shares one choice of columns, or several."""

    a: int
    b: int
    head: HeadTensors
    stats: RowStats
    floor: torch.Tensor | None = None
    forced: torch.Tensor | None = None
    columns: torch.Tensor | None = None


def spans(tiles: TilePass, block: HeadTensors, stats: RowStats, options: Options, size: TileSizes) -> list[Span]:
    n, vocabulary = len(block.targets), block.weight.shape[0]
    if not options.sampled:
        step = n if tiles.together else size.chunk
        ends = [(a, min(a + step, n)) for a in range(0, n, step)]
        return [Span(a, b, block.rows(slice(a, b)), stats.rows(a, b)) for a, b in ends]
    floor, forced = tiles.targets(block, options, size.chunk)
    chunks = len(forced) if tiles.together else 1
    out = []
    for i in range(0, len(forced), chunks):
        a, b = i * size.chunk, min((i + chunks) * size.chunk, n)
        part = stats.rows(a, b)
        columns = tiles.new_columns(vocabulary, part)
        out.append(Span(a, b, block.rows(slice(a, b)), part, floor[a:b], forced[i : i + chunks], columns))
    return out


def forward(
    tiles: TilePass,
    head: HeadTensors,
    options: Options,
    first_column: int,
    logits: Logits | None = None,
    into: RowStats | None = None,
) -> tuple[RowStats, list[Kept]]:
    """Row statistics, over all shards, and, of a sampled gradient, the columns that each row chunk keeps.

    Tiles of raw logits go into logits while it has room, statistics into `into` where given, as RowStats.new made it.
    """
    n, vocabulary = head.hidden.shape[0], head.weight.shape[0]
    acc, device = accumulator(head.hidden.dtype), head.hidden.device
    stats = RowStats.new(n, acc, device, options.entropy, options.sum_sq) if into is None else into
    size = tiles.sizes(options.sampled, head.hidden, options.wide, options.fixed)
    width = min(size.columns, vocabulary)
    kind = options.logits_dtype(head.hidden)
    if logits is not None and not logits.fits(min(size.rows, n), width, kind.itemsize):
        logits = None
    buffer = head.hidden.new_empty(min(size.rows, n) * (width + -width % tiles.align), dtype=kind)
    draws: list[Any] = []
    waiting: list[tuple[int, Span]] = []
    for a in range(0, n, size.rows):
        block = head.rows(slice(a, min(a + size.rows, n)))
        found = spans(tiles, block, stats.rows(a, a + size.rows), options, size)
        one = found[0]
        # A pass may have one launch for all of the vocabulary; then there are no tiles, and no logits to keep.
        alone = logits is None and len(found) == 1 and (one.forced is None or len(one.forced) == 1)
        if not (alone and tiles.fused(one.head, one.stats, one.floor, one.columns, options)):
            _tiles(tiles, block, found, options, size, buffer, a, logits)
        if options.error is not None:
            waiting += [(a + s.a, reduced(s, size.chunk)) for s in found]
        elif options.sampled:
            draws += [draw(tiles, s, options, a + s.a, first_column, size) for s in found]
    if options.group is not None:
        stats = stats.merged(options.group)
    chosen = None
    if waiting:
        chosen = choose_threshold(tiles, head, stats, waiting, options, size)
        draws = [draw(tiles, s, replace(options, tau=1.0), a, first_column, size) for a, s in waiting]
    kept = [kept_of(*one, size.break_even * vocabulary) for one in tiles.count(draws)]
    held = logits is not None and bool(logits.tiles)
    latest.record(tiles.name, n, vocabulary, options, size.chunk, kept, held, chosen)
    return stats, kept


def reduced(span: Span, chunk: int) -> Span:
    """With one row of bounds for each chunk: until the last row of all has been seen, those of every chunk wait."""
    assert span.columns is not None
    if span.columns.ndim == 1:
        return span
    chunks = -(-(span.b - span.a) // chunk)
    return replace(span, columns=span.columns.view(chunks, -1, span.columns.shape[1]).amax(1))


def choose_threshold(
    tiles: TilePass,
    head: HeadTensors,
    stats: RowStats,
    spans: list[tuple[int, Span]],
    options: Options,
    size: TileSizes,
    grads: RowGrads | None = None,
) -> Chosen:
    """The threshold of all chunks; it goes into their bounds, u / tau against 1, so that no GPU has it read back.

    grads: of all rows, where their coefficients are known.
    """
    entropy = stats.entropy()
    for a, s in spans:
        assert s.columns is not None
        if entropy is not None:
            _widen(s.columns, _means(entropy[a : a + s.b - s.a].nan_to_num(0.0), size.chunk).clamp(min=0.0))
    bounds = torch.cat([s.columns.view(-1, len(head.weight)) for _, s in spans if s.columns is not None])
    forced = torch.cat([s.forced for _, s in spans if s.forced is not None])
    # As many entries as a tile has, of few rows.
    width = max(size.columns, size.columns * size.rows // MANY) if tiles.together else size.columns
    chosen = choose(tiles, head, stats, bounds, forced, options, size.chunk, width, grads)
    for _, s in spans:
        assert s.columns is not None
        s.columns.sub_(chosen.tau.log())
    return chosen


def _widen(columns: torch.Tensor, mean_entropy: torch.Tensor) -> None:
    """Bounds log u of p to those of the entropy gradient's entries: u (1 - log u + mean entropy), in place."""
    columns.clamp_(max=0.0)
    # -inf is of entries that are 0: log1p of inf added to it would be NaN.
    columns.add_(torch.log1p(mean_entropy.view(-1, 1) - columns.clamp(min=LOWEST)).view_as(columns))


def _tiles(
    tiles: TilePass,
    block: HeadTensors,
    spans: list[Span],
    options: Options,
    size: TileSizes,
    buffer: torch.Tensor,
    first: int,
    logits: Logits | None,
) -> None:
    """One block of rows, from row first, over all of the vocabulary."""
    n, vocabulary = len(block.targets), block.weight.shape[0]
    for v in range(0, vocabulary, size.columns):
        w = block.weight[v : v + size.columns]
        kept = logits if logits is not None and logits.fits(n, len(w), buffer.element_size()) else None
        to = new_tile(buffer, n, len(w), tiles.align, None if kept else buffer)
        z = (fixed if options.fixed else linear)(block.hidden, w, to, options.wide)
        bias = part_of(block.bias, v, v + len(w))
        for s in spans:
            tile = Tile(z[s.a : s.b], bias, s.head.inv_temperature, s.head.targets)
            tiles.forward(tile, s.stats, s.floor, s.columns, v, options)
        if kept is not None:
            kept.keep((first, v), z)


def new_tile(
    like: torch.Tensor, rows: int, columns: int, align: int, buffer: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Where a GEMM writes a tile: in buffer, in memory of its own, or None for what the GEMM itself takes."""
    if buffer is None:
        if columns % align == 0:
            return None
        buffer = like.new_empty(rows * (columns + -columns % align))
    return tile_view(buffer, rows, columns, align)


def draw(tiles: TilePass, span: Span, options: Options, first: int, first_column: int, size: TileSizes) -> Any:
    """What tiles.select makes of the span's bounds. Nothing is read back: on a GPU each value read is a stall."""
    # Bounds of a threshold that was chosen are those of the entropy already.
    entropy = None if options.error is not None else span.stats.entropy()
    mean_entropy = None if entropy is None else _means(entropy.nan_to_num(0.0), size.chunk).clamp(min=0.0)
    rows = range(first, first + len(span.head.targets), size.chunk)
    assert span.columns is not None
    assert span.forced is not None
    assert options.tau is not None
    return tiles.select(Draw(span.columns, span.forced, options.tau, mean_entropy, options.seed, rows, first_column))


def _means(x: torch.Tensor, rows: int) -> torch.Tensor:
    """(chunks,) mean of each chunk of rows; the last one may be short."""
    whole = len(x) // rows * rows
    parts = [x[:whole].view(-1, rows).mean(1)] if whole else []
    return torch.cat([*parts, x[whole:].mean().reshape(1)]) if whole < len(x) else parts[0]


def kept_of(index: torch.Tensor, inverse: torch.Tensor, expected: float, most: float) -> Kept:
    # Not the number drawn: to drop a draw because it is large leaves the others short, which is a bias (28 standard
    # errors over 2000 draws at V = 37, where the number varies much).
    return Kept(None, None) if expected > most else Kept(index, inverse)
