"""Writes the tables and goals of docs/ and their pictures from bench/results/*.json.

    python bench/report.py            (--check: only say whether the tables are up to date)

A table stands between <!-- bench:NAME --> and <!-- /bench:NAME -->.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
DPP = ["dpp_cpu_1", "dpp_cpu_2"]
LOGPS = ["logps_cpu_float32", "logps_cpu_bfloat16"]
OURS, SAMPLED, EXACT = "qempo_fast cpu", "qempo_fast sampled", "qempo_fast exact"
TRL, PLAIN = "TRL ChunkedLogProbFunction", "plain torch"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def threads(run: dict[str, Any]) -> str:
    return "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"


def where(run: dict[str, Any]) -> str:
    """One line on what the numbers depend on."""
    peers = "".join(f", {name} {version}" for name, version in run["peers"].items() if version)
    load = f"{run['load_before'][0]:.1f} before and {run['load_after'][0]:.1f} after"
    return (
        f"{run['cpu']}, {run['cores']} cores, {threads(run)}; torch {run['torch']}, "
        f"qempo_fast {run['qempo_fast']} at {run['commit']}{peers}; {run['date']}; {run['rounds']} interleaved rounds; "
        f"load average {load}."
    )


def of(rows: list[dict], provider: str, mode: str = "full", **wanted: Any) -> dict | None:
    """The one timed row, or None."""
    for row in rows:
        if row["provider"] == provider and row.get("mode") == mode and all(row[k] == v for k, v in wanted.items()):
            return row
    return None


def median(rows: list[dict], provider: str, mode: str = "full", **wanted: Any) -> float | None:
    row = of(rows, provider, mode, **wanted)
    return None if row is None else row["median_ms"]


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def fastest(rows: list[dict], names: tuple[str, ...], **wanted: Any) -> float:
    return min(m for m in (median(rows, name, **wanted) for name in names) if m is not None)


EAGER, COMPILE = ("eager inv", "eager cholesky"), ("compile inv", "compile cholesky")


def dpp_table() -> str:
    parts = []
    for run in map(load, DPP):
        rows = run["rows"]
        lines = []
        for case in dict.fromkeys(r["case"] for r in rows):
            here = [r for r in rows if r["case"] == case]
            mine, eager, comp = median(here, OURS), fastest(here, EAGER), fastest(here, COMPILE)
            floor = median(here, "three passes", "forward")
            lines.append(
                [case, milliseconds(median(here, OURS, "forward")), f"**{milliseconds(mine)}**",
                 milliseconds(median(here, "qempo_fast reference")), milliseconds(eager), milliseconds(comp),
                 milliseconds(median(here, "python loop")), milliseconds(floor),
                 f"{eager / mine:.1f}", f"{comp / mine:.1f}"]
            )  # fmt: skip
        head = ["case", "forward", "forward + backward", "reference", "eager", "compile", "loop", "three passes",
                "eager / ours", "compile / ours"]  # fmt: skip
        parts.append(f"{where(run)}\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def goal(what: str, wanted: float, got: float, at_least: bool = True) -> list[str]:
    met = got >= wanted if at_least else got <= wanted
    return [what, f"{'at least' if at_least else 'at most'} {wanted:g}", f"{got:.3g}", "yes" if met else "**no**"]


GOAL_HEAD = ["goal", "wanted", "measured", "reached"]


def dpp_goals() -> str:
    lines = []
    for run in map(load, DPP):
        rows = run["rows"]
        for k, d, eager, comp in ((4, 384, 4, 3), (8, 384, 6, 3), (16, 384, 6, 3), (32, 384, 1, 1), (64, 384, 1, 1)):
            case = {"k": k, "d": d, "groups": max(r["groups"] for r in rows if r["k"] == k)}
            mine, name = median(rows, OURS, **case), f"k = {k}, {threads(run)}"
            lines.append(goal(f"eager / ours, {name}", eager, fastest(rows, EAGER, **case) / mine))
            lines.append(goal(f"compile / ours, {name}", comp, fastest(rows, COMPILE, **case) / mine))
    return table(GOAL_HEAD, lines)


def logps_table() -> str:
    parts = []
    for run in map(load, LOGPS):
        rows, lines = run["rows"], []
        memory = memory_of(rows[0]["dtype"])
        for name in dict.fromkeys(r["provider"] for r in sorted(rows, key=lambda r: "reason" in r)):
            row = of(rows, name) or of(rows, name, "forward")
            if row is None:
                why = next(r["reason"] for r in rows if r["provider"] == name)
                lines.append([name, f"did not run: {why}", "", "", "", "", "", "", ""])
                continue
            mine, full = name.startswith("qempo_fast"), row["mode"] == "full"
            cells = [milliseconds(median(rows, name, mode)) for mode in ("forward", "backward", "full")]
            if full:
                mib = memory[name]
                cells += [f"{mib[key]:.0f}" for key in ("memory_mib", "kept_mib")]
                cells += [f"{row[key]:.1e}" for key in ("error_hidden", "error_weight")]
                cells.append(f"{row['ratio_to_best_peer']:.2f}")
            else:
                cells += [""] * 5
            lines.append([f"**{name}**" if mine else name, *cells])
        head = ["provider", "forward", "backward", "both", "MiB", "kept", "error dH", "error dW", "best peer / this"]
        parts.append(f"{rows[0]['case']}. {where(run)}\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def memory_of(dtype: str) -> dict[str, dict[str, float]]:
    """Memory rows by provider, empty where a provider was not measured."""
    return {row["provider"]: row for row in load(f"logps_cpu_memory_{dtype}")["rows"]}


def _logps_goals(run: dict[str, Any], plain: float, trl: float) -> list[list[str]]:
    rows = run["rows"]
    dtype = rows[0]["dtype"]
    mine, exact = of(rows, SAMPLED), of(rows, EXACT)
    gemm = median(rows, "GEMMs of sampled's forward", "forward")
    lines = [goal(f"plain torch / sampled, {dtype}", plain, median(rows, PLAIN) / mine["median_ms"])]
    if median(rows, TRL) is not None:
        lines.append(goal(f"TRL / sampled, {dtype}", trl, median(rows, TRL) / mine["median_ms"]))
    both = mine["median_ms"] / gemm
    lines.append(goal(f"sampled forward + backward / its forward GEMMs, {dtype}", 1.35, both, False))
    forward = of(rows, SAMPLED, "forward")["median_ms"]
    lines.append(goal(f"sampled forward / its GEMMs, {dtype}", 1.15, forward / gemm, False))
    forward = of(rows, EXACT, "forward")["median_ms"]
    bare = median(rows, "GEMMs of exact's forward", "forward")
    lines.append(goal(f"exact forward / its GEMMs, {dtype}", 1.15, forward / bare, False))
    plain_row = of(rows, PLAIN)
    memory = memory_of(dtype)
    share = memory[SAMPLED]["memory_mib"] / memory[PLAIN]["memory_mib"]
    lines.append(goal(f"memory, sampled / plain, {dtype}", 0.08, share, False))
    if dtype == "bfloat16":
        for name in (SAMPLED, f"{SAMPLED} 2^-10"):
            for key in ("error_hidden", "error_weight"):
                ratio = of(rows, name)[key] / plain_row[key]
                lines.append(goal(f"{key}, {name} / plain, {dtype}", 1.1, ratio, False))
    for peer in (TRL, "torch linear_cross_entropy", "cut-cross-entropy torch_compile"):
        if median(rows, peer) is not None:
            lines.append(goal(f"{peer} / exact, {dtype}", 1.0, median(rows, peer) / exact["median_ms"]))
    return lines


def logps_goals() -> str:
    wanted = ((4.5, 4.0), (3.0, 11.0))
    parts = [_logps_goals(run, plain, trl) for run, (plain, trl) in zip(map(load, LOGPS), wanted, strict=True)]
    return table(GOAL_HEAD, [line for part in parts for line in part])


BLOCKS: dict[str, tuple[str, Callable[[], str]]] = {
    "dpp": ("docs/dpp.md", dpp_table),
    "dpp-goals": ("docs/dpp.md", dpp_goals),
    "logps": ("docs/linear_logps.md", logps_table),
    "logps-goals": ("docs/linear_logps.md", logps_goals),
}


def filled(text: str, name: str, block: str) -> str:
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no {begin} in the page")
    return pattern.sub(lambda _: f"{begin}\n{block}\n{end}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for name, (page, make) in BLOCKS.items():
        path = ROOT / page
        text = path.read_text()
        new = filled(text, name, make())
        if new != text:
            stale.append(f"{page}: {name}")
            if not args.check:
                path.write_text(new)
    if args.check:
        sys.exit(f"out of date, run python bench/report.py: {', '.join(stale)}" if stale else 0)
    import plots

    memories = [load(name.replace("cpu", "cpu_memory")) for name in LOGPS]
    plots.draw([load(name) for name in DPP], [load(name) for name in LOGPS], memories, ROOT / "docs" / "images")


if __name__ == "__main__":
    main()
