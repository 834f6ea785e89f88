"""Losses of a chosen and a rejected response, in plain torch: the (alpha, beta) family's pair form and its members."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .family import AlphaBeta, reduced


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
    """-(1 - e) log s(h) - e log s(-h), h = alpha (l_w - l_l) - beta (f_w - f_l), e = label_smoothing.

    An infinite margin h has the limits, 0 or infinity and slopes of 0 or alpha. NaN on purpose: infinity less infinity
    in h, where both responses, or a response for policy and reference, have a log-prob of -inf.
    """
    h = alpha * (chosen - rejected)
    if ref_chosen is not None and ref_rejected is not None and beta:
        h = h - beta * (ref_chosen - ref_rejected)
    losses = -F.logsigmoid(h)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-h)
    return reduced(losses, reduction)


# The members; **kw is label_smoothing and reduction.


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
