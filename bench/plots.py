"""Pictures of bench/results, PNG and SVG, from committed rows alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker
from results import FOLDER, SAMPLED_ERROR, cases, headline, one, pick, threads

# The same rows give the same file.
plt.rcParams.update({"svg.hashsalt": "qempo_fast", "svg.fonttype": "none", "font.size": 10})
ENGLISH = "SmolLM2-135M English text"
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
# Who stands for an op where one bar or one point does.
OURS = {
    "logps": ("qempo_fast sampled", "qempo_fast sampled 2^-11", "qempo_fast exact"),
    "dpp": ("qempo_fast cpu",),
    "losses": ("qempo_fast cpu",),
    "step": ("TRL with use_fused_logps", "TRL with use_fused_logps, sampled", "qempo_fast", "qempo_fast sampled"),
}
TITLE = {"logps": "log-probs", "dpp": "DPP gains", "losses": "losses", "step": "training step"}
Rows = list[dict[str, Any]]


def style(name: str) -> dict[str, Any]:
    colour, marker, line = STYLE.get(name, ("#555555", ".", "--"))
    return {"color": colour, "marker": marker, "linestyle": line, "label": name, "markeredgecolor": "#333333",
            "markeredgewidth": 0.4}  # fmt: skip


def save(figure: Any, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=130)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def legend(figure: Any, axes: Sequence[Any], columns: int) -> None:
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _log_axis(axis: Any, ticks: Sequence[float], x: bool = True) -> None:
    """Powers of two on a log axis, written as they are."""
    (axis.set_xscale if x else axis.set_yscale)("log", base=2)
    (axis.set_xticks if x else axis.set_yticks)(ticks, [f"{t:,g}" for t in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def speedup(rows: Rows, folder: Path, ops: Sequence[str], name: str) -> None:
    """A line for each case and public mode: each peer's time over ours. Left of 1 the peer is faster."""
    timed = pick(rows, mode="full", set=headline, threads=lambda n: n > 1)
    lines, labels = [], []
    for op in ops:
        for case, n in cases(pick(timed, op=op)):
            here = pick(timed, op=op, case=case, threads=n)
            for mine in (one(here, provider=provider) for provider in OURS[op]):
                # 2^-11 is the default of bfloat16 alone.
                if mine is not None and not ("2^-11" in mine["provider"] and mine["dtype"] == "float32"):
                    lines.append((mine, pick(here, kind="peer")))
                    short = mine["provider"].removeprefix("qempo_fast").strip()
                    labels.append(f"{case}   {short}" if op in ("logps", "step") and short else case)
    if not lines:
        return
    figure, axis = plt.subplots(figsize=(11, 1.5 + 0.29 * len(lines)), layout="constrained")
    for y, (mine, peers) in enumerate(lines):
        axis.axhline(y, color="#dddddd", linewidth=0.8, zorder=0)
        for peer in peers:
            axis.plot(
                peer["median_ms"] / mine["median_ms"], y, **{**style(peer["provider"]), "linestyle": "none"}, ms=8
            )
    for y, (mine, _) in enumerate(lines):
        if not y or lines[y - 1][0]["op"] != mine["op"]:
            axis.axhline(y - 0.5, color="#555555", linewidth=1)
            where = {"transform": axis.get_yaxis_transform(), "fontweight": "bold", "ha": "right", "va": "center"}
            axis.text(0.99, y, TITLE[mine["op"]], **where)
    axis.axvline(1, color="#D55E00", linewidth=2)
    ratios = [peer["median_ms"] / mine["median_ms"] for mine, peers in lines for peer in peers]
    low, high = min(0.7, *ratios) / 1.15, max(2, *ratios) * 1.15
    axis.axvspan(low, 1, color="#D55E00", alpha=0.07, zorder=-1)
    _log_axis(axis, [t for t in (2.0**i for i in range(-5, 10)) if low < t < high])
    axis.set_xlim(low, high)
    axis.set_yticks(range(len(lines)), labels, fontsize=9)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_xlabel("peer's time / ours, forward + backward (left of the line the peer is faster)")
    axis.set_title(f"How many times longer each peer takes, {threads(lines[0][0])}", loc="left")
    legend(figure, [axis], 4)
    save(figure, folder, name)


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
    save(figure, folder, "memory_vocabulary")


