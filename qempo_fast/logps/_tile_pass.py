"""What a backend brings to the chunked driver: the element-wise work on one tile of logits, and sums of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from ._gemm import add_product, product
from ._head import Draw, HeadTensors, RowGrads, Tile, forced_columns, target_scores
from ._options import Options, TileSizes, accumulator
from ._row_stats import RowStats

_Optional = torch.Tensor | None


class RowSum:
    """total, (V, D) and not yet written, becomes 0 in rows that nothing was added to; in plain torch, for any device.

    It is made block by block: begin() names the rows of weight, add() numbers them from there, end() writes them. In
    half precision the float32 buffer has the rows of a block that will be added to, and no others: one of all rows
    and its cast back cost 11 to 23% of a step.
    """

    def __init__(self, total: torch.Tensor) -> None:
        self.total = total
        self.half = total.dtype != accumulator(total.dtype)

    def begin(self, block: slice, columns: Sequence[torch.Tensor | None]) -> None:
        """columns: what each later add() will name, None for a slice."""
        self.out = self.total[block]
        self.rows = self.place = None
        some = [c for c in columns if c is not None]
        if not self.half or len(some) < len(columns):
            self.sum = torch.zeros_like(self.out, dtype=torch.float32) if self.half else self.out.zero_()
            return
        seen = torch.zeros(len(self.out), dtype=torch.bool, device=self.out.device)
        for c in some:
            seen.index_fill_(0, c, True)  # seen[c] = True copies the True from the host, a stall on a GPU
        self.rows = seen.nonzero().squeeze(1)
        self.place = torch.full((len(self.out),), -1, device=self.out.device, dtype=torch.int64)
        self.place[self.rows] = torch.arange(len(self.rows), device=self.out.device, dtype=torch.int64)
        self.sum = self.out.new_zeros(len(self.rows), self.out.shape[1], dtype=torch.float32)

    def add(self, at: slice | torch.Tensor, a: torch.Tensor, w: torch.Tensor) -> None:
        """a @ w.T to the rows at; what it has past len(at) is padding."""
        if isinstance(at, slice):
            add_product(self.sum[at], a, w)
        else:
            self._add(at, product(a, w)[: len(at)])

    def _add(self, at: torch.Tensor, rows: torch.Tensor) -> None:
        self.sum.index_add_(0, at if self.place is None else self.place[at], rows.to(self.sum.dtype))

    def end(self) -> None:
        if self.rows is not None:
            self.out.zero_()[self.rows] = self.sum.to(self.out.dtype)
        elif self.half:
            self.out.copy_(self.sum)


class TilePass(ABC):
    """A backend has the abstract methods; what moves rows about has its plain torch form here."""

    name: str  # of the backend
    # A tile's rows are a multiple of so many columns apart in memory.
    align = 1
    # Whether forward and select take all chunks of a tile's rows at once, rather than one.
    together = False

    @abstractmethod
    def sizes(
        self, sampled: bool, hidden: torch.Tensor | None = None, wide: bool = False, fixed: bool = False
    ) -> TileSizes:
        """Rows and columns of the logits buffer for these rows; without them of one chunk. wide: of float32.

        fixed: tiles have so many columns whatever the rows, sampled or not.
        """

    def ordered(self, hidden: torch.Tensor, vocabulary: int) -> bool:
        """Whether a sampled step of these rows gains more by their order than that takes to be found."""
        return True

    @abstractmethod
    def new_columns(self, vocabulary: int, like: RowStats) -> torch.Tensor:
        """Column statistic of the rows that forward takes, (..., vocabulary) at -inf."""

    @abstractmethod
    def forward(
        self, tile: Tile, stats: RowStats, floor: _Optional, columns: _Optional, v0: int, options: Options
    ) -> None:
        """Fold a tile of raw logits into the row statistics and, where given, the column statistic."""

    @abstractmethod
    def backward(self, tile: Tile, grads: RowGrads, inverse: _Optional, row_sum: _Optional, options: Options) -> None:
        """Overwrite a tile of raw logits with the gradient with respect to them.

        Where inverse is given, columns past its end are of rows of zeros: they become 0, or are left as they are.
        """

    def slopes(
        self,
        tile: Tile,
        grads: RowGrads,
        inverse: _Optional,
        row_sum: _Optional,
        options: Options,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """What backward() makes, in dtype, in which row_sum is of it: the tile itself or another; the tile is spent."""
        if tile.z.dtype == dtype:
            self.backward(tile, grads, inverse, row_sum, options)
            return tile.z
        self.backward(tile, grads, inverse, None, options)
        z = tile.z.to(dtype)
        if row_sum is not None:
            torch.sum(z, 1, dtype=row_sum.dtype, out=row_sum)
        return z

    @abstractmethod
    def select(self, draw: Draw) -> Any:
        """The draw of columns of each chunk of rows that forward takes at once; count() gives what they came to."""

    def count(self, draws: list[Any]) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """Of each chunk the kept columns, ascending, 1 / keep probability, and about how many were to be expected.

        Once a forward: where the numbers lie on a GPU, fetching them waits for it.
        """
        return draws

    def targets(self, head: HeadTensors, options: Options, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(n,) target's logit of each row, -inf where another shard has it; (chunks, V) uint8 mark of targets."""
        return target_scores(head, options), forced_columns(head.targets, len(head.weight), chunk)

    def fused(self, *args: Any) -> bool:
        """Do a whole row chunk's forward in one kernel, GEMM included; False: not done, take the tiles."""
        return False

    def logits_gradient(self, tile: Tile, counted: torch.Tensor, grads: RowGrads, options: Options) -> torch.Tensor:
        """Gradient of the tile itself, which stays as it is; 0 in rows that are not counted, whatever they hold."""
        out = tile.z.clone(memory_format=torch.contiguous_format)
        self.backward(tile._replace(z=out), grads, None, None, options)
        # An ignored row may hold anything, NaN too, and 0 * NaN is NaN.
        out[~counted] = 0
        return out

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A large output, not yet written."""
        return torch.empty(shape, dtype=dtype, device=device)

    def gather(self, weight: torch.Tensor, at: torch.Tensor, out: torch.Tensor) -> None:
        """out = weight[at], padded with zeros."""
        torch.index_select(weight, 0, at, out=out[: len(at)])
        if len(out) > len(at):
            out[len(at) :].zero_()

    def row_sum(self, weight: torch.Tensor) -> RowSum:
        """The sum that becomes dweight."""
        return RowSum(self.empty(weight.shape, weight.dtype, weight.device))
