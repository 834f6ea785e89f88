"""A loss as per-row weights: the coefficients dloss/dlogps of any loss of log-probs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _check

Tensors = torch.Tensor | tuple[torch.Tensor, ...]


def coefficients(
    loss_fn: Callable[..., torch.Tensor], logps: Tensors, *args: Any, **kw: Any
) -> tuple[torch.Tensor, Tensors]:
    """The loss and its coefficients at detached log-probs, ready as weights of a later backward.

        loss = loss_fn(logps, *args, **kw),   c_i = dloss/dl_i;   the gradient of sum_i c_i l_i is the loss's

    Derived from the chain rule: c survives shuffling and splitting into micro-batches, whole groups do not
    have to. Works under ``torch.no_grad`` and ``torch.inference_mode``.

    Args:
        loss_fn: any loss that returns a scalar; it gets logps first.
        logps: sequence or token log-probs, float; or a tuple, given to loss_fn as its first arguments (pairs,
            EPA).
        *args: passed on.
        **kw: passed on.

    Returns:
        The detached loss, and the coefficients: shape and dtype of logps, a tuple for a tuple.

    Raises:
        TypeError, ValueError: logps not float tensors; a loss that is not a scalar or has no graph; what loss_fn
            raises.
    """
    if not callable(loss_fn):
        _check.bad_type("loss_fn", "a loss of log-probs", type(loss_fn).__name__)
    single = isinstance(logps, torch.Tensor)
    if not single and not (isinstance(logps, tuple) and logps):
        _check.bad_type("logps", "a tensor or a tuple of tensors", type(logps).__name__)
    given = (logps,) if isinstance(logps, torch.Tensor) else logps
    for x in given:
        _check.tensor("logps", x)
    # Out of inference mode the clones are ordinary tensors, which autograd may save.
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in given]
        args = tuple(_ordinary(x) for x in args)
        loss = loss_fn(*leaves, *args, **{name: _ordinary(x) for name, x in kw.items()})
        if not isinstance(loss, torch.Tensor) or loss.ndim:
            got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            _check.bad_value("loss_fn", "a scalar loss", got)
        if not loss.requires_grad:
            _check.bad_value("loss_fn", "a loss with a graph to the log-probs it is given", "one without")
        # What the loss does not depend on has zeros.
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return loss.detach(), grads[0] if single else grads


def _ordinary(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x
