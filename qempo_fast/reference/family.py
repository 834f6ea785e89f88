"""The (alpha, beta) family in plain torch: one objective, three losses that share its optimum, its members.

    J(pi) = E_pi[r] + alpha H(pi) + beta E_pi[log pi_ref],  alpha > 0, beta >= 0
    pi*(y|x) = pi_ref(y|x)^(beta/alpha) exp(r(x,y)/alpha) / Z(x)

Derived; docs/losses.md has the table of members. No argument is checked here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .groups import centre, to_groups


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


def optimum(rewards: torch.Tensor, ref_logps: torch.Tensor | None, *, alpha: float, beta: float) -> torch.Tensor:
    """pi* of the family on a finite set, along the last dimension."""
    logits = rewards if ref_logps is None or beta == 0 else rewards + beta * ref_logps
    return torch.softmax(logits / alpha, dim=-1)


def pair_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor | None,
    ref_rejected: torch.Tensor | None,
    *,
    alpha: float,
    beta: float,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """-(1 - e) log s(h) - e log s(-h), h = alpha (l_w - l_l) - beta (f_w - f_l), e = label_smoothing."""
    h = alpha * (chosen - rejected)
    if ref_chosen is not None and ref_rejected is not None:
        h = h - beta * (ref_chosen - ref_rejected)
    losses = -F.logsigmoid(h)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-h)
    return reduced(losses, reduction)


def group_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    rewards: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    baseline: str = "loo",
    bonus: torch.Tensor | None = None,
) -> torch.Tensor:
    """-mean A_i l_i, A_i = S_i - baseline + bonus_i, S_i = r_i - alpha sg(l_i) + beta f_i."""
    shaped = rewards - alpha * logps.detach()
    if ref_logps is not None:
        shaped = shaped + beta * ref_logps
    advantages = centre(shaped, baseline, group_size=group_size, offsets=offsets)
    if bonus is not None:
        advantages = advantages + bonus
    return reduced(-advantages * logps, "mean")


def variance_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    rewards: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over groups of sum_i d_i^2 / (2 (k - 1)), d_i the group-centred alpha l_i - beta f_i - r_i."""
    residual = alpha * logps - rewards
    if ref_logps is not None:
        residual = residual - beta * ref_logps
    centred = centre(residual, "mean", group_size=group_size, offsets=offsets)
    d, mask = to_groups(centred, group_size, offsets)
    return reduced(d.square().sum(1) / (2 * (mask.sum(1) - 1)), "mean")


# The members. **kw is label_smoothing and reduction for pairs; group_size, offsets and baseline for groups.


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    **kw: Any,
) -> torch.Tensor:
    return pair_loss(chosen, rejected, ref_chosen, ref_rejected, **AlphaBeta.of_kl(beta)._asdict(), **kw)


def spl_pair_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    alpha: float,
    beta: float = 0.1,
    **kw: Any,
) -> torch.Tensor:
    return pair_loss(chosen, rejected, ref_chosen, ref_rejected, alpha=alpha, beta=beta, **kw)


def hdpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    alpha: float,
    beta: float = 0.1,
    **kw: Any,
) -> torch.Tensor:
    ab = AlphaBeta.of_hdpo(alpha, beta)
    return pair_loss(chosen, rejected, ref_chosen, ref_rejected, **ab._asdict(), **kw)


def qempo_pair_loss(chosen: torch.Tensor, rejected: torch.Tensor, *, lam: float, **kw: Any) -> torch.Tensor:
    return pair_loss(chosen, rejected, None, None, **AlphaBeta.of_qempo(lam)._asdict(), **kw)


def qempo_kl_pair_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    lam: float,
    mu: float,
    **kw: Any,
) -> torch.Tensor:
    ab = AlphaBeta.of_qempo(lam, mu)
    return pair_loss(chosen, rejected, ref_chosen, ref_rejected, **ab._asdict(), **kw)


def spl_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    rewards: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    **kw: Any,
) -> torch.Tensor:
    return group_loss(logps, ref_logps, rewards, alpha=alpha, beta=beta, **kw)


def qempo_loss(logps: torch.Tensor, rewards: torch.Tensor, *, lam: float, **kw: Any) -> torch.Tensor:
    return group_loss(logps, None, rewards, **AlphaBeta.of_qempo(lam)._asdict(), **kw)


def qempo_kl_loss(
    logps: torch.Tensor, ref_logps: torch.Tensor, rewards: torch.Tensor, *, lam: float, mu: float, **kw: Any
) -> torch.Tensor:
    return group_loss(logps, ref_logps, rewards, **AlphaBeta.of_qempo(lam, mu)._asdict(), **kw)


def gvpo_loss(
    logps: torch.Tensor, ref_logps: torch.Tensor, rewards: torch.Tensor, *, beta: float = 0.1, **kw: Any
) -> torch.Tensor:
    return variance_loss(logps, ref_logps, rewards, **AlphaBeta.of_kl(beta)._asdict(), **kw)
