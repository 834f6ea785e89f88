"""Log-probs over kept sets: ragged scores, then coefficients, then one backward; no full-vocabulary GEMM.

With M kept tokens in N rows a step has three passes of 2 M D operations, one forward and two backward, where the whole
vocabulary has three of 2 N V D. Kept for the backward: M logits. Beside them it reads hidden twice and the weight's
rows once a block of rows in each pass, and writes dhidden and dweight once, which is all that is as large as an input.

Scores of a chunk of rows come one of three ways, the cheapest by a count of costs:
  products   each row's own M_c dot products, summed in the dtype of sums
  union      the chunk's distinct tokens gathered, one GEMM of them all, entries picked by position
  vocabulary one GEMM of every token, in tiles
Rows are put in order of the size of their sets first, so that a few broad ones do not widen the union of many.
docs/support.md has the derivation and the measured costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import _backends, _check
from .._door import dense
from . import stats as latest
from ._backward import PAD, Three
from ._function import live_rows, pick, scatter
from ._gemm import add_product, linear
from ._head import HeadTensors, RowGrads
from ._options import MOVED, Options, accumulator
from ._ragged import Entries, RaggedPass
from ._row_stats import RowStats
from ._tile_pass import TilePass
from .support import Support

_Optional = torch.Tensor | None
WAYS = ("products", "union", "vocabulary")
# One of WAYS for all rows, None for the cheapest: set by tests.
WAY: str | None = None


class Backend(NamedTuple):
    """What a backend has for GEMM tiles and for ragged entries."""

    tiles: TilePass
    ragged: RaggedPass

    @classmethod
    def of(cls, name: str, device: torch.device) -> Backend:
        return cls(*(_backends.kernel(op, device, name)() for op in ("linear_logps", "support_logps")))


class Rows(NamedTuple):
    """Rows that are scored in one way, None for all; their entries, and which of all those are; columns of a union."""

    way: str
    which: _Optional
    at: _Optional
    entries: Entries
    columns: _Optional = None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return pick(x, self.which)


def plan(entries: Entries, hidden: torch.Tensor, vocabulary: int, backend: Backend) -> list[Rows]:
    """Which rows go which way: products cost `cost` entries of a GEMM each, columns of a union so many rows moved."""
    lengths, n = entries.offsets.diff(), len(entries.offsets) - 1
    if not len(entries.ids) or WAY == "products":
        return [Rows("products", None, None, entries)]
    cost, size = backend.ragged.cost(hidden), backend.tiles.sizes(True, hidden)
    order = lengths.argsort(stable=True)
    stops = [*range(size.chunk, n, size.chunk), n]
    # arange, not the stops themselves: what comes from the host is a stall on a GPU.
    ends = (
        torch.arange(size.chunk, n + size.chunk, size.chunk, device=order.device, dtype=torch.int64).clamp_(max=n) - 1
    )
    ascending = lengths[order]
    total, longest = torch.stack([ascending.cumsum(0)[ends], ascending[ends]]).tolist()
    counts = [b - a for a, b in zip([0, *total], total, strict=False)]
    chunks = [order[a:b] for a, b in zip([0, *stops], stops, strict=False)]
    # No union is smaller than the largest set in it.
    least = [
        min((len(rows) + MOVED) * most, len(rows) * vocabulary) for rows, most in zip(chunks, longest, strict=True)
    ]
    if not WAY and all(cost * count <= other for count, other in zip(counts, least, strict=True)):
        return [Rows("products", None, None, entries)]
    chunk = torch.empty_like(order)
    chunk[order] = torch.arange(n, device=order.device, dtype=torch.int64) // size.chunk
    marks = torch.zeros(len(chunks) * vocabulary, dtype=torch.bool, device=order.device)
    marks = marks.index_fill_(0, chunk[entries.rows] * vocabulary + entries.ids, True).view(-1, vocabulary)
    unions = marks.sum(1).tolist()
    out, products = [], []
    for i, rows in enumerate(chunks):
        costs = (cost * counts[i], (len(rows) + MOVED) * unions[i], len(rows) * vocabulary)
        way = WAY or WAYS[costs.index(min(costs))]
        if way == "products":
            products.append(rows)
        else:
            columns = marks[i].nonzero().squeeze(1) if way == "union" else None
            out.append(Rows(way, rows, *entries.of_rows(rows, counts[i]), columns))
    if not out:
        return [Rows("products", None, None, entries)]
    if products:
        rows = torch.cat(products)
        out.append(Rows("products", rows, *entries.of_rows(rows)))
    return out


class _Tile(NamedTuple):
    """Columns of a GEMM: the weight's rows w, and which they are; the entries that it has, their rows and columns."""

    w: torch.Tensor
    at: slice | torch.Tensor
    entries: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


