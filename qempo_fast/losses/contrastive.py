"""Losses on single prompts without groups: EPA's contrast and PoFT's comparison with aligned models."""

from __future__ import annotations

from typing import Any

import torch

from .. import _check
from . import _function, _inputs


def epa_loss(
    positive: torch.Tensor,
    strong: torch.Tensor,
    weak: torch.Tensor,
    ref_positive: torch.Tensor,
    ref_strong: torch.Tensor,
    ref_weak: torch.Tensor,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
) -> torch.Tensor:
    """Energy preference alignment: a positive against strong and weak negatives of one prompt.

        u_j = beta (l_j - f_j),   L = -log( e^{u_+} / (e^{u_+} + sum_strong e^{u_s} + sum_weak e^{u_v}) )

    Derived from the abstract of 2412.13862. One strong and no weak negative is exactly DPO. The numbers of
    negatives are not established, so none is a default. Weak negatives are responses to other prompts, scored
    at this one: free of annotation, not of forward passes.

    Args:
        positive: (B,) float, log-prob of the preferred response, summed over its tokens.
        strong: (B, n_strong) float, of rejected responses to the same prompt.
        weak: (B, n_weak) float, of responses to other prompts scored under this one; n_weak may be 0.
        ref_positive: (B,) float, the reference model's. Detached.
        ref_strong: (B, n_strong) float. Detached.
        ref_weak: (B, n_weak) float. Detached.
        beta: KL coefficient, > 0.
        reduction: "mean" or "sum" over positives, or "none".

    Returns:
        A scalar, or (B,) for "none"; float32, or float64 for float64 log-probs.

    Raises:
        TypeError, ValueError: a tensor of another type, shape or device; no negative at all; beta <= 0.
    """
    _check.positive("beta", beta)
    _check.choice("reduction", reduction, _inputs.REDUCTIONS)
    tensors = (positive, strong, weak, ref_positive, ref_strong, ref_weak)
    if not _fits(tensors):
        tensors = _named(tensors)
    return _function.loss("epa_loss", tensors, {"beta": beta, "reduction": reduction})


def _fits(tensors: tuple[Any, ...]) -> bool:
    """Whether EPA's six need no cast and have their shapes."""
    if not _check.alike(tensors):
        return False
    one, two, three, ref_positive, ref_strong, ref_weak = tensors
    if two is None or three is None or ref_positive is None or ref_strong is None or ref_weak is None:
        return False
    positive, strong, weak = one.shape, two.shape, three.shape
    return (
        len(positive) == 1
        and len(strong) == len(weak) == 2
        and strong[0] == weak[0] == positive[0]
        and strong[1] + weak[1] > 0
        and ref_positive.shape == positive
        and ref_strong.shape == strong
        and ref_weak.shape == weak
    )


def _named(tensors: tuple[Any, ...]) -> Any:
    """EPA's six, checked by name, in the dtype of the first three."""
    positive, strong, weak, *references = tensors
    _check.tensor("positive", positive, ndim=1)
    for name, x in (("strong", strong), ("weak", weak)):
        _check.tensor(name, x, shape=(positive.shape[0], -1), device=positive.device)
    if strong.shape[1] + weak.shape[1] == 0:
        _check.bad_value("strong", "at least one strong or weak negative", tuple(strong.shape))
    for name, x, like in zip(("ref_positive", "ref_strong", "ref_weak"), references, tensors, strict=False):
        _check.tensor(name, x, shape=like.shape, device=positive.device)
    dtype = _inputs.score_dtype(positive, strong, weak)
    return tuple(x.to(dtype) for x in tensors)


def poft_loss(
    logps: torch.Tensor,
    lengths: torch.Tensor,
    aligned_mean_logps: torch.Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """PoFT: supervised fine-tuning as a preference of the target model over aligned models on the same text.

        h = beta l/|y| - beta mean_m(log pi_m(y)/|y|_m) + gamma,   L = -log s(h)

    2412.12865, checked against the authors' code, whose log(sigmoid(h)) underflows where this does not.

    Args:
        logps: (B,) float, log-prob of each response, summed over its tokens.
        lengths: (B,) int or float, number of response tokens, > 0.
        aligned_mean_logps: (B, n_models) float, each aligned model's mean log-prob per token under its own
            tokeniser and template. Detached.
        beta: scale, > 0; the authors' default is 1.
        gamma: margin; the authors' default is 0.
        reduction: "mean" or "sum" over responses, or "none".

    Returns:
        A scalar, or (B,) for "none"; float32, or float64 for float64 log-probs.

    Raises:
        TypeError, ValueError: a tensor of another type, shape or device; a length of 0; a hyperparameter out
            of range.
    """
    _check.positive("beta", beta)
    _check.number("gamma", gamma)
    _check.choice("reduction", reduction, _inputs.REDUCTIONS)
    _check.tensor("logps", logps, ndim=1)
    rows, device = logps.shape[0], logps.device
    _check.tensor("lengths", lengths, dtypes=_check.INTS + _check.FLOATS, shape=(rows,), device=device)
    _check.tensor("aligned_mean_logps", aligned_mean_logps, shape=(rows, -1), device=device)
    if aligned_mean_logps.shape[1] == 0:
        _check.bad_value("aligned_mean_logps", "at least one model", tuple(aligned_mean_logps.shape))
    tensors: Any = (logps, lengths, aligned_mean_logps)
    if not _check.alike(tensors):
        dtype = _inputs.score_dtype(logps)
        tensors = [x.to(dtype) for x in tensors]
    return _function.loss("poft_loss", tensors, {"beta": beta, "gamma": gamma, "reduction": reduction})
