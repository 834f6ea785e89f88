"""The few figures that stand for all: README's six rows, the summary, what loses, the bars of the first picture."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from report.cells import CPU, ENGLISH, EXACT, FINE, NOT_YET, SAMPLED, Rows, machine, ms, ratio, table
from suite.results import cases, headline, one, pick, threads
from suite.show import percent_of_floor

FUSED = "TRL with use_fused_logps"
# The first row of README on another machine; it took 3 and 4 minutes on two cores that other work shared.
REPEAT = (
    'qempo-fast bench --op logps --case "text N=2048" '
    '--provider "qempo_fast exact" --provider "plain torch" --threads 2'
)
# An op's public modes.
PUBLIC = {
    "logps": (SAMPLED, FINE, EXACT),
    "dpp": (CPU,),
    "losses": (CPU,),
    "step": (FUSED, f"{FUSED}, sampled", "qempo_fast", "qempo_fast sampled"),
}


# A peer's name for those who do not ask which of its forms it was.
WORDS = dict.fromkeys(("torch.compile of plain", "compile", "compile inv", "compile cholesky"), "torch.compile")


class Pair(NamedTuple):
    """A row of ours and that of its fastest peer, in words; default: what a user gets who asks for nothing."""

    what: str
    mine: dict[str, Any]
    peer: dict[str, Any]
    default: bool = True


def all_threads(rows: Rows) -> Rows:
    """The rows at the most threads that were measured."""
    most = max((r.get("threads", 0) for r in rows), default=0)
    return pick(rows, threads=most)


def pair(rows: Rows, what: str, default: bool = True, **wanted: Any) -> Pair:
    mine = one(rows, **wanted)
    if mine is None:
        raise ValueError(f"results: no row of {wanted}, which the pages show")
    same = {key: mine[key] for key in ("op", "case", "threads")}
    peer = one(rows, provider=mine["best_peer"], **same)
    assert peer is not None
    return Pair(what, mine, peer, default)


def logps_pairs(rows: Rows) -> list[Pair]:
    """float32 then bfloat16, each exact, the default, then sampled, at 2^-9 and 2^-11."""
    main = {"op": "logps", "source": ENGLISH, "n": 2048}
    return [
        pair(rows, "log-probs, float32, exact gradient", dtype="float32", provider=EXACT, **main),
        pair(rows, "log-probs, float32, sampled gradient", False, dtype="float32", provider=SAMPLED, **main),
        pair(rows, "log-probs, bfloat16, exact gradient", dtype="bfloat16", provider=EXACT, **main),
        pair(rows, "log-probs, bfloat16, sampled gradient", False, dtype="bfloat16", provider=FINE, **main),
    ]


def bars(rows: Rows) -> list[Pair]:
    """What the first picture shows."""
    here = all_threads(rows)
    out = logps_pairs(here)
    for k in (4, 8, 16):
        wanted = {"op": "dpp", "groups": 4096, "k": k, "d": 384, "provider": CPU}
        out.append(pair(here, f"DPP gains, 4,096 groups of {k}", **wanted))
    for loss, name in (("dpo", "DPO"), ("spl", "SPL"), ("dqo", "DQO"), ("grpo", "GRPO")):
        out.append(pair(here, f"{name} loss", op="losses", provider=CPU, case=f"{loss} S=4096 k=8"))
    for method in ("DPO", "GRPO"):
        out.append(pair(here, f"whole {method} step of TRL", op="step", method=method, provider=FUSED))
    return out


def memory(rows: Rows, row: dict[str, Any]) -> float | None:
    """Peak MiB of a row's case and provider, where it was measured."""
    same = {key: row[key] for key in ("op", "case", "threads", "provider")}
    found = one(rows, mode="memory", **same)
    return None if found is None else found.get("memory_mib")


def words(provider: str) -> str:
    return WORDS.get(provider, provider)


