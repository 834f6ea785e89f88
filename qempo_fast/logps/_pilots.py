"""The threshold of a sampled gradient from the error that its draw may add, which a few pilot rows tell.

A draw's variance in row i of dhidden is sum_j dz_ij^2 (1 / q_j - 1) |W_j - c|^2, and q_j = min(1, u_j / tau) is known
once the forward has the column bounds u. For pilot rows, drawn by their size, dz and dhidden are computed in full.
The row sizes |W_j - c|^2 come from random signs that go through the same GEMM. docs/linear_logps.md has the derivation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ._gemm import linear, product
from ._head import HeadTensors, RowGrads, Tile, centre_of, part_of, signs
from ._options import Options, accumulator
from ._row_stats import RowStats
from ._tile_pass import TilePass

# Pilots are 1 in ROWS_A_PILOT rows, so that their two products cost a sixteenth of the forward's; from FEW to MANY, out
# of at most CHUNKS chunks. Signs: an estimate of |W_j - c|^2 is off by sqrt(2 / SIGNS), and thousands are added.
ROWS_A_PILOT, FEW, MANY, CHUNKS, SIGNS = 32, 16, 64, 8, 8
# Share of the error allowed that is aimed at: where few rows have most of it the estimate was off by up to a third.
AIM = 0.75
# log2 tau is looked for from LOWEST up over RANGE, in two rounds of 7 thresholds each: to a quarter of an octave, in a
# few launches. At the lower end columns are kept whose entries are under the rounding of float32: practically all. The
# entropy's entries are p (1 + |log p + H|), so its bounds and thresholds are some eight times as large.
LOWEST, RANGE, PARTS, ENTROPY = -20.0, 16.0, 8, 3.0


@dataclass(frozen=True)
class Chosen:
    """tau, its error relative to dhidden over all rows, and that of each pilot row, on the device of the rows."""

    tau: torch.Tensor
    error: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, parts: list[Chosen]) -> Chosen:
        """Of parts of a call that chose their own: the smallest threshold, the largest error."""
        tau, error = (torch.stack(x) for x in ([p.tau for p in parts], [p.error for p in parts]))
        return cls(tau.amin(), error.amax(), torch.cat([p.rows for p in parts]))


@dataclass(frozen=True)
class _Pilots:
    """Of (K, P) pilot rows in K chunks: chunks (K,), norm (V,) of W_j - c, how likely each row was to be one, and of
    the log-prob's gradient, then the entropy's where it is asked for, dz (K P, V) and size (K P,) = |dhidden|^2.
    """

    chunks: torch.Tensor
    norm: torch.Tensor
    likely: torch.Tensor
    dz: list[torch.Tensor]
    size: torch.Tensor


def choose(
    tiles: TilePass,
    head: HeadTensors,
    stats: RowStats,
    bounds: torch.Tensor,
    forced: torch.Tensor,
    options: Options,
    chunk: int,
    width: int,
    grads: RowGrads | None = None,
) -> Chosen:
    """The largest tau whose draw adds to dhidden AIM times options.error, relative to its norm where rows weigh alike.

    With the entropy to each of both gradients. On vocabulary shards all ranks find the same: of the same rows, errors
    summed over the shards.

    Args:
        head, stats: of all rows, whose statistics are final, over all shards.
        bounds: (chunks, V) log of the column bounds.
        forced: (chunks, V) nonzero where a column is always kept.
        chunk: rows of a chunk.
        width: columns of a tile.
        grads: coefficients of all rows, where they are known: the error is then that of their one gradient, bounds have
            the weights in them.
    """
    assert options.error is not None
    pilots = _measured(tiles, head, stats, options, chunk, len(bounds), width, grads)
    # A bound of 0 is of entries that are 0; and NaN anywhere makes every comparison fail, which keeps all columns.
    inverse = 1 / bounds[pilots.chunks].exp().clamp_(min=1e-30)
    inverse.masked_fill_(forced[pilots.chunks] != 0, 0.0)
    share = pilots.likely.mean() / pilots.likely
    squares = [dz.to(inverse.dtype).square_().view(len(inverse), -1, dz.shape[1]) for dz in pilots.dz]
    shares = share.view(len(inverse), 1, -1)
    weight = torch.stack([((shares @ x).squeeze(1) * pilots.norm).flatten() for x in squares], 1)
    size = pilots.size @ share
    most = (AIM * options.error) ** 2 * size
    low = size.new_full((1,), LOWEST + ENTROPY * options.entropy)
    steps = torch.arange(1, PARTS, device=size.device, dtype=size.dtype)
    for step in (RANGE / PARTS, RANGE / PARTS**2):
        errors = _over_shards(_excess((low + step * steps).exp2(), inverse.flatten()) @ weight, options)
        # The error rises with tau: as many steps as are within, of both gradients. NaN is not.
        low = low + step * (errors <= most).all(1).sum()
    tau = low.exp2()
    excess = (_excess(tau, inverse.flatten()).view_as(inverse) * pilots.norm).unsqueeze(2)
    rows = _over_shards(torch.stack([(x @ excess).flatten() for x in squares]), options)
    error, each = (rows @ share / size).sqrt(), (rows / pilots.size).sqrt()
    return Chosen(tau[0], error.amax(), each.amax(0))


def _over_shards(x: torch.Tensor, options: Options) -> torch.Tensor:
    """The sum over the vocabulary shards, in place."""
    if options.group is not None:
        dist.all_reduce(x, group=options.group)
    return x


def _excess(tau: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """(thresholds, columns) 1 / q - 1; inverse: 1 / u."""
    return torch.outer(tau, inverse).sub_(1.0).clamp_(min=0.0)


def _places(sizes: torch.Tensor, chunk: int, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(K,) chunks and (K P,) rows in them, each row as often as its size says; found where they are, nothing read back.

    Evenly spread, rows of which most are sure of their target told little: of 21 pilots among 700 rows two or three had
    nearly all of dhidden, and the error came out at half of the true one.

    Args:
        sizes: (n,) int64, whose sums are the same whatever their order: CUDA's cumsum of floats is not, and is refused
            where torch.use_deterministic_algorithms asks for it.
    """
    n = len(sizes)
    few = min(chunks, CHUNKS)
    each = max(1, min(MANY, max(FEW, n // ROWS_A_PILOT)) // few)
    table = torch.nn.functional.pad(sizes, (0, chunks * chunk - n)).view(chunks, chunk)
    which = _spread(table.sum(1), few)
    place = _spread(table[which], each)
    return which, (which[:, None] * chunk + place).flatten()


def _spread(sizes: torch.Tensor, count: int) -> torch.Tensor:
    """(..., count) places in the last dimension, at even steps of the sum so far."""
    total = sizes.cumsum(-1)
    steps = torch.arange(1, 2 * count, 2, device=sizes.device, dtype=torch.int64)
    return torch.searchsorted(total, total[..., -1:] * steps // (2 * count), right=True)


def _measured(
    tiles: TilePass,
    head: HeadTensors,
    stats: RowStats,
    options: Options,
    chunk: int,
    chunks: int,
    width: int,
    weighted: RowGrads | None,
) -> _Pilots:
    device, (vocabulary, depth), acc = head.hidden.device, head.weight.shape, accumulator(head.hidden.dtype)
    # A row's dz is of about this size, 1 - p of its target. Its part of |dhidden|^2 goes as the square, of the variance
    # as tau times the size: by squares alone one unsure row among sure ones was every pilot, and the error 3 times too
    # small. The surest are left a hundredth of the draws.
    sizes = torch.expm1(stats.logps(stats.lse())).neg_().nan_to_num(0.0).clamp_(min=0.0)
    if weighted is not None:
        # One that is infinite makes its own gradient NaN, not where the others are looked for.
        weights = weighted.weights()
        sizes *= weights.nan_to_num(0.0)
    parts = torch.stack([sizes, sizes.square()])
    parts *= 2.0**19 / (parts.mean(1, keepdim=True) + 1e-30)
    tickets = parts.sum(0).to(torch.int64) + 2**13
    which, index = _places(tickets, chunk, chunks)
    rows = head.rows(index)
    random = signs(SIGNS, head.hidden)
    # The backward takes c off where it knows that a row's dz sum to 0.
    known = options.softcap is None and options.group is None
    centre = centre_of(head.weight) if known else torch.zeros(depth, dtype=acc, device=device)
    offset = (random.to(acc) @ centre)[:, None]
    both = torch.cat([rows.hidden, random])
    grads = _unit_grads(stats, index) if weighted is None else [weighted.rows(index)]
    norm = torch.empty(vocabulary, dtype=acc, device=device)
    # Entries of 1e-8 count among those that may be dropped, and float16 ends at 6e-8.
    kind = torch.bfloat16 if head.hidden.dtype == torch.float16 else head.hidden.dtype
    dz = [torch.empty(len(index), vocabulary, dtype=kind, device=device) for _ in grads]
    dh = torch.zeros(len(grads), len(index), depth, dtype=acc, device=device)
    for v in range(0, vocabulary, width):
        w, bias = head.weight[v : v + width], part_of(head.bias, v, v + width)
        raw, projected = linear(both, w, wide=options.wide).to(acc).split([len(index), SIGNS])
        norm[v : v + width] = (projected - offset).square().mean(0)
        for i, of in enumerate(grads):
            part = raw.clone() if i + 1 < len(grads) else raw
            tiles.backward(Tile(part, bias, rows.inv_temperature, rows.targets - v), of, None, None, options)
            dz[i][:, v : v + width] = part
            dh[i] += product(part.to(head.hidden.dtype), w.t())
    size = _over_shards(dh, options).square().sum(2)
    return _Pilots(which, norm, tickets[index].to(acc), dz, size)


def _unit_grads(stats: RowStats, index: torch.Tensor) -> list[RowGrads]:
    """Of a coefficient of one: the log-prob's, and where it is asked for the entropy's."""
    lse, entropy = stats.lse()[index], stats.entropy()
    one = torch.ones_like(lse[:, 0])
    out = [RowGrads(lse, one, None, None)]
    if entropy is not None:
        out.append(RowGrads(lse, torch.zeros_like(one), one, entropy[index]))
    return out
