"""What a training loop knows before its forward, on its way through a framework to the output head: coefficients of
the log-probs, and the sets that tokens were drawn from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

import qempo_fast as qf

from .. import _check

_coefficients: ContextVar[torch.Tensor | None] = ContextVar("coefficients", default=None)
_sets: ContextVar[qf.Support | None] = ContextVar("sets", default=None)
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


@contextmanager
def kept_sets(support: qf.Support | None) -> Iterator[None]:
    """Around a forward of tokens that were drawn from these sets: its log-probs and entropies are over them.

    For heads that a framework calls: ``fused_forward``, and ``use_fused_logps`` of TRL, verl and OpenRLHF. Both sides
    of a ratio want it. A label whose set is empty is left out, with a log-prob of 0, as prompts and padding have none.
    Compiled modules run eagerly inside: a graph would keep the sets of the step that it was traced with.

    Args:
        support: a set for each label that the head scores: row after row of labels for ``fused_forward``; for verl's
            slots one for each label; for TRL's seam ``trl.kernel.seam_sets(support, counted)``. None: nothing is kept.

    Raises:
        TypeError, ValueError: naming support; in the forward where their number is not that of the labels.
    """
    if support is None:
        yield
        return
    if not isinstance(support, qf.Support):
        _check.bad_type("support", "a qempo_fast.Support or None", type(support).__name__)
    token = _sets.set(support)
    try:
        with torch.compiler.set_stance("force_eager"):  # type: ignore[no-untyped-call]
            yield
    finally:
        _sets.reset(token)


def refuse_under_sets(reason: str) -> None:
    """Raise where log-probs over the whole vocabulary would come out in spite of kept_sets."""
    if _sets.get() is not None:
        _check.bad_value("support", f"None where a framework's own log-probs have to run: {reason}", "kept_sets")


def lined_up(support: Any, shape: torch.Size, shift: int) -> qf.Support:
    """The sets of labels (..., T) without the first shift of each row, out of one for each label."""
    count = shape.numel()
    if not isinstance(support, qf.Support) or len(support.offsets) != count + 1:
        got = len(support.offsets) - 1 if isinstance(support, qf.Support) else type(support).__name__
        _check.bad_value("support", f"a qempo_fast.Support of {count} sets, one for each label", got)
    if not shift:
        return support
    positions = torch.arange(count, device=support.offsets.device, dtype=torch.int64).view(shape)
    return support.rows(positions[..., shift:].reshape(-1))


def _of_sets(targets: torch.Tensor, shift: int, options: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """targets and options under kept_sets: shift as scored has it."""
    support = None if torch.compiler.is_compiling() else _sets.get()
    if support is None:
        return targets, options
    if options.get("support") is not None:
        _check.bad_value("support", "None at a call under kept_sets", "one")
    # Who scores the labels of one tensor without its first has sets for all of them, or for those alone.
    cut = shift if len(support.offsets) != targets.numel() + 1 else 0
    support = lined_up(support, torch.Size((*targets.shape[:-1], targets.shape[-1] + cut)), cut).to(targets.device)
    empty = (support.offsets.diff() == 0).view(targets.shape)
    targets = targets.masked_fill(empty, options.get("ignore_index", -100))
    return targets, {**options, "support": support}


def scored(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, shift: int = 0, **options: Any
) -> qf.TokenLogps | qf.TokenScores:
    """linear_logps, over the kept sets where there are; of known coefficients with its gradient made already.

    shift: labels of each row that the head leaves out.
    """
    targets, options = _of_sets(targets, shift, options)
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
    for name in ("sum_sq", "top1"):
        if options.pop(name, False):
            _check.bad_value(name, "False with known coefficients", True)
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
