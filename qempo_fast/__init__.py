"""Custom kernels for aligning language models without losing their diversity."""

try:
    from . import _C  # noqa: F401
except ImportError:
    from importlib.util import find_spec
    from pathlib import Path

    # What is there says itself why it does not load. Of what is missing Python says "most likely due to a circular
    # import".
    if find_spec(f"{__name__}._C") is not None:
        raise
    here = Path(__file__).resolve().parent
    others = ", ".join(sorted(path.name for path in here.glob("_C.*.so")))
    without = f"without its native module{f' for this Python, with {others}' if others else ''}"
    if (here.parent / "csrc").is_dir():
        what = f"is the source tree {without}: `make setup`, or `pip install .` and start Python in another folder"
    else:
        what = f"is {without}: install it again"
    raise ImportError(f"{here} {what}", name=f"{__name__}._C") from None

from . import dpp, logps, losses, metrics, reference
from ._backends import backends
from .constraint import QempoSolution, QualityConstraint, solve_qempo, target_distribution
from .distributed import GatheredGroups, gather_groups
from .dpp import *  # noqa: F403
from .logps import *  # noqa: F403
from .losses import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "GatheredGroups",
    "QempoSolution",
    "QualityConstraint",
    "backends",
    "gather_groups",
    "metrics",
    "reference",
    "solve_qempo",
    "target_distribution",
]
# What a room shows its visitors, the package shows: a new loss is named once, in losses/__init__.py.
__all__ += dpp.__all__
__all__ += logps.__all__
__all__ += losses.__all__
