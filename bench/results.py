"""The committed results: every row of bench/results, a newer run of a case in place of an older one."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "bench" / "results"
SAMPLED_ERROR = "sampled_error.json"
# Runs under QEMPO_BENCH_ALLOCATOR=system; load() reads one folder, so they never stand for the others.
SYSTEM_ALLOCATOR = "system_allocator"


def load(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Rows, each with what its run depended on under "run".

    All providers of a case come from one run: ratios are between turns of the same minutes.
    """
    newest: dict[tuple, tuple[datetime.datetime, list[dict]]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if path.name == SAMPLED_ERROR or "ceilings" not in content:
            continue
        run = {key: value for key, value in content.items() if key != "rows"}
        date = datetime.datetime.strptime(run["date"], "%Y-%m-%d %H:%M UTC")
        cases: dict[tuple, list[dict]] = {}
        for row in content["rows"]:
            key = run["device"], row["op"], row["case"], row["threads"]
            cases.setdefault(key, []).append({**row, "run": run})
        for key, table in cases.items():
            if key not in newest or newest[key][0] <= date:
                newest[key] = date, table
    return [row for _, table in newest.values() for row in table]


def committed(path: Path, device: str) -> list[dict[str, Any]]:
    """The rows of one run's file; of a folder, those of the newest run of each case on this device."""
    if path.is_dir():
        return [r for r in load(path) if r["run"]["device"] == device]
    return json.loads(path.read_text())["rows"]


def pick(rows: Iterable[dict], **wanted: Any) -> list[dict]:
    """The rows whose columns have these values; a function says of a value whether it will do."""
    return [
        r for r in rows
        if all(w(r.get(k)) if isinstance(w, Callable) else r.get(k) == w for k, w in wanted.items())
    ]  # fmt: skip


def one(rows: Iterable[dict], **wanted: Any) -> dict | None:
    """The one such row, or None where it was not measured; mode "full" unless told."""
    found = pick(rows, **{"mode": "full", **wanted})
    if len(found) > 1:
        raise ValueError(f"results: wanted one row of {wanted}, got {len(found)}")
    return found[0] if found else None


def cases(rows: Iterable[dict]) -> list[tuple[str, int]]:
    """(case, threads), in the order of the files."""
    return list(dict.fromkeys((r["case"], r["threads"]) for r in rows))


def headline(name: str) -> bool:
    """Whether a set is one that README and the first picture show; the others vary one size."""
    return name in ("main", "models", "completions")


def threads(row: dict) -> str:
    return "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
