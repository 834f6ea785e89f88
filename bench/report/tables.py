"""The tables of docs/: those inside pages, and the pages that have every row."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from report.cells import (
    COMPILE,
    CPU,
    EAGER,
    ENGLISH,
    NOT_YET,
    PLAIN,
    SAMPLED,
    Rows,
    absent,
    entropy,
    fastest,
    ms,
    providers,
    table,
    times,
    where,
)
from suite.interleave import MODES
from suite.results import cases, one, pick, threads


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
        parts.append(f"{threads(timed[0]).capitalize()}:\n\n{table(head, lines)}")
    return together(pick(rows, op="dpp"), parts)


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
        parts.append(f"{threads(timed[0]).capitalize()}, microseconds:\n\n{table(head, lines)}")
    return together(pick(rows, op="losses", set="main"), parts)


def main_logps(rows: Rows) -> list[Rows]:
    """The rows of the main log-prob cases, one list for each dtype."""
    main = pick(rows, op="logps", source=ENGLISH, n=2048)
    return [pick(main, dtype=dtype) for dtype in ("float32", "bfloat16") if pick(main, dtype=dtype)]


def logps_table(rows: Rows) -> str:
    shown = main_logps(rows)
    return together([row for here in shown for row in here], [titled(here) for here in shown])


def titled(here: Rows) -> str:
    """The rows of one case, under its name."""
    return f"**{here[0]['case']}, {threads(here[0])}**{entropy(here)}\n\n{providers(here)}"


def together(rows: Rows, parts: list[str]) -> str:
    """Tables under one line on the machine and above one on who did not run; rows are those that they are made of."""
    if not parts:
        return NOT_YET
    last = absent(rows)
    return "\n\n".join([where(rows), *parts, *([last] if last else [])])


def sampled_error(rows: Rows) -> str:
    """Kept share and errors of one draw at each tau, a line for each input and dtype; beside them torch's rounding."""
    found = pick(rows, op="sampled_error")
    taus = sorted({r["tau"] for r in found if "tau" in r}, reverse=True)

    def errors(row: dict[str, Any]) -> str:
        return f"{row['error_hidden']:.1e}, {row['error_weight']:.1e}"

    lines = []
    for case in dict.fromkeys(r["case"] for r in found):
        here = pick(found, case=case)
        plain = one(here, provider=PLAIN, mode="error")
        drawn = [one(here, provider=SAMPLED, tau=tau, mode="error") for tau in taus]
        first = [plain["source"], f"{plain['entropy_nats']:.2f}", plain["dtype"], errors(plain)]
        lines.append(first + [f"{row['kept']:.3f}: {errors(row)}" for row in drawn])
    head = ["case", "nats", "dtype", "plain torch: dH, dW", *(f"2^{math.log2(tau):.0f}" for tau in taus)]
    return f"{where(found)}\n\n{table(head, lines)}"


def packing(rows: Rows) -> str:
    """Tokens and seconds of packed rows against separate ones."""
    found = pick(rows, op="packing")
    if not found:
        return NOT_YET
    lines = []
    for case in dict.fromkeys(r["case"] for r in found):
        tokens, cells = {}, []
        for mode in MODES:
            apart, packed = (one(found, case=case, provider=name, mode=mode) for name in ("separate rows", "packed"))
            tokens = {"apart": apart["tokens"], "packed": packed["tokens"]}
            seconds = f"{apart['median_ms'] / 1e3:.2f} -> {packed['median_ms'] / 1e3:.2f} s"
            cells.append(f"{seconds}, {times(apart, packed):.2f}x")
        fewer = f"{tokens['packed']}, {tokens['apart'] / tokens['packed']:.2f}x fewer"
        lines.append([case, str(tokens["apart"]), fewer, *cells])
    head = ["case", "tokens, separate", "tokens, packed", "forward", "backward", "both"]
    return f"{where(found)}\n\n{table(head, lines)}"


class Page(NamedTuple):
    """A page of docs/benchmarks/ with every row of an op's sets."""

    title: str
    op: str
    sets: tuple[str, ...]
    intro: str


PAGES = {
    "logps": Page(
        "Log-probs: every row", "logps", ("main", "models", "completions"), "Real text, and heads of large models.",
    ),
    "logps-scaling": Page(
        "Log-probs: against each size", "logps", ("scaling", "threads", "memory"),
        "N, D, V, temperature and threads, one at a time; then memory against the vocabulary.",
    ),
    "dpp": Page("DPP gains: every row", "dpp", ("main", "scaling"), "G groups of k embeddings of width d."),
    "losses": Page("Losses: every row", "losses", ("main",), "S sequences in groups of k, or as many pairs."),
    "step": Page("Training step: every row", "step", ("main", "memory"), "SmolLM2-135M, float32, with the optimiser."),
}  # fmt: skip


def full(page: Page, rows: Rows) -> str:
    """The text of one page."""
    mine = pick(rows, op=page.op, set=lambda name: name in page.sets)
    tables = [titled(pick(mine, case=case, threads=n)) for case, n in cases(mine)]
    return (
        f"# {page.title}\n\n"
        "<!-- Written by bench/report/pages.py from bench/results; do not edit. -->\n\n"
        f"{page.intro} Milliseconds; what a column means, and how it is measured: [benchmarks](../benchmarks.md).\n\n"
        f"{together(mine, tables)}\n"
    )
