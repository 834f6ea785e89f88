"""Times several providers of one op turn by turn, so that a slow minute of the machine hits all of them alike.

pytest-benchmark finishes one provider before it starts the next; the committed rows come from here. A row's median is
the smallest of the rounds' medians: on a shared machine other work only ever adds time. p20 and p80 are over all
samples.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import qempo_fast as qf

RESULTS = Path(__file__).parent / "results"
MODES = ("forward", "backward", "full")
# Steps of more seconds than this take every third turn only.
SLOW = 4.0
console = Console()


@dataclass
class Step:
    """One provider on one case: function's output, then its gradient in leaves for a fixed incoming gradient."""

    function: Callable[[], torch.Tensor]
    leaves: Sequence[torch.Tensor] = ()
    incoming: torch.Tensor | None = None

    def run(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], list[float]]:
        """(output, gradients, milliseconds of forward, backward and both); without leaves, of the forward alone."""
        start = time.perf_counter()
        out = self.function()
        middle = time.perf_counter()
        if not self.leaves:
            return out, (), [(middle - start) * 1e3]
        grads = torch.autograd.grad(out, self.leaves, self.incoming)
        end = time.perf_counter()
        return out.detach(), grads, [(b - a) * 1e3 for a, b in ((start, middle), (middle, end), (start, end))]


def interleaved(steps: dict[str, Step], rounds: int, seconds: float) -> dict[str, list[list[list[float]]]]:
    """Samples[round][repetition][mode] of each step, taken in turns whose order rotates; slow steps skip turns.

    A turn repeats its step until about that many seconds are spent, so that short steps get more samples.
    """
    once = {name: step.run()[2][-1] / 1e3 for name, step in steps.items()}
    repeats = {name: min(20, max(1, round(seconds / time_))) for name, time_ in once.items()}
    samples: dict[str, list[list[list[float]]]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn % 3 and once[name] > SLOW:
                continue
            samples[name].append([steps[name].run()[2] for _ in range(repeats[name])])
            # The first run may have met other work.
            once[name] = min(once[name], *(s[-1] / 1e3 for s in samples[name][-1]))
    return samples


def timings(samples: list[list[list[float]]]) -> dict[str, dict[str, float]]:
    """Median (smallest of the rounds'), p20 and p80 of each mode, in milliseconds."""
    out = {}
    for i, mode in enumerate(MODES[: len(samples[0][0])]):
        times = sorted(s[i] for turn in samples for s in turn)
        out[mode] = {
            "median_ms": min(statistics.median(s[i] for s in turn) for turn in samples),
            "p20_ms": times[len(times) // 5],
            "p80_ms": times[(len(times) * 4) // 5],
            "samples": len(times),
            "turns": len(samples),
        }
    return out


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the error over that of the truth."""
    return float((x.double() - truth).norm() / truth.norm())


def require(name: str, errors: dict[str, float], limits: dict[str, float]) -> None:
    """Refuse to time a provider whose result is wrong."""
    for key, limit in limits.items():
        # Not "error > limit": NaN has to fail.
        if not errors[key] <= limit:
            raise ValueError(f"{name}: {key} {errors[key]:.3g}, wanted at most {limit:.3g}")


def rows(base: dict[str, Any], samples: list[list[list[float]]], floors: dict[str, dict[str, float]]) -> list[dict]:
    """One row for each mode."""
    return [{**base, "mode": mode, **time_, **floors.get(mode, {})} for mode, time_ in timings(samples).items()]


def add_ratios(table: list[dict]) -> None:
    """ratio: the best peer's median over the row's own, in the same case and mode; above 1 is faster than it."""
    for row in table:
        peers = [
            r["median_ms"]
            for r in table
            if r["kind"] == "peer" and "mode" in r and (r["case"], r["mode"]) == (row["case"], row.get("mode"))
        ]
        if peers and "median_ms" in row:
            row["ratio_to_best_peer"] = min(peers) / row["median_ms"]


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)


def _cpu() -> str:
    fields = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    out = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
    return out.stdout.strip()


def environment(peers: Sequence[str]) -> dict[str, Any]:
    """What a row depends on beside its case."""
    # Only what can change a timing: the kernels and the package, not the pages.
    changed = bool(_git("status", "--porcelain", "--", "../qempo_fast", "../csrc", "../kernels"))
    return {
        "device": "cpu",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "qempo_fast": qf.__version__,
        "peers": {name: _version(name) for name in peers},
        "commit": _git("rev-parse", "--short", "HEAD") + (" with changes" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load_before": os.getloadavg(),
    }


def write(path: Path, header: dict[str, Any], table: list[dict]) -> None:
    add_ratios(table)
    header = {**header, "load_after": os.getloadavg()}
    path.write_text(json.dumps({**header, "rows": table}, indent=1) + "\n")
    for row in table:
        if row.get("mode", "full") in ("full", "forward"):
            console.print(
                row["case"], row["provider"], row.get("mode", ""),
                f"{row['median_ms']:.2f} ms" if "median_ms" in row else row.get("reason", ""),
                f"x{row['ratio_to_best_peer']:.2f}" if "ratio_to_best_peer" in row else "", highlight=False,
            )  # fmt: skip
