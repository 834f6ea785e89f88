"""The goals that were set before measuring, and what became of them."""

from __future__ import annotations

from collections.abc import Callable

from report.cells import COARSE, COMPILE, CPU, EAGER, EXACT, FINE, NOT_YET, PLAIN, SAMPLED, Rows, fastest, table, times
from report.tables import main_logps
from suite.results import SYSTEM_ALLOCATOR, load, one, pick, threads

KEPT, KEEPING = f"{EXACT}, logits kept", ("torch.compile of plain", "cut-cross-entropy torch_compile")
TRL = "TRL ChunkedLogProbFunction"
GOAL_HEAD = ["goal", "wanted", "measured", "reached"]


def goal(what: str, wanted: float, got: float, at_least: bool = True) -> list[str]:
    met = got >= wanted if at_least else got <= wanted
    return [what, f"{'at least' if at_least else 'at most'} {wanted:g}", f"{got:.3g}", "yes" if met else "**no**"]


def _both_allocators(make: Callable[[Rows], list[list[str]]], rows: Rows) -> str:
    """Each goal twice: as all rows are measured, and with memory that goes back to the system when freed."""
    lines = make(rows)
    if not lines:
        return NOT_YET
    system = {line[0]: line[2:] for line in make(load(variant=SYSTEM_ALLOCATOR))}
    head = [*GOAL_HEAD, "system's allocator", "reached"]
    return table(head, [[*line, *system.get(line[0], ["-", "-"])] for line in lines])


def dpp_goals(rows: Rows) -> str:
    return _both_allocators(_dpp_goals, rows)


def _dpp_goals(rows: Rows) -> list[list[str]]:
    lines = []
    for n in sorted({r["threads"] for r in pick(rows, op="dpp")}):
        timed = pick(rows, op="dpp", threads=n, d=384)
        for k, eager, comp in ((4, 4, 3), (8, 6, 3), (16, 6, 3), (32, 1, 1), (64, 1, 1)):
            sizes = [r["groups"] for r in timed if r["k"] == k and r["groups"] <= 4096]
            if not sizes:
                continue
            case = {"k": k, "groups": max(sizes)}
            mine, name = one(timed, provider=CPU, **case), f"k = {k}, {threads(timed[0])}"
            lines.append(goal(f"eager / ours, {name}", eager, times(fastest(timed, EAGER, **case), mine)))
            lines.append(goal(f"compile / ours, {name}", comp, times(fastest(timed, COMPILE, **case), mine)))
    return lines


def logps_goals(rows: Rows) -> str:
    return _both_allocators(_logps_goals, rows)


def _logps_goals(rows: Rows) -> list[list[str]]:
    wanted = {"float32": (4.5, 4.0), "bfloat16": (3.0, 11.0)}
    lines = []
    for here in main_logps(rows):
        dtype = here[0]["dtype"]
        exact, kept, plain, trl = (one(here, provider=name) for name in (EXACT, KEPT, PLAIN, TRL))
        over_plain, over_trl = wanted[dtype]
        # bfloat16's goals for speed and error are one: the finer threshold has to meet both.
        for name in (SAMPLED, FINE) if dtype == "bfloat16" else (SAMPLED,):
            row, short = one(here, provider=name), name.removeprefix("qempo_fast ")
            lines.append(goal(f"plain torch / {short}, {dtype}", over_plain, times(plain, row)))
            lines.append(goal(f"TRL / {short}, {dtype}", over_trl, times(trl, row)))
            for key in ("error_hidden", "error_weight") if dtype == "bfloat16" else ():
                lines.append(goal(f"{key}, {short} / plain, {dtype}", 1.1, row[key] / plain[key], False))
        gemms = {
            mode: one(here, provider=f"GEMMs of {mode}'s forward", mode="forward") for mode in ("sampled", "exact")
        }
        for name in (SAMPLED, COARSE):
            both = times(one(here, provider=name), gemms["sampled"])
            short = name.removeprefix("qempo_fast ")
            lines.append(goal(f"{short} forward + backward / its forward GEMMs, {dtype}", 1.35, both, False))
        for mode, name in (("sampled", SAMPLED), ("exact", EXACT)):
            share = times(one(here, provider=name, mode="forward"), gemms[mode])
            lines.append(goal(f"{mode} forward / its GEMMs, {dtype}", 1.15, share, False))
        memory = [one(here, provider=name, mode="memory") for name in (SAMPLED, PLAIN)]
        if all(m is not None and "memory_mib" in m for m in memory):
            share = memory[0]["memory_mib"] / memory[1]["memory_mib"]
            lines.append(goal(f"memory, sampled / plain, {dtype}", 0.08, share, False))
        for peer in pick(here, kind="peer", mode="full"):
            if peer["provider"] != PLAIN:
                lines.append(goal(f"{peer['provider']} / exact, {dtype}", 1.0, times(peer, exact)))
            if peer["provider"] in KEEPING and kept is not None:
                lines.append(goal(f"{peer['provider']} / exact, logits kept, {dtype}", 1.0, times(peer, kept)))
    return lines
