"""The (alpha, beta) family: one objective; three losses share its optimum, in pairs.py and groups.py.

    J(pi) = E_pi[r] + alpha H(pi) + beta E_pi[log pi_ref],  alpha > 0, beta >= 0
    pi*(y|x) = pi_ref(y|x)^(beta/alpha) exp(r(x,y)/alpha) / Z(x)

Derived; docs/losses.md has the table of members.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class AlphaBeta(NamedTuple):
    """The two numbers of the family, and the only place where a method's own hyperparameters become them."""

    alpha: float
    beta: float

    @classmethod
    def of_kl(cls, beta: float) -> AlphaBeta:
        """KL-regularised reward: DPO, GVPO, KL-RLHF."""
        return cls(beta, beta)

    @classmethod
    def of_hdpo(cls, alpha: float, beta: float) -> AlphaBeta:
        return cls(alpha * beta, beta)

    @classmethod
    def of_qempo(cls, lam: float, mu: float = 0.0) -> AlphaBeta:
        """QEMPO (mu = 0) and QEMPO-KL; lam and mu are the multipliers of the reward and KL constraints."""
        return cls((1.0 + mu) / lam, mu / lam)


def reduced(losses: torch.Tensor, reduction: str) -> torch.Tensor:
    """mean | sum | none over the first dimension; the mean of nothing is 0 with its graph."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / max(losses.shape[0], 1) if reduction == "mean" else total


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in float64; as it is on Apple's GPUs, which have none."""
    return x if x.device.type == "mps" else x.double()


def product(weights: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    """weights times logps; 0 where a weight is, though the log-prob be infinite."""
    return torch.where((weights == 0) & logps.isinf(), 0, weights * logps)


def optimum(rewards: torch.Tensor, ref_logps: torch.Tensor | None, *, alpha: float, beta: float) -> torch.Tensor:
    """pi* of the family on a finite set, along the last dimension."""
    # Less their largest before anything is scaled: float32 rounds 1e4 / 0.01 by up to 0.03, 3% of a probability.
    logits = _below_largest(rewards)
    if ref_logps is not None and beta != 0:
        logits = _below_largest(logits + beta * _below_largest(ref_logps))
    return torch.softmax(logits / alpha, dim=-1)


def _below_largest(x: torch.Tensor) -> torch.Tensor:
    return x - x.amax(-1, keepdim=True)
