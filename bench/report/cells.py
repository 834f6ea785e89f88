"""What every table of the pages is made of: the rows' cells, the line on the machine, ratios and goals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from suite.interleave import MODES
from suite.results import one
from suite.show import EXTRA, milliseconds, percent_of_floor

CPU, SAMPLED, EXACT = "qempo_fast cpu", "qempo_fast sampled", "qempo_fast exact"
# A quarter of the error of 2^-9, and four times it.
FINE, COARSE = f"{SAMPLED} 2^-11", f"{SAMPLED} 2^-7"
PLAIN = "plain torch"
EAGER, COMPILE = ("eager inv", "eager cholesky"), ("compile inv", "compile cholesky")
ENGLISH = "SmolLM2-135M English text"
NOT_YET = "No results are committed yet."
Rows = list[dict[str, Any]]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def machine(rows: Rows) -> str:
    """One line on the machine and the versions, for rows of runs that share them."""
    lines = []
    for run in (r["run"] for r in rows):
        peers = "".join(f", {name} {version}" for name, version in run["peers"].items() if version)
        lines.append(f"{run['cpu']}, {run['cores']} cores, torch {run['torch']}, qempo_fast {run['qempo_fast']}{peers}")
    return "; ".join(dict.fromkeys(lines))


def where(rows: Rows) -> str:
    """What the numbers depend on: the machine, then the runs."""
    runs = []
    for run in {r["run"]["date"]: r["run"] for r in rows}.values():
        told = [f"{run['date']} at {run['commit']}"]
        if "rounds" in run:
            told.append(f"{run['rounds']} interleaved rounds")
        told.append(f"load average {run['load_before'][0]:.1f} before")
        # The studies' older runs have no load after.
        if "load_after" in run:
            told[-1] += f" and {run['load_after'][0]:.1f} after"
        runs.append(", ".join(told))
    return f"{machine(rows)}. Measured {'; '.join(runs)}."


def ms(row: dict | None) -> str:
    return "-" if row is None else milliseconds(row["median_ms"])


def fastest(rows: Rows, names: tuple[str, ...], **wanted: Any) -> dict:
    found = [r for r in (one(rows, provider=name, **wanted) for name in names) if r is not None]
    return min(found, key=lambda r: r["median_ms"])


def times(slow: dict, fast: dict) -> float:
    return slow["median_ms"] / fast["median_ms"]


def ratio(row: dict) -> str:
    """Bold where ours is the faster."""
    value = f"{row['ratio_to_best_peer']:.2f}"
    return f"**{value}**" if row["ratio_to_best_peer"] >= 1 else value


def entropy(rows: Rows) -> str:
    nats = next((r["entropy_nats"] for r in rows if r.get("entropy_nats") is not None), None)
    return "" if nats is None else f", entropy {nats:.2f} nats"


def providers(rows: Rows) -> str:
    """One line for each provider of one case that ran."""
    extra = {key: shown for key, shown in {**EXTRA, "kept_mib": ("kept MiB", "{:.0f}")}.items()
             if any(r.get(key) is not None for r in rows)}  # fmt: skip
    lines = []
    for name in dict.fromkeys(r["provider"] for r in rows):
        mine = {r["mode"]: r for r in rows if r["provider"] == name and "mode" in r}
        if mine:
            lines.append(_provider(name, mine, extra))
    head = ["provider", "forward", "backward", "both", "p20-p80", "best peer / this", "% of floor"]
    return table(head + [shown for shown, _ in extra.values()], lines)


def _provider(name: str, mine: dict[str, dict], extra: dict[str, tuple[str, str]]) -> list[str]:
    whole = mine.get("full", mine.get("forward"))
    merged: dict[str, Any] = {key: value for row in mine.values() for key, value in row.items()}
    more = ["" if merged.get(key) is None else form.format(merged[key]) for key, (_, form) in extra.items()]
    if whole is None:
        return [name, *[""] * 6, *more]
    cells = [ms(mine.get(mode)) for mode in MODES]
    cells.append(f"{milliseconds(whole['p20_ms'])}-{milliseconds(whole['p80_ms'])}")
    over, percent = whole.get("ratio_to_best_peer"), percent_of_floor(whole)
    cells.append("" if over is None else f"{over:.2f}")
    cells.append(f"{percent:.0f}" if percent and whole["kind"] != "floor" else "")
    return [f"**{name}**" if whole["kind"] == "ours" else name, *cells, *more]


def absent(rows: Rows) -> str:
    """One line on the peers that could not run, and why; our kernels for another device would be noise here."""
    why: dict[str, dict[str, None]] = {}
    for row in rows:
        if "reason" in row and row["kind"] == "peer":
            why.setdefault(row["provider"], {})[row["reason"]] = None
    told = [f"{name} ({', '.join(reasons)})" for name, reasons in why.items()]
    return f"Did not run: {'; '.join(told)}." if told else ""
