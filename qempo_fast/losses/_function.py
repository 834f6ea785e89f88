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

from .. import _backends, _check
from .._backends import OPS
from .._operator import apply_of
from ..reference import groups
from ..reference.once import once
from . import op as _op
from ._values import blame, checked, solid


def _scaled(coefs: tuple[torch.Tensor, ...], grad: torch.Tensor) -> Sequence[torch.Tensor]:
    """Each of coefs times grad, a scalar or one number a row."""
    if grad.ndim:
        return [_op.times(coef, grad) for coef in coefs]
    return torch._foreach_mul(coefs, grad) if len(coefs) > 1 else (coefs[0] * grad,)


def _scaled_once(ctx: Any, grad: torch.Tensor) -> Sequence[torch.Tensor | None]:
    with torch.no_grad():
        grads = _scaled(ctx.saved_tensors, grad)
    return once(ctx.op, grads, (grad, *ctx.policy))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *policy: torch.Tensor) -> torch.Tensor:
        ctx.op, run, args, settings = call
        value, coefs = run(*args, **settings)
        if len(policy) > 1 and ctx.needs_input_grad.count(False) > 1:
            coefs = [coef for coef, need in zip(coefs, ctx.needs_input_grad[1:], strict=True) if need]
        ctx.save_for_backward(*coefs)
        ctx.policy = policy  # a graph of the gradients leads to them
        return value

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # A graph of the gradients is asked for by create_graph alone.
        grads = _scaled_once(ctx, grad) if torch.is_grad_enabled() else _scaled(ctx.saved_tensors, grad)
        needs = ctx.needs_input_grad
        if len(grads) + 1 == len(needs):
            return None, *grads
        each = iter(grads)
        return None, *[next(each) if need else None for need in needs[1:]]


_apply = apply_of(_Fused)


def loss(op: str, args: Sequence[Any], settings: dict[str, Any]) -> torch.Tensor:
    """The loss op of arguments that are checked but for their values, on the backend of their device."""
    first = args[0]
    if _check.traced(first):
        backend = _backends.choose(op, first.device)
        # On meta nothing runs, and plain torch would read the offsets.
        plain = backend == "reference" and not first.is_meta
        return _plain(op, args, settings) if plain else _op.loss(op, backend, args, settings)
    backend, run = _backends.default(op, first.device)
    if backend == "reference":
        return _plain(op, args, settings)
    policy = args[: OPS[op].policy]
    # One look for all: each asks whether values on a GPU may be read.
    if backend not in _op.CHECKING and _check.may_read(first):
        args, settings = checked(op, args, settings)
    given, settings = solid(op, args, settings)
    try:
        if torch.is_grad_enabled():
            for x in policy:
                if x.requires_grad:
                    return _apply((op, run, given, settings), *policy)
        return run(*given, **settings)[0]
    except RuntimeError:
        blame(op, given, settings)
        raise


def _plain(op: str, args: Sequence[Any], settings: dict[str, Any]) -> torch.Tensor:
    """The plain torch loss."""
    if not _check.traced(args[0]):
        blame(op, args, settings)
    policy = args[: OPS[op].policy]
    args, settings = checked(op, (*policy, *map(_detached, args[len(policy) :])), settings)
    reference = OPS[op].reference
    assert reference is not None
    return reference(*args, **settings)


def _detached(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach()


def advantages(rewards: torch.Tensor, **settings: Any) -> torch.Tensor:
    """group_advantages of rewards without a graph, on the backend of their device."""
    op, args = "group_advantages", (rewards,)
    # No kernel of it is an operator: while a call is traced, the plain torch definition joins the graph.
    if _check.traced(rewards):
        if rewards.is_meta and settings["offsets"] is not None:
            _check.present("offsets", settings["offsets"])
        args, settings = checked(op, args, settings)
        return groups.group_advantages(*args, **settings)
    backend, run = _backends.default(op, rewards.device)
    if backend not in _op.CHECKING:
        args, settings = checked(op, args, settings)
    given, settings = solid(op, args, settings)
    return run(*given, **settings)
