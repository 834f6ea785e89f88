"""Command line: qempo-fast info | demo | bench | compile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

# Exit status of a command that could not start: something is missing, or an argument is wrong.
CANNOT_START = 2

app = typer.Typer(
    name="qempo-fast",
    help="Fused kernels for aligning language models without losing their diversity.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def fail(message: str, status: int = CANNOT_START) -> NoReturn:
    """Print one line on standard error and leave with status."""
    Console(stderr=True).print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(status)


@app.command()
def info() -> None:
    """Versions, devices, instruction set, threads, and what runs each op and why."""
    from .info import show

    show(Console())


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps, under two minutes.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the table, the pictures and the figures.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Seed of sampling and training.")] = 0,
    method: Annotated[list[str] | None, typer.Option(help="Train this method only; may be repeated.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of each method.")] = None,
) -> None:
    """Post-train a small language model for diversity and show what becomes of its answers."""
    from qempo_fast.demo import main as train_and_report

    raise typer.Exit(train_and_report(quick=quick, out=out, seed=seed, methods=method, steps=steps))


@app.command()
def bench() -> None:
    """Time the ops against their peers."""
    fail("qempo-fast bench is not there yet: this version has no benchmark suite")


@app.command(name="compile")
def compile_kernels(
    target: Annotated[
        list[str] | None,
        typer.Option(help="cuda:80, cuda:90, hip:gfx942, ...; may be repeated. Default: cuda:80 90 100, hip:gfx942."),
    ] = None,
    only: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
) -> None:
    """Compile every Triton kernel with no GPU present; fail on a spill in a hot kernel."""
    from .compile import TARGETS, run

    raise typer.Exit(run(target or list(TARGETS), only, Console()))


def main() -> None:
    """Entry point of qempo-fast and of python -m qempo_fast."""
    app(prog_name="qempo-fast")
