"""Coefficients that a training loop knows before its forward, on their way through a framework to the output head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

import qempo_fast as qf

from .. import _check

_coefficients: ContextVar[torch.Tensor | None] = ContextVar("coefficients", default=None)
# Of the largest: loss code multiplies coefficients in float32 in another order than who foretold them.
_TOLERANCE = 1e-4


@contextmanager
def known_coefficients(coefficients: torch.Tensor | None) -> Iterator[None]:
    """Around a forward with gradients whose loss will have these coefficients: they are then made in it, at 6NDV.

        dloss/dlogps = s coefficients,   with one number s, which the backward finds and may be anything

    Log-probs come out as ever, and any loss code may follow. The gradient that arrives at them is compared with the
    coefficients; where it is not proportional to them the backward raises (on CPU; on a GPU gradients are NaN). The
    entropy has no gradient then. Under torch.compile nothing is foretold. ``fused_forward``, and ``use_fused_logps`` of
    TRL, verl and OpenRLHF all look here. Under their batch_invariant=True ``linear_logps`` runs as if nothing were
    known, at up to 8NDV and with nothing compared: ``weighted_logps`` keeps no row's bits.

    Args:
        coefficients: float, one for each label that the head scores: shaped like labels for ``fused_forward``; for
            verl's slots one for each label; for TRL's seam one for each row that TRL hands it (trl.kernel.seam_rows).
            None: nothing is known, as without.

    Raises:
        TypeError, ValueError: naming coefficients; in the forward where their number is not that of the labels.
    """
    if coefficients is not None:
        _check.tensor("coefficients", coefficients)
    token = _coefficients.set(coefficients)
    try:
        yield
    finally:
        _coefficients.reset(token)


def scored(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, shift: int = 0, **options: Any
) -> qf.TokenLogps | qf.TokenScores:
    """linear_logps; of known coefficients with its gradient made already. shift: labels that the head leaves out."""
    # A graph would keep those of the step that it was traced with.
    coefficients = None if torch.compiler.is_compiling() else _coefficients.get()
    # Kept sets have no logits to make a second time: nothing is gained there. weighted_logps keeps no row's bits.
    other = options.get("support") is not None or options.get("batch_invariant", False)
    if coefficients is None or other or not torch.is_grad_enabled():
        return qf.linear_logps(hidden, weight, targets, **options)
    options.pop("batch_invariant", None)
    coefficients = coefficients.detach()
    if shift and coefficients.ndim == targets.ndim:
        coefficients = coefficients[:, shift:]
    if coefficients.numel() != targets.numel():
        wanted = f"one for each of {targets.numel()} labels that the head scores"
        _check.bad_value("coefficients", wanted, coefficients.numel())
    if options.pop("sum_sq", False):
        _check.bad_value("sum_sq", "False with known coefficients", True)
    coefficients = coefficients.reshape(targets.shape).to(hidden.device)
    made = qf.weighted_logps(hidden, weight, targets, coefficients, **options)
    counted = targets != options.get("ignore_index", -100)
    return qf.TokenLogps(_Foretold.apply(made.loss, made.logps, coefficients, counted), made.entropy, None)


class _Foretold(torch.autograd.Function):
    """logps, whose gradient is a multiple of the coefficients that loss was made with."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, loss: torch.Tensor, logps: torch.Tensor, coefficients: torch.Tensor, counted: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(coefficients, counted)
        return logps.view_as(logps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        coefficients, counted = ctx.saved_tensors
        g, c = (x.double().where(counted, 0.0).flatten() for x in (grad, coefficients))
        if not len(c):
            return grad.new_zeros(()), None, None, None
        # By the largest, as the others' share in it has the fewest digits.
        largest = c.abs().argmax().reshape(1)  # an index of one number would be read
        at_most, arrived = c.index_select(0, largest), g.index_select(0, largest)
        scale = torch.where(at_most == 0, 0.0, arrived / at_most).squeeze(0)
        fits = (g - scale * c).abs().amax() <= _TOLERANCE * g.abs().amax()
        if grad.device.type == "cpu" and not bool(fits) and bool(g.isfinite().all()):
            wanted = "those of the loss, up to one factor (known_coefficients)"
            _check.bad_value("coefficients", wanted, f"others: off by {float((g - scale * c).abs().amax()):.3g}")
        return scale.where(fits, torch.nan).to(grad.dtype), None, None, None
