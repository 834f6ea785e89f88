"""Custom kernels for aligning language models without losing their diversity."""

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
