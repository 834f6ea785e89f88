"""The ops of log-probs over kept sets in torch's library of operators, as op.py has those over all tokens."""

from __future__ import annotations

from typing import Any

import torch

from .. import _check
from .._operator import differentiable
from ..reference.once import once
from ._function import head_of, pick, scatter
from ._head import RowGrads
from ._inputs import check_values
from ._options import Options, accumulator
from ._support import Backend, Sets, backward, forward, logits_backward, logits_forward, sets_of
from .op import UNSAFE, check_head, check_rows, options_of
from .support import Support, check, check_ids

_Optional = torch.Tensor | None
_T = torch.Tensor


def _sets(x: torch.Tensor, support: Support, targets: torch.Tensor, vocabulary: int, ignore_index: int) -> Sets:
    check(support, len(x), x.device)
    check_ids(support, vocabulary)
    return sets_of(support, targets, targets != ignore_index, 0, vocabulary, vocabulary)


def _full(x: _Optional, live: _Optional, n: int, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if x is None else scatter(x, live, n)


def _grads(lse: torch.Tensor, entropy: torch.Tensor, live: _Optional, g: torch.Tensor, gh: _Optional) -> RowGrads:
    rows = (None if x is None else pick(x, live).contiguous() for x in (lse, g, gh, None if gh is None else entropy))
    return RowGrads(*rows)  # type: ignore[arg-type]


@torch.library.custom_op("qempo_fast::support_logps_fwd", mutates_args=(), tags=UNSAFE)
def support_logps_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    logit_scale: torch.Tensor,
    softcap: torch.Tensor | None,
    ignore_index: int,
    entropy: bool,
    sum_sq: bool,
    wide: bool,
    backend: str,
) -> tuple[_T, _T, _T, _T, _T, _T]:
    """logps, entropy, sum_sq, and to keep: lse (N, 2), found (N,) bool as Sets has it, and raw logits (M,)."""
    check_rows("hidden", hidden, targets, inv_temperature, {})
    check_head(hidden, weight, bias, wide)
    check_values(targets, len(weight), inv_temperature, ignore_index)
    sets = _sets(hidden, Support(ids, offsets), targets, len(weight), ignore_index)
    options = options_of(logit_scale, softcap, None, None, entropy, sum_sq, 0, wide=wide)
    head = head_of(hidden, weight, bias, targets, inv_temperature, sets.live)
    z, stats = forward(head, sets, options, Backend.of(backend, hidden.device))
    lse, n = stats.lse(), len(hidden)
    rows = (stats.logps(lse), stats.entropy(), stats.log_sum_sq(), lse)
    full = [_full(x, sets.live, n, lse) for x in rows]
    return *full, sets.found, scatter(z, sets.at, len(ids))  # type: ignore[return-value]


@support_logps_fwd.register_fake
def _(
    hidden: Any, weight: Any, bias: Any, ids: Any, offsets: Any, targets: Any, inv_temperature: Any, scale: Any,
    softcap: Any, ignore_index: int, entropy: bool, sum_sq: bool, wide: bool, backend: str,
) -> Any:  # fmt: skip
    n, acc = hidden.shape[0], accumulator(hidden.dtype)
    shapes = ((n,), (n if entropy else 0,), (n if sum_sq else 0,), (n, 2))
    out = [hidden.new_empty(shape, dtype=acc) for shape in shapes]
    return *out, hidden.new_empty(n, dtype=torch.bool), hidden.new_empty(ids.shape[0], dtype=acc)