def _span(values: list[float], form: str) -> str:
    return f"{form.format(min(values))} to {form.format(max(values))}"


def _both(rows: Rows, mine: dict[str, Any], peer: dict[str, Any], between: str = "against") -> str:
    sizes = [memory(rows, row) for row in (mine, peer)]
    return "" if None in sizes else f"{sizes[0]:,.0f} {between} {sizes[1]:,.0f} MiB"


def _line(rows: Rows, shown: Pair, what: str) -> list[str]:
    peer = f"{ms(shown.peer)} ms, {words(shown.peer['provider'])}"
    return [what, f"{ms(shown.mine)} ms", peer, ratio(shown.mine), _both(rows, shown.mine, shown.peer, "/")]


def _losses(rows: Rows) -> list[str]:
    """All losses in one line: the least and the most of each column."""
    ours = pick(rows, op="losses", set=headline, provider=CPU, mode="full")
    peers = [r["median_ms"] * r["ratio_to_best_peer"] for r in ours]
    names = " or ".join(sorted({words(r["best_peer"]) for r in ours}))
    lost = sum(r["ratio_to_best_peer"] < 1 for r in ours)
    return [
        f"loss and its gradient, {len(ours)} cases" + (f", slower in {lost}" if lost else ""),
        f"{_span([r['median_ms'] for r in ours], '{:.2g}')} ms",
        f"{_span(peers, '{:.2g}')} ms, {names}",
        f"**{_span([r['ratio_to_best_peer'] for r in ours], '{:.1f}')}**" if not lost else
        _span([r["ratio_to_best_peer"] for r in ours], "{:.1f}"),
        "",
    ]  # fmt: skip


def _steps(rows: Rows) -> list[str]:
    """TRL's two trainers in one line; memory is that of the only case it was measured on."""
    steps = [pair(rows, "", op="step", method=method, provider=FUSED) for method in ("DPO", "GRPO")]
    large = pick(rows, op="step", mode="memory", provider=FUSED)[0]
    plain = one(rows, op="step", mode="memory", case=large["case"], provider=steps[0].peer["provider"])
    assert plain is not None
    return [
        "TRL step, `use_fused_logps`: DPO, GRPO",
        ", ".join(ms(s.mine) for s in steps) + " ms",
        ", ".join(ms(s.peer) for s in steps) + f" ms, {words(steps[0].peer['provider'])}",
        ", ".join(ratio(s.mine) for s in steps),
        f"{large['memory_mib']:,.0f} / {plain['memory_mib']:,.0f} MiB (DPO)",
    ]


def readme(rows: Rows) -> str:
    """Six rows: what is exact first, what loses among them."""
    if not rows:
        return NOT_YET
    here = all_threads(rows)
    exact, sampled, half, fine = logps_pairs(here)
    dpp = pair(here, "", op="dpp", groups=4096, k=8, d=384, provider=CPU)
    lines = [
        _line(here, exact, "log-probs, float32, exact (default)"),
        _line(here, half, "log-probs, bfloat16, exact (default)"),
        _line(here, sampled, 'log-probs, float32, `grad="sampled"`'),
        _line(here, dpp, "DPP gains, 4,096 groups of 8"),
        _losses(here),
        _steps(here),
    ]
    head = [
        "forward + backward of",
        "ours",
        "fastest peer",
        "peer / ours (> 1: ours is faster)",
        "extra memory, ours / peer",
    ]
    case, shown = exact.mine, headlines(rows)
    cpus, torches = (" and ".join(dict.fromkeys(row["run"][key] for row in shown)) for key in ("cpu", "torch"))
    days = sorted({row["run"]["date"].split()[0] for row in shown})
    lost = losers(rows)
    return (
        f"{cpus}, {threads(case)}, torch {torches}, {' to '.join(dict.fromkeys((days[0], days[-1])))}. "
        f"**Ratios depend on the processor**; row 1 on yours, 2 to 4 minutes: "
        f"`{REPEAT}`\n\n"
        f"{table(head, lines)}\n\n"
        f"Log-probs: SmolLM2's head, N = {case['n']:,}; bfloat16 sampled at 2^-11: {ms(fine.mine)} ms, "
        f"{ratio(fine.mine)}. Ours is slower in {len(lost)} of {len(shown)} rows, "
        f"[each named](docs/benchmarks.md#where-ours-is-slower)."
    )


