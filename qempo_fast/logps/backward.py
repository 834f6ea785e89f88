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
PAD = 256
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
    live, out = grads.live(), []
    every = bool(live.all())
    for number, a in enumerate(range(0, len(live), rows)):
        index: slice | torch.Tensor = slice(a, min(a + rows, len(live)))
        if not every and not bool(live[index].all()):
            index = live[index].nonzero().squeeze(1) + a
            if not len(index):
                continue
        out.append((number, _Rows(a, index, head.rows(index), grads.rows(index))))
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
    return _Sampled(tiles, head, kept, options, needs, size).run(grads, kept)


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
        total = None
        for rows in chunks:
            h = rows.head.hidden
            z = _kept_or_again(logits, rows, v, w, buffer[: len(h) * len(w)].view(len(h), len(w)))
            _tile(tiles, z, rows, bias, None, rows.head.targets - v, options, None)
            if dh is not None:
                part = linear(z, w.t())
                dh[rows.index] = dh[rows.index].add_(part)
            if dw is not None:
                part = linear(z.t(), h.t())
                total = part if total is None else total.to(acc).add_(part)
            if db is not None:
                db[v : v + len(w)] += z.sum(0, dtype=acc)
        if dw is not None:
            dw[v : v + len(w)] = 0.0 if total is None else total
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


class _Sampled:
    """The three gradients of one call, summed chunk by chunk over the columns that each chunk kept."""

    def __init__(
        self,
        tiles: TilePass,
        head: HeadTensors,
        kept: list[Kept],
        options: Options,
        needs: tuple[bool, bool, bool],
        size: TileSizes,
    ) -> None:
        self.tiles, self.head, self.options, self.size = tiles, head, options, size
        hidden, weight, acc = head.hidden, head.weight, accumulator(head.hidden.dtype)
        self.dh = torch.zeros_like(hidden) if needs[0] else None
        self.db = weight.new_zeros(len(weight), dtype=acc) if needs[2] else None
        columns = [k.columns for k in kept]
        self.dw: RowSum | None = tiles.row_sum(weight, columns) if needs[1] else None
        # Over all columns a row's dloss/dlogits sum to 0, so dhidden = sum_j dz_j (W_j - c) for any c, and near the
        # mean row the sampling error is smaller. A softmax cap, or a shard, leaves a sum that is not known.
        centred = needs[0] and options.softcap is None and options.group is None
        self.centre = weight[:: max(1, len(weight) // CENTRE_ROWS)].to(acc).mean(0) if centred else None
        width = max((min(size.kept_columns, len(c)) for c in columns if c is not None), default=0)
        width += -width % PAD
        self.gathered = weight.new_empty(width, weight.shape[1])
        self.buffer = hidden.new_empty(min(size.chunk, len(hidden)) * max(width, 1))

    def run(self, grads: RowGrads, kept: list[Kept]) -> Three:
        for number, rows in _live_chunks(self.head, grads, self.size.chunk):
            chunk = kept[number]
            total = self._all(rows) if chunk.columns is None else self._some(rows, chunk)
            if self.dh is not None and total is not None:
                self.dh[rows.index] = total.to(self.dh.dtype)
        return _as_inputs(self.head, self.dh, None if self.dw is None else self.dw.finish(), self.db)

    def _all(self, rows: _Rows) -> torch.Tensor | None:
        """A chunk past break-even: every column, tile by tile."""
        weight, total = self.head.weight, None
        for v in range(0, len(weight), self.size.columns):
            at = slice(v, min(v + self.size.columns, len(weight)))
            w, bias = weight[at], part_of(self.head.bias, v, v + self.size.columns)
            z = linear(rows.head.hidden, w)
            _tile(self.tiles, z, rows, bias, None, rows.head.targets - v, self.options, None)
            total = self._add(z, w, rows, at, total)
        return total

    def _some(self, rows: _Rows, kept: Kept) -> torch.Tensor | None:
        assert kept.columns is not None
        assert kept.inverse is not None
        targets, columns = rows.head.targets, kept.columns
        place = torch.searchsorted(columns, targets)
        here = columns[place.clamp(max=len(columns) - 1)] == targets
        place = place.where(here, -1)
        acc = kept.inverse.dtype
        total, tile_sum, row_sum = None, None, None
        if self.centre is not None:
            tile_sum = torch.empty(len(targets), dtype=acc, device=targets.device)
            row_sum = torch.zeros_like(tile_sum)
        for v in range(0, len(columns), self.size.kept_columns):
            at = columns[v : v + self.size.kept_columns]
            width = len(at) + -len(at) % PAD
            w = self.gathered[:width]
            self.tiles.gather(self.head.weight, at, w)
            scale = kept.inverse.new_zeros(width)
            scale[: len(at)] = kept.inverse[v : v + len(at)]
            bias = None if self.head.bias is None else torch.zeros_like(scale)
            if bias is not None and self.head.bias is not None:
                bias[: len(at)] = self.head.bias[at]
            out = self.buffer[: len(targets) * width].view(len(targets), width)
            z = linear(rows.head.hidden, w, out)
            _tile(self.tiles, z, rows, bias, scale, place - v, self.options, tile_sum)
            if row_sum is not None and tile_sum is not None:
                row_sum += tile_sum
            total = self._add(z, w, rows, at, total)
        if total is not None and row_sum is not None and self.centre is not None:
            total.addr_(row_sum, self.centre, alpha=-1.0)
        return total

    def _add(
        self, dz: torch.Tensor, w: torch.Tensor, rows: _Rows, at: slice | torch.Tensor, total: torch.Tensor | None
    ) -> torch.Tensor | None:
        """One tile: dz (n, c) of weight rows `at`; columns of dz past them are padding, 0. Returns dhidden so far."""
        if self.dh is not None:
            part = linear(dz, w.t())
            total = part.to(accumulator(part.dtype)) if total is None else total.add_(part)
        if self.dw is not None:
            part = linear(dz.t(), rows.head.hidden.t())
            self.dw.add(at, part)
        if self.db is not None:
            part = dz.sum(0, dtype=self.db.dtype)
            if isinstance(at, slice):
                self.db[at] += part
            else:
                self.db.index_add_(0, at, part[: len(at)])
        return total
