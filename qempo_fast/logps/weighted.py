"""Log-probs whose weights in the loss are known beforehand: the gradient is made in the forward, at 6NDV."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup

from .. import _backends, _check
from .._operator import scalar
from ..reference.logps import WeightedLogps, WeightedSequenceLogps
from ..reference.once import once, single
from ..reference.segments import spread
from . import _inputs, _sharded, weighted_op
from ._call import Call, prepared, seed, wants_gradient
from ._options import accumulator
from ._tile_pass import TilePass
from ._weighted import of_coefficients, weighted
from .segments import summed

_Optional = torch.Tensor | None


class _Weights(NamedTuple):
    """Coefficients (N,) in the dtype of sums, and whether the entropy is returned."""

    coef: torch.Tensor
    coef_entropy: _Optional
    call: Call


def weighted_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    coef: torch.Tensor,
    *,
    coef_entropy: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    grad: str = "auto",
    tau: float | None = None,
    process_group: ProcessGroup | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> WeightedLogps:
    """The weighted sum of log-probs whose weights are known: its gradient is made in the same pass, and kept.

        loss = sum_i coef_i logps_i + coef_entropy_i entropy_i,   logps and entropy as linear_logps has them

    The gradient of any loss L of log-probs is that of this one with coef = dL/dlogps (``coefficients``), which of a
    rollout is known before the training forward: advantages, RSPO's weights, DQO's gains. 6NDV where linear_logps
    takes up to 8NDV, 4NDV with a frozen head; nothing is kept but the gradients. A row of coefficient 0 costs its
    forward alone, 2NDV. Sampled, 2NDV (1 + 2f), and each row has a say in the columns as |coef| weighs it.

    Args:
        hidden: (..., D); weight: (V, D); targets: (...), as linear_logps.
        coef: (...) float, shaped like targets; differentiable, as a factor. Where targets are ignore_index it may be
            anything.
        coef_entropy: the same of the entropies, or None.
        bias, temperature, logit_scale, softcap, ignore_index, process_group, logits_dtype, backend: as linear_logps.
        entropy: return the entropy; it is returned with coef_entropy in any case.
        grad, tau: as linear_logps. Without tau, the threshold is chosen for each block of up to 1024 rows, for the
            gradient of this loss.

    Returns:
        WeightedLogps(loss, logps, entropy): loss () differentiable, once, in hidden, weight, bias and the coefficients;
        logps and entropy, shaped like targets, are not. float32, or float64 for float64 hidden.

    Raises:
        TypeError, ValueError: as linear_logps; coef or coef_entropy of another shape.
    """

    def also() -> None:
        _check.boolean("entropy", entropy)
        _check_weights(coef, coef_entropy, targets.shape, hidden.device)

    sums = entropy if coef_entropy is None else True
    call = prepared(
        *(hidden, weight, targets, bias, temperature, logit_scale, softcap, ignore_index, sums, False),
        *(grad, tau, process_group, logits_dtype, False, backend, also),
    )
    acc = accumulator(call.hidden.dtype)
    flat = [None if x is None else x.reshape(-1).to(acc) for x in (coef, coef_entropy)]
    weights = _Weights(flat[0], flat[1], call)  # type: ignore[arg-type]
    loss, logps, h = call.run(lambda _: _traced(weights), lambda _: _eager(weights))
    return WeightedLogps(loss, logps.reshape(targets.shape), _inputs.shaped(h, targets))


def _check_weights(coef: Any, coef_entropy: Any, shape: tuple[int, ...], device: torch.device) -> None:
    _check.tensor("coef", coef, shape=shape, device=device)
    if coef_entropy is not None:
        _check.tensor("coef_entropy", coef_entropy, shape=shape, device=device)


def _eager(weights: _Weights) -> tuple[torch.Tensor, torch.Tensor, _Optional]:
    coef, coef_entropy, call = weights
    hidden, weight, bias, targets, inv_temperature, ignore_index, options, name = call
    tiles = _backends.kernel("linear_logps", hidden.device, name)()
    shard = (hidden, weight, bias, targets, inv_temperature, ignore_index, options)
    columns = _sharded.shard_range(*shard, (coef, coef_entropy))
    _inputs.check_values(targets, columns[1], inv_temperature, ignore_index)
    if options.sampled:
        weights = weights._replace(call=call._replace(options=replace(options, seed=int(seed()))))
    return _Function.apply(hidden, weight, bias, coef, coef_entropy, weights.call, columns, tiles)  # type: ignore[no-any-return]


def _traced(weights: _Weights) -> tuple[torch.Tensor, torch.Tensor, _Optional]:
    coef, coef_entropy, call = weights
    hidden, weight, bias, targets, inv_temperature, ignore_index, options, name = call
    loss, logps, h, *_ = weighted_op.op(
        *(hidden, weight, bias, targets, inv_temperature, coef, coef_entropy, seed() if options.sampled else None),
        *map(scalar, (options.logit_scale, options.softcap, options.tau, options.error)),
        *(ignore_index, options.entropy, options.wide, *map(wants_gradient, (hidden, weight, bias)), name),
    )
    return loss, logps, h if options.entropy else None


class _Function(torch.autograd.Function):
    """(loss, logps, entropy or None); the gradients wait in ctx, out of reach of what saves tensors elsewhere."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: _Optional,
        coef: torch.Tensor,
        coef_entropy: _Optional,
        call: Call,
        columns: tuple[int, int],
        tiles: TilePass,
    ) -> tuple[torch.Tensor, torch.Tensor, _Optional]:
        made = weighted(
            *(tiles, (hidden, weight, bias), call.targets, call.inv_temperature, (coef, coef_entropy)),
            *(call.ignore_index, columns, call.options, tuple(ctx.needs_input_grad[:3])),  # type: ignore[arg-type]
        )
        ctx.save_for_backward(hidden, weight, bias, coef, coef_entropy, made.logps, made.entropy)
        ctx.made = [made.hidden, made.weight, made.bias]
        ctx.unit = made.unit
        ctx.mark_non_differentiable(made.logps, *([] if made.entropy is None else [made.entropy]))
        ctx.set_materialize_grads(False)
        return made.loss, made.logps, made.entropy

    @staticmethod
    def backward(ctx: Any, grad: _Optional, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 8
        single(grad)
        *saved, logps, entropy = ctx.saved_tensors
        with torch.no_grad():
            factor = grad if ctx.unit is None else grad * ctx.unit
            # A graph that is kept may come back. One that is not lets go of its gradients, which are then written in
            # place, and which autograd takes as they are: of a head of 1 GB a copy less.
            last = not torch._C._autograd._get_current_graph_task_keep_graph()
            same = grad.device.type == "cpu" and float(factor) == 1.0
            grads = [
                None if x is None else _scaled(x, factor, like.dtype, last, same)
                for x, like in zip(ctx.made, saved[:3], strict=True)
            ]
            if last:
                ctx.made = [None] * 3
            grads += of_coefficients(grad, (saved[3], saved[4]), (logps, entropy), ctx.needs_input_grad[3:5])
        return *once("weighted_logps", grads, (grad, *saved)), None, None, None


def _scaled(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, last: bool, same: bool) -> torch.Tensor:
    if same:
        return x.to(dtype) if last else x.to(dtype, copy=True)
    return x.mul_(factor).to(dtype) if last else (x * factor).to(dtype)


def weighted_sequence_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    coef: torch.Tensor,
    *,
    coef_entropy: torch.Tensor | None = None,
    average: bool = False,
    **head: Any,
) -> WeightedSequenceLogps:
    """weighted_logps with one weight for each packed sequence: loss = sum_s coef_s logps_s + coef_entropy_s entropy_s.

    logps_s is the sum over the counted tokens of sequence s, with average=True divided by their number.

    Args:
        hidden, weight, targets, cu_seqlens, average: as sequence_logps.
        coef: (S,) float; coef_entropy: (S,) or None; not differentiable.
        **head: every other keyword of weighted_logps.

    Returns:
        WeightedSequenceLogps(loss (), logps (S,), entropy (S,) or None, lengths (S,) int64, token_logps (N,)), of which
        the loss is differentiable.

    Raises:
        TypeError, ValueError: as weighted_logps and sequence_logps.
    """
    *_, group = _sharded.local_head(weight, head.get("bias"), head.get("process_group"))
    with _sharded.checked_together(group, hidden, weight):
        _inputs.check_sequences(hidden, targets, cu_seqlens, average)
        _check_weights(coef, coef_entropy, (cu_seqlens.shape[0] - 1,), hidden.device)
    n, ignore_index = hidden.shape[0], head.get("ignore_index", -100)
    lengths = summed((targets != ignore_index).double(), cu_seqlens)

    def tokens(x: _Optional) -> _Optional:
        if x is None:
            return None
        x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        return spread(x / lengths.clamp_min(1).to(x.dtype) if average else x, cu_seqlens, n)

    of_logps = tokens(coef)
    assert of_logps is not None
    out = weighted_logps(hidden, weight, targets, of_logps, coef_entropy=tokens(coef_entropy), **head)
    sums = [None if x is None else summed(x, cu_seqlens) for x in (out.logps, out.entropy)]
    if average:
        sums = [None if x is None else x / lengths.clamp_min(1).to(x.dtype) for x in sums]
    assert sums[0] is not None
    return WeightedSequenceLogps(out.loss, sums[0], sums[1], lengths.long(), out.logps)
