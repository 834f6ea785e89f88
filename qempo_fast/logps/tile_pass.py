"""What a backend brings to the chunked driver: the element-wise work on one tile of logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from .options import TileSizes
from .stats import RowStats


class TilePass(ABC):
    """The signatures are those of CpuPass; zeros and add_rows have plain torch forms here."""

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
    def select(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept columns of one row chunk and 1 / keep probability."""

    def fused(self, *args: Any) -> bool:
        """Do a whole row chunk's forward in one kernel, GEMM included; False: not done, take the tiles."""
        return False

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def add_rows(self, out: torch.Tensor, at: torch.Tensor, rows: torch.Tensor) -> None:
        """out[at] += rows, the indices distinct."""
        out.index_add_(0, at, rows.to(out.dtype))
