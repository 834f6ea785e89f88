"""The autograd layer of log-probs over kept sets: linear_logps and logps_from_logits with support=."""

from __future__ import annotations

from typing import Any

import torch

from .. import _check, _collective
from .._door import dense
from .._operator import scalar
from ..reference.once import once, single
from . import _inputs, _sharded, _support_op
from ._call import Call, Scored
from ._function import head_of, pick, scatter
from ._head import RowGrads
from ._options import Options, Wanted
from ._support import Backend, Sets, backward, forward, logits_backward, logits_forward, sets_of
from .support import Support, check_ids

_Optional = torch.Tensor | None
_Four = tuple[torch.Tensor, _Optional, _Optional, _Optional]


def row_grads(
    lse: torch.Tensor, entropy: _Optional, live: _Optional, grad: _Optional, grad_entropy: _Optional
) -> RowGrads:
    """Of the counted rows, of which lse and entropy are; grad and grad_entropy are of all."""
    g, gh = (None if x is None else dense("grad", pick(x, live).to(lse.dtype)) for x in (grad, grad_entropy))
    return RowGrads(lse, lse.new_zeros(len(lse)) if g is None else g, gh, None if gh is None else entropy)


class SupportLogps(torch.autograd.Function):
    """(logps, entropy, sum_sq, lse) of (N, D) rows over their sets, as LinearLogps; targets already checked."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: _Optional,
        targets: torch.Tensor,
        inv_temperature: _Optional,
        sets: Sets,
        backend: Backend,
        options: Options,
    ) -> _Four:
        head = head_of(hidden, weight, bias, targets, inv_temperature, sets.live)
        z, stats = forward(head, sets, options, backend)
        lse, entropy = stats.lse(), stats.entropy()
        ctx.save_for_backward(hidden, weight, bias, lse, entropy, z)
        ctx.rest = targets, inv_temperature, sets, backend, options
        ctx.set_materialize_grads(False)
        # A copy of the entropy: who edits what is returned leaves alone what the backward reads.
        outputs = [stats.logps(lse), None if entropy is None else entropy.clone(), stats.log_sum_sq()]
        outputs.append(lse if options.lse else None)
        full = [None if x is None else scatter(x, sets.live, len(hidden)) for x in outputs]
        ctx.mark_non_differentiable(*(x for x in full[2:] if x is not None))
        return tuple(full)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, grad: _Optional, grad_entropy: _Optional, *_: _Optional) -> tuple[Any, ...]:
        single(grad, grad_entropy)
        hidden, weight, bias, lse, entropy, z = ctx.saved_tensors
        targets, inv_temperature, sets, backend, options = ctx.rest
        with torch.no_grad():
            head = head_of(hidden, weight, bias, targets, inv_temperature, sets.live)
            grads = row_grads(lse, entropy, sets.live, grad, grad_entropy)
            three = backward(head, sets, z, grads, options, backend, tuple(ctx.needs_input_grad[:3]), len(hidden))
        return *once("linear_logps", three, (grad, grad_entropy, hidden, weight, bias)), *[None] * 5


class SupportFromLogits(torch.autograd.Function):
    """(logps, entropy or None) of (N, V) logits over their rows' sets."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: torch.Tensor,
        inv_temperature: _Optional,
        sets: Sets,
        backend: Backend,
        options: Options,
    ) -> tuple[torch.Tensor, _Optional]:
        stats = logits_forward(logits, inv_temperature, sets, options, backend)
        lse, entropy = stats.lse(), stats.entropy()
        ctx.save_for_backward(logits, lse, entropy)
        ctx.rest = inv_temperature, sets, backend, options
        ctx.set_materialize_grads(False)
        h = None if entropy is None else scatter(entropy.clone(), sets.live, len(logits))
        return scatter(stats.logps(lse), sets.live, len(logits)), h

    @staticmethod
    def backward(ctx: Any, grad: _Optional, grad_entropy: _Optional) -> tuple[Any, ...]:
        single(grad, grad_entropy)
        logits, lse, entropy = ctx.saved_tensors
        inv_temperature, sets, backend, options = ctx.rest
        with torch.no_grad():
            grads = row_grads(lse, entropy, sets.live, grad, grad_entropy)
            out = logits_backward(logits, inv_temperature, sets, grads, options, backend)
        return *once("logps_from_logits", (out,), (grad, grad_entropy, logits)), *[None] * 4


def _told(targets: torch.Tensor, support: Support) -> torch.Tensor:
    """Targets in which other ranks see another support: one whose sets differ would merge other rows' statistics."""
    return targets + (_collective.checksum(support.ids) ^ _collective.checksum(support.offsets))


def _marked(logps: torch.Tensor, targets: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """NaN where a target is not in its set and that could not be checked before."""
    return logps if _check.readable(targets) else logps.masked_fill(lost, torch.nan)


def eager(support: Support, call: Call, more: Wanted) -> Scored:
    hidden, weight, bias, targets, inv_temperature, ignore_index, options, name = call
    told = targets if options.group is None else _told(targets, support)
    shard = (hidden, weight, bias, told, inv_temperature, ignore_index, options)
    first, vocabulary = _sharded.shard_range(*shard, more=more)
    check_ids(support, vocabulary)
    _inputs.check_values(targets, vocabulary, inv_temperature, ignore_index)
    counted = targets != ignore_index
    sets = sets_of(support, targets, counted, first, len(weight), vocabulary)
    backend = Backend.of(name, hidden.device)
    logps, h, ss, lse = SupportLogps.apply(hidden, weight, bias, targets, inv_temperature, sets, backend, options)
    return Scored(_marked(logps, targets, counted & ~sets.found), h, ss, lse, (first, vocabulary))


def traced(support: Support, call: Call) -> Scored:
    hidden, weight, bias, targets, inv_temperature, ignore_index, options, name = call
    logps, h, ss, lse, found, _ = _support_op.linear(
        *(hidden, weight, bias, *support, targets, inv_temperature),
        *map(scalar, (options.logit_scale, options.softcap)),
        *(ignore_index, options.entropy, options.sum_sq, options.wide, name),
    )
    counted = targets != ignore_index
    logps = logps.masked_fill(counted & ~found, torch.nan)
    # Not h itself, as in linear.py.
    more = (h.where(counted, 0.0) if options.entropy else None, ss if options.sum_sq else None)
    return Scored(logps, *more, lse if options.lse else None, (0, weight.shape[0]))


def from_logits(
    support: Support,
    logits: torch.Tensor,
    targets: torch.Tensor,
    inv_temperature: _Optional,
    ignore_index: int,
    entropy: bool,
    name: str,
) -> tuple[torch.Tensor, _Optional]:
    """logps and entropy of (N, V) logits over their sets, (N,) each."""
    counted = targets != ignore_index
    if _check.traced(logits):
        logps, h, _, found = _support_op.from_logits(
            *(logits, *support, targets, inv_temperature, ignore_index, entropy, name)
        )
        return logps.masked_fill(counted & ~found, torch.nan), h.where(counted, 0.0) if entropy else None
    vocabulary = logits.shape[1]
    check_ids(support, vocabulary)
    _inputs.check_values(targets, vocabulary, inv_temperature, ignore_index)
    sets = sets_of(support, targets, counted, 0, vocabulary, vocabulary)
    options = Options(1.0, None, entropy, False, None, 0, None)
    backend = Backend.of(name, logits.device)
    logps, h = SupportFromLogits.apply(logits, inv_temperature, sets, backend, options)
    return _marked(logps, targets, counted & ~sets.found), h
