"""Pictures of bench/results, from committed rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from report.cells import CPU, ENGLISH, PLAIN, SAMPLED, Rows
from report.headlines import Pair, all_threads, bars, memory, words
from report.pictures import save
from suite.results import headline, one, pick, threads

plt.rcParams.update({"font.size": 10})
DPI = 130
# What a user gets who asks for nothing, what has to be asked for, and a peer.
DEFAULT, ASKED, PEER = "#0072B2", "#E69F00", "#999999"
# Okabe and Ito's colours, told apart by the colour-blind; markers tell them apart in grey.
STYLE = {
    "qempo_fast sampled": ("#D55E00", "o", "-"),
    "qempo_fast exact": ("#E69F00", "s", "-"),
    "qempo_fast cpu": ("#D55E00", "o", "-"),
    "qempo_fast reference": ("#E69F00", "s", "-"),
    "qempo_fast": ("#E69F00", "s", "-"),
    "TRL with use_fused_logps": ("#D55E00", "o", "-"),
    "TRL with use_fused_logps, sampled": ("#D55E00", "o", "-"),
    "plain torch": ("#0072B2", "^", "--"),
    "eager": ("#0072B2", "^", "--"),
    "compile": ("#009E73", "D", "--"),
    "torch.compile of plain": ("#56B4E9", "v", "--"),
    "torch linear_cross_entropy": ("#999999", "P", "--"),
    "TRL ChunkedLogProbFunction": ("#CC79A7", "D", "--"),
    "TRL": ("#CC79A7", "D", "--"),
    "Liger scaled cross-entropy": ("#F0E442", "X", "--"),
    "cut-cross-entropy torch_compile": ("#009E73", "p", "--"),
    "eager inv": ("#0072B2", "^", "--"),
    "eager cholesky": ("#56B4E9", "v", "--"),
    "compile inv": ("#009E73", "D", "--"),
    "compile cholesky": ("#CC79A7", "P", "--"),
    "python loop": ("#000000", "*", "none"),
    "three passes": ("#777777", "x", ":"),
}


def style(name: str) -> dict[str, Any]:
    colour, marker, line = STYLE.get(name, ("#555555", ".", "--"))
    return {"color": colour, "marker": marker, "linestyle": line, "label": name, "markeredgecolor": "#333333",
            "markeredgewidth": 0.4}  # fmt: skip


def legend(figure: Any, axes: Sequence[Any], columns: int) -> None:
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _log_axis(axis: Any, ticks: Sequence[float], x: bool = True) -> None:
    """Powers of two on a log axis, written as they are."""
    (axis.set_xscale if x else axis.set_yscale)("log", base=2)
    (axis.set_xticks if x else axis.set_yticks)(ticks, [f"{t:,g}" for t in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _plain_log(axis: Any) -> None:
    """A log axis of y whose ticks are 1, 2 and 5 times powers of ten, written out."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def speedup(rows: Rows, folder: Path) -> None:
    """One bar a case: the fastest peer's time over ours, and beside it what either keeps in memory."""
    shown = bars(rows)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, 0.6 + 0.42 * len(shown)), width_ratios=(2, 1), layout="constrained"
    )
    _ratios(left, shown)
    _memories(right, rows, [p for p in shown if memory(rows, p.mine) is not None])
    figure.suptitle(f"Forward + backward, {threads(shown[0].mine)}: ours against the fastest peer of each case")
    legend(figure, [left], 2)
    save(figure, folder / "speedup.png", DPI)


def _ratios(axis: Any, shown: list[Pair]) -> None:
    for y, bar in enumerate(shown):
        ratio = bar.mine["ratio_to_best_peer"]
        axis.barh(y, ratio - 1, left=1, height=0.62, color=DEFAULT if bar.default else ASKED)
        text = f" {ratio:.2f}x   {_ms(bar.mine)} against {_ms(bar.peer)} ms ({words(bar.peer['provider'])})"
        axis.text(max(ratio, 1), y, text, va="center", fontsize=9)
    axis.axvline(1, color="black", linewidth=1.2)
    _log_axis(axis, (0.5, 1, 2, 4, 8, 16))
    axis.grid(visible=False)
    # Half of the width is for the words beside the bars.
    axis.set_xlim(0.6, 200)
    axis.set_yticks(range(len(shown)), [bar.what for bar in shown])
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("times faster than the fastest peer (left of the line ours is slower)")
    for colour, label in ((DEFAULT, "what a call does by default"), (ASKED, "has to be asked for (grad=)")):
        axis.bar(0, 0, color=colour, label=label)


