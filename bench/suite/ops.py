"""The ops of the suite. Each is a module of its name beside this one, that has

SETS                        {set: Set}; "quick", "main", "scaling" and "tiny" are asked for by name
PROVIDERS                   {name: Provider}
inputs(case, device)        the tensors of a case, and its truth in float64 or what leads to it
checked(name, case, made)   (Step, columns): the provider's step after one run, errors within its limits. Whatever
                            it raises becomes the reason of its row; the others keep theirs
baselines(case, made)       {name: Step} of bare work, for scale: kind "floor"
floors(case)                {mode: {"floor_bytes": ..., "floor_flops": ...}}, what no provider can do without
unchecked(name, case, made) (smaller Step of the same widths, Step), where a set asks for memory
"""

from __future__ import annotations

import importlib
from types import ModuleType

OPS = ("logps", "support", "options", "dpp", "losses", "step")


def load(op: str) -> ModuleType:
    return importlib.import_module(f"suite.{op}")
