"""Times several providers of one op turn by turn, so that a slow minute of the machine hits all of them alike.

A row's median is the smallest of the turns' medians: on a shared machine other work only ever adds time. p20 and p80
are over all samples. turn_ms has each turn's median, so that two providers can be compared turn by turn.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

MODES = ("forward", "backward", "full")
# Steps of more seconds than this take every third turn only.
SLOW = 4.0
# Cycles that a GPU spins while the host queues what is timed: half a millisecond, some hundred launches.
QUEUE_CYCLES = 1_000_000
console = Console()


class Inaccurate(ValueError):
    """A provider's result is wrong, by these errors."""

    def __init__(self, message: str, errors: dict[str, float]) -> None:
        super().__init__(message)
        self.errors = errors


class HostClock:
    """Wall time."""

    def start(self) -> float:
        return time.perf_counter()

    def mark(self) -> float:
        return time.perf_counter()

    def milliseconds(self, first: float, last: float) -> float:
        return (last - first) * 1e3


class EventClock:
    """GPU time between events: L2 is overwritten first, and a spin lets the host queue the work before it starts.

    Not yet run on a GPU.
    """

    def __init__(self, cuda: Any = torch.cuda, device: str = "cuda") -> None:
        self._cuda = cuda
        # Twice L2: what was in it is gone whatever the replacement policy.
        size = 2 * cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def start(self) -> Any:
        self._flush.zero_()
        self._cuda._sleep(QUEUE_CYCLES)
        return self.mark()

    def mark(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, first: Any, last: Any) -> float:
        last.synchronize()
        return first.elapsed_time(last)


@functools.cache
def clock(device: str) -> HostClock | EventClock:
    return EventClock() if device == "cuda" else HostClock()


@dataclass
class Step:
    """One provider on one case: function's output, then its gradient in leaves for a fixed incoming gradient.

    update, where given, takes the gradients and belongs to the whole step: an optimiser's.
    """

    function: Callable[[], torch.Tensor]
    leaves: Sequence[torch.Tensor] = ()
    incoming: torch.Tensor | None = None
    device: str = "cpu"
    update: Callable[[tuple[torch.Tensor, ...]], None] | None = None

    def run(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], list[float]]:
        """(output, gradients, milliseconds of forward, backward and all); without leaves, of the forward alone."""
        time_ = clock(self.device)
        start = time_.start()
        out = self.function()
        middle = time_.mark()
        if not self.leaves:
            return out, (), [time_.milliseconds(start, middle)]
        grads = torch.autograd.grad(out, self.leaves, self.incoming)
        backward = time_.mark()
        if self.update is not None:
            self.update(grads)
        end = time_.mark()
        pairs = ((start, middle), (middle, backward), (start, end))
        return out.detach(), grads, [time_.milliseconds(a, b) for a, b in pairs]


def interleaved(
    steps: dict[str, Step], rounds: int, seconds: float
) -> tuple[dict[str, dict[int, list[list[float]]]], dict[str, str]]:
    """Samples[turn][repetition][mode] of each step, taken in turns whose order rotates; slow steps skip turns.

    A turn repeats its step until about that many seconds are spent, so that short steps get more samples. A step that
    raises leaves; the second dictionary has its reason.
    """
    failed: dict[str, str] = {}

    def taken(name: str, times: int) -> list[list[float]]:
        try:
            return [steps[name].run()[2] for _ in range(times)]
        except Exception as error:
            failed[name] = reason(error)
        free(steps[name].device)
        return []

    once = {name: sample[0][-1] / 1e3 for name in steps if (sample := taken(name, 1))}
    repeats = {name: min(20, max(1, round(seconds / time_))) for name, time_ in once.items()}
    samples: dict[str, dict[int, list[list[float]]]] = {name: {} for name in once}
    names = list(once)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)] if names else ():
            if name in failed or (turn % 3 and once[name] > SLOW):
                continue
            samples[name][turn] = taken(name, repeats[name])
            # The first run may have met other work.
            once[name] = min([once[name], *(s[-1] / 1e3 for s in samples[name][turn])])
    return {name: turns for name, turns in samples.items() if name not in failed}, failed


def free(device: str) -> None:
    """What a step that failed held goes back to the GPU, so that the next has it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def wall_ms(step: Step, runs: int) -> float:
    """Median wall time of a whole step: what the host does is in it, which the event clock hides."""
    wait = torch.cuda.synchronize if step.device == "cuda" else lambda: None
    times = []
    for _ in range(runs):
        wait()
        start = time.perf_counter()
        out = step.function()
        grads = torch.autograd.grad(out, step.leaves, step.incoming) if step.leaves else ()
        if step.update is not None:
            step.update(grads)
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def timings(samples: dict[int, list[list[float]]]) -> dict[str, dict[str, Any]]:
    """Median (smallest of the turns'), p20, p80 and each turn's median of each mode, in milliseconds."""
    out = {}
    modes = len(next(iter(samples.values()))[0])
    for i, mode in enumerate(MODES[:modes]):
        times = sorted(s[i] for turn in samples.values() for s in turn)
        turns = {turn: statistics.median(s[i] for s in taken) for turn, taken in samples.items()}
        out[mode] = {
            "median_ms": min(turns.values()),
            "p20_ms": times[len(times) // 5],
            "p80_ms": times[(len(times) * 4) // 5],
            "samples": len(times),
            "turn_ms": {str(turn): value for turn, value in turns.items()},
        }
    return out


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the error over that of the truth."""
    return float((x.double() - truth).norm() / truth.norm())


def require(name: str, errors: dict[str, float], limits: dict[str, float]) -> None:
    """Refuse to time a provider whose result is wrong: raises Inaccurate."""
    for key, limit in limits.items():
        # Not "error > limit": NaN has to fail.
        if not errors[key] <= limit:
            raise Inaccurate(f"{name}: {key} {errors[key]:.3g}, wanted at most {limit:.3g}", errors)


def rows(base: dict[str, Any], samples: dict[int, list[list[float]]], floors: dict[str, dict[str, float]]) -> list:
    """One row for each mode."""
    return [{**base, "mode": mode, **time_, **floors.get(mode, {})} for mode, time_ in timings(samples).items()]


def add_ratios(table: list[dict]) -> None:
    """ratio_to_best_peer: the best peer's median over the row's own, in one case and mode; above 1 is faster than it.

    ratio_low and ratio_high: the least and the most that one turn alone would say; a row without its turns keeps those
    it has.
    """
    for row in table:
        if "median_ms" not in row or row["kind"] == "floor":
            continue
        peers = [
            r for r in table
            if r["kind"] == "peer" and "median_ms" in r
            and all(r.get(key) == row.get(key) for key in ("op", "case", "threads", "mode"))
        ]  # fmt: skip
        if not peers:
            continue
        best = min(peers, key=lambda r: r["median_ms"])
        row["best_peer"] = best["provider"]
        row["ratio_to_best_peer"] = best["median_ms"] / row["median_ms"]
        if "turn_ms" in row:
            both = best["turn_ms"].keys() & row["turn_ms"].keys()
            ratios = [best["turn_ms"][turn] / row["turn_ms"][turn] for turn in both]
            row["ratio_low"], row["ratio_high"] = min(ratios), max(ratios)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