def _memories(axis: Any, rows: Rows, shown: list[Pair]) -> None:
    for y, bar in enumerate(shown):
        for offset, row, colour in ((-0.2, bar.mine, DEFAULT if bar.default else ASKED), (0.2, bar.peer, PEER)):
            mib = memory(rows, row) or 0.0
            axis.barh(y + offset, mib, height=0.38, color=colour)
            text = f" {mib:,.0f}" + (f", {words(row['provider'])}" if row is bar.peer else "")
            axis.text(mib, y + offset, text, va="center", fontsize=9)
    labels = [bar.what.removeprefix("log-probs, ").removesuffix(" gradient").replace(", ", "\n") for bar in shown]
    axis.set_yticks(range(len(shown)), labels, fontsize=9)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.4)
    axis.set_xlabel("peak MiB above inputs and gradients")
    axis.set_title("Memory of the log-probs (grey: that peer)", loc="left", fontsize=10)


def _ms(row: dict[str, Any]) -> str:
    return f"{row['median_ms']:,.0f}" if row["median_ms"] >= 10 else f"{row['median_ms']:.2g}"


def speedup_losses(rows: Rows, folder: Path) -> None:
    """A line a loss: eager's and torch.compile's time over ours, the slower losses for them last."""
    here = pick(all_threads(rows), op="losses", set=headline, mode="full")
    mine = sorted(pick(here, provider=CPU), key=lambda r: r["ratio_to_best_peer"])
    if not mine:
        return
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.27 * len(mine)), layout="constrained")
    for name, colour, marker in (("eager", "#0072B2", "^"), ("compile", "#009E73", "D")):
        ratios = [one(here, case=r["case"], provider=name)["median_ms"] / r["median_ms"] for r in mine]
        axis.plot(ratios, range(len(mine)), linestyle="none", marker=marker, color=colour, ms=7, label=words(name))
    for y in range(len(mine)):
        axis.axhline(y, color="#dddddd", linewidth=0.8, zorder=0)
    axis.axvline(1, color="black", linewidth=1.2)
    _log_axis(axis, (1, 2, 4, 8, 16))
    axis.set_yticks(range(len(mine)), [f"{r['case']}   {1000 * r['median_ms']:.0f} µs" for r in mine], fontsize=9)
    axis.set_ylim(len(mine) - 0.5, -0.5)
    axis.set_xlabel("peer's time / ours, forward + backward")
    axis.set_title(f"Losses: how many times longer each peer takes, {threads(mine[0])}", loc="left")
    axis.legend(loc="upper right")
    save(figure, folder / "speedup_losses.png", DPI)


def memory_vocabulary(rows: Rows, folder: Path) -> None:
    found = pick(rows, op="logps", mode="memory", source="synthetic", memory_mib=lambda m: m is not None)
    if not found:
        return
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    last: list[tuple[tuple[float, float], str]] = []
    for name in dict.fromkeys(r["provider"] for r in found):
        points = sorted((r["v"], r["memory_mib"]) for r in found if r["provider"] == name)
        axis.plot(*zip(*points, strict=True), **style(name), linewidth=2, ms=8)
        last.append((points[-1], axis.get_lines()[-1].get_color()))
    for i, (point, colour) in enumerate(sorted(last, key=lambda p: p[0][1])):
        # The two lowest meet: one label below the other.
        at = {"xytext": (7, -9 if not i else 2), "textcoords": "offset points", "fontsize": 9, "color": colour}
        axis.annotate(f"{point[1]:,.0f}", point, **at)
    sizes = sorted({r["v"] for r in found})
    axis.set_xticks(sizes, [f"{v:,}" for v in sizes])
    axis.grid(alpha=0.3)
    axis.margins(x=0.12, y=0.06)
    first = found[0]
    axis.set_xlabel("V, vocabulary")
    axis.set_ylabel("peak MiB above inputs and gradients")
    axis.set_title(f"Memory of forward + backward: N = {first['n']}, D = {first['d']}, {first['dtype']}", loc="left")
    legend(figure, [axis], 2)
    save(figure, folder / "memory_vocabulary.png", DPI)


def error_kept(rows: Rows, folder: Path) -> None:
    """What one draw costs: error of dHidden against the share of columns kept, one curve for each input."""
    found = pick(rows, op="sampled_error")
    if not found:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    marks = zip(("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"), "osD^vPX", strict=True)
    look = dict(zip(dict.fromkeys(r["source"] for r in found), marks, strict=False))
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        for source, (colour, marker) in look.items():
            mine = pick(found, source=source, dtype=dtype)
            drawn = sorted((r["kept"], r["error_hidden"]) for r in pick(mine, provider=SAMPLED) if r["kept"] < 1)
            nats = mine[0]["entropy_nats"]
            axis.plot(*zip(*drawn, strict=True), color=colour, marker=marker, label=f"{source} ({nats:.1f} nats)")
            if dtype == "bfloat16":
                plain = one(mine, provider=PLAIN, mode="error")
                axis.axhline(plain["error_hidden"], color=colour, linestyle=":", linewidth=1)
        axis.set_xscale("log")
        ticks = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        _plain_log(axis)
        axis.grid(alpha=0.3, which="both")
        axis.set_xlabel("share of the vocabulary kept, f")
        axis.set_title(
            dtype + (" (dotted: what plain torch loses to rounding)" if dtype == "bfloat16" else ""), loc="left"
        )
    axes[0].set_ylabel("relative error of dHidden, one draw")
    legend(figure, axes[:1], 2)
    save(figure, folder / "error_kept.png", DPI)


