"""linear -> log-softmax -> gather over (row chunk, vocabulary tile) pairs, one logits buffer at a time.

Forward costs one GEMM, 2NDV. The exact backward recomputes each tile (2NDV) and takes two GEMMs more; the sampled one
does all three on the kept columns alone. docs/linear_logps.md has the derivations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..reference.logps import finish_head
from .gemm import linear
from .options import Options, TileSizes, accumulator
from .stats import RowStats
from .tile_pass import TilePass

# Past this kept share the gather costs more than the columns it saves.
BREAK_EVEN = 0.8
# oneDNN compiles a kernel for each new width: kept columns are padded to a multiple, with scale 0.
PAD = 256


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
    """Columns kept for one row chunk with 1 / keep probability; None: all of them."""

    columns: torch.Tensor | None
    inverse: torch.Tensor | None


def _part(x: torch.Tensor | None, a: int, b: int) -> torch.Tensor | None:
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


def forward(tiles: TilePass, head: HeadTensors, options: Options, first_column: int) -> tuple[RowStats, list[Kept]]:
    """Row statistics over this weight's columns and, where options.tau is set, the kept columns of each row chunk."""
    n, vocabulary = head.hidden.shape[0], head.weight.shape[0]
    acc = accumulator(head.hidden.dtype)
    stats = RowStats.new(n, acc, head.hidden.device, options.entropy, options.sum_sq)
    sampled = options.tau is not None
    size = tiles.sizes(sampled)
    buffer = head.hidden.new_empty(min(size.rows, n) * min(size.columns, vocabulary))
    kept = []
    for a in range(0, n, size.rows):
        b = min(a + size.rows, n)
        chunk, part = head.rows(slice(a, b)), stats.rows(a, b)
        columns = tiles.new_columns(vocabulary, part) if sampled else None
        floor = _target_scores(chunk, options) if sampled else None
        # A pass may have one launch for all of the vocabulary; then there are no tiles.
        whole = tiles.fused(chunk, part, floor, columns, options)
        for v in range(0, 0 if whole else vocabulary, size.columns):
            w = head.weight[v : v + size.columns]
            z = linear(chunk.hidden, w, buffer[: (b - a) * len(w)].view(b - a, len(w)))
            bias = _part(head.bias, v, v + len(w))
            tiles.forward(z, bias, chunk.inv_temperature, chunk.targets, part, floor, columns, v, options)
        if columns is not None:
            kept.append(_select(tiles, chunk, part, columns, options, a, first_column))
    return stats, kept


def _select(
    tiles: TilePass,
    chunk: HeadTensors,
    part: RowStats,
    columns: torch.Tensor,
    options: Options,
    a: int,
    first_column: int,
) -> Kept:
    vocabulary = chunk.weight.shape[0]
    forced = torch.zeros(vocabulary, dtype=torch.uint8, device=columns.device)
    here = (chunk.targets >= 0) & (chunk.targets < vocabulary)
    forced[chunk.targets[here]] = 1
    entropy = part.entropy()
    mean_entropy = None if entropy is None else max(float(entropy.nan_to_num(0.0).mean()), 0.0)
    index, inverse = tiles.select(columns, forced, options.tau, mean_entropy, options.seed, a, first_column)
    if len(index) > BREAK_EVEN * vocabulary:
        return Kept(None, None)
    return Kept(index, inverse)


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


