"""bench's files as modules, without a change of sys.path: all of bench/ on it would hide packages of the same names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

BENCH = Path(__file__).parent.parent / "bench"


def load(name: str) -> ModuleType:
    """A fresh bench/NAME.py, which imports none of the others, or puts bench/ on the path itself."""
    spec = importlib.util.spec_from_file_location(f"qempo_bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclass looks its module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
