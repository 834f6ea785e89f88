"""The seam between the losses and their kernels: one autograd function for every loss and backend.

A backend's function of an op takes exactly the arguments of the op's reference function. It gets contiguous tensors of
one dtype, float32 or float64, and returns (value, coefs): value is the scalar, or (B,) for reduction "none"; coefs has
d value / d argument for each of the first OPS[op].policy arguments, each a tensor of its own in that argument's shape
(for "none", d value_b / d argument_b row by row). The backward pass is one multiply,
on a GPU one launch for all arguments. "reference" is the plain torch loss itself, with torch's own graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .. import _backends, _check
from .._backends import OPS
from ..reference import groups
from . import op as _op
from ._values import checked


def _scaled(coefs: tuple[torch.Tensor, ...], grad: torch.Tensor) -> Sequence[torch.Tensor]:
    """Each of coefs times grad, a scalar or one number a row."""
    if grad.ndim:
        return [_op.times(coef, grad) for coef in coefs]
    return torch._foreach_mul(coefs, grad) if len(coefs) > 1 else (coefs[0] * grad,)


@once_differentiable
def _scaled_once(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(_scaled(ctx.saved_tensors, grad))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *policy: torch.Tensor) -> torch.Tensor:
        run, args, settings = call
        value, coefs = run(*args, **settings)
        if len(policy) > 1 and ctx.needs_input_grad.count(False) > 1:
            coefs = [coef for coef, need in zip(coefs, ctx.needs_input_grad[1:], strict=True) if need]
        ctx.save_for_backward(*coefs)
        return value

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # once_differentiable takes 2 of a small loss's 20 microseconds and says nothing without create_graph.
        grads = _scaled_once(ctx, grad) if torch.is_grad_enabled() else _scaled(ctx.saved_tensors, grad)
        needs = ctx.needs_input_grad
        if len(grads) + 1 == len(needs):
            return None, *grads
        each = iter(grads)
        return None, *[next(each) if need else None for need in needs[1:]]


# Function.apply's own step in Python looks for functorch's wrappers in each argument, 2 microseconds.
_apply = super(torch.autograd.Function, _Fused).apply
_in_functorch = torch._C._are_functorch_transforms_active


def loss(op: str, args: Sequence[Any], settings: dict[str, Any]) -> torch.Tensor:
    """The loss op of arguments that are checked but for their values, on the backend of their device."""
    first = args[0]
    if torch.compiler.is_compiling():
        backend = _backends.choose(op, first.device)
        return _plain(op, args, settings) if backend == "reference" else _op.loss(op, backend, args, settings)
    backend, run = _backends.default(op, first.device)
    if backend == "reference":
        return _plain(op, args, settings)
    policy = args[: OPS[op].policy]
    # One look for all: each asks whether values on a GPU may be read.
    if backend not in _op.CHECKING and _check.may_read(first):
        args, settings = checked(op, args, settings)
    given = [x if x is None else x.contiguous() for x in args]
    if torch.is_grad_enabled():
        for x in policy:
            if x.requires_grad:
                return (_Fused.apply if _in_functorch() else _apply)((run, given, settings), *policy)
    return run(*given, **settings)[0]


def _plain(op: str, args: Sequence[Any], settings: dict[str, Any]) -> torch.Tensor:
    """The plain torch loss."""
    policy = args[: OPS[op].policy]
    args, settings = checked(op, (*policy, *map(_detached, args[len(policy) :])), settings)
    reference = OPS[op].reference
    assert reference is not None
    return reference(*args, **settings)


def _detached(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach()


def advantages(rewards: torch.Tensor, **settings: Any) -> torch.Tensor:
    """group_advantages of rewards without a graph, on the backend of their device."""
    # No kernel of it is an operator: while torch.compile traces, the plain torch definition joins the graph.
    if torch.compiler.is_compiling():
        backend, run = "reference", groups.group_advantages
    else:
        backend, run = _backends.default("group_advantages", rewards.device)
    args: tuple[Any, ...] = (rewards,)
    if backend not in _op.CHECKING:
        args, settings = checked("group_advantages", args, settings)
    return run(*args, **settings)
