"""The weight gradient as a sum of rows that arrive by index, in float32 for half precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .gemm import add_product, product
from .options import accumulator


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
        self.place = torch.full((len(self.out),), -1, device=self.out.device)
        self.place[self.rows] = torch.arange(len(self.rows), device=self.out.device)
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
