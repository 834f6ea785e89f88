"""Preference pairs: the (alpha, beta) family's logistic loss and its members."""

from __future__ import annotations

from typing import Any

import torch

from .. import _check
from ..reference.family import AlphaBeta
from . import _function, _inputs

_NAMES = ("chosen", "rejected", "ref_chosen", "ref_rejected")


def _pair_loss(
    scores: tuple[Any, Any, Any, Any], ab: AlphaBeta, label_smoothing: Any, reduction: Any, why: str = "beta"
) -> torch.Tensor:
    """The family's loss of (chosen, rejected, ref_chosen, ref_rejected), the last two needed where why is above 0."""
    chosen, rejected, ref_chosen, ref_rejected = scores
    if ab.beta <= 0:
        scores = chosen, rejected, None, None
    elif ref_chosen is None or ref_rejected is None:
        _inputs.needs_reference("ref_chosen", ref_chosen, ab.beta, why)
        _inputs.needs_reference("ref_rejected", ref_rejected, ab.beta, why)
    _check.number("label_smoothing", label_smoothing, low=0.0, high=0.5, open_high=True)
    _check.choice("reduction", reduction, _inputs.REDUCTIONS)
    _inputs.given("rejected", rejected)
    settings = {"alpha": ab.alpha, "beta": ab.beta, "label_smoothing": label_smoothing, "reduction": reduction}
    return _function.loss("pair_loss", _inputs.scores(_NAMES, scores, policy=2), settings)


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Direct preference optimisation: the family's pair loss at alpha = beta.

        h = beta (l_w - l_l) - beta (f_w - f_l),   L = -(1 - e) log s(h) - e log s(-h)

    2305.18290, equation 7; e > 0 is cDPO's label smoothing.

    Args:
        chosen: (B,) float, log-prob of each preferred response, summed over its tokens.
        rejected: (B,) float, the same for the rejected response.
        ref_chosen: (B,) float, the reference model's log-prob of the preferred response. Detached.
        ref_rejected: (B,) float, the same for the rejected response. Detached.
        beta: KL coefficient, > 0.
        label_smoothing: e, the share of labels taken to be wrong, in [0, 0.5).
        reduction: "mean" or "sum" over pairs, or "none".

    Returns:
        A scalar, or (B,) for "none"; float32, or float64 for float64 log-probs.

    Raises:
        TypeError, ValueError: a tensor of another type, shape or device; a hyperparameter out of range.
    """
    _check.positive("beta", beta)
    return _pair_loss((chosen, rejected, ref_chosen, ref_rejected), AlphaBeta.of_kl(beta), label_smoothing, reduction)


def spl_pair_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor | None,
    ref_rejected: torch.Tensor | None,
    *,
    alpha: float,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Soft preference learning: entropy weighted by alpha apart from cross-entropy to the reference by beta.

        h = alpha (l_w - l_l) - beta (f_w - f_l),   L = -(1 - e) log s(h) - e log s(-h)

    2511.08594, the DPO form, read in third-party summaries. alpha = beta is DPO; alpha > beta is the more
    diverse side, a sequence-level temperature alpha / beta.

    Args:
        chosen: (B,) float, log-prob of each preferred response, summed over its tokens.
        rejected: (B,) float, the same for the rejected response.
        ref_chosen: (B,) float, the reference model's log-prob of the preferred response, detached; None is
            allowed where beta = 0.
        ref_rejected: the same for the rejected response.
        alpha: weight of the entropy, > 0.
        beta: weight of the cross-entropy to the reference, >= 0; it may exceed alpha.
        label_smoothing: e, the share of labels taken to be wrong, in [0, 0.5).
        reduction: "mean" or "sum" over pairs, or "none".

    Returns:
        A scalar, or (B,) for "none"; float32, or float64 for float64 log-probs.

    Raises:
        TypeError, ValueError: a tensor of another type, shape or device; a hyperparameter out of range.
    """
    _check.positive("alpha", alpha)
    _check.number("beta", beta, low=0.0)
    return _pair_loss((chosen, rejected, ref_chosen, ref_rejected), AlphaBeta(alpha, beta), label_smoothing, reduction)


def hdpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    alpha: float,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """H-DPO: DPO with the policy's log-ratio scaled by alpha, so that alpha < 1 sharpens and > 1 diversifies.

        h = alpha beta (l_w - l_l) - beta (f_w - f_l),   L = -(1 - e) log s(h) - e log s(-h)

    2411.07595, read in third-party code; the family at (alpha beta, beta).

    Args:
        chosen: (B,) float, log-prob of each preferred response, summed over its tokens.
        rejected: (B,) float, the same for the rejected response.
        ref_chosen: (B,) float, the reference model's log-prob of the preferred response. Detached.
        ref_rejected: (B,) float, the same for the rejected response. Detached.
        alpha: entropy factor, > 0; 1 is DPO.
        beta: KL coefficient, > 0.
        label_smoothing: e, the share of labels taken to be wrong, in [0, 0.5).
        reduction: "mean" or "sum" over pairs, or "none".

    Returns:
        A scalar, or (B,) for "none"; float32, or float64 for float64 log-probs.

    Raises:
        TypeError, ValueError: a tensor of another type, shape or device; a hyperparameter out of range.
    """
    _check.positive("alpha", alpha)
    _check.positive("beta", beta)
    return _pair_loss(
        (chosen, rejected, ref_chosen, ref_rejected), AlphaBeta.of_hdpo(alpha, beta), label_smoothing, reduction
    )


def qempo_pair_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    lam: float,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """QEMPO offline: the most entropy at a held quality, with no reference model.

        h = (l_w - l_l) / lam,   L = -(1 - e) log s(h) - e log s(-h);   optimum exp(lam r) / Z

    Derived from the abstract and reviews of 2602.15894; its symbols and constants were not available.
    The optimum can be normalised only on a finite response set, that is with a cap on length.

    Args:
        chosen: (B,) float, log-prob of each preferred response, summed over its tokens.
        rejected: (B,) float, the same for the rejected response.
        lam: Lagrange multiplier of E[r] >= R, > 0. ``QualityConstraint`` and ``solve_qempo`` find it.
        label_smoothing: e, the share of labels taken to be wrong, in [0, 0.5).
        reduction: "mean" or "sum" over pairs, or "none".

    Returns:
        A scalar, or (B,) for "none"; float32, or float64 for float64 log-probs.

    Raises:
        TypeError, ValueError: a tensor of another type, shape or device; a hyperparameter out of range.
    """
    _check.positive("lam", lam)
    return _pair_loss((chosen, rejected, None, None), AlphaBeta.of_qempo(lam), label_smoothing, reduction)


def qempo_kl_pair_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor | None,
    ref_rejected: torch.Tensor | None,
    *,
    lam: float,
    mu: float,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """QEMPO-KL offline: QEMPO that also holds KL(pi || pi_ref) under a cap.

        h = alpha (l_w - l_l) - beta (f_w - f_l),  alpha = (1 + mu) / lam,  beta = mu / lam
        L = -(1 - e) log s(h) - e log s(-h)

    Derived from the abstract and reviews of 2602.15894; its symbols and constants were not available.

    Args:
        chosen: (B,) float, log-prob of each preferred response, summed over its tokens.
        rejected: (B,) float, the same for the rejected response.
        ref_chosen: (B,) float, the reference model's log-prob of the preferred response, detached; None is
            allowed where mu = 0.
        ref_rejected: the same for the rejected response.
        lam: multiplier of E[r] >= R, > 0.
        mu: multiplier of KL <= K, >= 0; 0 is QEMPO.
        label_smoothing: e, the share of labels taken to be wrong, in [0, 0.5).
        reduction: "mean" or "sum" over pairs, or "none".

    Returns:
        A scalar, or (B,) for "none"; float32, or float64 for float64 log-probs.

    Raises:
        TypeError, ValueError: a tensor of another type, shape or device; a hyperparameter out of range.
    """
    _check.positive("lam", lam)
    _check.number("mu", mu, low=0.0)
    return _pair_loss(
        (chosen, rejected, ref_chosen, ref_rejected), AlphaBeta.of_qempo(lam, mu), label_smoothing, reduction, "mu"
    )