def _tiles(part: Rows, weight: torch.Tensor, backend: Backend, hidden: torch.Tensor) -> Iterator[_Tile]:
    step, columns = backend.tiles.sizes(True, hidden).kept_columns, part.columns
    place = part.entries.ids if columns is None else torch.searchsorted(columns, part.entries.ids)
    count = len(weight) if columns is None else len(columns)
    # Entries by tile, once: to look at all of them in each tile took as long as its GEMM.
    tile_of, order = (place // step).sort(stable=True)
    starts = list(range(0, count, step))
    ends = torch.arange(1, len(starts) + 1, device=place.device, dtype=torch.int64)
    first = 0
    for a, last in zip(starts, torch.searchsorted(tile_of, ends).tolist(), strict=True):
        at: slice | torch.Tensor
        if columns is None:
            at = slice(a, min(a + step, count))
            w = weight[at]
        else:
            at = columns[a : a + step]
            w = weight.new_empty(len(at) + -len(at) % PAD, weight.shape[1])
            backend.tiles.gather(weight, at, w)
        entries = order[first:last]
        yield _Tile(w, at, entries, part.entries.rows[entries], place[entries] - a)
        first = last


def scores(head: HeadTensors, entries: Entries, backend: Backend, wide: bool) -> torch.Tensor:
    """(M,) raw logits with their bias, in the dtype of sums; a GEMM's are rounded as it writes them unless wide."""
    hidden, weight = head.hidden, head.weight
    out = torch.zeros(len(entries.ids), dtype=accumulator(hidden.dtype), device=hidden.device)
    for part in plan(entries, hidden, len(weight), backend):
        h = part.of(hidden)
        if part.way == "products":
            z = backend.ragged.dots(h, weight, part.entries)
        else:
            z = out.new_zeros(len(part.entries.ids))
            for tile in _tiles(part, weight, backend, h):
                z[tile.entries] = linear(h, tile.w, wide=wide)[tile.rows, tile.columns].to(z.dtype)
        if part.at is None:
            out = z
        else:
            out[part.at] = z
    return out if head.bias is None else out + head.bias[entries.ids]


def products(
    head: HeadTensors, entries: Entries, dz: torch.Tensor, backend: Backend, needs: tuple[bool, bool, bool]
) -> Three:
    """(dhidden in the dtype of sums, dweight, dbias), None where not needed, from dz of each entry."""
    hidden, weight = head.hidden, head.weight
    dh = torch.zeros(hidden.shape, dtype=dz.dtype, device=dz.device) if needs[0] else None
    dw = backend.ragged.row_sum(backend.tiles, weight) if needs[1] else None
    parts = plan(entries, hidden, len(weight), backend) if needs[0] or needs[1] else []
    if dw is not None:
        named = {"products": lambda p: p.entries.ids, "union": lambda p: p.columns, "vocabulary": lambda p: None}
        dw.begin(slice(0, len(weight)), [named[p.way](p) for p in parts])
    for part in parts:
        h, d = part.of(hidden), pick(dz, part.at)
        mine: _Optional
        if part.way != "products":
            mine = _tile_products(part, h, weight, d, backend, dw)
        else:
            mine = None if dh is None else backend.ragged.to_hidden(d, weight, part.entries, len(h))
            if dw is not None:
                backend.ragged.to_weight(d, h, part.entries, dw)
        if dh is not None and mine is not None:
            dh = mine if part.which is None else dh.index_copy_(0, part.which, mine)
    if dw is not None:
        dw.end()
    db = None
    if needs[2] and head.bias is not None:
        ids, order = entries.ids.sort(stable=True)
        ends = torch.searchsorted(ids, torch.arange(len(weight) + 1, device=ids.device, dtype=torch.int64))
        db = torch.segment_reduce(dz[order].double(), "sum", offsets=ends, initial=0.0, unsafe=True)
    return dh, None if dw is None else dw.total, db


def _tile_products(
    part: Rows, h: torch.Tensor, weight: torch.Tensor, dz: torch.Tensor, backend: Backend, dw: Any
) -> torch.Tensor:
    """dhidden of these rows; their part of dweight goes to dw."""
    dh = torch.zeros(h.shape, dtype=dz.dtype, device=dz.device)
    for tile in _tiles(part, weight, backend, h):
        filled = h.new_zeros(len(h), len(tile.w))
        # Added: columns of one's own choice may name a token twice.
        filled.view(-1).scatter_add_(0, tile.rows * len(tile.w) + tile.columns, dz[tile.entries].to(h.dtype))
        add_product(dh, filled, tile.w.t())
        if dw is not None:
            dw.add(tile.at, filled.t(), h.t())
    return dh


class Sets(NamedTuple):
    """A Support as it is worked on: this shard's entries of the counted rows, and targets' places in their sets.

    found: (N,) whether each row's target is in its set on any shard, and all of the set is sound. live: the counted
    rows, and at: which of all M entries are theirs, None for all.
    """

    entries: Entries
    places: torch.Tensor
    found: torch.Tensor
    live: _Optional
    at: _Optional


def _sound(support: Support, vocabulary: int) -> tuple[Support, _Optional]:
    """With what could not be checked made safe to read by, and the rows where that changed something."""
    ids, offsets = (dense("support", x.long()) for x in support)
    if _check.readable(ids):
        return Support(ids, offsets), None
    m = len(ids)
    safe = offsets.clamp(0, m).cummax(0).values
    safe[:1].zero_()
    safe[-1:].fill_(m)
    moved, inside = safe != offsets, ids.clamp(0, vocabulary - 1)
    outside = torch.nn.functional.pad((inside != ids).cumsum(0), (1, 0))
    return Support(inside, safe), moved[1:] | moved[:-1] | (outside[safe[1:]] != outside[safe[:-1]])


def sets_of(
    support: Support, targets: torch.Tensor, counted: torch.Tensor, first: int, columns: int, vocabulary: int
) -> Sets:
    """Raises, where it may be read, on a counted target that is not in its set."""
    support, wrong = _sound(support, vocabulary)
    every = Entries.of(*support)
    places = every.places(targets)
    found = places >= 0 if wrong is None else (places >= 0) & ~wrong
    if _check.readable(targets):
        lost = counted & ~found
        if bool(lost.any()):
            row = int(lost.nonzero()[0])
            _check.bad_value("targets", "tokens of their sets in support", f"{int(targets[row])} at position {row}")
    at: _Optional = None
    live = live_rows(counted)
    if live is not None:
        at, every = every.of_rows(live)
        places = places[live]
    if columns != vocabulary:
        mine = (every.ids >= first) & (every.ids < first + columns)
        ends = torch.nn.functional.pad(mine.cumsum(0), (1, 0))[every.offsets]
        every = Entries.of(every.ids[mine] - first, ends)
        places = every.places(pick(targets, live) - first)
    return Sets(every, places, found, live, at)


def forward(head: HeadTensors, sets: Sets, options: Options, backend: Backend) -> tuple[torch.Tensor, RowStats]:
    """Raw logits of the entries, and statistics of the counted rows over all shards."""
    with _check.own_dtypes(head.hidden.device.type):
        z = scores(head, sets.entries, backend, options.wide)
    stats = backend.ragged.forward(z, head.inv_temperature, sets.entries, sets.places, options)
    latest.record(backend.tiles.name, len(sets.places), len(head.weight), options, 0, [], False, None)
    return z, stats if options.group is None else stats.merged(options.group)


def backward(
    head: HeadTensors,
    sets: Sets,
    z: torch.Tensor,
    grads: RowGrads,
    options: Options,
    backend: Backend,
    needs: tuple[bool, bool, bool],
    n: int,
) -> Three:
    """Gradients of hidden (n rows), weight and bias; z and grads are of the counted rows."""
    entries, places = sets.entries, sets.places
    rows: _Optional = None
    live = grads.live().nonzero().squeeze(1)
    if len(live) < len(places):
        # The others add nothing, whatever their logits: 0 * NaN is NaN.
        at, entries = entries.of_rows(live)
        z, places, rows, head, grads = z[at], places[live], live, head.rows(live), grads.rows(live)
    with _check.own_dtypes(head.hidden.device.type):
        dz = backend.ragged.backward(backend.tiles, z, head.inv_temperature, entries, places, grads, options)
        dh, dw, db = products(head, entries, dz, backend, needs)
    if dh is not None:
        dh = scatter(dh.to(head.hidden.dtype), rows, len(sets.places))
        if options.group is not None:
            dist.all_reduce(dh, group=options.group)
        dh = scatter(dh, sets.live, n)
    return dh, dw, None if db is None or head.bias is None else db


def _picked(logits: torch.Tensor, sets: Sets) -> tuple[torch.Tensor, torch.Tensor]:
    """(row of logits, logit) of each entry."""
    rows = sets.entries.rows if sets.live is None else sets.live[sets.entries.rows]
    return rows, logits[rows, sets.entries.ids].to(accumulator(logits.dtype))


def logits_forward(
    logits: torch.Tensor, inv_temperature: _Optional, sets: Sets, options: Options, backend: Backend
) -> RowStats:
    """Statistics of the counted rows of (N, V) logits over their sets: 2 M entries read, none of the others."""
    _, z = _picked(logits, sets)
    inv_t = None if inv_temperature is None else dense("temperature", pick(inv_temperature, sets.live))
    return backend.ragged.forward(z, inv_t, sets.entries, sets.places, options)


def logits_backward(
    logits: torch.Tensor, inv_temperature: _Optional, sets: Sets, grads: RowGrads, options: Options, backend: Backend
) -> torch.Tensor:
    """Gradient of (N, V) logits: 0 outside the sets, so it is filled once, and M entries of it are written."""
    rows, z = _picked(logits, sets)
    inv_t = None if inv_temperature is None else dense("temperature", pick(inv_temperature, sets.live))
    dz = backend.ragged.backward(backend.tiles, z, inv_t, sets.entries, sets.places, grads, options)
    # A row without a coefficient may hold anything, NaN too.
    dz = torch.where(grads.live()[sets.entries.rows], dz, 0.0)
    out = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    out.view(-1).scatter_(0, rows * logits.shape[1] + sets.entries.ids, dz.to(out.dtype))
    return out
