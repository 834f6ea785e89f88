"""What the latest call did, for a user who asks."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._head import Kept


@dataclass(frozen=True)
class LogpsStats:
    """One forward of linear_logps; see last_stats."""

    backend: str
    rows: int
    vocabulary: int
    tau: float | None
    seed: int | None
    chunk_rows: int
    kept_columns: tuple[int, ...]
    exact_chunks: int
    kept_logits: bool

    @property
    def kept_shares(self) -> tuple[float, ...]:
        """Share of the columns that each row chunk kept."""
        return tuple(k / self.vocabulary for k in self.kept_columns)

    @property
    def kept_share(self) -> float:
        """Mean of kept_shares, the f of the cost 2NDV (1 + 3f); 1 where the gradient is exact."""
        return sum(self.kept_shares) / len(self.kept_columns) if self.kept_columns else 1.0


_local = threading.local()


def record(
    backend: str,
    rows: int,
    vocabulary: int,
    tau: float | None,
    seed: int,
    chunk_rows: int,
    kept: list[Kept],
    kept_logits: bool,
) -> None:
    counts = tuple(vocabulary if k.columns is None else len(k.columns) for k in kept)
    exact = sum(k.columns is None for k in kept)
    drawn = None if tau is None else seed
    _local.stats = LogpsStats(backend, rows, vocabulary, tau, drawn, chunk_rows, counts, exact, kept_logits)


def last_stats() -> LogpsStats | None:
    """What the latest linear_logps or sequence_logps forward of this thread did; None where there was none.

    It is recorded where the forward runs: under torch.compile when the graph runs, not when it is traced, and under
    activation checkpointing by the recomputation too. Call it outside of a compiled function.

    Returns:
        LogpsStats with backend (its name), rows (tokens counted), vocabulary (rows of weight, on a shard its own), tau
        and seed (None where no column is dropped), chunk_rows (rows that choose their columns together), kept_columns
        (of each such chunk; empty with an exact gradient), exact_chunks (chunks past break-even, which count as
        vocabulary columns), kept_logits (held for the backward: QEMPO_KEEP_LOGITS), and the properties kept_shares and
        kept_share.
    """
    return getattr(_local, "stats", None)
