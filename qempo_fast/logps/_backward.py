"""The gradients of _forward.py: exact, tile by tile, or on the kept columns alone.

The exact backward recomputes each tile (2NDV) unless the forward kept it, and takes two GEMMs more; the sampled one
does all three on a share of the columns. docs/linear_logps.md has the derivations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._forward import new_tile
from ._gemm import add_product, factor_dtype, fixed, linear, product
from ._head import HeadTensors, Kept, Logits, RowGrads, Tile, centre_of, part_of, tile_view
from ._options import Options, TileSizes, accumulator
from ._tile_pass import RowSum, TilePass

# oneDNN compiles a kernel for each new width, and cuBLAS wants multiples of 8: kept columns are padded to a multiple,
# with rows of zeros. With at most TileSizes.kept columns at a time that makes a handful of widths in all.
PAD = 128

Three = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class _Rows:
    """The rows of a chunk that have a coefficient: where in hidden (the chunk begins at row first), and where among all
    such rows.
    """

    first: int
    index: slice | torch.Tensor
    at: slice
    head: HeadTensors
    grads: RowGrads


@dataclass(frozen=True)
class _Live:
    """The chunks with such rows, by number; index: of these rows in hidden, None where that is all; size: how many."""

    chunks: list[tuple[int, _Rows]]
    index: torch.Tensor | None
    size: int


def _live(head: HeadTensors, grads: RowGrads, rows: int, more: list[torch.Tensor]) -> tuple[_Live, list[int]]:
    """Chunks of so many rows; and the numbers in more, since they are read along."""
    n, start, chunks = len(grads.lse), 0, []
    # Two reads at most, whatever the number of chunks: on a GPU each is a stall.
    live = grads.live().nonzero().squeeze(1)
    stops = list(range(rows, n + rows, rows))
    every = len(live) == n
    reads = (
        more
        if every
        else [
            torch.searchsorted(live, torch.arange(rows, n + rows, rows, device=live.device, dtype=torch.int64)),
            *more,
        ]
    )
    read = torch.cat(reads).tolist() if reads else []
    if not every:
        stops, read = read[: len(stops)], read[len(stops) :]
    for number, stop in enumerate(stops):
        whole = slice(number * rows, min((number + 1) * rows, n))
        part = live[start:stop]
        index = whole if len(part) == whole.stop - whole.start else part
        at = slice(start, start + len(part))
        start = stop
        if len(part):
            chunks.append((number, _Rows(whole.start, index, at, head.rows(index), grads.rows(index))))
    return _Live(chunks, None if every else live, len(live)), read


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
    # Where every chunk is past break-even nothing is sampled, and the exact path has the fewer passes over dweight.
    if not options.sampled or all(k.columns is None for k in kept):
        size = tiles.sizes(False, head.hidden, options.wide, options.fixed)
        live, _ = _live(head, grads, size.rows, [])
        dh, dw, db = _exact(tiles, head, live, options, needs, size, logits)
        return _as_inputs(head, None if dh is None else _spread(dh, live, head.hidden), dw, db)
    return sampled_rows(tiles, head, grads, kept, options, needs)


def sampled_rows(
    tiles: TilePass,
    head: HeadTensors,
    grads: RowGrads,
    kept: list[Kept],
    options: Options,
    needs: tuple[bool, bool, bool],
) -> Three:
    size = tiles.sizes(True, head.hidden, options.wide, options.fixed)
    return _Sampled(tiles, head, grads, kept, options, needs, size).run()


def exact_rows(
    tiles: TilePass,
    head: HeadTensors,
    grads: RowGrads,
    options: Options,
    logits: Logits | None,
    needs: tuple[bool, bool, bool] = (True, False, False),
    into: torch.Tensor | None = None,
) -> Three:
    """Of rows that have a coefficient each: none is looked for, so nothing is read.

    dhidden and dbias in the dtype of sums; dweight in weight's, or added to `into`, which is of sums.
    """
    size, n = tiles.sizes(False, head.hidden, options.wide, options.fixed), len(grads.lse)
    parts = [slice(a, min(a + size.rows, n)) for a in range(0, n, size.rows)]
    chunks = [(i, _Rows(at.start, at, at, head.rows(at), grads.rows(at))) for i, at in enumerate(parts)]
    return _exact(tiles, head, _Live(chunks, None, n), options, needs, size, logits, into)


def _exact(
    tiles: TilePass,
    head: HeadTensors,
    live: _Live,
    options: Options,
    needs: tuple[bool, bool, bool],
    size: TileSizes,
    logits: Logits | None,
    into: torch.Tensor | None = None,
) -> Three:
    """Vocabulary outside, rows inside: each row of dweight is summed over all rows of hidden and written once.

    dhidden is of the live rows alone, and as dbias in the dtype of sums. dweight is added to `into` where given.
    """
    hidden, weight, acc = head.hidden, head.weight, accumulator(head.hidden.dtype)
    # In the order of the chunks: a GEMM adds to its part where it lies.
    dh = torch.zeros(live.size, hidden.shape[1], dtype=acc, device=hidden.device) if needs[0] else None
    dw = into
    if needs[1] and into is None:
        dw = tiles.empty(weight.shape, weight.dtype, weight.device)
    db = weight.new_zeros(len(weight), dtype=acc) if needs[2] else None
    chunks = [rows for _, rows in live.chunks]
    width = min(size.columns, len(weight))
    kind = options.logits_dtype(hidden)
    buffer = hidden.new_empty(min(size.rows, len(hidden)) * (width + -width % tiles.align), dtype=kind)
    for v in range(0, len(weight), size.columns):
        w, bias = weight[v : v + size.columns], part_of(head.bias, v, v + size.columns)
        out = None if dw is None else dw[v : v + len(w)]
        total = None
        for rows in chunks:
            h = rows.head.hidden
            z = _kept_or_again(logits, rows, v, w, tile_view(buffer, len(h), len(w), tiles.align), options)
            z = _tile(tiles, z, rows, bias, None, rows.head.targets - v if v else rows.head.targets, options, None)
            if dh is not None:
                if options.fixed:
                    dh[rows.at] += fixed(z, w.t(), wide=True)
                else:
                    add_product(dh[rows.at], z, w.t())
            if out is not None:
                if into is not None:
                    add_product(out, z.t(), h.t())
                elif total is not None:
                    total = add_product(total.to(acc), z.t(), h.t())
                else:
                    # The only chunk's product is dweight itself: at 64 rows its copy took up to a fifth of the step.
                    total = linear(z.t(), h.t(), out) if len(chunks) == 1 else product(z.t(), h.t())
            if db is not None:
                db[v : v + len(w)] += z.sum(0, dtype=acc)
        if out is not None and into is None and total is not out:
            out[:] = 0.0 if total is None else total
    return dh, dw, db


def _spread(dh: torch.Tensor, live: _Live, hidden: torch.Tensor) -> torch.Tensor:
    """Rows with a coefficient to all rows, in hidden's dtype; 0 elsewhere."""
    dh = dh.to(hidden.dtype)
    return dh if live.index is None else torch.zeros_like(hidden).index_copy_(0, live.index, dh)