@torch.library.custom_op("qempo_fast::support_logps_bwd", mutates_args=(), tags=UNSAFE)
def support_logps_bwd(
    grad: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    z: torch.Tensor,
    logit_scale: torch.Tensor,
    softcap: torch.Tensor | None,
    needs: list[bool],
    ignore_index: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h = None if grad_entropy is None else entropy
    check_rows(
        *("hidden", hidden, targets, inv_temperature),
        {"grad": grad, "grad_entropy": grad_entropy, "lse": lse, "entropy": h},
    )
    check_head(hidden, weight, bias, False)
    check_values(targets, len(weight), inv_temperature, ignore_index)
    sets = _sets(hidden, Support(ids, offsets), targets, len(weight), ignore_index)
    _check.tensor("z", z, dtypes=(lse.dtype,), shape=ids.shape, device=hidden.device)
    head = head_of(hidden, weight, bias, targets, inv_temperature, sets.live)
    three = backward(
        *(head, sets, pick(z, sets.at).contiguous(), _grads(lse, entropy, sets.live, grad, grad_entropy)),
        *(options_of(logit_scale, softcap, None, None, h is not None, False, 0), Backend.of(backend, hidden.device)),
        *((needs[0], needs[1], needs[2]), len(hidden)),
    )
    dh, dw, db = three
    db = None if db is None or bias is None else db.to(bias.dtype)
    return tuple(hidden.new_empty(0) if x is None else x for x in (dh, dw, db))  # type: ignore[return-value]


@support_logps_bwd.register_fake
def _(
    grad: Any, grad_entropy: Any, hidden: Any, weight: Any, bias: Any, ids: Any, offsets: Any, targets: Any,
    i: Any, lse: Any, h: Any, z: Any, scale: Any, softcap: Any, needs: Any, *settings: Any,
) -> Any:  # fmt: skip
    inputs = (hidden, weight, bias)
    return tuple(x.new_empty(x.shape) if need else hidden.new_empty(0) for x, need in zip(inputs, needs, strict=True))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, scale, softcap, ignore_index, ctx.entropy, _, _, backend = inputs
    _, h, sum_sq, lse, found, z = output
    ctx.save_for_backward(*tensors, lse, h, z, scale, softcap)
    ctx.settings = ignore_index, backend
    ctx.mark_non_differentiable(sum_sq, lse, found, z)
    ctx.set_materialize_grads(False)


def _linear_backward(ctx: Any, grad: _Optional, grad_entropy: _Optional, *_: Any) -> tuple[Any, ...]:
    needs, saved = list(ctx.needs_input_grad[:3]), ctx.saved_tensors
    of_entropy = grad_entropy if ctx.entropy else None
    if grad is None:
        grad = torch.zeros_like(saved[7][:, 0])  # of lse's dtype
    with torch.no_grad():
        three = support_logps_bwd(grad, of_entropy, *saved, needs, *ctx.settings)
    grads = [g if need else None for g, need in zip(three, needs, strict=True)]
    return *once("linear_logps", grads, (grad, of_entropy, *saved[:3])), *[None] * 11


linear = differentiable(support_logps_fwd, _linear_setup, _linear_backward)


@torch.library.custom_op("qempo_fast::support_from_logits_fwd", mutates_args=(), tags=UNSAFE)
def support_from_logits_fwd(
    logits: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    ignore_index: int,
    entropy: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logps, entropy, and to keep: lse (N, 2), and found (N,) bool as Sets has it."""
    check_rows("logits", logits, targets, inv_temperature, {})
    check_values(targets, logits.shape[1], inv_temperature, ignore_index)
    sets = _sets(logits, Support(ids, offsets), targets, logits.shape[1], ignore_index)
    options = Options(1.0, None, entropy, False, None, 0, None)
    stats = logits_forward(logits, inv_temperature, sets, options, Backend.of(backend, logits.device))
    lse, n = stats.lse(), len(logits)
    full = [_full(x, sets.live, n, lse) for x in (stats.logps(lse), stats.entropy(), lse)]
    return *full, sets.found  # type: ignore[return-value]


@support_from_logits_fwd.register_fake
def _(logits: Any, ids: Any, offsets: Any, targets: Any, i: Any, ignore_index: int, entropy: bool, backend: str) -> Any:
    n, acc = logits.shape[0], accumulator(logits.dtype)
    out = [logits.new_empty(shape, dtype=acc) for shape in ((n,), (n if entropy else 0,), (n, 2))]
    return *out, logits.new_empty(n, dtype=torch.bool)


@torch.library.custom_op("qempo_fast::support_from_logits_bwd", mutates_args=(), tags=UNSAFE)
def support_from_logits_bwd(
    grad: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    logits: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    ignore_index: int,
    backend: str,
) -> torch.Tensor:
    h = None if grad_entropy is None else entropy
    check_rows(
        *("logits", logits, targets, inv_temperature),
        {"grad": grad, "grad_entropy": grad_entropy, "lse": lse, "entropy": h},
    )
    check_values(targets, logits.shape[1], inv_temperature, ignore_index)
    sets = _sets(logits, Support(ids, offsets), targets, logits.shape[1], ignore_index)
    options = Options(1.0, None, h is not None, False, None, 0, None)
    grads = _grads(lse, entropy, sets.live, grad, grad_entropy)
    return logits_backward(logits, inv_temperature, sets, grads, options, Backend.of(backend, logits.device))


@support_from_logits_bwd.register_fake
def _(grad: Any, grad_entropy: Any, logits: Any, *_: Any) -> Any:
    return logits.new_empty(logits.shape)


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ignore_index, ctx.entropy, backend = inputs
    _, h, lse, found = output
    ctx.save_for_backward(*tensors, lse, h)
    ctx.settings = ignore_index, backend
    ctx.mark_non_differentiable(lse, found)


def _logits_backward(ctx: Any, grad: torch.Tensor, grad_entropy: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    saved, of_entropy = ctx.saved_tensors, grad_entropy if ctx.entropy else None
    with torch.no_grad():
        out = support_from_logits_bwd(grad, of_entropy, *saved, *ctx.settings)
    return *once("logps_from_logits", (out,), (grad, of_entropy, saved[0])), *[None] * 7


from_logits = differentiable(support_from_logits_fwd, _logits_setup, _logits_backward)
