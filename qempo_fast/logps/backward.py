"""The gradients of chunked.forward: exact, tile by tile, or on the kept columns alone.

The exact backward recomputes each tile (2NDV) unless the forward kept it, and takes two GEMMs more; the sampled one
does all three on a share of the columns. docs/linear_logps.md has the derivations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .chunked import HeadTensors, Kept, Logits, part_of
from .gemm import linear
from .options import Options, TileSizes, accumulator
from .row_sum import RowSum
from .tile_pass import TilePass

# oneDNN compiles a kernel for each new width: kept columns are padded to a multiple, with scale 0. With at most
# TileSizes.kept columns at a time that makes a handful of widths in all.
PAD = 128
# Of dweight in a block of TileSizes.block columns: 64 MiB in float32. For a width of 4096 that is 4096 columns, which
# took 0.8 of the time of 12288 where a third of them was kept.
BLOCK_ENTRIES = 2**24
# Rows of the weight whose mean is taken off the sampled sum; any number of them leaves it unbiased.
CENTRE_ROWS = 1024

Three = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class RowGrads:
    """(N,) lse, dloss/dlogp, and with the entropy gradient dloss/dH and H."""

    lse: torch.Tensor
    grad: torch.Tensor
    grad_entropy: torch.Tensor | None
    entropy: torch.Tensor | None

    def rows(self, index: slice | torch.Tensor) -> RowGrads:
        pick = lambda x: None if x is None else x[index]  # noqa: E731
        return RowGrads(self.lse[index], self.grad[index], pick(self.grad_entropy), pick(self.entropy))

    def live(self) -> torch.Tensor:
        """Rows with a coefficient: the others add nothing to any gradient."""
        live = self.grad != 0
        return live if self.grad_entropy is None else live | (self.grad_entropy != 0)


@dataclass(frozen=True)
class _Rows:
    """The rows of a chunk that have a coefficient, and where they are in hidden."""

    first: int
    index: slice | torch.Tensor
    head: HeadTensors
    grads: RowGrads


def _live_chunks(head: HeadTensors, grads: RowGrads, rows: int) -> list[tuple[int, _Rows]]:
    """(number, rows) of each chunk, without the chunks where no row has a coefficient."""
    n, start, out = len(grads.lse), 0, []
    # Two reads at most, whatever the number of chunks: on a GPU each is a stall.
    live = grads.live().nonzero().squeeze(1)
    ends = torch.arange(rows, n + rows, rows, device=live.device)
    stops = range(rows, n + rows, rows) if len(live) == n else torch.searchsorted(live, ends).tolist()
    for number, stop in enumerate(stops):
        whole = slice(number * rows, min((number + 1) * rows, n))
        part = live[start:stop]
        index = whole if len(part) == whole.stop - whole.start else part
        start = stop
        if len(part):
            out.append((number, _Rows(whole.start, index, head.rows(index), grads.rows(index))))
    return out


def backward(
    tiles: TilePass,
    head: HeadTensors,
    grads: RowGrads,
    kept: list[Kept],
    options: Options,
    needs: tuple[bool, bool, bool],
    logits: Logits | None = None,
) -> Three:
    """(dhidden, dweight, dbias), None where not needed; dhidden is this shard's part of the sum over shards.

    logits is emptied: its tiles are overwritten.
    """
    size = tiles.sizes(options.tau is not None)
    if options.tau is None:
        return _exact(tiles, head, grads, options, needs, size, {} if logits is None else logits)
    chunks = [(rows, kept[number]) for number, rows in _live_chunks(head, grads, size.chunk)]
    return _Sampled(tiles, head, chunks, options, needs, size).run()


def _exact(
    tiles: TilePass,
    head: HeadTensors,
    grads: RowGrads,
    options: Options,
    needs: tuple[bool, bool, bool],
    size: TileSizes,
    logits: Logits,
) -> Three:
    """Vocabulary outside, rows inside: each row of dweight is summed over all rows of hidden and written once."""
    hidden, weight, acc = head.hidden, head.weight, accumulator(head.hidden.dtype)
    dh = torch.zeros(hidden.shape, dtype=acc, device=hidden.device) if needs[0] else None
    dw = tiles.empty(weight.shape, weight.dtype, weight.device) if needs[1] else None
    db = weight.new_zeros(len(weight), dtype=acc) if needs[2] else None
    chunks = [rows for _, rows in _live_chunks(head, grads, size.rows)]
    buffer = hidden.new_empty(min(size.rows, len(hidden)) * min(size.columns, len(weight)))
    for v in range(0, len(weight), size.columns):
        w, bias = weight[v : v + size.columns], part_of(head.bias, v, v + size.columns)
        out = None if dw is None else dw[v : v + len(w)]
        total = None
        for rows in chunks:
            h = rows.head.hidden
            z = _kept_or_again(logits, rows, v, w, buffer[: len(h) * len(w)].view(len(h), len(w)))
            _tile(tiles, z, rows, bias, None, rows.head.targets - v, options, None)
            if dh is not None:
                part = linear(z, w.t())
                dh[rows.index] = dh[rows.index].add_(part)
            if out is not None:
                # The only chunk's product is dweight itself: at 64 rows its copy took up to a fifth of the step.
                part = linear(z.t(), h.t(), out if len(chunks) == 1 else None)
                total = part if total is None else total.to(acc).add_(part)
            if db is not None:
                db[v : v + len(w)] += z.sum(0, dtype=acc)
        if out is not None and total is not out:
            out[:] = 0.0 if total is None else total
    return _as_inputs(head, dh, dw, db)


def _kept_or_again(logits: Logits, rows: _Rows, v: int, w: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    z = logits.pop((rows.first, v), None)
    if z is None:
        return linear(rows.head.hidden, w, out)
    return z if isinstance(rows.index, slice) else z[rows.index - rows.first]


def _tile(
    tiles: TilePass,
    z: torch.Tensor,
    rows: _Rows,
    bias: torch.Tensor | None,
    inverse: torch.Tensor | None,
    target: torch.Tensor,
    options: Options,
    row_sum: torch.Tensor | None,
) -> None:
    """Raw logits to their gradients, in place."""
    g = rows.grads
    tiles.backward(
        *(z, bias, rows.head.inv_temperature, g.lse, g.grad, g.grad_entropy, g.entropy, inverse, target, row_sum),
        options,
    )


def _as_inputs(head: HeadTensors, dh: torch.Tensor | None, dw: torch.Tensor | None, db: torch.Tensor | None) -> Three:
    dh = None if dh is None else dh.to(head.hidden.dtype)
    return dh, dw, None if db is None or head.bias is None else db.to(head.bias.dtype)


@dataclass
class _Chunk:
    """A chunk of rows in the sampled gradient; columns, inverse and place are None where it keeps every column.

    place: of each row's target among the columns, or -1. ends: where in columns the blocks of the vocabulary end.
    dh, row_sum: sums so far over the tiles of dz W and of dz.
    """

    rows: _Rows
    columns: torch.Tensor | None
    inverse: torch.Tensor | None
    place: torch.Tensor | None
    ends: list[int]
    dh: torch.Tensor | None = None
    row_sum: torch.Tensor | None = None

    def within(self, number: int) -> slice:
        """Where in columns block number is."""
        return slice(self.ends[number - 1] if number else 0, self.ends[number])


def _chunk(rows: _Rows, kept: Kept, blocks: list[slice]) -> _Chunk:
    if kept.columns is None:
        return _Chunk(rows, None, None, None, [])
    targets, columns = rows.head.targets, kept.columns
    place = torch.searchsorted(columns, targets)
    here = columns[place.clamp(max=len(columns) - 1)] == targets
    ends = [len(columns)]
    if len(blocks) > 1:
        ends = torch.searchsorted(columns, torch.tensor([b.stop for b in blocks], device=columns.device)).tolist()
    return _Chunk(rows, columns, kept.inverse, place.where(here, -1), ends)


class _Sampled:
    """The three gradients of one call, over the columns that each chunk of rows kept.

    The vocabulary is outside and rows are inside, in blocks whose part of W and of dW stay in the cache: chunks keep
    much the same columns.
    """

    def __init__(
        self,
        tiles: TilePass,
        head: HeadTensors,
        chunks: list[tuple[_Rows, Kept]],
        options: Options,
        needs: tuple[bool, bool, bool],
        size: TileSizes,
    ) -> None:
        self.tiles, self.head, self.options, self.size = tiles, head, options, size
        hidden, weight, acc = head.hidden, head.weight, accumulator(head.hidden.dtype)
        step = min(size.block, max(1, BLOCK_ENTRIES // weight.shape[1])) if size.block else len(weight)
        self.blocks = [slice(v, min(v + step, len(weight))) for v in range(0, len(weight), step)]
        # Live chunks alone: a row of dweight that is named and never added to would keep what lay in its memory.
        self.chunks = [_chunk(rows, kept, self.blocks) for rows, kept in chunks]
        self.dh = torch.zeros_like(hidden) if needs[0] else None
        self.db = weight.new_zeros(len(weight), dtype=acc) if needs[2] else None
        self.dw: RowSum | None = tiles.row_sum(weight) if needs[1] else None
        # Over all columns a row's dloss/dlogits sum to 0, so dhidden = sum_j dz_j (W_j - c) for any c, and near the
        # mean row the sampling error is smaller. A softmax cap, or a shard, leaves a sum that is not known.
        centred = needs[0] and options.softcap is None and options.group is None
        self.centre = weight[:: max(1, len(weight) // CENTRE_ROWS)].to(acc).mean(0) if centred else None
        counts = [c.within(b).stop - c.within(b).start for c in self.chunks if c.ends for b in range(len(self.blocks))]
        width = min(size.kept_columns, max(counts, default=0))
        width += -width % PAD
        self.gathered = weight.new_empty(width, weight.shape[1])
        self.buffer = hidden.new_empty(min(size.chunk, len(hidden)) * max(width, 1))

    def run(self) -> Three:
        for number, block in enumerate(self.blocks):
            columns = [None if c.columns is None else c.columns[c.within(number)] - block.start for c in self.chunks]
            if self.dw is not None:
                self.dw.begin(block, columns)
            for chunk, at in zip(self.chunks, columns, strict=True):
                if at is None:
                    self._all(chunk, block)
                else:
                    self._some(chunk, block, at, chunk.within(number).start)
            if self.dw is not None:
                self.dw.end()
        for chunk in self.chunks:
            self._finish(chunk)
        return _as_inputs(self.head, self.dh, None if self.dw is None else self.dw.total, self.db)

    def _finish(self, chunk: _Chunk) -> None:
        if self.dh is None or chunk.dh is None:
            return
        if chunk.row_sum is not None and self.centre is not None:
            chunk.dh.addr_(chunk.row_sum, self.centre, alpha=-1.0)
        self.dh[chunk.rows.index] = chunk.dh.to(self.dh.dtype)

    def _all(self, chunk: _Chunk, block: slice) -> None:
        """A chunk past break-even: every column of the block, tile by tile."""
        rows, step = chunk.rows, self.size.columns
        for v in range(block.start, block.stop, step):
            stop = min(v + step, block.stop)
            w, bias = self.head.weight[v:stop], part_of(self.head.bias, v, stop)
            z = linear(rows.head.hidden, w)
            _tile(self.tiles, z, rows, bias, None, rows.head.targets - v, self.options, None)
            self._add(chunk, z, w, block, slice(v - block.start, stop - block.start))

    def _some(self, chunk: _Chunk, block: slice, columns: torch.Tensor, first: int) -> None:
        """The kept columns of the block, numbered within it; first is the place of the first among all of them."""
        rows, step = chunk.rows, self.size.kept_columns
        assert chunk.inverse is not None
        assert chunk.place is not None
        weight, bias = self.head.weight[block], part_of(self.head.bias, block.start, block.stop)
        n = len(rows.head.targets)
        row_sum = None if self.centre is None else torch.empty(n, dtype=chunk.inverse.dtype, device=columns.device)
        for v in range(0, len(columns), step):
            at = columns[v : v + step]
            width = len(at) + -len(at) % PAD
            w = self.gathered[:width]
            self.tiles.gather(weight, at, w)
            scale = _padded(chunk.inverse[first + v : first + v + len(at)], width)
            out = self.buffer[: n * width].view(n, width)
            z = linear(rows.head.hidden, w, out)
            kept_bias = None if bias is None else _padded(bias[at], width)
            # A target in the next tile must not be taken for one of this tile's padding.
            place = chunk.place - (first + v)
            place = place.where(place < len(at), -1)
            _tile(self.tiles, z, rows, kept_bias, scale, place, self.options, row_sum)
            if row_sum is not None:
                chunk.row_sum = row_sum.clone() if chunk.row_sum is None else chunk.row_sum.add_(row_sum)
            self._add(chunk, z, w, block, at)

    def _add(self, chunk: _Chunk, dz: torch.Tensor, w: torch.Tensor, block: slice, at: slice | torch.Tensor) -> None:
        """One tile: dz (n, c) of the block's rows `at`; columns of dz past them are padding, 0."""
        if self.dh is not None:
            part = linear(dz, w.t())
            chunk.dh = part.to(accumulator(part.dtype)) if chunk.dh is None else chunk.dh.add_(part)
        if self.dw is not None:
            self.dw.add(at, linear(dz.t(), chunk.rows.head.hidden.t()))
        if self.db is not None:
            part, db = dz.sum(0, dtype=self.db.dtype), self.db[block]
            if isinstance(at, slice):
                db[at] += part
            else:
                db.index_add_(0, at, part[: len(at)])


def _padded(x: torch.Tensor, width: int) -> torch.Tensor:
    """x and zeros."""
    return torch.nn.functional.pad(x, (0, width - len(x)))