def headlines(rows: Rows) -> Rows:
    """One row for each main case and public mode at all threads."""
    timed = pick(all_threads(rows), mode="full", set=headline)
    return [
        row for op, names in PUBLIC.items() for case, n in cases(pick(timed, op=op)) for name in names
        if (row := one(timed, op=op, case=case, threads=n, provider=name)) is not None
    ]  # fmt: skip


def losers(rows: Rows) -> Rows:
    return [row for row in headlines(rows) if row["ratio_to_best_peer"] < 1]


def losing(rows: Rows) -> str:
    """A line for each main case and public mode in which a peer is faster."""
    lines = []
    for row in losers(rows):
        peer = pair(rows, "", **{key: row[key] for key in ("op", "case", "threads", "provider")}).peer
        both = _both(rows, row, peer)
        lines.append(
            f"- **{row['op']}, {row['case']}, {row['provider']}**: {ms(row)} ms against {ms(peer)} ms of "
            f"{peer['provider']}, {ratio(row)} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f} over the turns)"
            + (f"; memory {both}." if both else ".")
        )
    return "\n".join(lines) + f"\n\n{_others(rows)}" if lines else "In none of the measured rows."


def _others(rows: Rows) -> str:
    """One line on the rows that the summary leaves out."""
    shown = [id(row) for row in headlines(rows)]
    timed = pick(rows, kind="ours", mode="full", op=lambda op: op in PUBLIC, best_peer=lambda peer: peer is not None)
    left = [row for row in timed if id(row) not in shown]
    slow = Counter(row["provider"] for row in left if row["ratio_to_best_peer"] < 1)
    told = ", ".join(f"{name} in {count}" for name, count in slow.items()) or "none"
    return f"Of the {len(left)} other rows (one thread, one size varied, further settings), slower: {told}."


def summary(rows: Rows) -> str:
    """Every main case and public mode, losing ones too; the losses in one line."""
    shown = [row for row in headlines(rows) if row["op"] != "losses"]
    if not shown:
        return NOT_YET
    lines = []
    for row in shown:
        peer = pair(rows, "", **{key: row[key] for key in ("op", "case", "threads", "provider")}).peer
        percent = percent_of_floor(row)
        lines.append(
            [f"{row['op']}: {row['case']}", row["provider"], ms(row), f"{ms(peer)}, {peer['provider']}", ratio(row),
             f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}", f"{percent:.0f}" if percent else ""]
        )  # fmt: skip
    ours = [row for row in headlines(rows) if row["op"] == "losses"]
    if ours:
        peers = [r["median_ms"] * r["ratio_to_best_peer"] for r in ours]
        names = " or ".join(sorted({r["best_peer"] for r in ours}))
        lines.append(
            [
                f"losses: each of {len(ours)} cases",
                CPU,
                _span([r["median_ms"] for r in ours], "{:.3g}"),
                f"{_span(peers, '{:.3g}')}, {names}",
                _span([r["ratio_to_best_peer"] for r in ours], "{:.2f}"),
                f"{min(r['ratio_low'] for r in ours):.2f}-{max(r['ratio_high'] for r in ours):.2f}",
                _span([percent_of_floor(r) or 0.0 for r in ours], "{:.0f}"),
            ]
        )
    head = ["case", "ours", "ms", "fastest peer, ms", "peer / ours", "over the turns", "% of floor"]
    return f"{threads(shown[0]).capitalize()}. {machine(shown)}.\n\n{table(head, lines)}"
