"""What the driver works on: the head's tensors, a tile of logits, gradients of rows, the columns that a chunk keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..reference.logps import finish_head
from ._options import Options, accumulator

# Rows of the weight whose mean is taken off the sampled sum.
CENTRE_ROWS = 1024


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


class Tile(NamedTuple):
    """Raw logits z (n, c) of some rows and columns; bias (c), 1 / temperature (n), targets (n) as numbered there."""

    z: torch.Tensor
    bias: torch.Tensor | None
    inv_temperature: torch.Tensor | None
    targets: torch.Tensor


@dataclass(frozen=True)
class RowGrads:
    """lse (N, 2) in two parts, RowStats.lse(); (N,) dloss/dlogp, and with the entropy gradient dloss/dH and H."""

    lse: torch.Tensor
    grad: torch.Tensor
    grad_entropy: torch.Tensor | None
    entropy: torch.Tensor | None

    def rows(self, index: slice | torch.Tensor) -> RowGrads:
        pick = lambda x: None if x is None else x[index]  # noqa: E731
        return RowGrads(self.lse[index], self.grad[index], pick(self.grad_entropy), pick(self.entropy))

    def weights(self) -> torch.Tensor:
        """(N,) size of each row's coefficients, the largest 1."""
        size = self.grad.abs()
        if self.grad_entropy is not None:
            size = torch.maximum(size, self.grad_entropy.abs())
        return size / size.amax()

    def live(self) -> torch.Tensor:
        """Rows with a coefficient: the others add nothing to any gradient."""
        live = self.grad != 0
        return live if self.grad_entropy is None else live | (self.grad_entropy != 0)


@dataclass(frozen=True)
class Kept:
    """Columns kept for one row chunk, ascending, with 1 / keep probability; None: all of them.

    logits: raw ones of the chunk's rows there, where the forward had them all; else they are made again.
    """

    columns: torch.Tensor | None
    inverse: torch.Tensor | None
    logits: torch.Tensor | None = None


class Draw(NamedTuple):
    """What select chooses columns from: (..., V) bounds and targets' marks of chunks of rows, which begin at rows."""

    columns: torch.Tensor
    forced: torch.Tensor
    tau: float
    mean_entropy: torch.Tensor | None
    seed: int
    rows: range
    first_column: int


@dataclass
class Logits:
    """Raw logits that an exact forward keeps for its backward, by (first row, first column) of a tile.

    left: bytes that may still be kept. The tiles past them are computed again.
    """

    left: int
    tiles: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def fits(self, rows: int, columns: int, size: int) -> bool:
        """Whether a tile of so many entries of size bytes may still be kept."""
        return rows * columns * size <= self.left

    def keep(self, at: tuple[int, int], z: torch.Tensor) -> None:
        self.tiles[at] = z
        self.left -= z.numel() * z.element_size()


def centre_of(weight: torch.Tensor) -> torch.Tensor:
    """The mean of about CENTRE_ROWS rows, spread evenly; any number of them leaves the sampled gradient unbiased."""
    return weight[:: max(1, len(weight) // CENTRE_ROWS)].mean(0, dtype=accumulator(weight.dtype))


def signs(count: int, like: torch.Tensor) -> torch.Tensor:
    """(count, like's width) of -1 and 1, always the same: torch's generator is the user's."""
    width = like.shape[1]
    x = torch.arange(1, count * width + 1, device=like.device, dtype=torch.int64) * 0x9E3779B1
    x = ((x ^ (x >> 15)) * 0x85EBCA77) & 0xFFFFFFFF
    return (((x ^ (x >> 13)) & 1) * 2 - 1).to(like.dtype).view(count, width)


def part_of(x: torch.Tensor | None, a: int, b: int) -> torch.Tensor | None:
    return None if x is None else x[a:b]


def finished(
    z: torch.Tensor, bias: torch.Tensor | None, inv_temperature: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """Raw logits of a tile to logits, in the dtype of sums."""
    raw = z.to(accumulator(z.dtype))
    raw = raw if bias is None else raw + bias
    temperature = 1.0 if inv_temperature is None else 1 / inv_temperature.unsqueeze(-1)
    return finish_head(raw, logit_scale=options.logit_scale, softcap=options.softcap, temperature=temperature)


def target_scores(head: HeadTensors, options: Options) -> torch.Tensor:
    """(N,) logit of each row's target, -inf where it is in another shard."""
    here = (head.targets >= 0) & (head.targets < head.weight.shape[0])
    at = head.targets.where(here, 0)
    acc = accumulator(head.hidden.dtype)
    raw = (head.hidden.to(acc) * head.weight[at].to(acc)).sum(-1, keepdim=True)
    bias = None if head.bias is None else head.bias[at].unsqueeze(1)
    z = finished(raw, bias, head.inv_temperature, options).squeeze(1)
    return z.where(here, -torch.inf)


def forced_columns(targets: torch.Tensor, vocabulary: int, chunk: int) -> torch.Tensor:
    """(chunks, vocabulary) uint8, 1 at the targets of each chunk of rows."""
    chunks = -(-len(targets) // chunk)
    # One more column for the targets of other shards: to pick this one's by a mask is to read their number.
    forced = torch.zeros(chunks, vocabulary + 1, dtype=torch.uint8, device=targets.device)
    at = targets.where((targets >= 0) & (targets < vocabulary), vocabulary)
    for i, row in enumerate(forced):
        row.index_fill_(0, at[i * chunk : (i + 1) * chunk], 1)
    return forced[:, :vocabulary]


def tile_view(buffer: torch.Tensor, rows: int, columns: int, align: int) -> torch.Tensor:
    """(rows, columns) of a flat buffer, the rows a multiple of align apart."""
    stride = columns + -columns % align
    return buffer[: rows * stride].view(rows, stride)[:, :columns]
