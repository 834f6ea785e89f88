"""Command line: qempo-fast info | demo | reproduce | bench | compile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ._fail import fail

app = typer.Typer(
    name="qempo-fast",
    help="Fused kernels for aligning language models without losing their diversity.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


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
def reproduce(
    name: Annotated[str | None, typer.Argument(help="Which one; --list names them.")] = None,
    list_them: Annotated[bool, typer.Option("--list", help="Name every reproduction and its claim.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer steps, seeds and answers, two to three minutes.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
) -> None:
    """Reproduce one paper's claim on a small language model, and say whether its direction was seen."""
    from qempo_fast.reproduce import listing
    from qempo_fast.reproduce import main as run_one

    if list_them:
        Console().print(listing())
    elif name is None:
        fail("name: wanted one of the names that qempo-fast reproduce --list prints, got none")
    else:
        raise typer.Exit(run_one(name, quick=quick, seeds=seeds, out=json))


@app.command()
def bench(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    case: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    provider: Annotated[list[str] | None, typer.Option(help="Only this provider; may be repeated.")] = None,
    group: Annotated[list[str] | None, typer.Option("--set", help="Only this set of cases; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One or two small cases an op, 2 to 3 minutes.")] = False,
    compare: Annotated[
        Path | None, typer.Option(help="Exit with 1 where ratios fell against this table or folder of tables.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, max=1.0, help="How far a ratio may fall, as a share.")] = 0.2,
    json: Annotated[
        Path | None,
        typer.Option(
            help="Add the rows to this table, JSON lines, in place of older ones of their cases; "
            "a folder has a table for each device."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Numbers of threads; may be repeated.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns that each provider takes.")] = None,
) -> None:
    """Time the ops against their peers, each result checked first. Needs the source tree."""
    from .bench import folder, run

    where = folder()
    if where is None:
        fail("the benchmark suite is in the source tree, not in the wheel: clone it and run this command from there")
    if device not in ("cpu", "cuda"):
        fail(f"device: wanted cpu or cuda, got {device!r}")
    status = run(
        where, ops=op or (), case=case, providers=provider or (), sets=group or (), quick=quick, compare=compare,
        tolerance=tolerance, json=json, device=device, threads=threads or (), rounds=rounds,
    )  # fmt: skip
    raise typer.Exit(status)


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
