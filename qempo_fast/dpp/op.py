"""The DPP ops in torch's library of operators, as torch.compile and torch.export take it.

Eager calls go to the autograd function of reference/dpp.py instead, which costs less per call and keeps the factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _backends, _check
from .._operator import differentiable, number
from ..reference.dpp import Inputs
from ..reference.once import once
from ._inputs import check_groups

# They read the ridge, and for ragged groups the offsets: a captured graph would keep those of its first run.
_UNSAFE = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("qempo_fast::dpp_fwd", mutates_args=(), tags=_UNSAFE)
def dpp_fwd(
    x: torch.Tensor,
    log_quality: torch.Tensor | None,
    offsets: torch.Tensor | None,
    ridge: torch.Tensor,
    normalize: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Tracing cannot read values, so the checks that do are made here, where the graph runs.
    settings = number("ridge", ridge), normalize
    check_groups(x, log_quality, offsets, settings[0])
    with _check.own_dtypes(x.device.type):
        result = _backends.kernel("dpp", x.device, backend)(x, log_quality, offsets, *settings)
    return result.logdet, result.gains, result.baselines


@dpp_fwd.register_fake
def _(x: Any, log_quality: Any, offsets: Any, ridge: Any, normalize: bool, backend: str) -> Any:
    out = torch.float64 if x.dtype == torch.float64 else torch.float32
    groups = x.shape[0] if offsets is None else offsets.shape[0] - 1
    return tuple(x.new_empty(shape, dtype=out) for shape in ((groups,), x.shape[:-1], x.shape[:-1]))


@torch.library.custom_op("qempo_fast::dpp_bwd", mutates_args=(), tags=_UNSAFE)
def dpp_bwd(
    grad_logdet: torch.Tensor | None,
    grad_gains: torch.Tensor | None,
    x: torch.Tensor,
    log_quality: torch.Tensor | None,
    offsets: torch.Tensor | None,
    ridge: torch.Tensor,
    normalize: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    # What a kernel keeps has a shape of its own, and for ragged groups one that depends on the offsets' values, which
    # a graph cannot hold: the forward pass is made again.
    settings = number("ridge", ridge), normalize
    check_groups(x, log_quality, offsets, settings[0])
    result = _backends.kernel("dpp", x.device, backend)(x, log_quality, offsets, *settings)
    for name, grad, like in (("grad_logdet", grad_logdet, result.logdet), ("grad_gains", grad_gains, result.gains)):
        if grad is not None:
            _check.tensor(name, grad, dtypes=(like.dtype,), shape=like.shape, device=like.device)
    inputs = Inputs(x, log_quality, offsets)
    with _check.own_dtypes(x.device.type):
        grad_x, grad_quality = result.bwd((grad_logdet, grad_gains), inputs, result.saved, *settings)
    assert grad_x is not None
    return grad_x.contiguous(), x.new_empty(0) if grad_quality is None else grad_quality.contiguous()


@dpp_bwd.register_fake
def _(_: Any, __: Any, x: Any, log_quality: Any, *settings: Any) -> Any:
    quality = x.new_empty(0) if log_quality is None else log_quality.new_empty(log_quality.shape)
    return x.new_empty(x.shape), quality


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.settings = inputs[4:]
    ctx.save_for_backward(*inputs[:4])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logdet: Any, grad_gains: Any, _: Any) -> tuple[Any, ...]:
    if grad_logdet is None and grad_gains is None:
        return (None,) * 6
    saved = ctx.saved_tensors
    with torch.no_grad():
        grads = dpp_bwd(grad_logdet, grad_gains, *saved, *ctx.settings)
    wanted = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[:2], strict=True)]
    return *once("dpp_gains", wanted, (grad_logdet, grad_gains, *saved[:2])), None, None, None, None


run = differentiable(dpp_fwd, _setup, _backward)


def select(
    run: Callable[..., torch.Tensor],
    x: torch.Tensor,
    n: int,
    log_quality: torch.Tensor | None,
    offsets: torch.Tensor | None,
    ridge: float,
) -> torch.Tensor:
    """Greedy selection, after a check that n samples are in each ragged group."""
    if offsets is not None and offsets.numel() > 1 and _check.readable(offsets):
        _check.integer("n", n, low=1, high=int(offsets.diff().min()))
    return run(x, n, log_quality=log_quality, offsets=offsets, ridge=ridge)


@torch.library.custom_op("qempo_fast::dpp_select", mutates_args=(), tags=_UNSAFE)
def dpp_select(
    x: torch.Tensor,
    n: int,
    log_quality: torch.Tensor | None,
    offsets: torch.Tensor | None,
    ridge: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    check_groups(x, log_quality, offsets, number("ridge", ridge))
    _check.integer("n", n, low=1, high=x.shape[1] if offsets is None else None)
    run = _backends.kernel("dpp_select", x.device, backend)
    return select(run, x, n, log_quality, offsets, number("ridge", ridge))


@dpp_select.register_fake
def _(x: Any, n: int, log_quality: Any, offsets: Any, *_: Any) -> Any:
    return x.new_empty((x.shape[0] if offsets is None else offsets.shape[0] - 1, n), dtype=torch.int64)