def error_kept(folder: Path) -> None:
    """What one draw costs: error of dHidden against the share of columns kept, one curve for each input."""
    rows = json.loads((FOLDER / SAMPLED_ERROR).read_text())["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    marks = zip(("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"), "osD^vPX", strict=True)
    look = dict(zip(dict.fromkeys(r["case"] for r in rows), marks, strict=False))
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        for case, (colour, marker) in look.items():
            mine = [r for r in rows if r["case"] == case and r["dtype"] == dtype]
            drawn = sorted((r["kept"], r["error_hidden"]) for r in mine if r["mode"] == "sampled" and r["kept"] < 1)
            nats = mine[0]["entropy"]
            axis.plot(*zip(*drawn, strict=True), color=colour, marker=marker, label=f"{case} ({nats:.1f} nats)")
            if dtype == "bfloat16":
                plain = next(r["error_hidden"] for r in mine if r["mode"] == "plain")
                axis.axhline(plain, color=colour, linestyle=":", linewidth=1)
        axis.set_xscale("log")
        axis.set_yscale("log")
        ticks = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.set_xlabel("share of the vocabulary kept, f")
        axis.set_title(
            dtype + (" (dotted: what plain torch loses to rounding)" if dtype == "bfloat16" else ""), loc="left"
        )
    axes[0].set_ylabel("relative error of dHidden, one draw")
    legend(figure, axes[:1], 2)
    save(figure, folder, "error_kept")


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
    marks = zip(("#D55E00", "#D55E00", "#E69F00", "#E69F00", "#0072B2", "#CC79A7"), "oPsXD^", strict=True)
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
    save(figure, folder, "roofline")


def _panel(axis: Any, rows: Rows, by: str, names: Sequence[str], title: str, x_label: str) -> None:
    for name in names:
        points = sorted((r[by], r["median_ms"]) for r in pick(rows, provider=name, mode="full"))
        if points:
            axis.plot(*zip(*points, strict=True), **style(name), linewidth=1.8)
    ticks = sorted({r[by] for r in pick(rows, mode="full")})
    _log_axis(axis, ticks)
    axis.set_yscale("log")
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
    axis.set_yscale("log")
    axis.margins(x=0.1, y=0.15)
    axis.grid(alpha=0.3)
    axis.set_title("SmolLM2, N = 512, temperature 0.5 to 2", loc="left", fontsize=10)
    axis.set_xlabel("entropy of the distributions, nats")
    figure.suptitle(f"Log-probs, forward + backward, float32, {threads(timed[0])}")
    legend(figure, axes.flat, 4)
    save(figure, folder, "scaling_logps")


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
            axis.set_yscale("log")
            axis.set_xlabel(label)
            axis.set_title(", ".join(f"{k} = {v}" for k, v in fixed.items()) + f", {threads(here[0])}", fontsize=10)
        line[0].set_ylabel("forward + backward, µs per group")
    figure.suptitle("DPP gains and their gradient")
    legend(figure, axes.flat, 4)
    save(figure, folder, "dpp_time")


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
    save(figure, folder, "linear_logps_time")


def draw(rows: Rows, folder: Path) -> None:
    cpu = [r for r in rows if r["run"]["device"] == "cpu"]
    speedup(cpu, folder, ("logps", "dpp", "step"), "speedup")
    speedup(cpu, folder, ("losses",), "speedup_losses")
    for picture in (memory_vocabulary, roofline, scaling_logps, dpp, logps):
        picture(cpu, folder)
    error_kept(folder)
