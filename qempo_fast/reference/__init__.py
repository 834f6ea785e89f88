"""Every op and loss in plain torch, any float dtype: the definition that all backends are compared with.

No argument is checked here; the public functions of qempo_fast do that.
"""

from .contrastive import epa_loss, poft_loss
from .dpp import DppGains, dpp_gains, dpp_logdet, dpp_select
from .dqo import dqo_loss
from .groups import (
    group_advantages,
    gvpo_loss,
    policy_gradient_loss,
    qempo_kl_loss,
    qempo_loss,
    spl_loss,
    variance_loss,
)
from .logps import (
    SequenceLogps,
    TokenLogps,
    TokenScores,
    WeightedLogps,
    WeightedSequenceLogps,
    linear_logps,
    logps_from_logits,
    sequence_logps,
    weighted_logps,
    weighted_sequence_logps,
)
from .pairs import dpo_loss, hdpo_loss, qempo_kl_pair_loss, qempo_pair_loss, spl_pair_loss
from .risk import rspo_loss
from .segments import segment_sum
from .tokens import grpo_loss

__all__ = [
    "DppGains",
    "SequenceLogps",
    "TokenLogps",
    "TokenScores",
    "WeightedLogps",
    "WeightedSequenceLogps",
    "dpo_loss",
    "dpp_gains",
    "dpp_logdet",
    "dpp_select",
    "dqo_loss",
    "epa_loss",
    "group_advantages",
    "grpo_loss",
    "gvpo_loss",
    "hdpo_loss",
    "linear_logps",
    "logps_from_logits",
    "poft_loss",
    "policy_gradient_loss",
    "qempo_kl_loss",
    "qempo_kl_pair_loss",
    "qempo_loss",
    "qempo_pair_loss",
    "rspo_loss",
    "segment_sum",
    "sequence_logps",
    "spl_loss",
    "spl_pair_loss",
    "variance_loss",
    "weighted_logps",
    "weighted_sequence_logps",
]