def roofline(rows: Rows, folder: Path) -> None:
    """Work that a case cannot do without, per second, against that work per byte; the roof is this machine's."""
    timed = [
        r
        for r in pick(rows, mode="full", kind="ours", threads=lambda n: n > 1)
        if r.get("floor_flops") and r.get("floor_bytes")
    ]
    roof = next((c for r in timed for c in r["run"]["ceilings"] if c["threads"] == r["threads"]), None)
    if roof is None:
        return
    figure, axis = plt.subplots(figsize=(9.5, 5.5), layout="constrained")
    low, high, copy = 0.125, 4096.0, roof["copy_gbs"]
    for dtype, line in (("float32", "-"), ("bfloat16", "--")):
        rate = roof["gemm_gflops"][dtype]
        axis.plot([low, rate / copy, high], [low * copy, rate, rate], color="#333333", linestyle=line)
        axis.annotate(f"{dtype} GEMM, measured: {rate:,.0f} GFLOP/s", (high, rate), ha="right", va="bottom", fontsize=9)
    axis.annotate(f"copy, measured: {copy:.0f} GB/s", (0.3, 0.25 * copy), fontsize=9, va="top")
    kinds = {
        "logps": (("qempo_fast sampled", "float32"), ("qempo_fast sampled 2^-11", "bfloat16"),
                  ("qempo_fast exact", "float32"), ("qempo_fast exact", "bfloat16")),
        "dpp": (("qempo_fast cpu", None),),
        "step": (("qempo_fast", None),),
    }  # fmt: skip
    marks = zip(("#D55E00", "#CC79A7", "#E69F00", "#999999", "#0072B2", "#009E73"), "oPsXD^", strict=True)
    for (op, name, dtype), (colour, marker) in zip(
        ((o, *k) for o, ks in kinds.items() for k in ks), marks, strict=True
    ):
        here = pick(timed, op=op, provider=name, **({"dtype": dtype} if dtype else {}))
        if not here:
            continue
        label = " ".join(filter(None, (op, name.removeprefix("qempo_fast").strip(), dtype)))
        x = [r["floor_flops"] / r["floor_bytes"] for r in here]
        y = [r["floor_flops"] / r["median_ms"] / 1e6 for r in here]
        axis.plot(x, y, linestyle="none", marker=marker, color=colour, mec="#333333", mew=0.4, ms=8, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.set_xlabel(
        "FLOPs per byte of the least work: one forward GEMM, or the Gram matrices, and inputs and gradients once"
    )
    axis.set_ylabel("GFLOP/s of that least work")
    axis.set_title(f"Roofline, {timed[0]['run']['cpu']}, {threads(timed[0])}, forward + backward", loc="left")
    legend(figure, [axis], 4)
    save(figure, folder / "roofline.png", DPI)


def _panel(axis: Any, rows: Rows, by: str, names: Sequence[str], title: str, x_label: str) -> None:
    for name in names:
        points = sorted((r[by], r["median_ms"]) for r in pick(rows, provider=name, mode="full"))
        if points:
            axis.plot(*zip(*points, strict=True), **style(name), linewidth=1.8)
    ticks = sorted({r[by] for r in pick(rows, mode="full")})
    _log_axis(axis, ticks)
    _plain_log(axis)
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x_label)
    axis.set_ylabel("ms")


def scaling_logps(rows: Rows, folder: Path) -> None:
    timed = pick(rows, op="logps", dtype="float32", threads=lambda n: n > 1)
    english = pick(timed, source=ENGLISH)
    synthetic = pick(timed, source="synthetic", n=512)
    few = ("qempo_fast sampled", "qempo_fast exact", "plain torch", "cut-cross-entropy torch_compile")
    if not synthetic:
        return
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    _panel(axes[0][0], pick(english, temperature=1.0), "n", few, "SmolLM2's head, English text", "N, tokens")
    _panel(axes[0][1], pick(synthetic, d=576), "v", few, "synthetic, N = 512, D = 576", "V, vocabulary")
    _panel(axes[1][0], pick(synthetic, v=49152), "d", few, "synthetic, N = 512, V = 49,152", "D, hidden size")
    axis = axes[1][1]
    for name in few:
        found = pick(english, n=512, provider=name, mode="full")
        points = sorted((r["entropy_nats"], r["median_ms"], r.get("kept")) for r in found)
        if not points:
            continue
        axis.plot([p[0] for p in points], [p[1] for p in points], **style(name), linewidth=1.8)
        for nats, ms, kept in points:
            if kept is not None:
                axis.annotate(
                    f"f = {kept:.2f}", (nats, ms), xytext=(0, -13), textcoords="offset points", ha="center", fontsize=8
                )
    _plain_log(axis)
    axis.margins(x=0.1, y=0.15)
    axis.grid(alpha=0.3)
    axis.set_title("SmolLM2, N = 512, temperature 0.5 to 2", loc="left", fontsize=10)
    axis.set_xlabel("entropy of the distributions, nats")
    figure.suptitle(f"Log-probs, forward + backward, float32, {threads(timed[0])}")
    legend(figure, axes.flat, 4)
    save(figure, folder / "scaling_logps.png", DPI)


