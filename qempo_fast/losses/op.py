"""The losses in torch's library of operators, as torch.compile and torch.export take them.

Eager calls go to the autograd function of _function.py instead: an operator costs 30 to 60 microseconds a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import _backends, _check
from .._backends import OPS
from .._operator import differentiable, number, scalar
from ..reference.once import once
from ._values import _TENSORS, arguments, checked, solid

# Arguments of several rows a response.
_MATRICES = ("aligned_mean_logps", "strong", "weak", "ref_strong", "ref_weak")
# Backends that check values in the pass that computes, and raise what checked() would.
CHECKING = ("cpu",)

# The annotations of the reference functions as a schema has them. A float is a tensor there: see scalar().
_TYPES = {
    "torch.Tensor": "Tensor",
    "torch.Tensor | None": "Tensor?",
    "float": "Tensor",
    "int": "SymInt",
    "int | None": "SymInt?",
    "str": "str",
    "str | float": "Tensor",
}
# A tensor holds no words: these stand for the words of normalize, whose numbers are above 0.
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
    given, settings = solid(op, args, settings)
    return run(*given, **settings)


def _check_tensors(named: dict[str, Any]) -> None:
    """Tensors that a graph, or anyone, hands to an operator: what the public functions see to."""
    name, first = next(iter(named.items()))
    _check.tensor(name, first, dtypes=(torch.float32, torch.float64), ndim=1)
    # One of a pair's references without the other was an address of nothing in native code.
    refs = {name: x for name, x in named.items() if name.startswith("ref_")}
    missing = [name for name, x in refs.items() if x is None]
    if 0 < len(missing) < len(refs):
        _check.bad_value(missing[0], "a tensor, as the other references are, or no reference at all", None)
    for name, x in named.items():
        if x is None:
            continue
        if name in ("offsets", "cu_seqlens"):
            _check.tensor(name, x, dtypes=_check.INTS, ndim=1, device=first.device)
            continue
        policy = named.get(name.removeprefix("ref_"))
        wide = policy.shape if policy is not None and policy is not x else (len(first), *[-1] * (x.ndim - 1))
        shape = (len(named["cu_seqlens"]) - 1,) if name == "advantages" else wide
        _check.tensor(
            name, x, dtypes=(first.dtype,), ndim=2 if name in _MATRICES else 1, shape=shape, device=first.device
        )


def _operator(op: str) -> Any:
    tensors, others = arguments(op)
    positional, keywords, count = len(tensors), list(others), OPS[op].policy
    words = {float(code): word for word, code in NORMALIZE.items()}

    def forward(*given: Any) -> tuple[torch.Tensor, ...]:
        settings = dict(zip(keywords, given[positional:-1], strict=True))
        for name in _NUMBERS[op]:
            x = number(name, settings[name])
            settings[name] = words.get(x, x) if name == "normalize" else x
        _check_tensors(dict(zip(tensors, given, strict=False)) | {name: settings[name] for name in _TENSORS[op]})
        value, coefs = checked_run(op, given[-1], given[:positional], settings)
        return value, *coefs

    def fake(*given: Any) -> tuple[torch.Tensor, ...]:
        settings = dict(zip(keywords, given[positional:-1], strict=True))
        shape = given[0].shape if settings.get("reduction") == "none" else ()
        return given[0].new_empty(shape), *[torch.empty_like(x) for x in given[:count]]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.save_for_backward(*output[1:], *inputs[:count])
        ctx.mark_non_differentiable(*output[1:])

    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: a second reading breaks selective checkpointing
        coefs, policy = saved[:count], saved[count:]
        needs = zip(coefs, ctx.needs_input_grad[:count], strict=True)
        grads = once(op, [times(coef, grad) if need else None for coef, need in needs], (grad, *policy))
        return *grads, *[None] * (positional + len(keywords) + 1 - count)

    name, tags = f"qempo_fast::{op}", (torch.Tag.cudagraph_unsafe,) if _NUMBERS[op] else ()
    operator = torch.library.custom_op(name, forward, mutates_args=(), schema=_schema(op), tags=tags)
    operator.register_fake(fake)
    return differentiable(operator, setup, backward)


def times(coef: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """coef times grad, a scalar or one number a row."""
    return coef * (grad[:, None] if grad.ndim and coef.ndim > 1 else grad)


_KEYWORDS = {op: arguments(op)[1] for op, row in OPS.items() if row.policy}
_NUMBERS = {op: [name for name, kind in of.items() if "float" in kind] for op, of in _KEYWORDS.items()}
_OPERATORS = {op: _operator(op) for op in _KEYWORDS}


def loss(op: str, backend: str, args: Sequence[Any], settings: dict[str, Any]) -> torch.Tensor:
    """The loss op as one node of the graph."""
    if isinstance(settings.get("normalize"), str):
        settings = {**settings, "normalize": NORMALIZE[settings["normalize"]]}
    given = [scalar(settings[name]) if name in _NUMBERS[op] else settings.get(name) for name in _KEYWORDS[op]]
    return _OPERATORS[op](*args, *given, backend)[0]
