"""The log-prob ops in torch's library of operators, as torch.compile and torch.export take them.

Eager calls go to the autograd functions next door instead, which cost less per call. An op here checks values where the
graph runs, since tracing cannot read them, and gives an empty tensor where the eager function gives None.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import _backends, _check
from .._operator import differentiable, number
from ..reference.once import once
from ..reference.segments import spread
from . import _logits
from ._function import arranged, backward, forward, head_of, live_rows, pick, scatter
from ._head import Kept
from ._inputs import check_values, orders_sums
from ._options import Options, accumulator
from ._slopes import Slopes, slopes_dtype

_Optional = torch.Tensor | None
_T = torch.Tensor
_Eight = tuple[_T, _T, _T, _T, _T, _T, _T, _T]


def check_rows(
    name: str, x: torch.Tensor, targets: torch.Tensor, inv_temperature: _Optional, backward: dict[str, Any]
) -> None:
    """Who calls an operator may be a graph, or anyone: rows x (N, any), and by name what has N entries in acc."""
    _check.tensor(name, x, ndim=2)
    dtypes = (accumulator(x.dtype),)
    _check.tensor("targets", targets, dtypes=_check.INTS, shape=x.shape[:1], device=x.device)
    for what, rows in {"inv_temperature": inv_temperature, **backward}.items():
        if rows is not None:
            shape = (len(x), 2) if what == "lse" else x.shape[:1]
            _check.tensor(what, rows, dtypes=dtypes, shape=shape, device=x.device)


def check_head(hidden: torch.Tensor, weight: torch.Tensor, bias: _Optional, wide: bool) -> None:
    _check.tensor("weight", weight, dtypes=(hidden.dtype,), shape=(-1, hidden.shape[1]), device=hidden.device)
    if bias is not None:
        _check.tensor("bias", bias, shape=weight.shape[:1], device=hidden.device)
    if wide and hidden.element_size() > 2:
        _check.bad_value("wide", f"False where logits are {hidden.dtype} anyway", wide)


def _scales(kept: list[Kept], rows: int, like: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """(rows, V) 1 / keep probability, 0 where a column is not kept: a shape that a graph knows, unlike Kept's."""
    out = like.new_zeros(rows, vocabulary)
    for scale, chunk in zip(out, kept, strict=False):
        if chunk.columns is None or chunk.inverse is None:
            scale.fill_(1.0)
        else:
            scale[chunk.columns] = chunk.inverse.to(scale.dtype)
    return out


def _kept(scales: torch.Tensor) -> list[Kept]:
    """What _scales was made of: all ones for a chunk that kept every column."""
    # Two reads, whatever the number of chunks: on a GPU each is a stall.
    counts, ones = torch.stack([scales.count_nonzero(1), (scales == 1).sum(1)]).tolist()
    columns = (scales.flatten().nonzero().squeeze(1) % scales.shape[1]).split(counts)
    return [
        Kept(None, None) if one == scales.shape[1] else Kept(at, scale[at])
        for at, one, scale in zip(columns, ones, scales, strict=True)
    ]


def chunk_rows(device: torch.device, backend: str) -> int:
    """Rows that choose their columns together."""
    return _backends.kernel("linear_logps", device, backend)().sizes(True).chunk


# What torch.compiler.assume_constant_result sets; the decorator itself imports Dynamo, and Triton with it.
chunk_rows._dynamo_marked_constant = True  # type: ignore[attr-defined]


def options_of(
    scale: torch.Tensor,
    softcap: _Optional,
    tau: _Optional,
    error: _Optional,
    entropy: bool,
    sum_sq: bool,
    seed: int,
    slopes: bool = False,
    wide: bool = False,
    fixed: bool = False,
) -> Options:
    cap = None if softcap is None else number("softcap", softcap)
    keep = None if tau is None else number("tau", tau)
    most = None if error is None else number("error", error)
    head = (number("logit_scale", scale), cap, entropy, sum_sq, keep, seed, None)
    return Options(*head, error=most, slopes=slopes, wide=wide, fixed=fixed)


