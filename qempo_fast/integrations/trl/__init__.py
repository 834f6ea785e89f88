"""TRL's trainers with this library's log-prob kernel and losses.

``use_fused_logps`` speeds up TRL's own trainers; ``PreferenceTrainer``, ``GroupTrainer`` and ``OfflineGroupTrainer``
add the losses; ``QualityConstraintCallback`` holds a mean reward during training. docs/integrations/trl.md.
"""

from .. import missing

try:
    import trl  # noqa: F401
except ModuleNotFoundError as error:
    raise missing(error, "trl") from error

from .constraint import QualityConstraintCallback
from .group import GROUP_LOSSES, GroupTrainer
from .kernel import FusedLogps, use_fused_logps
from .offline import OFFLINE_LOSSES, OfflineGroupTrainer
from .preference import PAIR_LOSSES, PreferenceTrainer

__all__ = [
    "GROUP_LOSSES",
    "OFFLINE_LOSSES",
    "PAIR_LOSSES",
    "FusedLogps",
    "GroupTrainer",
    "OfflineGroupTrainer",
    "PreferenceTrainer",
    "QualityConstraintCallback",
    "use_fused_logps",
]
