"""How a command says why it cannot go on."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console

# Exit status of a command that could not start: something is missing, or an argument is wrong.
CANNOT_START = 2


def fail(message: str, status: int = CANNOT_START) -> NoReturn:
    """Print one line on standard error and leave with status."""
    Console(stderr=True).print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(status)
