"""The threshold of a sampled gradient from the error that its draw may add, which a few pilot rows tell.

A draw's variance in row i of dhidden is sum_j dz_ij^2 (1 / q_j - 1) |W_j - c|^2, and q_j = min(1, u_j / tau) is known
once the forward has the column bounds u. For pilot rows, drawn by their size, dz and dhidden are computed in full.
The row sizes |W_j - c|^2 come from random signs that go through the same GEMM. docs/linear_logps.md has the derivation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._gemm import linear, product
from ._head import HeadTensors, centre_of, finished, part_of
from ._options import Options, accumulator
from ._row_stats import RowStats

# Pilots are 1 in ROWS_A_PILOT rows, so that their two products cost a sixteenth of the forward's; from FEW to MANY, out
# of at most CHUNKS chunks. Signs: an estimate of |W_j - c|^2 is off by sqrt(2 / SIGNS), and thousands are added.
ROWS_A_PILOT, FEW, MANY, CHUNKS, SIGNS = 32, 16, 64, 8, 8
# Share of the error allowed that is aimed at: where few rows have most of it the estimate was off by up to a third.
AIM = 0.75
# log2 tau is looked for from LOWEST up over RANGE, in two rounds of 7 thresholds each: to a quarter of an octave, in a
# few launches. At the lower end columns are kept whose entries are under the rounding of float32: practically all.
LOWEST, RANGE, PARTS = -20.0, 16.0, 8


@dataclass(frozen=True)
class Chosen:
    """tau, its error relative to dhidden over all rows, and that of each pilot row, on the device of the rows."""

    tau: torch.Tensor
    error: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class _Pilots:
    """Of (K, P) pilot rows in K chunks: chunks (K,), dz (K P, V), size (K P,) = |dhidden|^2, norm (V,) of W_j - c, and
    how likely each row was to be one.
    """

    chunks: torch.Tensor
    dz: torch.Tensor
    size: torch.Tensor
    norm: torch.Tensor
    likely: torch.Tensor


def choose(
    head: HeadTensors,
    stats: RowStats,
    bounds: torch.Tensor,
    forced: torch.Tensor,
    options: Options,
    chunk: int,
    width: int,
) -> Chosen:
    """The largest tau whose draw adds to dhidden AIM times options.error, relative to its norm where rows weigh alike.

    Args:
        head, stats: of all rows, whose statistics are final.
        bounds: (chunks, V) log of the column bounds.
        forced: (chunks, V) nonzero where a column is always kept.
        chunk: rows of a chunk.
        width: columns of a tile.
    """
    assert options.error is not None
    pilots = _measured(head, stats, options, chunk, len(bounds), width)
    count = len(pilots.chunks)
    # A bound of 0 is of entries that are 0; and NaN anywhere makes every comparison fail, which keeps all columns.
    inverse = 1 / bounds[pilots.chunks].exp().clamp_(min=1e-30)
    inverse.masked_fill_(forced[pilots.chunks] != 0, 0.0)
    share = pilots.likely.mean() / pilots.likely
    squares = [dz.to(inverse.dtype).square_() for dz in pilots.dz.chunk(count)]
    weight = torch.stack([w @ s for w, s in zip(share.chunk(count), squares, strict=True)]).mul_(pilots.norm)
    size = share @ pilots.size
    most = (AIM * options.error) ** 2 * size
    low, steps = pilots.size.new_full((1,), LOWEST), torch.arange(1, PARTS, device=size.device, dtype=size.dtype)
    for step in (RANGE / PARTS, RANGE / PARTS**2):
        errors = _excess((low + step * steps).exp2(), inverse.flatten()) @ weight.flatten()
        # The error rises with tau: as many steps as are within. NaN is not.
        low = low + step * (errors <= most).sum()
    tau = low.exp2()
    excess = _excess(tau, inverse.flatten()).view_as(inverse) * pilots.norm
    rows = torch.cat([s @ e for s, e in zip(squares, excess, strict=True)])
    return Chosen(tau[0], (share @ rows / size).sqrt(), (rows / pilots.size).sqrt())


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


def _signs(width: int, like: torch.Tensor) -> torch.Tensor:
    """(SIGNS, width) of -1 and 1, always the same: torch's generator is the user's."""
    x = torch.arange(1, SIGNS * width + 1, device=like.device, dtype=torch.int64) * 0x9E3779B1
    x = ((x ^ (x >> 15)) * 0x85EBCA77) & 0xFFFFFFFF
    return (((x ^ (x >> 13)) & 1) * 2 - 1).to(like.dtype).view(SIGNS, width)


def _measured(head: HeadTensors, stats: RowStats, options: Options, chunk: int, chunks: int, width: int) -> _Pilots:
    device, (vocabulary, depth), acc = head.hidden.device, head.weight.shape, accumulator(head.hidden.dtype)
    # A row's dz is of about this size, 1 - p of its target; sure ones are left a hundredth of the draws.
    sizes = torch.expm1(stats.logps(stats.lse())).square().nan_to_num(0.0)
    tickets = (sizes * (2.0**20 / (sizes.mean() + 1e-30))).to(torch.int64) + 2**13
    which, index = _places(tickets, chunk, chunks)
    rows = head.rows(index)
    scale = options.logit_scale * (1.0 if rows.inv_temperature is None else rows.inv_temperature[:, None])
    temperature = 1.0 if rows.inv_temperature is None else 1 / rows.inv_temperature[:, None]
    signs = _signs(depth, head.hidden)
    # The backward takes c off where it knows that a row's dz sum to 0.
    centre = centre_of(head.weight) if options.softcap is None else torch.zeros(depth, dtype=acc, device=device)
    offset = (signs.to(acc) @ centre)[:, None]
    lse = (stats.max[index][:, None], stats.sum[index].log()[:, None])
    both = torch.cat([rows.hidden, signs])
    norm = torch.empty(vocabulary, dtype=acc, device=device)
    # Entries of 1e-8 count among those that may be dropped, and float16 ends at 6e-8.
    kind = torch.bfloat16 if head.hidden.dtype == torch.float16 else head.hidden.dtype
    dz = torch.empty(len(index), vocabulary, dtype=kind, device=device)
    dh = torch.zeros(len(index), depth, dtype=acc, device=device)
    for v in range(0, vocabulary, width):
        w, bias = head.weight[v : v + width], part_of(head.bias, v, v + width)
        raw, projected = linear(both, w).to(acc).split([len(index), SIGNS])
        norm[v : v + width] = (projected - offset).square().mean(0)
        z = finished(raw, bias, rows.inv_temperature, options)
        away = z - lse[0] - lse[1]
        here = torch.arange(v, v + len(w), device=device, dtype=torch.int64) == rows.targets[:, None]
        part = torch.where(here, -torch.expm1(away), -away.exp()) * scale
        if options.softcap is not None:
            part *= 1 - (z * temperature / options.softcap).square()
        dz[:, v : v + width] = part
        dh += product(part.to(head.hidden.dtype), w.t())
    return _Pilots(which, dz, dh.square().sum(1), norm, tickets[index].to(acc))
