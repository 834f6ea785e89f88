"""Token and sequence log-probs from hidden states, without keeping the logits."""

from .from_logits import logps_from_logits
from .linear import SequenceLogps, TokenLogps, TokenScores, linear_logps, sequence_logps
from .segments import segment_sum
from .stats import LogpsStats, last_stats
from .support import Support
from .weighted import WeightedLogps, WeightedSequenceLogps, weighted_logps, weighted_sequence_logps

__all__ = [
    "LogpsStats",
    "SequenceLogps",
    "Support",
    "TokenLogps",
    "TokenScores",
    "WeightedLogps",
    "WeightedSequenceLogps",
    "last_stats",
    "linear_logps",
    "logps_from_logits",
    "segment_sum",
    "sequence_logps",
    "weighted_logps",
    "weighted_sequence_logps",
]
