"""qempo-fast bench: finds the suite in the source tree and runs it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import qempo_fast

_SUITE = Path("bench", "suite", "run.py")


def folder() -> Path | None:
    """bench/ of the source tree: beside an editable install, or under the current folder; None in a wheel."""
    for root in (Path(qempo_fast.__file__).resolve().parents[1], Path.cwd()):
        if (root / _SUITE).is_file():
            return root / _SUITE.parts[0]
    return None


def run(where: Path, **options: Any) -> int:
    """Run the suite of this folder; returns the exit status."""
    sys.path.insert(0, str(where))
    return importlib.import_module("suite.run").main(**options)
