"""What the latest call did, for a user who asks."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._head import Kept
    from ._options import Options
    from ._pilots import Chosen


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
    error: float | None = None
    row_errors: tuple[float, ...] = ()

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
    options: Options,
    chunk_rows: int,
    kept: list[Kept],
    kept_logits: bool,
    chosen: Chosen | None,
) -> None:
    counts = tuple(vocabulary if k.columns is None else len(k.columns) for k in kept)
    exact = sum(k.columns is None for k in kept)
    seed = options.seed if options.sampled else None
    stats = LogpsStats(backend, rows, vocabulary, options.tau, seed, chunk_rows, counts, exact, kept_logits)
    _local.stats, _local.chosen = stats, chosen


def last_stats() -> LogpsStats | None:
    """What the latest linear_logps or sequence_logps forward of this thread did; None where there was none.

    It is recorded where the forward runs: under torch.compile when the graph runs, not when it is traced, and under
    activation checkpointing by the recomputation too. Call it outside of a compiled function.

    Returns:
        LogpsStats with backend (its name), rows (tokens counted), vocabulary (rows of weight, on a shard its own), tau
        and seed (None where the gradient is exact), error (what the draw is expected to add to dhidden, relative to its
        norm where all rows weigh alike) and row_errors (the same of each of a few rows; both where tau was chosen by
        them, and too large where chunks are exact), chunk_rows (rows that choose their columns together), kept_columns
        (of each such chunk; empty with an exact gradient), exact_chunks (chunks past break-even, which count as
        vocabulary columns), kept_logits (whether some are held for the backward: QEMPO_KEEP_LOGITS), and the properties
        kept_shares and kept_share.
    """
    stats: LogpsStats | None = getattr(_local, "stats", None)
    chosen: Chosen | None = getattr(_local, "chosen", None)
    if stats is None or chosen is None:
        return stats
    # Read here: in the forward each number would have made the host wait for the GPU.
    tau, error, rows = float(chosen.tau), float(chosen.error), tuple(chosen.rows.tolist())
    _local.stats, _local.chosen = replace(stats, tau=tau, error=error, row_errors=rows), None
    return _local.stats
