"""The seam between the losses and their kernels: one autograd function for every loss and backend.

A backend registers, under the op names of POLICY, run(...) with exactly the arguments of the reference function of that
name. run gets contiguous tensors of one dtype, float32 or float64, and returns (value, coefs): value is the scalar, or
(B,) for reduction "none"; coefs has d value / d argument for each of the first POLICY[op] arguments, each a tensor of
its own in that argument's shape (for "none", d value_b / d argument_b row by row). The backward pass is one multiply,
on a GPU one launch for all arguments. "reference" is the plain torch loss itself, with torch's own graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .. import _backends
from . import _op
from ._values import CHECKS, POLICY


def _scaled(coefs: Sequence[torch.Tensor], grad: torch.Tensor) -> Sequence[torch.Tensor]:
    """Each of coefs times grad, a scalar or one number a row."""
    if len(coefs) == 1:
        return (_op.times(coefs[0], grad),)
    if not grad.ndim:
        return torch._foreach_mul(tuple(coefs), grad)
    return [_op.times(coef, grad) for coef in coefs]


@once_differentiable
def _scaled_once(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(_scaled(ctx.saved_tensors, grad))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *policy: torch.Tensor) -> torch.Tensor:
        run, args, settings = call
        value, coefs = run(*args, **settings)
        if len(policy) > 1 and False in ctx.needs_input_grad[1:]:
            coefs = [coef for coef, need in zip(coefs, ctx.needs_input_grad[1:], strict=True) if need]
        ctx.save_for_backward(*coefs)
        return value

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # once_differentiable takes 2 of a small loss's 20 microseconds and says nothing without create_graph.
        grads = _scaled_once(ctx, grad) if torch.is_grad_enabled() else _scaled(ctx.saved_tensors, grad)
        if len(grads) + 1 == len(ctx.needs_input_grad):
            return None, *grads
        each = iter(grads)
        return None, *[next(each) if need else None for need in ctx.needs_input_grad[1:]]


def loss(op: str, *args: Any, **settings: Any) -> torch.Tensor:
    """The loss op of arguments that are checked but for their values, on the backend of their device."""
    policy = args[: POLICY[op]]
    backend, run = _backends.default(op, args[0].device)
    if backend == "reference":
        args, settings = CHECKS[op](*policy, *map(_detached, args[len(policy) :]), **settings)
        return run(*args, **settings)
    if torch.compiler.is_compiling():
        return _op.loss(op, backend, args, settings)
    if backend not in _op.CHECKING:
        args, settings = CHECKS[op](*args, **settings)
    given = [x if x is None else x.contiguous() for x in args]
    if torch.is_grad_enabled():
        for x in policy:
            if x.requires_grad:
                return _Fused.apply((run, given, settings), *policy)
    return run(*given, **settings)[0]


def _detached(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach()


def advantages(rewards: torch.Tensor, **settings: Any) -> torch.Tensor:
    """group_advantages of rewards without a graph, on the backend of their device."""
    backend, run = _backends.default("group_advantages", rewards.device)
    # No kernel of it is an operator: while torch.compile traces, the plain torch definition joins the graph.
    if torch.compiler.is_compiling():
        backend, run = "reference", _backends.kernel("group_advantages", rewards.device, "reference")
    args: tuple[Any, ...] = (rewards,)
    if backend not in _op.CHECKING:
        args, settings = CHECKS["group_advantages"](rewards, **settings)
    return run(*args, **settings)
