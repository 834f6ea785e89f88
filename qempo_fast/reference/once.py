"""Gradients that can be differentiated no further, and say so where someone tries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_Optional = torch.Tensor | None
_kinds = torch._C._functorch


class _Once(torch.autograd.Function):
    """Passes gradients on; depends on all that they depend on, so that a second derivative comes here."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.op}: differentiable once, and a second derivative was asked for")


def batched(grad: torch.Tensor) -> bool:
    """Whether grad is a batch of gradients, which has no address."""
    return _kinds.is_batchedtensor(grad) or _kinds.is_legacy_batchedtensor(grad)


def single(*grads: _Optional) -> None:
    """Refuse a batch of gradients where a backward pass takes one."""
    for grad in grads:
        if grad is not None and batched(grad):
            raise ValueError(
                "grad: wanted one gradient, got a batch of them (is_grads_batched); torch.func.jacrev works"
            )


def once(op: str, grads: Sequence[_Optional], inputs: Sequence[_Optional]) -> tuple[_Optional, ...]:
    """grads, which a backward pass made without a graph, and which depend on inputs.

    torch's once_differentiable speaks up only where an incoming gradient needs a gradient. Of f(x).sum() none does: a
    Hessian product was 0, and a gradient penalty changed nothing.
    """
    given = [x for x in inputs if x is not None and x.requires_grad]
    made = [g for g in grads if g is not None]
    if not torch.is_grad_enabled() or not given:
        return tuple(grads)
    marked = iter(_Once.apply(op, len(made), *made, *given))
    return tuple(None if g is None else next(marked) for g in grads)
