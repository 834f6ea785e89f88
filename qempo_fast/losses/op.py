"""The losses in torch's library of operators, as torch.compile and torch.export take them.

Eager calls go to the autograd function of _function.py instead: an operator costs 30 to 60 microseconds a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import _backends
from .._backends import OPS
from ._values import arguments, checked

# Backends that check values in the pass that computes, and raise what checked() would.
CHECKING = ("cpu",)

# The annotations of the reference functions as a schema has them.
_TYPES = {
    "torch.Tensor": "Tensor",
    "torch.Tensor | None": "Tensor?",
    "float": "float",
    "int": "int",
    "int | None": "int?",
    "str": "str",
    "str | float": "Scalar",
}
# A schema has no union of words and numbers: these stand for the words of normalize, whose numbers are above 0.
NORMALIZE = {"sequence": 0, "token": -1}


def _schema(op: str) -> str:
    tensors, others = arguments(op)
    parts = [f"{_TYPES[annotation]} {name}" for name, annotation in (tensors | others).items()]
    return f"({', '.join(parts)}, str backend) -> ({', '.join(['Tensor'] * (1 + OPS[op].policy))})"


def checked_run(op: str, backend: str, args: Sequence[Any], settings: dict[str, Any]) -> Any:
    """(value, coefs) of arguments whose values are not checked yet."""
    if backend not in CHECKING:
        args, settings = checked(op, args, settings)
    run = _backends.kernel(op, args[0].device, backend)
    return run(*[None if x is None else x.contiguous() for x in args], **settings)


def _operator(op: str) -> Any:
    tensors, others = arguments(op)
    positional, keywords, count = len(tensors), list(others), OPS[op].policy

    def forward(*given: Any) -> tuple[torch.Tensor, ...]:
        settings = dict(zip(keywords, given[positional:-1], strict=True))
        if settings.get("normalize", 1) <= 0:
            settings["normalize"] = {number: word for word, number in NORMALIZE.items()}[settings["normalize"]]
        value, coefs = checked_run(op, given[-1], given[:positional], settings)
        return value, *coefs

    def fake(*given: Any) -> tuple[torch.Tensor, ...]:
        settings = dict(zip(keywords, given[positional:-1], strict=True))
        shape = given[0].shape if settings.get("reduction") == "none" else ()
        return given[0].new_empty(shape), *[torch.empty_like(x) for x in given[:count]]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])

    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        needs = zip(ctx.saved_tensors, ctx.needs_input_grad[:count], strict=True)
        grads = [times(coef, grad) if need else None for coef, need in needs]
        return *grads, *[None] * (positional + len(keywords) + 1 - count)

    operator = torch.library.custom_op(f"qempo_fast::{op}", forward, mutates_args=(), schema=_schema(op))
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=setup)
    return operator


def times(coef: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """coef times grad, a scalar or one number a row."""
    return coef * (grad[:, None] if grad.ndim and coef.ndim > 1 else grad)


_OPERATORS = {op: _operator(op) for op, row in OPS.items() if row.policy}
_KEYWORDS = {op: tuple(arguments(op)[1]) for op in _OPERATORS}


def loss(op: str, backend: str, args: Sequence[Any], settings: dict[str, Any]) -> torch.Tensor:
    """The loss op as one node of the graph."""
    if "normalize" in settings:
        settings = {**settings, "normalize": NORMALIZE.get(settings["normalize"], settings["normalize"])}
    return _OPERATORS[op](*args, *[settings.get(name) for name in _KEYWORDS[op]], backend)[0]
