"""What a backend brings to the chunked driver: the element-wise work on one tile of logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from .head import HeadTensors, forced_columns, target_scores
from .options import Options, TileSizes
from .row_sum import RowSum
from .stats import RowStats


class TilePass(ABC):
    """The signatures are those of CpuPass; what moves rows about has its plain torch form here."""

    name: str  # of the backend
    # A tile's rows are a multiple of so many columns apart in memory.
    align = 1
    # Whether forward and select take all chunks of a tile's rows at once, rather than one.
    together = False

    @abstractmethod
    def sizes(self, sampled: bool, hidden: torch.Tensor | None = None) -> TileSizes:
        """Rows and columns of the logits buffer for these rows; without them of one chunk."""

    @abstractmethod
    def new_columns(self, vocabulary: int, like: RowStats) -> torch.Tensor:
        """Column statistic of the rows that forward takes, (..., vocabulary) at -inf."""

    @abstractmethod
    def forward(self, *args: Any) -> None:
        """Fold a tile of raw logits into the row statistics and, where given, the column statistic."""

    @abstractmethod
    def backward(self, *args: Any) -> None:
        """Overwrite a tile of raw logits with the gradient with respect to them.

        Where inverse is given, columns past its end are of rows of zeros: they become 0, or are left as they are.
        """

    @abstractmethod
    def select(self, *args: Any) -> Any:
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

    def logits_gradient(
        self,
        z: torch.Tensor,
        targets: torch.Tensor,
        counted: torch.Tensor,
        inv_temperature: torch.Tensor | None,
        lse: torch.Tensor,
        grad: torch.Tensor,
        grad_entropy: torch.Tensor | None,
        entropy: torch.Tensor | None,
        options: Options,
    ) -> torch.Tensor:
        """Gradient of z itself, which stays as it is; 0 in rows that are not counted, whatever they hold."""
        out = z.clone(memory_format=torch.contiguous_format)
        self.backward(
            *(out, None, inv_temperature, lse, grad, grad_entropy, entropy, None, targets, None, options),
        )
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
