"""The suite under pytest-benchmark: pytest bench/suite --benchmark-only [--bench-set main --bench-op dpp].

pytest-benchmark finishes one test before it starts the next, so it cannot take turns. Here the suite checks and times
all providers of a case, turn by turn, before the first of its tests; each test then hands pytest-benchmark the median
of every turn, through a timer that reads them out. Its JSON, its comparison and its histograms work as ever.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from suite import machine
from suite.run import Options, Run, table_of


class Replay:
    """A timer whose every second reading is one recorded duration later than the one before it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._now, self._started = 0.0, False

    def __call__(self) -> float:
        if self._started:
            self._now += self.seconds.pop(0)
        self._started = not self._started
        return self._now


replay = Replay()


@functools.cache
def _ceilings(threads: int, device: str) -> machine.Ceilings:
    torch.set_num_threads(threads)
    return machine.measured(device)


@functools.lru_cache(maxsize=1)
def _rows(run: Run, options: Options) -> list[dict[str, Any]]:
    return table_of(run, options, _ceilings(run.threads, options.device))


@pytest.mark.benchmark(timer=replay)
def test_op(benchmark: Any, options: Options, run: Run, provider: str, mode: str) -> None:
    mine = [r for r in _rows(run, options) if r["provider"] == provider]
    if "reason" in mine[0]:
        pytest.skip(mine[0]["reason"])
    row = next(r for r in mine if r["mode"] == mode)
    replay.seconds = [ms / 1e3 for ms in row["turn_ms"].values()]
    benchmark.group = f"{run}, {mode}"
    benchmark.extra_info.update({k: v for k, v in row.items() if k != "turn_ms"})
    benchmark.pedantic(lambda: None, rounds=len(replay.seconds), iterations=1)
    assert row["median_ms"] > 0
