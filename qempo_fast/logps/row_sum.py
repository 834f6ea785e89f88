"""The weight gradient as a sum of rows that arrive by index, in float32 for half precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .options import accumulator


class RowSum:
    """(V, D) of weight's dtype, 0 in rows that nothing was added to; in plain torch, for any device.

    columns: the rows that each later add() will name, None for all of them. In half precision the float32 buffer has
    the union of those rows only: one of all rows and its cast back cost 11 to 23% of a step.
    """

    def __init__(self, weight: torch.Tensor, columns: Sequence[torch.Tensor | None]) -> None:
        self.shape, self.dtype, device = weight.shape, weight.dtype, weight.device
        acc = accumulator(self.dtype)
        self.rows = self.place = None
        some = [c for c in columns if c is not None]
        if self.dtype != acc and len(some) == len(columns):
            seen = torch.zeros(self.shape[0], dtype=torch.bool, device=device)
            for c in some:
                seen[c] = True
            self.rows = seen.nonzero().squeeze(1)
            self.place = torch.full((self.shape[0],), -1, device=device)
            self.place[self.rows] = torch.arange(len(self.rows), device=device)
        n = self.shape[0] if self.rows is None else len(self.rows)
        self.sum = self._buffer((n, self.shape[1]), acc, device, len(some) < len(columns))

    def _buffer(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, whole: bool) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def add(self, at: slice | torch.Tensor, rows: torch.Tensor) -> None:
        """Rows past len(at) are padding."""
        if isinstance(at, slice):
            self.sum[at] += rows
        else:
            self._add(at, rows[: len(at)])

    def _add(self, at: torch.Tensor, rows: torch.Tensor) -> None:
        self.sum.index_add_(0, at if self.place is None else self.place[at], rows.to(self.sum.dtype))

    def finish(self) -> torch.Tensor:
        if self.rows is None:
            return self.sum.to(self.dtype)
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.sum.device)
        out[self.rows] = self.sum.to(self.dtype)
        return out