def _kept_or_again(
    logits: Logits | None, rows: _Rows, v: int, w: torch.Tensor, out: torch.Tensor, options: Options
) -> torch.Tensor:
    z = None if logits is None else logits.tiles.pop((rows.first, v), None)
    if z is None:
        return (fixed if options.fixed else linear)(rows.head.hidden, w, out, options.wide)
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
) -> torch.Tensor:
    """Raw logits to their gradients, in place, or of float32 logits in the dtype that the GEMMs take."""
    tile = Tile(z, bias, rows.head.inv_temperature, target)
    dtype = factor_dtype(rows.head.hidden) if options.wide else z.dtype
    return tiles.slopes(tile, rows.grads, inverse, row_sum, options, dtype)


def _as_inputs(head: HeadTensors, dh: torch.Tensor | None, dw: torch.Tensor | None, db: torch.Tensor | None) -> Three:
    return dh, dw, None if db is None or head.bias is None else db.to(head.bias.dtype)


@dataclass
class _Chunk:
    """A chunk of rows in the sampled gradient; columns, inverse and place are None where it keeps every column.

    place: of each row's target among the columns, outside of them where another shard has it. ends: where in columns
    the blocks of the vocabulary end. logits: as Kept has them, of these rows. dh, row_sum: sums so far over the tiles
    of dz W and of dz.
    """

    rows: _Rows
    columns: torch.Tensor | None
    inverse: torch.Tensor | None
    place: torch.Tensor | None
    ends: list[int]
    logits: torch.Tensor | None = None
    dh: torch.Tensor | None = None
    row_sum: torch.Tensor | None = None

    def within(self, number: int) -> slice:
        """Where in columns block number is."""
        return slice(self.ends[number - 1] if number else 0, self.ends[number])


