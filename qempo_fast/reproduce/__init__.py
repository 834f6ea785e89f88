"""Small reproductions of the papers' qualitative claims on SmolLM2-135M: the paper's direction beside what was seen."""

from __future__ import annotations

import os
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ..demo import _missing, _refuse
from .papers import REPRODUCTIONS, Reproduction

__all__ = ["REPRODUCTIONS", "Reproduction", "listing", "main"]

SEEDS, QUICK_SEEDS = 3, 2


def listing() -> Table:
    """Every reproduction, its paper and its claim."""
    view = Table(box=box.SIMPLE_HEAD)
    for head in ("name", "paper", "claim", "minutes"):
        view.add_column(head, no_wrap=head == "name", justify="right" if head == "minutes" else "left")
    for name, r in REPRODUCTIONS.items():
        view.add_row(name, r.paper, r.claim, str(r.minutes))
    return view


def main(
    name: str,
    *,
    quick: bool = False,
    seeds: int | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> int:
    """Run one reproduction and print its tables; returns the exit status.

    Args:
        name: a key of REPRODUCTIONS.
        quick: fewer steps, seeds and answers, for two to three minutes.
        seeds: number of seeds, 0 to seeds - 1.
        out: where a JSON of every figure goes, if anywhere.
        console: where to print; standard output by default.

    Returns:
        0 where it ran, whichever way the directions came out; 2 where it cannot start; 130 after Ctrl-C.
    """
    if name not in REPRODUCTIONS:
        return _refuse(f"name: wanted one of {', '.join(REPRODUCTIONS)}, got {name}")
    if seeds is not None and seeds < 1:
        return _refuse(f"seeds: wanted at least 1, got {seeds}")
    if out is not None and not out.parent.is_dir():
        return _refuse(f"json: wanted a file in a folder that exists, got {out}")
    problem = _missing()
    if problem is not None:
        return _refuse(problem)
    # Every file comes out of a package: no request is to be tried, and no bar of theirs breaks ours.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from ..demo.run import load
    from . import experiments, run

    settings = experiments.settings(name, quick)
    count = seeds or (QUICK_SEEDS if quick else SEEDS)
    return run.run(
        name, settings, range(count), quick=quick, out=out, console=console or Console(), load=lambda: load(settings)
    )