# Both read sizes from the device: a captured graph would keep those of its first run, and capturing fails.
UNSAFE = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("qempo_fast::linear_logps_fwd", mutates_args=(), tags=UNSAFE)
def linear_logps_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    seed: torch.Tensor | None,
    logit_scale: torch.Tensor,
    softcap: torch.Tensor | None,
    tau: torch.Tensor | None,
    error: torch.Tensor | None,
    ignore_index: int,
    entropy: bool,
    sum_sq: bool,
    slopes: bool,
    wide: bool,
    fixed: bool,
    chunk: int,
    backend: str,
) -> _Eight:
    """logps, entropy, sum_sq, and to keep: lse (N, 2), scales of the kept columns (chunks, V), the order of the counted
    rows (N,), then anything, the values (N, D) and size (N,) of Slopes; numbers as scalar(). What was not asked for is
    empty.

    chunk is chunk_rows(...). As an argument it is part of what torch's cache on disk knows a graph by: read here, a
    graph compiled by a version with other chunks failed at run time, "expected size 3 == 2".
    """
    check_rows("hidden", hidden, targets, inv_temperature, {})
    check_head(hidden, weight, bias, wide)
    orders_sums(fixed, backend)
    _check.integer("chunk", chunk, low=1)
    if slopes and not (tau is None and error is None):
        _check.bad_value("slopes", "False where the gradient is sampled", slopes)
    n, vocabulary = hidden.shape[0], weight.shape[0]
    check_values(targets, vocabulary, inv_temperature, ignore_index)
    live = live_rows(targets != ignore_index)
    if seed is not None:
        _check.tensor("seed", seed, dtypes=(torch.int64,), shape=())
    drawn = 0 if seed is None else int(seed)
    options = options_of(logit_scale, softcap, tau, error, entropy, sum_sq, drawn, slopes, wide, fixed)
    tiles = _backends.kernel("linear_logps", hidden.device, backend)()
    live = arranged(hidden, vocabulary, live, tiles, options)
    head = head_of(hidden, weight, bias, targets, inv_temperature, live)
    stats, kept, found = forward(tiles, head, options, 0)
    lse = stats.lse()
    outputs = (stats.logps(lse), stats.entropy(), stats.log_sum_sq(), lse, *found)
    full = [lse.new_empty(0) if x is None else scatter(x, live, n) for x in outputs]
    rows = -(-n // chunk) if options.sampled else 0
    scales = _scales(kept, rows, lse, vocabulary if rows else 0)
    order = torch.arange(n if options.sampled else 0, device=lse.device, dtype=torch.int64)
    if live is not None and options.sampled:
        order[: len(live)] = live
    return *full[:4], scales, order, *full[4:]  # type: ignore[return-value]


@linear_logps_fwd.register_fake
def _(
    hidden: Any,
    weight: Any,
    bias: Any,
    targets: Any,
    inv_temperature: Any,
    seed: Any,
    logit_scale: Any,
    softcap: Any,
    tau: Any,
    error: Any,
    ignore_index: int,
    entropy: bool,
    sum_sq: bool,
    slopes: bool,
    wide: bool,
    fixed: bool,
    chunk: int,
    backend: str,
) -> Any:
    n, acc = hidden.shape[0], accumulator(hidden.dtype)
    sampled = tau is not None or error is not None
    kept = (-(-n // chunk), weight.shape[0]) if sampled else (0, 0)
    shapes = ((n,), (n if entropy else 0,), (n if sum_sq else 0,), (n, 2), kept)
    out = [hidden.new_empty(shape, dtype=acc) for shape in shapes]
    out.append(hidden.new_empty(n if sampled else 0, dtype=torch.int64))
    values = out[0].new_empty(0)
    if slopes:
        values = hidden.new_empty(n, hidden.shape[1], dtype=slopes_dtype(hidden.dtype))
    return *out, values, out[0].new_empty(n if slopes else 0)


@torch.library.custom_op("qempo_fast::linear_logps_bwd", mutates_args=(), tags=UNSAFE)
def linear_logps_bwd(
    grad: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    scales: torch.Tensor,
    order: torch.Tensor,
    values: torch.Tensor,
    size: torch.Tensor,
    logit_scale: torch.Tensor,
    softcap: torch.Tensor | None,
    tau: torch.Tensor | None,
    error: torch.Tensor | None,
    needs: list[bool],
    ignore_index: int,
    wide: bool,
    fixed: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h = None if grad_entropy is None else entropy
    saved = {"grad": grad, "grad_entropy": grad_entropy, "lse": lse, "entropy": h}
    check_rows("hidden", hidden, targets, inv_temperature, saved)
    check_head(hidden, weight, bias, wide)
    check_values(targets, weight.shape[0], inv_temperature, ignore_index)
    live = live_rows(targets != ignore_index)
    options = options_of(logit_scale, softcap, tau, error, grad_entropy is not None, False, 0, wide=wide, fixed=fixed)
    if options.sampled:
        _check.tensor("order", order, dtypes=(torch.int64,), shape=hidden.shape[:1], device=hidden.device)
        live = order[: len(order) if live is None else len(live)]
    head = head_of(hidden, weight, bias, targets, inv_temperature, live)
    tiles = _backends.kernel("linear_logps", hidden.device, backend)()
    # scales has a row for each chunk that there would be were every row counted.
    chunks = -(-len(head.targets) // tiles.sizes(True).chunk) if options.sampled else 0
    if chunks:
        _check.tensor("scales", scales, dtypes=(lse.dtype,), shape=(-1, weight.shape[0]), device=hidden.device)
        if len(scales) < chunks:
            _check.bad_value("scales", f"a row for each of {chunks} chunks", tuple(scales.shape))
    slopes = None
    if len(size):
        _check.tensor("values", values, dtypes=(slopes_dtype(hidden.dtype),), shape=hidden.shape, device=hidden.device)
        _check.tensor("size", size, dtypes=(lse.dtype,), shape=hidden.shape[:1], device=hidden.device)
        slopes = Slopes(pick(values, live), pick(size, live))
    three = backward(
        tiles,
        head,
        pick(lse, live),
        None if h is None else pick(h, live),
        live,
        _kept(scales[:chunks]) if chunks else [],
        options,
        (grad, grad_entropy),
        (needs[0], needs[1], needs[2]),
        hidden.shape[0],
        slopes=slopes,
    )
    return tuple(hidden.new_empty(0) if x is None else x for x in three)  # type: ignore[return-value]


@linear_logps_bwd.register_fake
def _(
    grad: Any, grad_entropy: Any, hidden: Any, weight: Any, bias: Any, t: Any, i: Any, lse: Any, h: Any, s: Any,
    order: Any, values: Any, size: Any, scale: Any, softcap: Any, tau: Any, error: Any, needs: Any, *settings: Any,
) -> Any:  # fmt: skip
    inputs = (hidden, weight, bias)
    return tuple(x.new_empty(x.shape) if need else hidden.new_empty(0) for x, need in zip(inputs, needs, strict=True))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *head, _, scale, softcap, tau, error, ignore_index, entropy, _, _, wide, fixed, _, backend = inputs
    _, h, sum_sq, *kept = output
    lse, *rest = kept
    ctx.save_for_backward(*head, lse, h, *rest, scale, softcap, tau, error)
    ctx.entropy, ctx.settings = entropy, (ignore_index, wide, fixed, backend)
    ctx.mark_non_differentiable(sum_sq, *kept)
    # Zeros for an entropy that nobody differentiates would be a gradient of it, for which the logits are made again.
    ctx.set_materialize_grads(False)


def _linear_backward(ctx: Any, grad: _Optional, grad_entropy: _Optional, *_: Any) -> tuple[Any, ...]:
    needs, saved = list(ctx.needs_input_grad[:3]), ctx.saved_tensors
    of_entropy = grad_entropy if ctx.entropy else None
    if grad is None:
        grad = torch.zeros_like(saved[5][:, 0])  # of lse's dtype
    with torch.no_grad():
        three = linear_logps_bwd(grad, of_entropy, *saved, needs, *ctx.settings)
    grads = [g if need else None for g, need in zip(three, needs, strict=True)]
    return *once("linear_logps", grads, (grad, of_entropy, *saved[:3])), *[None] * 15


linear = differentiable(linear_logps_fwd, _linear_setup, _linear_backward)


@torch.library.custom_op("qempo_fast::logps_from_logits_fwd", mutates_args=())
def logps_from_logits_fwd(
    logits: torch.Tensor,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    ignore_index: int,
    entropy: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logps, entropy, and to keep: lse (N, 2)."""
    check_rows("logits", logits, targets, inv_temperature, {})
    check_values(targets, logits.shape[1], inv_temperature, ignore_index)
    counted = targets != ignore_index
    tiles = _backends.kernel("logps_from_logits", logits.device, backend)()
    logps, full, lse = _logits.forward(logits, targets.where(counted, 0), counted, inv_temperature, tiles, entropy)
    return logps, lse.new_empty(0) if full is None else full.where(counted, 0.0), lse


@logps_from_logits_fwd.register_fake
def _(logits: Any, targets: Any, inv_temperature: Any, ignore_index: int, entropy: bool, backend: str) -> Any:
    n, acc = logits.shape[0], accumulator(logits.dtype)
    return tuple(logits.new_empty(shape, dtype=acc) for shape in ((n,), (n if entropy else 0,), (n, 2)))


@torch.library.custom_op("qempo_fast::logps_from_logits_bwd", mutates_args=())
def logps_from_logits_bwd(
    grad: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    logits: torch.Tensor,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    ignore_index: int,
    backend: str,
) -> torch.Tensor:
    h = None if grad_entropy is None else entropy
    saved = {"grad": grad, "grad_entropy": grad_entropy, "lse": lse, "entropy": h}
    check_rows("logits", logits, targets, inv_temperature, saved)
    check_values(targets, logits.shape[1], inv_temperature, ignore_index)
    counted = targets != ignore_index
    tiles = _backends.kernel("logps_from_logits", logits.device, backend)()
    rows = (logits, targets.where(counted, 0), counted, lse, h)
    return _logits.backward(rows, inv_temperature, tiles, grad, grad_entropy)


@logps_from_logits_bwd.register_fake
def _(grad: Any, grad_entropy: Any, logits: Any, *_: Any) -> Any:
    return logits.new_empty(logits.shape)


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, targets, inv_temperature, ignore_index, ctx.entropy, backend = inputs
    ctx.save_for_backward(logits, targets, inv_temperature, output[2], output[1])
    ctx.settings = (ignore_index, backend)
    ctx.mark_non_differentiable(output[2])


def _logits_backward(ctx: Any, grad: torch.Tensor, grad_entropy: torch.Tensor, _: Any) -> tuple[Any, ...]:
    saved, of_entropy = ctx.saved_tensors, grad_entropy if ctx.entropy else None
    with torch.no_grad():
        out = logps_from_logits_bwd(grad, of_entropy, *saved, *ctx.settings)
    return *once("logps_from_logits", (out,), (grad, of_entropy, saved[0])), *[None] * 5


from_logits = differentiable(logps_from_logits_fwd, _logits_setup, _logits_backward)


@torch.library.custom_op("qempo_fast::segment_sum", mutates_args=())
def segment_sum(values: torch.Tensor, cu_seqlens: torch.Tensor, backend: str) -> torch.Tensor:
    _check.tensor("values", values, ndim=1)
    _check.offsets("cu_seqlens", cu_seqlens, values.shape[0], values.device)
    return _backends.kernel("segment_sum", values.device, backend)(values, cu_seqlens)


@segment_sum.register_fake
def _(values: Any, cu_seqlens: Any, backend: str) -> Any:
    return values.new_empty(cu_seqlens.shape[0] - 1, dtype=accumulator(values.dtype))


def _segment_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    values, cu_seqlens, _ = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.n, ctx.dtype = values.shape[0], values.dtype


def _segment_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (cu_seqlens,) = ctx.saved_tensors
    return spread(grad, cu_seqlens, ctx.n).to(ctx.dtype), None, None


segments = differentiable(segment_sum, _segment_setup, _segment_backward)
