"""The programs of a second call that no CPU machine has: their command lines, checked here, and what they print."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

# Names of kernels to count: ours as kernels/*.py and csrc/cuda have them, the vendor's GEMMs (nvjet), torch's gathers.
KERNELS = "logps|kept|support|dpp|loss|nvjet|gemm|index|add_rows|rows_out|segment_sum"
# All of one pass: another would save and restore gigabytes for each kernel. sm__throughput would take several. Names
# that every architecture has: of one that it lacks ncu makes an error, and counts nothing.
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__grid_size",
    "launch__block_size",
)
# Options of each tool that take a value, as their manuals have them; all others here would be a slip.
_OPTIONS = {
    "compute-sanitizer": ("--tool", "--error-exitcode", "--launch-timeout", "--print-limit", "--kernel-regex"),
    "ncu": (
        "--clock-control", "--target-processes", "--launch-skip", "--launch-count", "--filter-mode", "--csv", "--page",
        "--metrics", "--kernel-name", "--replay-mode",
    ),
}  # fmt: skip
_FLAGS = ("--csv",)
_METRIC = re.compile(r"(gpu|dram|sm|lts|l1tex)__\w+\.(sum|avg|max|min)(\.\w+)?|launch__\w+")


def sanitizer(tool: str, words: Sequence[str]) -> list[str]:
    """Of kernels with "_kernel" in their names, as all of ours have it: to instrument the vendor's GEMMs takes minutes.

    kns is a part of the name, no regular expression in spite of the option's. Python takes seconds to its first launch:
    at its default the sanitizer gives up waiting for one.
    """
    options = ("--tool", tool, "--error-exitcode", "9", "--launch-timeout", "60", "--print-limit", "20")
    return ["compute-sanitizer", *options, "--kernel-regex", "kns=_kernel", *words]


def counters(words: Sequence[str]) -> list[str]:
    """The second launch of each kernel at each size; the clocks stay as they are."""
    return [
        *("ncu", "--clock-control", "none", "--target-processes", "all", "--csv", "--page", "raw"),
        *("--filter-mode", "per-launch-config", "--launch-skip", "1", "--launch-count", "1"),
        *("--kernel-name", f"regex:{KERNELS}", "--metrics", ",".join(METRICS), *words),
    ]


def wrong(command: Sequence[str]) -> str | None:
    """What is wrong with a tool's command line, as far as one can tell without the tool."""
    tool, rest = command[0], list(command[1:])
    values = {}
    while rest and rest[0].startswith("--"):
        option = rest.pop(0)
        if option not in _OPTIONS[tool]:
            return f"{tool} has no {option}"
        values[option] = "" if option in _FLAGS else rest.pop(0)
    scripts = [w for w in rest if w.endswith(".py")]
    if not rest or not os.access(rest[0], os.X_OK) or not scripts or not Path(scripts[0]).is_file():
        return f"{tool} is to start {' '.join(rest[:3])}, which is no Python and a script"
    odd = [m for m in values.get("--metrics", "").split(",") if m and not _METRIC.fullmatch(m)]
    if odd:
        return f"not names of metrics: {', '.join(odd)}"
    if values.get("--clock-control", "none") != "none":
        return "the clocks are to stay as they are"
    name = values.get("--kernel-name", "regex:").removeprefix("regex:")
    with contextlib.suppress(re.error):
        re.compile(name)
        return None
    return f"no regular expression: {name}"


def counted(text: str) -> list[dict[str, Any]]:
    """Rows of ncu's raw page: a head, a line of units, then a line for each launch; its own messages lie between."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    head, units, *launches = csv.reader(io.StringIO("\n".join(lines)))
    rows = []
    for values in launches:
        cells = dict(zip(head, values, strict=False))
        row: dict[str, Any] = {"kernel": cells.get("Kernel Name", "?")[:100]}
        row |= {"grid": cells.get("Grid Size"), "block": cells.get("Block Size")}
        for name, unit in zip(head, units, strict=False):
            if name in METRICS:
                row[f"{name} {unit}".strip()] = _number(cells.get(name, ""))
        rows.append(row)
    return rows


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


@contextlib.contextmanager
def pretended(rehearse: bool) -> Iterator[None]:
    """In a rehearsal of a search: Triton's launches are counted on a GPU that is not there, and each takes a moment."""
    if not rehearse:
        yield
        return
    import torch

    from qempo_fast.cli.standin import standin
    from qempo_fast.kernels import _launch

    def moment(run: Any) -> float:
        run()
        return 1.0

    with (
        standin("cuda:90", compiles=False),
        mock.patch.object(_launch, "_milliseconds", moment),
        mock.patch.object(torch.cuda, "get_device_name", return_value="no GPU"),
    ):
        yield
