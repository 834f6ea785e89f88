"""The committed results: one table a device, bench/results/<device>.jsonl, which every page and picture is made of.

Each line is an object, of one of three kinds:
    a run      {"date": ..., "device": ..., ...}: what its figures depend on; other lines name it by its date
    a case     {"run": ..., "op": ..., "case": ..., "threads": ..., ...}: sizes, and the floors of its modes
    a figure   {"run", "op", "case", "threads", "provider", "mode", ...}: one provider of that case in one mode
A case that is measured again takes the place of its lines; git has the older ones. Times, errors and memory are written
with nine digits. What follows from other lines, the ratio to the best peer, is computed on reading.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from suite.interleave import MODES, add_ratios
from suite.provenance import chip

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "bench" / "results"
# "variant" of a run under QEMPO_BENCH_ALLOCATOR=system: its rows stand beside the others and never for them.
SYSTEM_ALLOCATOR = "system allocator"
KEY = ("op", "case", "threads")
FLOOR = ("floor_bytes", "floor_flops", "floor_ms")
# Each turn's median stays in memory: what it says of a row is in its range and in its ratios' range.
LEFT_OUT = (*KEY, *FLOOR, "run", "turn_ms", "best_peer", "ratio_to_best_peer")


@dataclass
class _Case:
    line: dict[str, Any]
    figures: list[dict[str, Any]] = field(default_factory=list)


class _Table:
    """The lines of one file: runs by date, cases by what tells them apart."""

    def __init__(self, path: Path) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.cases: dict[tuple, _Case] = {}
        for number, text in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
            try:
                line = json.loads(text)
                if "device" in line:
                    self.runs[line["date"]] = line
                elif "provider" in line:
                    self.cases[self._key(line)].figures.append(line)
                else:
                    self.cases[self._key(line)] = _Case(line)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: line {number} is none of a table of results: {error!r}") from error

    def _key(self, line: dict[str, Any]) -> tuple:
        run = self.runs[line["run"]]
        return run["device"], run.get("variant"), *(line.get(column) for column in KEY)

    def rows(self) -> Iterator[dict[str, Any]]:
        for case in self.cases.values():
            run = self.runs[case.line["run"]]
            shared = _without(case.line, ("run", "floors"))
            floors = case.line.get("floors", {})
            table = [
                {**shared, **_without(figure, ("run",)), **floors.get(figure.get("mode"), {}), "run": run}
                for figure in case.figures
            ]
            add_ratios(table)
            yield from table

    def add(self, run: dict[str, Any], table: list[dict[str, Any]]) -> None:
        """The rows of one case, in place of those it had."""
        self.runs[run["date"]] = run
        name = {"run": run["date"], **{key: table[0][key] for key in KEY if key in table[0]}}
        # An op's columns come before the provider's: they are the case's.
        columns = list(table[0])
        shared = {key: table[0][key] for key in columns[: columns.index("provider")]}
        floors = {
            mode: {key: row[key] for key in FLOOR if key in row}
            for mode in MODES for row in table if row.get("mode") == mode and "floor_ms" in row
        }  # fmt: skip
        case = _Case({**name, **shared, **({"floors": floors} if floors else {})})
        case.figures = [{**name, **_without(row, (*shared, *LEFT_OUT))} for row in table]
        self.cases[self._key(name)] = case

    def text(self) -> str:
        used = {case.line["run"] for case in self.cases.values()}
        lines = [run for date, run in self.runs.items() if date in used]
        for case in self.cases.values():
            lines += [case.line, *case.figures]
        return "".join(json.dumps(_short(line), ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)


def _without(line: dict[str, Any], columns: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in columns}


def _short(value: Any) -> Any:
    """Nine digits of every float: with seven, one figure of the pages in 5,000 was printed otherwise."""
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(inner) for inner in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def save(path: Path, run: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """Add a run's rows to the table at path, in place of older rows of their cases. The file is always a whole one."""
    table = _Table(path)
    run = {**run, "load_after": os.getloadavg()}
    for _, case in groupby(rows, key=lambda row: [row.get(column) for column in KEY]):
        table.add(run, list(case))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(table.text())
    part.replace(path)


def result_path(path: Path, device: str) -> Path:
    """path, or for a folder the table in it of the device of this name."""
    return path if path.suffix and not path.is_dir() else path / f"{chip(device)}.jsonl"


def load(path: Path = FOLDER, variant: str | None = None) -> list[dict[str, Any]]:
    """Rows of one table, or of all in a folder, each with what it depended on under "run".

    All providers of a case come from one run: ratios are between turns of the same minutes.
    """
    paths = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [row for each in paths for row in _Table(each).rows() if row["run"].get("variant") == variant]


def committed(path: Path, device: str) -> list[dict[str, Any]]:
    """The rows of one table; of a folder, those of this device."""
    rows = load(path)
    return [r for r in rows if r["run"]["device"] == device] if path.is_dir() else rows


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
    """(case, threads), in the order of the table."""
    return list(dict.fromkeys((r["case"], r["threads"]) for r in rows))


def headline(name: str) -> bool:
    """Whether a set is one that README and the first picture show; the others vary one size."""
    return name in ("main", "models", "completions")


def threads(row: dict) -> str:
    return "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