def _chunks(
    head: HeadTensors, grads: RowGrads, kept: list[Kept], blocks: list[slice], rows: int
) -> tuple[list[_Chunk], _Live]:
    """Live chunks alone: a row of dweight that is named and never added to would keep what lay in its memory."""
    vocabulary, step = blocks[-1].stop, blocks[0].stop
    found, many = [k.columns for k in kept if k.columns is not None], len(blocks) > 1
    # arange, not the blocks themselves: what comes from the host is a stall on a GPU.
    stops = torch.arange(step, vocabulary + step, step, device=head.hidden.device, dtype=torch.int64) if many else None
    live, read = _live(head, grads, rows, [] if stops is None else [torch.searchsorted(c, stops) for c in found])
    ends = [read[i : i + len(blocks)] for i in range(0, len(read), len(blocks))] if many else [[len(c)] for c in found]
    ends_of = iter(ends)
    by_number = [[] if k.columns is None else next(ends_of) for k in kept]
    # A target in this shard is kept always; that of a later one comes after all columns, and so shall any other here.
    targets = head.targets.where(head.targets >= 0, vocabulary)
    out = []
    for number, part in live.chunks:
        columns, inverse = kept[number].columns, kept[number].inverse
        place = None if columns is None else torch.searchsorted(columns, targets[part.index])
        logits = kept[number].logits
        if logits is not None and not isinstance(part.index, slice):
            logits = logits[part.index - part.first]
        out.append(_Chunk(part, columns, inverse, place, by_number[number], logits))
    return out, live


