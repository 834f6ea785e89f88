"""The gradients of sum_i c_i logps_i + h_i entropy_i, made in the forward: the coefficients are known before it.

A block of rows at a time keeps its logits until its row statistics are there, and turns them into their gradients:
6NDV for a step whose exact gradient takes 8NDV where the logits are made again, 4NDV of a frozen head, 2NDV of rows
without a coefficient. Each block adds its part to dweight, which is read and written for it. Sampled, the logits of the
columns that are kept wait for the end, f N V of them: 2NDV (1 + 2f), and a row asks for columns as its coefficient
weighs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from .. import _check
from . import stats as latest
from ._backward import Three, exact_rows, sampled_rows
from ._forward import Span, choose_threshold, draw, kept_of, reduced, spans
from ._forward import forward as driver_forward
from ._function import arranged, head_of, scatter
from ._head import HeadTensors, Kept, Logits, RowGrads, Tile, part_of
from ._inputs import marked
from ._options import Options, accumulator, logits_budget
from ._pilots import Chosen
from ._policy import even
from ._row_stats import RowStats
from ._slopes import ROWS, slopes_dtype
from ._tile_pass import TilePass

_Optional = torch.Tensor | None

# Rows of a block that has a part of dweight, read and written for each: at 1024 an H100 takes as long for that, 1.5 ms
# of a 131072 x 4096 head in float32, as for the GEMM that adds it.
SUMMED = 4096


class Weighted(NamedTuple):
    """loss (), logps (N,), entropy (N,) or None, and unit times the gradients of hidden (N, D), weight and bias.

    None where not needed. float16 has its gradients in float32, and a unit that is a power of two: coefficients of a
    mean over thousands of tokens are under 6e-8, and a loss scale comes with the backward.
    """

    loss: torch.Tensor
    logps: torch.Tensor
    entropy: _Optional
    hidden: _Optional
    weight: _Optional
    bias: _Optional
    unit: _Optional


class Rows(NamedTuple):
    """Coefficients (n,) of log-probs and entropies, in the dtype of sums; the first `moving` rows have one."""

    logps: torch.Tensor
    entropy: _Optional
    moving: int

    def grads(self, part: RowStats, a: int, b: int) -> RowGrads:
        """Of rows a to b, whose statistics are part."""
        if self.entropy is None:
            return RowGrads(part.lse(), self.logps[a:b], None, None)
        return RowGrads(part.lse(), self.logps[a:b], self.entropy[a:b], part.entropy())


def weighted(
    tiles: TilePass,
    inputs: tuple[torch.Tensor, torch.Tensor, _Optional],
    targets: torch.Tensor,
    inv_temperature: _Optional,
    coefficients: tuple[torch.Tensor, _Optional],
    ignore_index: int,
    columns: tuple[int, int],
    options: Options,
    needs: tuple[bool, bool, bool],
) -> Weighted:
    """Of inputs = (hidden, weight, bias); columns: the first of this shard, and how many all shards have."""
    (hidden, weight, bias), (coef, coef_entropy), n = inputs, coefficients, len(targets)
    counted = targets != ignore_index
    order, rows = _in_order(inputs, counted, coefficients, tiles, options, any(needs))
    head = head_of(hidden, weight, bias, targets - columns[0], inv_temperature, order)
    with _check.own_dtypes(hidden.device.type):
        stats, (dh, dw, db), unit = _gradients(tiles, head, rows, options, columns[0], needs)
    logps = marked(scatter(stats.logps(stats.lse()), order, n), targets, counted, columns[1])
    entropy = stats.entropy()
    entropy = None if entropy is None else scatter(entropy, order, n)
    if dh is not None:
        dh = dh.new_zeros(n, dh.shape[1]).index_copy_(0, order[: rows.moving], dh)
    db = None if db is None else db.to(logps.dtype)
    loss = _sum(coef, logps, counted)
    if coef_entropy is not None and entropy is not None:
        loss = loss + _sum(coef_entropy, entropy, counted)
    return Weighted(loss, logps, entropy, dh, dw, db, unit)


def _sum(coef: torch.Tensor, values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """A row without a coefficient adds nothing: 0 * -inf is NaN."""
    return torch.where(counted & (coef != 0), coef * values, 0.0).sum()


def of_coefficients(
    grad: torch.Tensor,
    coefficients: tuple[torch.Tensor, _Optional],
    values: tuple[torch.Tensor, _Optional],
    needs: tuple[bool, bool],
) -> list[_Optional]:
    """Gradients of the coefficients of values: the loss is linear in both."""
    out: list[_Optional] = []
    for c, x, need in zip(coefficients, values, needs, strict=True):
        known = None if c is None or x is None else x.where((c != 0) | x.isfinite(), 0.0)
        out.append(known * grad if need and known is not None else None)
    return out


def _in_order(
    inputs: tuple[torch.Tensor, torch.Tensor, _Optional],
    counted: torch.Tensor,
    coefficients: tuple[torch.Tensor, _Optional],
    tiles: TilePass,
    options: Options,
    needed: bool,
) -> tuple[torch.Tensor, Rows]:
    """(n,) indices of the counted rows, those with a coefficient first, and their coefficients."""
    coef, coef_entropy = coefficients
    moves = coef != 0 if coef_entropy is None else (coef != 0) | (coef_entropy != 0)
    moves = counted & moves if needed else torch.zeros_like(counted)
    moving, still = moves.nonzero().squeeze(1), (counted & ~moves).nonzero().squeeze(1)
    moved = arranged(inputs[0], len(inputs[1]), moving, tiles, options)
    order = torch.cat([moving if moved is None else moved, still])
    return order, Rows(coef[order], None if coef_entropy is None else coef_entropy[order], len(moving))


def _gradients(
    tiles: TilePass, head: HeadTensors, rows: Rows, options: Options, first_column: int, needs: tuple[bool, bool, bool]
) -> tuple[RowStats, Three, _Optional]:
    """Row statistics, the gradients of the moving rows and of the head, and their unit; head in the order of rows."""
    n, acc = len(head.targets), accumulator(head.hidden.dtype)
    stats = RowStats.new(n, acc, head.hidden.device, options.entropy, options.sum_sq)
    rows, unit = _in_units(rows, options.sampled) if head.hidden.dtype == torch.float16 else (rows, None)
    if rows.moving < n:
        rest = head.rows(slice(rows.moving, n))
        _scored(tiles, rest, stats.rows(rows.moving, n), options, first_column, None)
    make = _sampled if options.sampled else _exact
    three = make(tiles, head, rows, stats, options, first_column, needs) if rows.moving else _nothing(head, needs)
    if three[0] is not None and options.group is not None:
        dist.all_reduce(three[0], group=options.group)
    return stats, three, unit


def _in_units(rows: Rows, sampled: bool) -> tuple[Rows, torch.Tensor]:
    """Rows of coefficients of at most 2, or 1 / 8 where gradients are summed in float16 itself, which ends at 65504."""
    both = rows.logps.abs() if rows.entropy is None else torch.maximum(rows.logps.abs(), rows.entropy.abs())
    most = both.amax() if len(both) else both.new_ones(())
    unit = torch.exp2(most.log2().floor()).where((most > 0) & most.isfinite(), 1.0)
    unit = unit * 16 if sampled else unit
    return rows._replace(logps=rows.logps / unit, entropy=None if rows.entropy is None else rows.entropy / unit), unit


def _scored(
    tiles: TilePass, head: HeadTensors, part: RowStats, options: Options, first_column: int, logits: Logits | None
) -> None:
    """Statistics of some rows into part, over all shards."""
    plain = replace(options, tau=None, error=None)
    found, _ = driver_forward(tiles, head, plain, first_column, logits, part)
    part.take(found)


def _block(head: HeadTensors, moving: int, options: Options, step: int, most: int) -> tuple[int, int]:
    """Rows of each block, a multiple of step, and the bytes that its logits may take."""
    kind = options.logits_dtype(head.hidden)
    size, budget = len(head.weight) * kind.itemsize, logits_budget(min(moving, most), head.weight, kind)
    fit = budget // size
    if options.group is not None:
        # Every rank merges the statistics of the same blocks.
        least = torch.tensor([fit], dtype=torch.int64, device=head.hidden.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=options.group)
        fit = int(least)
    if options.sampled:
        rows = even(moving, max(step, min(most, fit) // step * step), step)
        return rows, max(budget, rows * size)
    return even(moving, most if fit < max(1, min(moving, 64)) else min(most, fit), step), budget


def _exact(
    tiles: TilePass,
    head: HeadTensors,
    rows: Rows,
    stats: RowStats,
    options: Options,
    first_column: int,
    needs: tuple[bool, bool, bool],
) -> Three:
    hidden, weight, acc = head.hidden, head.weight, accumulator(head.hidden.dtype)
    step, budget = _block(head, rows.moving, options, 1, SUMMED if needs[1] else ROWS)
    kind = slopes_dtype(hidden.dtype)
    dh = torch.empty(rows.moving, hidden.shape[1], dtype=kind, device=hidden.device) if needs[0] else None
    # Of one block dweight is written as it is; of several, and for float16, in a sum.
    several = rows.moving > step or hidden.dtype == torch.float16
    dw = torch.zeros(weight.shape, dtype=acc, device=weight.device) if needs[1] and several else None
    db = torch.zeros(len(weight), dtype=acc, device=weight.device) if needs[2] else None
    for a in range(0, rows.moving, step):
        b = min(a + step, rows.moving)
        block, part, logits = head.rows(slice(a, b)), stats.rows(a, b), Logits(budget)
        _scored(tiles, block, part, options, first_column, logits)
        dh_part, dw_part, db_part = exact_rows(tiles, block, rows.grads(part, a, b), options, logits, needs, dw)
        if dh is not None and dh_part is not None:
            dh[a:b] = dh_part
        if db is not None and db_part is not None:
            db += db_part
        dw = dw_part
    latest.record(tiles.name, len(head.targets), len(weight), options, step, [], False, None)
    return dh, None if dw is None else dw.to(slopes_dtype(weight.dtype)), db


def _nothing(head: HeadTensors, needs: tuple[bool, bool, bool]) -> Three:
    """No row has a coefficient."""
    weight, acc = head.weight, accumulator(head.hidden.dtype)
    return (
        head.hidden.new_zeros(0, head.hidden.shape[1], dtype=slopes_dtype(weight.dtype)) if needs[0] else None,
        torch.zeros(weight.shape, dtype=slopes_dtype(weight.dtype), device=weight.device) if needs[1] else None,
        torch.zeros(len(weight), dtype=acc, device=weight.device) if needs[2] else None,
    )


def _sampled(
    tiles: TilePass,
    head: HeadTensors,
    rows: Rows,
    stats: RowStats,
    options: Options,
    first_column: int,
    needs: tuple[bool, bool, bool],
) -> Three:
    size, whole = (tiles.sizes(sampled, head.hidden, options.wide) for sampled in (True, False))
    step, budget = _block(head, rows.moving, options, size.chunk, min(ROWS, whole.rows) // size.chunk * size.chunk)
    # An entropy that is asked for and has no coefficients makes no column more likely to be kept.
    asked, options = options, replace(options, entropy=rows.entropy is not None)
    kept: list[Kept] = []
    chosen: list[Chosen] = []
    for a in range(0, rows.moving, step):
        b = min(a + step, rows.moving)
        block, part, logits = head.rows(slice(a, b)), stats.rows(a, b), Logits(budget)
        _scored(tiles, block, part, asked, first_column, logits)
        part = part if options.entropy else replace(part, sum_z=None)
        grads = rows.grads(part, a, b)
        found = _bounds(tiles, block, part, logits, grads, options)
        own = options
        if options.error is not None:
            found = [reduced(s, size.chunk) for s in found]
            chosen.append(choose_threshold(tiles, block, part, [(s.a, s) for s in found], options, size, grads))
            own = replace(options, tau=1.0)
        draws = [draw(tiles, s, own, a + s.a, first_column, size) for s in found]
        some = [kept_of(*one, size.break_even * len(head.weight)) for one in tiles.count(draws)]
        kept += _with_logits(some, logits, size.chunk)
    latest.record(
        *(tiles.name, len(head.targets), len(head.weight), options, size.chunk, kept, False),
        Chosen.of(chosen) if chosen else None,
    )
    moving, part = head.rows(slice(0, rows.moving)), stats.rows(0, rows.moving)
    return sampled_rows(tiles, moving, rows.grads(part, 0, rows.moving), kept, options, needs)


def _bounds(
    tiles: TilePass, block: HeadTensors, part: RowStats, logits: Logits, grads: RowGrads, options: Options
) -> list[Span]:
    """Chunks of the block with bounds on log |c_i| p_ij of each column, over the largest c of the block.

    The pass bounds z by the larger of the log-sum-exp so far and a floor: with log-sum-exp - log |c_i| for a floor, and
    |c_i| at most 1, that is the floor always.
    """
    acc = grads.lse.dtype
    floor = grads.lse.sum(1) - grads.weights().log()
    again = RowStats.new(len(floor), acc, floor.device, options.entropy, False)
    found = [
        replace(s, floor=floor[s.a : s.b])
        for s in spans(tiles, block, again, options, tiles.sizes(True, block.hidden, options.wide))
    ]
    for (_, v), z in sorted(logits.tiles.items(), key=lambda item: item[0]):
        bias = part_of(block.bias, v, v + z.shape[1])
        for s in found:
            tile = Tile(z[s.a : s.b], bias, s.head.inv_temperature, s.head.targets)
            tiles.forward(tile, s.stats, s.floor, s.columns, v, options)
    return [replace(s, stats=part.rows(s.a, s.b)) for s in found]


def _with_logits(kept: list[Kept], logits: Logits, chunk: int) -> list[Kept]:
    """With the raw logits of the kept columns, out of those of a block's."""
    held = sorted(logits.tiles.items(), key=lambda item: item[0])
    some = [k.columns for k in kept if k.columns is not None]
    if not some:
        return kept
    # All are of one width but the last. arange: what comes from the host is a stall on a GPU.
    starts = torch.arange(len(held), device=some[0].device, dtype=torch.int64) * held[0][1].shape[1]
    ends = iter(torch.stack([torch.searchsorted(c, starts) for c in some]).tolist())
    out = []
    for i, k in enumerate(kept):
        if k.columns is None:
            out.append(k)
            continue
        at = [*next(ends), len(k.columns)]
        parts = [
            z[i * chunk : (i + 1) * chunk].index_select(1, k.columns[a:b] - v)
            for ((_, v), z), a, b in zip(held, at, at[1:], strict=False)
        ]
        out.append(replace(k, logits=torch.cat(parts, 1)))
    return out
