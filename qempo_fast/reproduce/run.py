"""One reproduction: train and measure behind progress bars, print the tables, write the figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..demo.model import SplitModel
from ..demo.run import INTERRUPTED, THREADS, describe, progress_bars
from ..demo.task import Task
from ..demo.train import Settings
from . import claims
from .experiments import COLUMNS, RUN
from .lab import Lab
from .papers import REPRODUCTIONS

_WIDTH = 240  # of a line of the JSON: a claim with three differences, or one figure of three seeds


def run(
    name: str,
    settings: Settings,
    seeds: Sequence[int],
    *,
    quick: bool,
    out: Path | None,
    console: Console,
    load: Callable[[], tuple[SplitModel, Task]],
) -> int:
    """Run the experiment of that name over the seeds; returns the exit status, 130 where Ctrl-C stopped it."""
    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(THREADS)
    size = f"{'quick: ' if quick else ''}{settings.steps} steps of {settings.samples} answers"
    size += f", {100 * settings.evaluation_batches} answers measured"
    try:
        with console.status("loading SmolLM2-135M-Instruct, MiniLM and geonames (about 20 s the first time)"):
            model, task = load()
        console.print(f"{name}: {REPRODUCTIONS[name].claim} ({REPRODUCTIONS[name].paper})", soft_wrap=True)
        with progress_bars(console, bar_width=20) as progress:
            lab = Lab(model, task, settings, progress)
            for seed in seeds:
                RUN[name].each_seed(lab, seed)
        found = RUN[name].claims(lab.rows)
    except KeyboardInterrupt:
        console.print("\nStopped before the end: no result.")
        return INTERRUPTED
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - start
    console.print(claims.figures_table(lab.rows, COLUMNS[name], f"{size}; mean (range over seeds)"))
    console.print(claims.claims_table(found, len(seeds)))
    console.print(f"{seconds:.0f} s. What is measured and what was tried: docs/reproduce.md", soft_wrap=True)
    if out is not None:
        facts = describe(settings, name=name, paper=REPRODUCTIONS[name].paper, quick=quick, seeds=list(seeds))
        figures = {**facts, "seconds": seconds, "rows": lab.rows, "claims": [c.as_json() for c in found]}
        out.write_text(_lines(figures) + "\n", encoding="utf-8")
        console.print(f"Written: {out}", soft_wrap=True)
    return 0


def _lines(x: Any, indent: int = 0) -> str:
    """JSON with every value on one line where it fits, so that the lines of a file are about its figures."""
    flat = json.dumps(x, ensure_ascii=False, allow_nan=False)
    if not isinstance(x, (dict, list)) or indent + len(flat) <= _WIDTH:
        return flat
    if isinstance(x, dict):
        items = [f"{json.dumps(key, ensure_ascii=False)}: {_lines(value, indent + 1)}" for key, value in x.items()]
    else:
        items = [_lines(value, indent + 1) for value in x]
    start, end = "{}" if isinstance(x, dict) else "[]"
    pad = "\n" + " " * indent
    return f"{start}{pad} {f',{pad} '.join(items)}{pad}{end}"
