"""What a backend brings to the chunked driver: the element-wise work on one tile of logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from .options import TileSizes
from .row_sum import RowSum
from .stats import RowStats


class TilePass(ABC):
    """The signatures are those of CpuPass; what moves rows about has its plain torch form here."""

    name: str  # of the backend

    @abstractmethod
    def sizes(self, sampled: bool) -> TileSizes:
        """Rows and columns of the logits buffer."""

    @abstractmethod
    def new_columns(self, vocabulary: int, like: RowStats) -> torch.Tensor:
        """Column statistic of one row chunk, (..., vocabulary) at -inf."""

    @abstractmethod
    def forward(self, *args: Any) -> None:
        """Fold a tile of raw logits into the row statistics and, where given, the column statistic."""

    @abstractmethod
    def backward(self, *args: Any) -> None:
        """Overwrite a tile of raw logits with the gradient with respect to them."""

    @abstractmethod
    def select(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """One row chunk's draw of columns; count() gives what it came to."""

    def count(self, draws: list[Any]) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """Of each draw the kept columns, ascending, 1 / keep probability, and about how many were to be expected.

        Once a forward: where the numbers lie on a GPU, fetching them waits for it.
        """
        return draws

    def fused(self, *args: Any) -> bool:
        """Do a whole row chunk's forward in one kernel, GEMM included; False: not done, take the tiles."""
        return False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A large output, not yet written."""
        return torch.empty(shape, dtype=dtype, device=device)

    def gather(self, weight: torch.Tensor, at: torch.Tensor, out: torch.Tensor) -> None:
        """out = weight[at], padded with copies of the first."""
        torch.index_select(weight, 0, torch.cat([at, at[:1].expand(len(out) - len(at))]), out=out)

    def row_sum(self, weight: torch.Tensor) -> RowSum:
        """The sum that becomes dweight."""
        return RowSum(self.empty(weight.shape, weight.dtype, weight.device))
