"""Losses of log-probs, rewards and embeddings, differentiable in the policy's log-probs only."""

from .coefficients import coefficients
from .contrastive import epa_loss, poft_loss
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
from .pairs import dpo_loss, hdpo_loss, qempo_kl_pair_loss, qempo_pair_loss, spl_pair_loss
from .risk import rspo_loss
from .tokens import grpo_loss

__all__ = [
    "coefficients",
    "dpo_loss",
    "dqo_loss",
    "epa_loss",
    "group_advantages",
    "grpo_loss",
    "gvpo_loss",
    "hdpo_loss",
    "poft_loss",
    "policy_gradient_loss",
    "qempo_kl_loss",
    "qempo_kl_pair_loss",
    "qempo_loss",
    "qempo_pair_loss",
    "rspo_loss",
    "spl_loss",
    "spl_pair_loss",
    "variance_loss",
]
