"""weighted_logps in torch's library of operators, as torch.compile, torch.export and torch.func take it."""

from __future__ import annotations

from typing import Any

import torch

from .. import _backends, _check
from .._operator import differentiable
from ..reference.once import once
from ._inputs import check_values
from ._options import accumulator
from ._slopes import slopes_dtype
from ._weighted import of_coefficients, weighted
from .op import UNSAFE, check_head, check_rows, options_of

_T = torch.Tensor
_Seven = tuple[_T, _T, _T, _T, _T, _T, _T]


@torch.library.custom_op("qempo_fast::weighted_logps", mutates_args=(), tags=UNSAFE)
def weighted_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    coef: torch.Tensor,
    coef_entropy: torch.Tensor | None,
    seed: torch.Tensor | None,
    logit_scale: torch.Tensor,
    softcap: torch.Tensor | None,
    tau: torch.Tensor | None,
    error: torch.Tensor | None,
    ignore_index: int,
    entropy: bool,
    wide: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> _Seven:
    """loss (), logps, entropy, and the fields of Weighted after them; what is not there is empty."""
    coefficients = {"coef": coef, "coef_entropy": coef_entropy}
    check_rows("hidden", hidden, targets, inv_temperature, coefficients)
    check_head(hidden, weight, bias, wide)
    vocabulary = weight.shape[0]
    check_values(targets, vocabulary, inv_temperature, ignore_index)
    if seed is not None:
        _check.tensor("seed", seed, dtypes=(torch.int64,), shape=())
    drawn = 0 if seed is None else int(seed)
    options = options_of(logit_scale, softcap, tau, error, entropy or coef_entropy is not None, False, drawn, wide=wide)
    tiles = _backends.kernel("linear_logps", hidden.device, backend)()
    made = weighted(
        *(tiles, (hidden, weight, bias), targets, inv_temperature, (coef, coef_entropy), ignore_index),
        *((0, vocabulary), options, (need_hidden, need_weight, need_bias and bias is not None)),
    )
    return tuple(made.logps.new_empty(0) if x is None else x for x in made)  # type: ignore[return-value]


@weighted_logps.register_fake
def _(
    hidden: Any, weight: Any, bias: Any, targets: Any, inv_temperature: Any, coef: Any, coef_entropy: Any, seed: Any,
    logit_scale: Any, softcap: Any, tau: Any, error: Any, ignore_index: int, entropy: bool, wide: bool,
    need_hidden: bool, need_weight: bool, need_bias: bool, backend: str,
) -> Any:  # fmt: skip
    n, acc, kind = hidden.shape[0], accumulator(hidden.dtype), slopes_dtype(hidden.dtype)
    if tau is not None or error is not None:
        kind = hidden.dtype
    rows = hidden.new_empty(n, dtype=acc)
    sums = entropy or coef_entropy is not None
    none = hidden.new_empty(0, dtype=acc)
    return (
        *(hidden.new_empty((), dtype=acc), rows, torch.empty_like(rows) if sums else none),
        hidden.new_empty(hidden.shape, dtype=kind) if need_hidden else none.clone(),
        weight.new_empty(weight.shape, dtype=kind) if need_weight else none.clone(),
        none.new_empty(weight.shape[0]) if need_bias and bias is not None else none.clone(),
        none.new_empty(()) if hidden.dtype == torch.float16 else none.clone(),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3], *inputs[5:7], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Any, *_: Any) -> tuple[Any, ...]:
    *inputs, logps, entropy, dh, dw, db, unit = ctx.saved_tensors
    if grad is None:
        return (None,) * 19
    needs, factor = ctx.needs_input_grad, grad * unit if unit.ndim == 0 else grad
    grads = [
        (made * factor).to(x.dtype) if need else None
        for x, made, need in zip(inputs[:3], (dh, dw, db), needs[:3], strict=True)
    ]
    with torch.no_grad():
        grads += of_coefficients(grad, (inputs[3], inputs[4]), (logps, entropy), (needs[5], needs[6]))
    done = once("weighted_logps", grads, (grad, *inputs))
    return *done[:3], None, None, *done[3:], *[None] * 12


op = differentiable(weighted_logps, _setup, _backward)
