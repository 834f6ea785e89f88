"""Custom kernels for aligning language models without losing their diversity."""

from . import metrics, reference
from ._backends import backends
from .constraint import QempoSolution, QualityConstraint, solve_qempo, target_distribution
from .distributed import GatheredGroups, gather_groups
from .dpp import DppGains, dpp_gains, dpp_logdet, dpp_select
from .logps import (
    LogpsStats,
    SequenceLogps,
    TokenLogps,
    last_stats,
    linear_logps,
    logps_from_logits,
    segment_sum,
    sequence_logps,
)
from .losses import (
    coefficients,
    dpo_loss,
    dqo_loss,
    epa_loss,
    group_advantages,
    grpo_loss,
    gvpo_loss,
    hdpo_loss,
    poft_loss,
    qempo_kl_loss,
    qempo_kl_pair_loss,
    qempo_loss,
    qempo_pair_loss,
    rspo_loss,
    spl_loss,
    spl_pair_loss,
    variance_loss,
)

__version__ = "0.1.0"

__all__ = [
    "DppGains",
    "GatheredGroups",
    "LogpsStats",
    "QempoSolution",
    "QualityConstraint",
    "SequenceLogps",
    "TokenLogps",
    "backends",
    "coefficients",
    "dpo_loss",
    "dpp_gains",
    "dpp_logdet",
    "dpp_select",
    "dqo_loss",
    "epa_loss",
    "gather_groups",
    "group_advantages",
    "grpo_loss",
    "gvpo_loss",
    "hdpo_loss",
    "last_stats",
    "linear_logps",
    "logps_from_logits",
    "metrics",
    "poft_loss",
    "qempo_kl_loss",
    "qempo_kl_pair_loss",
    "qempo_loss",
    "qempo_pair_loss",
    "reference",
    "rspo_loss",
    "segment_sum",
    "sequence_logps",
    "solve_qempo",
    "spl_loss",
    "spl_pair_loss",
    "target_distribution",
    "variance_loss",
]
