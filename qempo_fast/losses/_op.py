"""The losses in torch's library of operators, as torch.compile and torch.export take them.

Eager calls go to the autograd function of _fused.py instead: an operator costs 30 to 60 microseconds a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import _backends
from ._values import CHECKS, POLICY

# Backends that check values in the pass that computes, and raise what CHECKS would.
CHECKING = ("cpu",)

_GROUPS = "int? group_size, Tensor? offsets"
# The arguments of the reference functions, positional and by keyword; a policy's log-probs come first.
_SCHEMAS = {
    "pair_loss": (
        "Tensor chosen, Tensor rejected, Tensor? ref_chosen, Tensor? ref_rejected",
        "float alpha, float beta, float label_smoothing, str reduction",
    ),
    "group_loss": (
        "Tensor logps, Tensor? ref_logps, Tensor rewards",
        f"float alpha, float beta, {_GROUPS}, str baseline, Tensor? bonus",
    ),
    "variance_loss": ("Tensor logps, Tensor? ref_logps, Tensor rewards", f"float alpha, float beta, {_GROUPS}"),
    "epa_loss": (
        "Tensor positive, Tensor strong, Tensor weak, Tensor ref_positive, Tensor ref_strong, Tensor ref_weak",
        "float beta, str reduction",
    ),
    "poft_loss": (
        "Tensor logps, Tensor lengths, Tensor aligned_mean_logps",
        "float beta, float gamma, str reduction",
    ),
    "rspo_loss": ("Tensor logps, Tensor rewards", f"int k, {_GROUPS}, str baseline"),
    "token_loss": (
        "Tensor token_logps, Tensor old_token_logps, Tensor advantages, Tensor cu_seqlens",
        "Tensor? ref_token_logps, float kl, float eps_low, float eps_high, str ratio, Scalar normalize",
    ),
}
# A schema has no union of words and numbers: these stand for the words of normalize, whose numbers are above 0.
NORMALIZE = {"sequence": 0, "token": -1}


def _names(part: str) -> list[str]:
    return [argument.split()[1] for argument in part.split(", ")]


def checked_run(op: str, backend: str, args: Sequence[Any], settings: dict[str, Any]) -> Any:
    """(value, coefs) of arguments whose values are not checked yet."""
    if backend not in CHECKING:
        args, settings = CHECKS[op](*args, **settings)
    run = _backends.kernel(op, args[0].device, backend)
    return run(*[None if x is None else x.contiguous() for x in args], **settings)


def _operator(op: str, tensors: str, others: str) -> Any:
    positional, keywords, count = len(_names(tensors)), _names(others), POLICY[op]

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

    schema = f"({tensors}, {others}, str backend) -> ({', '.join(['Tensor'] * (1 + count))})"
    operator = torch.library.custom_op(f"qempo_fast::{op}", forward, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=setup)
    return operator


def times(coef: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """coef times grad, a scalar or one number a row."""
    return coef * (grad[:, None] if grad.ndim and coef.ndim > 1 else grad)


_OPERATORS = {op: _operator(op, *schema) for op, schema in _SCHEMAS.items()}


def loss(op: str, backend: str, args: Sequence[Any], settings: dict[str, Any]) -> torch.Tensor:
    """The loss op as one node of the graph."""
    if "normalize" in settings:
        settings = {**settings, "normalize": NORMALIZE.get(settings["normalize"], settings["normalize"])}
    return _OPERATORS[op](*args, *[settings.get(name) for name in _names(_SCHEMAS[op][1])], backend)[0]