class _Sampled:
    """The three gradients of one call, over the columns that each chunk of rows kept.

    The vocabulary is outside and rows are inside, in blocks whose part of W and of dW stay in the cache: chunks keep
    much the same columns.
    """

    def __init__(
        self,
        tiles: TilePass,
        head: HeadTensors,
        grads: RowGrads,
        kept: list[Kept],
        options: Options,
        needs: tuple[bool, bool, bool],
        size: TileSizes,
    ) -> None:
        self.tiles, self.head, self.options, self.size = tiles, head, options, size
        hidden, weight, acc = head.hidden, head.weight, accumulator(head.hidden.dtype)
        step = size.block or len(weight)
        self.blocks = [slice(v, min(v + step, len(weight))) for v in range(0, len(weight), step)]
        self.chunks, live = _chunks(head, grads, kept, self.blocks, size.chunk)
        every = live.index is None and live.size == len(hidden)
        self.dh = (torch.empty_like(hidden) if every else torch.zeros_like(hidden)) if needs[0] else None
        self.db = weight.new_zeros(len(weight), dtype=acc) if needs[2] else None
        self.dw: RowSum | None = tiles.row_sum(weight) if needs[1] else None
        # Over all columns a row's dloss/dlogits sum to 0, so dhidden = sum_j dz_j (W_j - c) for any c, and near the
        # mean row the sampling error is smaller. A softmax cap, or a shard, leaves a sum that is not known.
        centred = needs[0] and options.softcap is None and options.group is None
        self.centre = centre_of(weight) if centred else None
        counts = [c.within(b).stop - c.within(b).start for c in self.chunks if c.ends for b in range(len(self.blocks))]
        width = min(size.kept_columns, max(counts, default=0))
        width += -width % PAD
        self.gathered = weight.new_empty(width, weight.shape[1])
        kind = options.logits_dtype(hidden)
        self.buffer = hidden.new_empty(min(size.chunk, len(hidden)) * max(width, 1), dtype=kind)

    def run(self) -> Three:
        for number, block in enumerate(self.blocks):
            columns = [None if c.columns is None else c.columns[c.within(number)] for c in self.chunks]
            if block.start:
                columns = [None if at is None else at - block.start for at in columns]
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
        if self.dh is None:
            return
        index = chunk.rows.index
        if chunk.dh is None:
            self.dh[index] = 0.0  # no column was kept
            return
        if chunk.row_sum is not None and self.centre is not None:
            chunk.dh.addr_(chunk.row_sum, self.centre, alpha=-1.0)
        self.dh[index] = chunk.dh if isinstance(index, slice) else chunk.dh.to(self.dh.dtype)

    def _all(self, chunk: _Chunk, block: slice) -> None:
        """A chunk past break-even: every column of the block, tile by tile."""
        rows, step = chunk.rows, max(self.size.columns, self.size.kept_columns)
        hidden = rows.head.hidden
        for v in range(block.start, block.stop, step):
            stop = min(v + step, block.stop)
            w, bias = self.head.weight[v:stop], part_of(self.head.bias, v, stop)
            to = new_tile(self.buffer, len(hidden), len(w), self.tiles.align)
            z = linear(hidden, w, to, self.options.wide)
            z = _tile(self.tiles, z, rows, bias, None, rows.head.targets - v, self.options, None)
            self._add(chunk, z, w, block, slice(v - block.start, stop - block.start))

    def _some(self, chunk: _Chunk, block: slice, columns: torch.Tensor, first: int) -> None:
        """The kept columns of the block, numbered within it; first is the place of the first among all of them."""
        rows, step = chunk.rows, self.size.kept_columns
        assert chunk.inverse is not None
        assert chunk.place is not None
        weight, bias = self.head.weight[block], part_of(self.head.bias, block.start, block.stop)
        n = len(rows.head.targets)
        for v in range(0, len(columns), step):
            at = columns[v : v + step]
            width = len(at) + -len(at) % PAD
            w = self.gathered[:width]
            self.tiles.gather(weight, at, w)
            z = self._logits(chunk, slice(first + v, first + v + len(at)), w)
            scale = chunk.inverse[first + v : first + v + len(at)]
            place = chunk.place - (first + v) if first + v else chunk.place
            row_sum = None if self.centre is None else torch.empty(n, dtype=scale.dtype, device=at.device)
            # Columns past the kept ones are those of rows of zeros: logits of 0, made gradients of 0 or left alone.
            z = _tile(self.tiles, z, rows, None if bias is None else bias[at], scale, place, self.options, row_sum)
            if row_sum is not None:
                chunk.row_sum = row_sum if chunk.row_sum is None else chunk.row_sum.add_(row_sum)
            self._add(chunk, z, w, block, at)

    def _logits(self, chunk: _Chunk, at: slice, w: torch.Tensor) -> torch.Tensor:
        """Raw logits of the kept columns `at`, and of the padding behind them in the gathered rows w."""
        hidden = chunk.rows.head.hidden
        out = self.buffer[: len(hidden) * len(w)].view(len(hidden), len(w))
        if chunk.logits is None:
            return linear(hidden, w, out, self.options.wide)
        count = at.stop - at.start
        out[:, :count] = chunk.logits[:, at]
        out[:, count:] = 0.0
        return out

    def _add(self, chunk: _Chunk, dz: torch.Tensor, w: torch.Tensor, block: slice, at: slice | torch.Tensor) -> None:
        """One tile: dz (n, c) of the block's rows `at`; columns of dz past them are padding, 0."""
        if self.dh is not None:
            if chunk.dh is None:
                part = product(dz, w.t())
                chunk.dh = part.to(accumulator(part.dtype))
            else:
                add_product(chunk.dh, dz, w.t())
        if self.dw is not None:
            self.dw.add(at, dz.t(), chunk.rows.head.hidden.t())
        if self.db is not None:
            part, db = dz.sum(0, dtype=self.db.dtype), self.db[block]
            if isinstance(at, slice):
                db[at] += part
            else:
                db.index_add_(0, at, part[: len(at)])
