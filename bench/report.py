"""Writes the tables and pictures of README.md and docs/ from bench/results alone.

    python -P bench/report.py            (--check: only say whether the tables are up to date)

A table stands between <!-- bench:NAME --> and <!-- /bench:NAME -->.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from results import FOLDER, ROOT, SAMPLED_ERROR, SYSTEM_ALLOCATOR, cases, committed, headline, load, one, pick, threads
from show import EXTRA, milliseconds, percent_of_floor

CPU, SAMPLED, EXACT = "qempo_fast cpu", "qempo_fast sampled", "qempo_fast exact"
# bfloat16's default, and the coarsest: four times the error of 2^-9.
FINE, COARSE = f"{SAMPLED} 2^-11", f"{SAMPLED} 2^-7"
KEPT, KEEPING = f"{EXACT}, logits kept", ("torch.compile of plain", "cut-cross-entropy torch_compile")
TRL, PLAIN = "TRL ChunkedLogProbFunction", "plain torch"
EAGER, COMPILE = ("eager inv", "eager cholesky"), ("compile inv", "compile cholesky")
ENGLISH = "SmolLM2-135M English text"
# What stands for an op in README: its public modes.
HEADLINE = {
    "logps": (SAMPLED, FINE, EXACT),
    "dpp": (CPU,),
    "losses": ("qempo_fast cpu",),
    "step": ("TRL with use_fused_logps", "TRL with use_fused_logps, sampled", "qempo_fast", "qempo_fast sampled"),
}
NOT_YET = "No results are committed yet."
Rows = list[dict[str, Any]]


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def where(rows: Rows) -> str:
    """One line on what the numbers depend on; more where several runs are in the table."""
    lines = []
    for run in {r["run"]["date"]: r["run"] for r in rows}.values():
        peers = "".join(f", {name} {version}" for name, version in run["peers"].items() if version)
        load_average = f"{run['load_before'][0]:.1f} before and {run['load_after'][0]:.1f} after"
        lines.append(
            f"{run['cpu']}, {run['cores']} cores, device {run['device']}; torch {run['torch']}, qempo_fast "
            f"{run['qempo_fast']} at {run['commit']}{peers}; {run['date']}; {run['rounds']} interleaved rounds; "
            f"load average {load_average}."
        )
    return "\n".join(lines)


def ms(row: dict | None) -> str:
    return "-" if row is None else milliseconds(row["median_ms"])


def fastest(rows: Rows, names: tuple[str, ...], **wanted: Any) -> dict:
    found = [r for r in (one(rows, provider=name, **wanted) for name in names) if r is not None]
    return min(found, key=lambda r: r["median_ms"])


def times(slow: dict, fast: dict) -> float:
    return slow["median_ms"] / fast["median_ms"]


def readme(rows: Rows) -> str:
    """One line for each main case and public mode, losing ones too."""
    lines = []
    timed = pick(rows, mode="full")
    for op, names in HEADLINE.items():
        for case, n in cases(pick(timed, op=op, set=headline, threads=lambda n: n > 1)):
            if op == "losses":
                continue
            here = pick(timed, op=op, case=case, threads=n)
            for mine in (r for name in names for r in here if r["provider"] == name):
                best = one(here, provider=mine["best_peer"])
                percent = percent_of_floor(mine)
                ratio = f"{mine['ratio_to_best_peer']:.2f}"
                lines.append(
                    [op, case, mine["provider"], ms(mine), f"{best['provider']}, {ms(best)}",
                     f"**{ratio}**" if mine["ratio_to_best_peer"] >= 1 else ratio,
                     f"{mine['ratio_low']:.2f}-{mine['ratio_high']:.2f}", f"{percent:.0f}" if percent else ""]
                )  # fmt: skip
    lines += _all_losses(pick(timed, op="losses", set=headline, provider=HEADLINE["losses"][0]))
    if not lines:
        return NOT_YET
    head = ["op", "case", "ours", "ms", "best peer, ms", "peer / ours", "over the turns", "% of floor"]
    return f"{where(timed)}\n\n{table(head, lines)}"


def _all_losses(ours: Rows) -> list[list[str]]:
    """Twenty losses in one line: the least and the most of each column."""
    ours = [r for r in ours if r["threads"] == max(o["threads"] for o in ours)]
    if not ours:
        return []

    def span(values: list[float], form: str) -> str:
        return f"{form.format(min(values))} to {form.format(max(values))}"

    times_ = span([r["median_ms"] for r in ours], "{:.3g}")
    peers = span([r["median_ms"] * r["ratio_to_best_peer"] for r in ours], "{:.3g}")
    ratios = span([r["ratio_to_best_peer"] for r in ours], "{:.2f}")
    turns = f"{min(r['ratio_low'] for r in ours):.2f}-{max(r['ratio_high'] for r in ours):.2f}"
    floor = span([percent_of_floor(r) or 0.0 for r in ours], "{:.0f}")
    names = " or ".join(sorted({r["best_peer"] for r in ours}))
    lost = sum(r["ratio_to_best_peer"] < 1 for r in ours)
    case = f"each of {len(ours)} cases" + (f", slower in {lost}" if lost else "")
    return [["losses", case, ours[0]["provider"], times_, f"{names}, {peers}", ratios, turns, floor]]


def everything(rows: Rows) -> str:
    """Every row of every op."""
    parts = []
    for op in HEADLINE:
        for case, n in cases(pick(rows, op=op)):
            here = pick(rows, op=op, case=case, threads=n)
            parts.append(f"**{op}: {case}, {threads(here[0])}**{entropy(here)}\n\n{providers(here)}")
    return "\n\n".join(parts) or NOT_YET


def entropy(rows: Rows) -> str:
    nats = next((r["entropy_nats"] for r in rows if r.get("entropy_nats") is not None), None)
    return "" if nats is None else f", entropy {nats:.2f} nats"


def providers(rows: Rows) -> str:
    """One line for each provider of one case, those that did not run last."""
    extra = {key: shown for key, shown in {**EXTRA, "kept_mib": ("kept MiB", "{:.0f}")}.items()
             if any(r.get(key) is not None for r in rows)}  # fmt: skip
    lines, missing = [], []
    for name in dict.fromkeys(r["provider"] for r in rows):
        mine = {r.get("mode"): r for r in rows if r["provider"] == name}
        failed = next((r["reason"] for r in mine.values() if "reason" in r), None)
        whole = mine.get("full", mine.get("forward"))
        if failed is not None and whole is None:
            missing.append([name, f"did not run: {failed}", *[""] * (5 + len(extra))])
            continue
        if whole is None:
            sizes = ["" if mine["memory"].get(key) is None else form.format(mine["memory"][key])
                     for key, (_, form) in extra.items()]  # fmt: skip
            lines.append([name, *[""] * 6, *sizes])
            continue
        cells = [ms(mine.get(mode)) for mode in ("forward", "backward", "full")]
        cells.append(f"{milliseconds(whole['p20_ms'])}-{milliseconds(whole['p80_ms'])}")
        ratio, percent = whole.get("ratio_to_best_peer"), percent_of_floor(whole)
        cells += ["" if ratio is None else f"{ratio:.2f}",
                  f"{percent:.0f}" if percent and whole["kind"] != "floor" else ""]  # fmt: skip
        merged: dict[str, Any] = {key: value for row in mine.values() for key, value in row.items()}
        cells += ["" if merged.get(key) is None else form.format(merged[key]) for key, (_, form) in extra.items()]
        lines.append([f"**{name}**" if whole["kind"] == "ours" else name, *cells])
    head = ["provider", "forward", "backward", "both", "p20-p80", "best peer / this", "% of floor"]
    return table(head + [head_ for head_, _ in extra.values()], lines + missing)


def dpp_table(rows: Rows) -> str:
    parts = []
    for n in sorted({r["threads"] for r in pick(rows, op="dpp")}):
        timed = pick(rows, op="dpp", threads=n)
        lines = []
        for case in dict.fromkeys(r["case"] for r in timed):
            here = pick(timed, case=case)
            mine, eager, comp = one(here, provider=CPU), fastest(here, EAGER), fastest(here, COMPILE)
            lines.append(
                [case, ms(one(here, provider=CPU, mode="forward")), f"**{ms(mine)}**",
                 ms(one(here, provider="qempo_fast reference")), ms(eager), ms(comp),
                 ms(one(here, provider="python loop")), ms(one(here, provider="three passes", mode="forward")),
                 f"{times(eager, mine):.1f}", f"{times(comp, mine):.1f}"]
            )  # fmt: skip
        head = ["case", "forward", "forward + backward", "reference", "eager", "compile", "loop", "three passes",
                "eager / ours", "compile / ours"]  # fmt: skip
        parts.append(f"{threads(timed[0])}. {where(timed)}\n\n{table(head, lines)}")
    return "\n\n".join(parts) or NOT_YET


def losses_table(rows: Rows) -> str:
    """Microseconds of the main cases, forward and backward."""

    def us(row: dict | None) -> str:
        return "-" if row is None else f"{1000 * row['median_ms']:.0f}"

    parts = []
    for n in sorted({r["threads"] for r in pick(rows, op="losses", set="main")}):
        timed = pick(rows, op="losses", set="main", threads=n)
        lines = []
        for case in dict.fromkeys(r["case"] for r in timed):
            here = pick(timed, case=case)
            mine, eager, comp, empty, native = (
                one(here, provider=name)
                for name in (CPU, "eager", "compile", "empty autograd function", "one operator of torch")
            )
            ratios = [f"{times(peer, mine):.1f}" if peer else "-" for peer in (eager, comp)]
            ratios.append(f"{times(eager, native):.1f}" if native else "-")
            forward = us(one(here, provider=CPU, mode="forward"))
            lines.append([case, forward, f"**{us(mine)}**", us(eager), us(comp), us(empty), us(native), *ratios])
        head = ["case", "forward", "forward + backward", "eager", "compile", "empty function", "one operator",
                "eager / ours", "compile / ours", "eager / one operator"]  # fmt: skip
        parts.append(f"{threads(timed[0])}, microseconds. {where(timed)}\n\n{table(head, lines)}")
    return "\n\n".join(parts) or NOT_YET


def goal(what: str, wanted: float, got: float, at_least: bool = True) -> list[str]:
    met = got >= wanted if at_least else got <= wanted
    return [what, f"{'at least' if at_least else 'at most'} {wanted:g}", f"{got:.3g}", "yes" if met else "**no**"]


GOAL_HEAD = ["goal", "wanted", "measured", "reached"]


def _both_allocators(make: Callable[[Rows], list[list[str]]], rows: Rows) -> str:
    """Each goal twice: as all rows are measured, and with memory that goes back to the system when freed."""
    lines = make(rows)
    if not lines:
        return NOT_YET
    system = {line[0]: line[2:] for line in make(committed(FOLDER / SYSTEM_ALLOCATOR, "cpu"))}
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


def _main_logps(rows: Rows) -> list[Rows]:
    """The rows of the main log-prob cases, one list for each dtype."""
    main = pick(rows, op="logps", source=ENGLISH, n=2048)
    return [pick(main, dtype=dtype) for dtype in ("float32", "bfloat16") if pick(main, dtype=dtype)]


def logps_table(rows: Rows) -> str:
    parts = [f"{here[0]['case']}, {threads(here[0])}{entropy(here)}. {where(here)}\n\n{providers(here)}"
             for here in _main_logps(rows)]  # fmt: skip
    return "\n\n".join(parts) or NOT_YET


def logps_goals(rows: Rows) -> str:
    return _both_allocators(_logps_goals, rows)


def _logps_goals(rows: Rows) -> list[list[str]]:
    wanted = {"float32": (4.5, 4.0), "bfloat16": (3.0, 11.0)}
    lines = []
    for here in _main_logps(rows):
        dtype = here[0]["dtype"]
        exact, kept, plain, trl = (one(here, provider=name) for name in (EXACT, KEPT, PLAIN, TRL))
        over_plain, over_trl = wanted[dtype]
        # bfloat16's goals for speed and error are one: its own default has to meet both.
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


def sampled_error(_: Rows) -> str:
    """Kept share and errors of one draw at each tau, a line for each input and dtype; beside them torch's rounding."""
    found = json.loads((FOLDER / SAMPLED_ERROR).read_text())["rows"]
    taus = sorted({r["tau"] for r in found if r["tau"] is not None}, reverse=True)
    lines = []
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in found):
        mine = {(r["mode"], r["tau"]): r for r in found if (r["case"], r["dtype"]) == (case, dtype)}
        errors = {key: f"{r['error_hidden']:.1e}, {r['error_weight']:.1e}" for key, r in mine.items()}
        cells = [f"{mine['sampled', tau]['kept']:.3f}: {errors['sampled', tau]}" for tau in taus]
        lines.append([case, f"{mine['plain', None]['entropy']:.2f}", dtype, errors["plain", None], *cells])
    head = ["case", "nats", "dtype", "plain torch: dH, dW", *(f"2^{math.log2(tau):.0f}" for tau in taus)]
    return table(head, lines)


BLOCKS: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "readme": ("README.md", readme),
    "everything": ("docs/benchmarks.md", everything),
    "dpp": ("docs/dpp.md", dpp_table),
    "losses": ("docs/losses.md", losses_table),
    "dpp-goals": ("docs/dpp.md", dpp_goals),
    "sampled-error": ("docs/linear_logps.md", sampled_error),
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
    rows, stale = load(), []
    for name, (page, make) in BLOCKS.items():
        path = ROOT / page
        text = path.read_text()
        new = filled(text, name, make(pick(rows, run=lambda run: run["device"] == "cpu")))
        if new != text:
            stale.append(f"{page}: {name}")
            if not args.check:
                path.write_text(new)
    if args.check:
        sys.exit(f"out of date, run python -P bench/report.py: {', '.join(stale)}" if stale else 0)
    import plots

    plots.draw(rows, ROOT / "docs" / "images")


if __name__ == "__main__":
    main()
