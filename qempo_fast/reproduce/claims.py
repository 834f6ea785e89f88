"""A paper's direction beside what was seen: differences by seed, a verdict, and the tables that show both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

# Figures of every row, in the order they are shown: (key, heading, decimals).
Columns = Sequence[tuple[str, str, int]]
Rows = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Claim:
    """One direction: the differences that it says are above 0, or at least -margin where it has one, one a seed."""

    text: str
    source: str  # "paper", or "derived" where only our derivation says so
    differences: tuple[float, ...]
    margin: float | None = None

    def __post_init__(self) -> None:
        if not self.differences or not all(math.isfinite(d) for d in self.differences):
            raise ValueError(f"differences: wanted finite numbers, one a seed, got {self.differences}")

    @property
    def verdict(self) -> str:
        """ "holds" on every seed, "does not hold" on any, or how many of the seeds have it."""
        n = len(self.differences)
        held = sum(d > 0 if self.margin is None else d >= -self.margin for d in self.differences)
        return "holds" if held == n else "does not hold" if held == 0 else f"mixed: {held} of {n} seeds"

    def as_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "source": self.source,
            "differences": list(self.differences),
            "margin": self.margin,
            "verdict": self.verdict,
        }


def compare(
    text: str, rows: Rows, figure: str, more: str, less: str, *, source: str = "paper", margin: float | None = None
) -> Claim:
    """The claim that figure is higher in the row more than in the row less, or not lower by more than margin."""
    pairs = zip(rows[more][figure], rows[less][figure], strict=True)
    return Claim(text, source, tuple(a - b for a, b in pairs), margin)


def best_at(curve: Sequence[tuple[float, float]], quality: float) -> float:
    """The most diversity that a (quality, diversity) curve offers at no less than quality.

    Between its points the curve is linear. Above its highest quality that point stands for it.
    """
    points = sorted(curve)
    top = points[-1][0]
    wanted = min(quality, top)
    found = [d for q, d in points if q >= wanted]
    for (q0, d0), (q1, d1) in itertools.pairwise(points):
        if q0 <= wanted < q1:
            found.append(d0 + (d1 - d0) * (wanted - q0) / (q1 - q0))
    return max(found)


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and under it the range where there is more than one value."""
    mean, low, high = (format(x, form) for x in (sum(values) / len(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean}\n{low} to {high}"


def figures_table(rows: Rows, columns: Columns, title: str) -> Table:
    """Every row's figures: mean over the seeds and their range."""
    view = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("model", no_wrap=True)
    for _, head, _ in columns:
        view.add_column(head, justify="right")
    for name, figures in rows.items():
        view.add_row(name, *(spread(figures[key], f".{n}f") if key in figures else "-" for key, _, n in columns))
    return view


def claims_table(claims: Sequence[Claim], seeds: int) -> Table:
    """The paper's direction beside what was seen."""
    view = Table(title=f"The direction, and what {seeds} seed{'s' if seeds > 1 else ''} showed", box=box.SIMPLE_HEAD)
    view.add_column("direction")
    view.add_column("source")
    view.add_column("difference\n(range)", justify="right", no_wrap=True)
    view.add_column("seen")
    for c in claims:
        allowed = f" (by more than {c.margin:g})" if c.margin else ""
        view.add_row(c.text + allowed, c.source, spread(c.differences, "+.3f"), c.verdict)
    return view
