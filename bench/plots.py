"""Pictures of bench/results: DPP time against k and d, log-probs time and memory of each provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, told apart by the colour-blind; markers tell them apart in grey.
STYLE = {
    "qempo_fast cpu": ("#D55E00", "o", "-"),
    "qempo_fast reference": ("#E69F00", "s", "-"),
    "eager inv": ("#0072B2", "^", "-"),
    "eager cholesky": ("#56B4E9", "v", "-"),
    "compile inv": ("#009E73", "D", "--"),
    "compile cholesky": ("#CC79A7", "P", "--"),
    "python loop": ("#000000", "*", "none"),
    "three passes": ("#777777", "x", ":"),
}


def _microseconds(rows: list[dict], provider: str, by: str, fixed: tuple[str, int]) -> tuple[list, list]:
    """Sorted (by, microseconds a group) of one provider; the loop has one point, at its own number of groups."""
    points = {}
    for r in sorted(rows, key=lambda r: r["groups"]):
        mode = "forward" if provider == "three passes" else "full"
        if r["provider"] == provider and r.get("mode") == mode and r[fixed[0]] == fixed[1]:
            # The most groups win: per group, few groups pay for the call.
            points[r[by]] = r["median_ms"] * 1e3 / r["groups"]
    return sorted(points), [points[x] for x in sorted(points)]


def dpp(runs: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), sharey=True, layout="constrained")
    for row, run in zip(axes, runs, strict=True):
        for axis, by, fixed in ((row[0], "k", ("d", 384)), (row[1], "d", ("k", 8))):
            for name, (colour, marker, line) in STYLE.items():
                x, y = _microseconds(run["rows"], name, by, fixed)
                axis.plot(x, y, color=colour, marker=marker, linestyle=line, label=name, linewidth=1.8)
            ticks = sorted({r[by] for r in run["rows"] if r[fixed[0]] == fixed[1]})
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(ticks, [str(t) for t in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_xlabel("k, samples in a group" if by == "k" else "d, embedding width")
            threads = "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"
            axis.set_title(f"{fixed[0]} = {fixed[1]}, {threads}")
        row[0].set_ylabel("forward + backward, µs per group")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("DPP gains and their gradient")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def logps(runs: list[dict[str, Any]], memories: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for row, run, measured in zip(axes, runs, memories, strict=True):
        timed = [r for r in run["rows"] if r.get("mode") == "full"]
        names = [r["provider"] for r in timed][::-1]
        forward = {r["provider"]: r["median_ms"] for r in run["rows"] if r.get("mode") == "forward"}
        whole = {r["provider"]: r["median_ms"] for r in timed}
        memory = {r["provider"]: r["memory_mib"] for r in measured["rows"]}
        both = [whole[n] for n in names]
        front = [min(forward[n], whole[n]) for n in names]
        row[0].barh(names, both, color="#56B4E9", label="backward")
        row[0].barh(names, front, color="#0072B2", label="forward")
        row[0].axvline(
            forward["GEMMs of sampled's forward"], color="#D55E00", linestyle="--", label="forward GEMMs alone"
        )
        row[0].set_xlabel("ms")
        row[1].barh(names, [memory[n] for n in names], color="#009E73")
        row[1].set_xlabel("peak MiB above inputs and gradients")
        row[1].set_yticks([])
        for axis, values, form in ((row[0], both, "{:.0f}"), (row[1], [memory[n] for n in names], "{:.0f}")):
            axis.set_xlim(0, max(values) * 1.12)
            for i, value in enumerate(values):
                axis.text(value, i, " " + form.format(value), va="center")
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_title(f"{timed[0]['dtype']}, {run['threads']} threads", loc="left")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    first = runs[0]["rows"][0]
    figure.suptitle(f"Log-probs of SmolLM2-135M: N = {first['n']}, D = {first['d']}, V = {first['v']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(dpp_runs: list[dict], logps_runs: list[dict], memories: list[dict], folder: Path) -> None:
    dpp(dpp_runs, folder / "dpp_time.png")
    logps(logps_runs, memories, folder / "linear_logps_time.png")
