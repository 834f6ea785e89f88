"""Rows as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from suite.interleave import MODES

# Columns that an op adds, with their heads; shown where a row of the case has them.
EXTRA = {
    "kept": ("f", "{:.3f}"),
    "error_hidden": ("error dH", "{:.1e}"),
    "error_weight": ("error dW", "{:.1e}"),
    "error_gains": ("error gains", "{:.1e}"),
    "error_grad": ("error grad", "{:.1e}"),
    "error_loss": ("error loss", "{:.1e}"),
    "memory_mib": ("MiB", "{:.0f}"),
}


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def percent_of_floor(row: dict) -> float | None:
    """How near a row comes to the time that the bytes or FLOPs of its floor need, in percent."""
    return 100 * row["floor_ms"] / row["median_ms"] if row.get("floor_ms") else None


def rows(table: list[dict], console: Console) -> None:
    """One table for the rows of one case: medians with p20 and p80, ratio to the best peer, percentage of the floor."""
    first = table[0]
    entropy = next((f", entropy {r['entropy_nats']:.2f} nats" for r in table if "entropy_nats" in r), "")
    floor = next((r for r in table if r.get("mode") == "full" and r.get("floor_ms")), None)
    bound = ""
    if floor is not None:
        bound = f"; floor {floor['floor_bytes'] / 1e6:.3g} MB, {floor.get('floor_flops', 0) / 1e9:.3g} GFLOP"
        bound += f": {milliseconds(floor['floor_ms'])} ms"
    threads = f"{first['threads']} thread{'s' * (first['threads'] != 1)}"
    title = f"{first['op']}: {first['case']}, {threads}{entropy}{bound}"
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    # Eighty columns hold what a reader asks first; the rest comes with the width.
    wide = console.width >= 110
    modes = MODES if wide else ("full",)
    extra = {key: shown for key, shown in EXTRA.items() if wide and any(r.get(key) is not None for r in table)}
    heads = (*(f"{mode} ms" for mode in modes), "p20-p80", "best peer / this", "% of floor")
    out.add_column("provider", no_wrap=True)
    for head in (*heads, *(head for head, _ in extra.values())):
        out.add_column(head, justify="right", no_wrap=len(head) < 8)
    missing = []
    for name in dict.fromkeys(r["provider"] for r in table):
        mine = {r.get("mode"): r for r in table if r["provider"] == name}
        failed = next((r for r in mine.values() if "reason" in r), None)
        # Our kernels for another device are in the file; here they would be noise.
        if failed is not None and failed["kind"] == "peer":
            missing.append(f"  {name}: {failed['reason']}")
        whole = mine.get("full", mine.get("forward"))
        if whole is None:
            if "memory" in mine and failed is None:
                missing.append(f"  {name}: {mine['memory']['memory_mib']:.0f} MiB")
            continue
        every: dict[str, Any] = {}
        for row in mine.values():
            every.update(row)
        percent = percent_of_floor(whole) if whole["kind"] != "floor" else None
        cells = [milliseconds(mine[mode]["median_ms"]) if mode in mine else "" for mode in modes]
        cells.append(f"{milliseconds(whole['p20_ms'])}-{milliseconds(whole['p80_ms'])}")
        cells.append(f"{whole['ratio_to_best_peer']:.2f}" if "ratio_to_best_peer" in whole else "")
        cells.append("" if percent is None else f"{percent:.0f}")
        cells += ["" if every.get(key) is None else form.format(every[key]) for key, (_, form) in extra.items()]
        out.add_row(name, *cells, style="bold" if whole["kind"] == "ours" else None)
    console.print(out)
    for line in missing:
        console.print(line, style="dim", highlight=False, soft_wrap=True)


def header(run: dict[str, Any], console: Console) -> None:
    """What the figures depend on."""
    peers = ", ".join(f"{name} {version or 'not installed'}" for name, version in run["peers"].items())
    ceilings = "; ".join(
        f"{c['threads']} thread{'s' * (c['threads'] != 1)}: "
        + ", ".join(f"{name} GEMM {rate:.0f} GFLOP/s" for name, rate in c["gemm_gflops"].items())
        + f", copy {c['copy_gbs']:.1f} GB/s"
        for c in run["ceilings"]
    )
    console.print(
        f"{run['cpu']}, {run['cores']} cores, device {run['device']}; torch {run['torch']}, qempo_fast "
        f"{run['qempo_fast']} at {run['commit']}, {peers}; {run['rounds']} interleaved rounds. Ceilings: {ceilings}.",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
