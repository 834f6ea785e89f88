"""bench's modules for tests: bench/ goes on the path here alone, whose four packages hide none that is installed."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"


def load(name: str) -> ModuleType:
    """A module of bench/ by its name there: "suite.heads"."""
    if str(BENCH) not in sys.path:
        sys.path.append(str(BENCH))
    return importlib.import_module(name)


def python(code: str, cwd: str | Path = "/", **env: str) -> subprocess.CompletedProcess[str]:
    """This code in a process of its own with bench/ on its path; not the root, whose kernels/ would hide another."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCH), **env}
    return subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