class _Accumulator:
    """dHidden, dWeight and dbias of one call, in float32 for half precision."""

    def __init__(self, tiles: TilePass, head: HeadTensors, kept: list[Kept], needs: tuple[bool, bool, bool]) -> None:
        self.tiles = tiles
        acc = accumulator(head.hidden.dtype)
        hidden, weight = head.hidden, head.weight
        self.dtype = weight.dtype
        self.hidden = tiles.zeros(hidden.shape, acc, hidden.device) if needs[0] else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=acc) if needs[2] else None
        self.weight = None
        self.rows = None  # of weight that have a row in self.weight; None: all
        if not needs[1]:
            return
        if weight.dtype != acc and kept and all(k.columns is not None for k in kept):
            # Half precision: accumulate in float32 over the union of kept rows only. A float32 copy of a whole
            # (V, D) gradient and its cast back cost 11 to 23% of a step.
            seen = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
            for k in kept:
                seen[k.columns] = True
            self.rows = seen.nonzero().squeeze(1)
            self.place = torch.full((weight.shape[0],), -1, device=weight.device)
            self.place[self.rows] = torch.arange(len(self.rows), device=weight.device)
            self.weight = tiles.zeros((len(self.rows), weight.shape[1]), acc, weight.device)
        else:
            self.weight = tiles.zeros(weight.shape, acc, weight.device)
        self.shape = weight.shape

    def add(
        self,
        dz: torch.Tensor,
        w: torch.Tensor,
        h: torch.Tensor,
        at: slice | torch.Tensor,
        rows: torch.Tensor | slice,
    ) -> None:
        """One tile: dz (n, c) of weight rows `at`, hidden rows `rows`; columns of dz past len(at) are padding, 0."""
        if self.hidden is not None:
            part = linear(dz, w.t())
            if isinstance(rows, slice):
                self.hidden[rows] += part
            else:
                self.tiles.add_rows(self.hidden, rows, part)
        if self.weight is not None:
            part = linear(dz.t(), h.t())
            if isinstance(at, slice):
                self.weight[at] += part
            else:
                where = at if self.rows is None else self.place[at]
                self.tiles.add_rows(self.weight, where, part[: len(at)])
        if self.bias is not None:
            part = dz.sum(0, dtype=self.bias.dtype)
            if isinstance(at, slice):
                self.bias[at] += part
            else:
                self.bias.index_add_(0, at, part[: len(at)])

    def finish_weight(self) -> torch.Tensor | None:
        if self.weight is None or self.rows is None:
            return None if self.weight is None else self.weight.to(self.dtype)
        out = self.tiles.zeros(self.shape, self.dtype, self.weight.device)
        out[self.rows] = self.weight.to(self.dtype)
        return out


def backward(
    tiles: TilePass,
    head: HeadTensors,
    grads: RowGrads,
    kept: list[Kept],
    options: Options,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dhidden, dweight, dbias), None where not needed; dhidden is this shard's part of the sum over shards."""
    total = _Accumulator(tiles, head, kept, needs)
    size = tiles.sizes(options.tau is not None)
    for i, a in enumerate(range(0, head.hidden.shape[0], size.rows)):
        rows = slice(a, min(a + size.rows, head.hidden.shape[0]))
        live = grads.rows(rows).live()
        index: slice | torch.Tensor = rows
        if not bool(live.all()):
            index = live.nonzero().squeeze(1) + a
            if not len(index):
                continue
        chunk = kept[i] if kept else Kept(None, None)
        _backward_chunk(tiles, head.rows(index), grads.rows(index), chunk, options, total, index, size)
    hidden = None if total.hidden is None else total.hidden.to(head.hidden.dtype)
    bias = None if total.bias is None or head.bias is None else total.bias.to(head.bias.dtype)
    return hidden, total.finish_weight(), bias


def _backward_chunk(
    tiles: TilePass,
    head: HeadTensors,
    grads: RowGrads,
    kept: Kept,
    options: Options,
    total: _Accumulator,
    index: slice | torch.Tensor,
    size: TileSizes,
) -> None:
    vocabulary = head.weight.shape[0]
    count = vocabulary if kept.columns is None else len(kept.columns)
    position = torch.full((vocabulary,), -1, dtype=torch.int64, device=head.weight.device)
    for v in range(0, count, size.columns):
        if kept.columns is None:
            at: slice | torch.Tensor = slice(v, min(v + size.columns, vocabulary))
            w, bias, inverse = head.weight[at], _part(head.bias, v, v + size.columns), None
            target = head.targets - v
        else:
            at = kept.columns[v : v + size.columns]
            assert kept.inverse is not None
            w, bias, inverse = _gather(head, at, kept.inverse[v : v + size.columns])
            position.fill_(-1)
            position[at] = torch.arange(len(at), device=at.device)
            here = (head.targets >= 0) & (head.targets < vocabulary)
            target = position[head.targets.where(here, 0)].where(here, -1)
        z = linear(head.hidden, w)
        tiles.backward(
            z,
            bias,
            head.inv_temperature,
            grads.lse,
            grads.grad,
            grads.grad_entropy,
            grads.entropy,
            inverse,
            target,
            options,
        )
        total.add(z, w, head.hidden, at, index)


def _gather(
    head: HeadTensors, at: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Kept rows of weight and bias, padded with copies of the first whose scale is 0."""
    pad = -len(at) % PAD
    at = torch.cat([at, at[:1].expand(pad)])
    scale = torch.cat([inverse, inverse.new_zeros(pad)])
    return head.weight[at], None if head.bias is None else head.bias[at], scale
