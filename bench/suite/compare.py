"""Whether a run's ratios to the best peer have fallen against those of committed results.

Ratios differ less from machine to machine than seconds, and still do between processors: that is said first. A row
counts as fallen where even the best of its turns says less than (1 - tolerance) of the committed ratio: a slow moment
of the machine does not last through every turn.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from suite import provenance


def key(row: dict) -> tuple:
    return row["op"], row["case"], row["threads"], row["provider"], row.get("mode")


def fallen(now: list[dict], then: list[dict], tolerance: float) -> tuple[list[str], int]:
    """(one line for each ratio that fell or went missing, number of rows that were compared)."""
    measured = {key(r): r for r in now}
    ran = {(r["op"], r["case"], r["threads"], r["provider"]) for r in now}
    lines, compared = [], 0
    for old in then:
        if old["kind"] != "ours" or old.get("mode") != "full" or "ratio_to_best_peer" not in old:
            continue
        # Cases and providers that this run was not asked for are not missing.
        if key(old)[:4] not in ran:
            continue
        compared += 1
        new = measured.get(key(old))
        name = f"{old['op']}, {old['case']}, {old['threads']} threads, {old['provider']}"
        if new is None or "ratio_to_best_peer" not in new:
            lines.append(f"{name}: {old['ratio_to_best_peer']:.2f} before, and no ratio now")
        elif new["ratio_high"] < (1 - tolerance) * old["ratio_to_best_peer"]:
            lines.append(
                f"{name}: {old['ratio_to_best_peer']:.2f} before, now {new['ratio_to_best_peer']:.2f}, "
                f"at best {new['ratio_high']:.2f}"
            )
    return lines, compared


def regressions(now: list[dict], then: list[dict], path: Path, tolerance: float, console: Console) -> int:
    """Print what fell since then, the rows of path; 1 where anything did, 2 where no row was measured again, else 0."""
    lines, compared = fallen(now, then, tolerance)
    if not compared:
        console.print(f"compare: no case of {path} was run again", style="red", soft_wrap=True)
        return 2
    here = provenance.cpu()
    others = sorted({row["run"]["cpu"] for row in then if row["run"]["device"] == "cpu"} - {here})
    if others:
        console.print(
            f"another processor: this is {here}, {path} is of {', '.join(others)}. "
            "Ratios depend on the processor: what fell below need not be a regression",
            style="yellow",
            soft_wrap=True,
            highlight=False,
        )
    for line in lines:
        console.print(f"fell: {line}", style="red", soft_wrap=True, highlight=False)
    console.print(
        f"{compared} ratios compared with {path}: {len(lines)} fell by more than {tolerance:.0%}", soft_wrap=True
    )
    return 1 if lines else 0
