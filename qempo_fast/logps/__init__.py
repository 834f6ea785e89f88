"""Token and sequence log-probs from hidden states, without keeping the logits."""

from .from_logits import logps_from_logits
from .linear import SequenceLogps, TokenLogps, linear_logps, sequence_logps
from .segments import segment_sum
from .stats import LogpsStats, last_stats
from .support import Support

__all__ = [
    "LogpsStats",
    "SequenceLogps",
    "Support",
    "TokenLogps",
    "last_stats",
    "linear_logps",
    "logps_from_logits",
    "segment_sum",
    "sequence_logps",
]