def dpp(rows: Rows, folder: Path) -> None:
    """Microseconds a group against k, d and G, for each number of threads."""
    timed = pick(rows, op="dpp")
    if not timed:
        return
    counts = sorted({r["threads"] for r in timed})
    figure, axes = plt.subplots(
        len(counts), 3, figsize=(13, 4 * len(counts)), sharey="col", squeeze=False, layout="constrained"
    )
    panels = (("k", {"d": 384}, "k, samples in a group"), ("d", {"k": 8}, "d, embedding width"),
              ("groups", {"k": 8, "d": 384}, "G, groups"))  # fmt: skip
    for line, count in zip(axes, counts, strict=True):
        for axis, (by, fixed, label) in zip(line, panels, strict=True):
            here = pick(timed, threads=count, **fixed)
            for name in (n for n in STYLE if n in {r["provider"] for r in here}):
                mode = "forward" if name == "three passes" else "full"
                found = pick(here, provider=name, mode=mode)
                # The most groups win: per group, few groups pay for the call.
                points = {r[by]: r["median_ms"] * 1e3 / r["groups"] for r in sorted(found, key=lambda r: r["groups"])}
                axis.plot(sorted(points), [points[x] for x in sorted(points)], **style(name), linewidth=1.8)
            _log_axis(axis, sorted({r[by] for r in here}))
            _plain_log(axis)
            axis.set_xlabel(label)
            axis.set_title(", ".join(f"{k} = {v}" for k, v in fixed.items()) + f", {threads(here[0])}", fontsize=10)
        line[0].set_ylabel("forward + backward, µs per group")
    figure.suptitle("DPP gains and their gradient")
    legend(figure, axes.flat, 4)
    save(figure, folder / "dpp_time.png", DPI)


def logps(rows: Rows, folder: Path) -> None:
    """Time and memory of every provider on the main case."""
    runs = [pick(rows, op="logps", source=ENGLISH, n=2048, dtype=dtype) for dtype in ("float32", "bfloat16")]
    if not all(runs):
        return
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    for line, here in zip(axes, runs, strict=True):
        names = [r["provider"] for r in pick(here, mode="full")][::-1]
        forward, whole = (
            {n: one(here, provider=n, mode=mode)["median_ms"] for n in names} for mode in ("forward", "full")
        )
        memory = {r["provider"]: r.get("memory_mib", 0) for r in pick(here, mode="memory")}
        line[0].barh(names, [whole[n] for n in names], color="#56B4E9", label="backward")
        line[0].barh(names, [min(forward[n], whole[n]) for n in names], color="#0072B2", label="forward")
        gemms = one(here, provider="GEMMs of sampled's forward", mode="forward")["median_ms"]
        line[0].axvline(gemms, color="#D55E00", linestyle="--", label="forward GEMMs alone")
        line[0].set_xlabel("ms")
        line[1].barh(names, [memory.get(n, 0) for n in names], color="#009E73")
        line[1].set_xlabel("peak MiB above inputs and gradients")
        line[1].set_yticks([])
        for axis, values in ((line[0], [whole[n] for n in names]), (line[1], [memory.get(n, 0) for n in names])):
            axis.set_xlim(0, max(values) * 1.12)
            for i, value in enumerate(values):
                axis.text(value, i, f" {value:,.0f}", va="center")
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_title(f"{here[0]['dtype']}, {threads(here[0])}", loc="left")
    first = runs[0][0]
    figure.suptitle(f"Log-probs of {first['source']}: N = {first['n']}, D = {first['d']}, V = {first['v']:,}")
    legend(figure, axes.flat, 3)
    save(figure, folder / "linear_logps_time.png", DPI)


def draw(rows: Rows, folder: Path) -> None:
    for picture in (speedup, speedup_losses, memory_vocabulary, error_kept, roofline, scaling_logps, dpp, logps):
        picture(rows, folder)
