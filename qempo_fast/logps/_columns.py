"""Log-probs of columns of one's own choice and the log-sum-exp, composed of what linear_logps gives and a few products.

    lse_i = z_it - logp_it,   log p_ij = z_ij - lse_i,   z_ij = finished(h_i . w_j + b_j)

so that a gradient of either goes to logps, whose backward has the softmax in it already, and to N (K + 1) products: no
pass over the vocabulary is added, and 2 N (K + 1) D operations forward and twice that backward. Their part of dweight
is a tensor of its own, added by autograd: a write and a read of V D more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .. import _check
from .._door import dense, owned
from .._operator import differentiable
from ..reference.logps import finish_head
from ..reference.once import once, single
from ._call import Call, Scored
from ._head import HeadTensors
from ._options import Wanted, accumulator
from ._ragged import Entries
from ._support import Backend, products, scores
from .op import UNSAFE
from .support import Support

_Optional = torch.Tensor | None


def _entries(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, first: int
) -> tuple[HeadTensors, Entries, torch.Tensor]:
    """The head, the entries of ids (N, K), and which of them this shard has: the others point anywhere."""
    n, k = ids.shape
    at = dense("columns", ids - first)
    here = (at >= 0) & (at < len(weight))
    head = HeadTensors(dense("hidden", hidden), owned("weight", weight), None, at, None)
    ends = torch.arange(n + 1, device=ids.device, dtype=torch.int64) * k
    return head, Entries.of(at.where(here, 0).reshape(-1), ends), here


def _products(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, first: int, wide: bool, backend: Backend
) -> torch.Tensor:
    """(N, K) h_i . w_j in the dtype of sums, rounded where linear_logps rounds its logits; 0 where j is not here."""
    head, entries, here = _entries(hidden, weight, ids, first)
    with _check.own_dtypes(hidden.device.type):
        z = scores(head, entries, backend, wide)
    z = z if wide else z.to(hidden.dtype).to(z.dtype)
    return z.view(ids.shape).where(here, 0.0)


def _gradients(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    first: int,
    backend: Backend,
    needs: tuple[bool, bool],
) -> tuple[_Optional, _Optional]:
    d = grad.to(accumulator(hidden.dtype))
    # A row without a gradient adds nothing, whatever it holds: 0 * NaN is NaN.
    hidden = hidden.where((d != 0).any(1, keepdim=True), 0.0)
    head, entries, here = _entries(hidden, weight, ids, first)
    d = dense("grad", d.where(here, 0.0).reshape(-1))
    with _check.own_dtypes(hidden.device.type):
        dh, dw, _ = products(head, entries, d, backend, (*needs, False))
    return None if dh is None else dh.to(hidden.dtype), dw


class ColumnProducts(torch.autograd.Function):
    """(N, K) products of each row with its columns, over all shards."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        ids: torch.Tensor,
        first: int,
        wide: bool,
        backend: Backend,
        group: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        ctx.rest = first, backend, group
        z = _products(hidden, weight, ids, first, wide, backend)
        if group is not None:
            dist.all_reduce(z, group=group)
        return z

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        single(grad)
        hidden, weight, ids = ctx.saved_tensors
        first, backend, group = ctx.rest
        with torch.no_grad():
            needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
            dh, dw = _gradients(grad, hidden, weight, ids, first, backend, needs)
            if dh is not None and group is not None:
                dist.all_reduce(dh, group=group)
        return *once("linear_logps", (dh, dw), (grad, hidden, weight)), *[None] * 5


def _check_columns(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> None:
    _check.tensor("hidden", hidden, ndim=2)
    _check.tensor("weight", weight, dtypes=(hidden.dtype,), shape=(-1, hidden.shape[1]), device=hidden.device)
    _check.tensor("ids", ids, dtypes=(torch.int64,), shape=(len(hidden), -1), device=hidden.device)


@torch.library.custom_op("qempo_fast::column_products_fwd", mutates_args=(), tags=UNSAFE)
def column_products_fwd(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, wide: bool, backend: str
) -> torch.Tensor:
    _check_columns(hidden, weight, ids)
    if ids.numel() and _check.readable(ids):
        low, high = map(int, ids.aminmax())
        if low < 0 or high >= len(weight):
            _check.bad_value("columns", f"tokens in [0, {len(weight)})", low if low < 0 else high)
    return _products(hidden, weight, ids, 0, wide, Backend.of(backend, hidden.device))


@column_products_fwd.register_fake
def _(hidden: Any, weight: Any, ids: Any, wide: bool, backend: str) -> Any:
    return hidden.new_empty(ids.shape, dtype=accumulator(hidden.dtype))


@torch.library.custom_op("qempo_fast::column_products_bwd", mutates_args=(), tags=UNSAFE)
def column_products_bwd(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_columns(hidden, weight, ids)
    _check.tensor("grad", grad, dtypes=(accumulator(hidden.dtype),), shape=ids.shape, device=hidden.device)
    made = _gradients(grad, hidden, weight, ids, 0, Backend.of(backend, hidden.device), (need_hidden, need_weight))
    return tuple(hidden.new_empty(0) if x is None else x for x in made)  # type: ignore[return-value]


@column_products_bwd.register_fake
def _(grad: Any, hidden: Any, weight: Any, ids: Any, need_hidden: bool, need_weight: bool, backend: str) -> Any:
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.backend = inputs[4]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad
    with torch.no_grad():
        two = column_products_bwd(grad, *saved, needs[0], needs[1], ctx.backend)
    grads = [g if need else None for g, need in zip(two, needs[:2], strict=True)]
    return *once("linear_logps", grads, (grad, *saved[:2])), None, None, None


op = differentiable(column_products_fwd, _setup, _backward)


def _logits(call: Call, ids: torch.Tensor, first: int) -> torch.Tensor:
    """(N, K) logits of columns ids as the head finishes them; differentiable in hidden, weight and bias."""
    options, group = call.options, call.options.group
    if group is None and _check.traced(call.hidden):
        z = op(call.hidden, call.weight, ids, options.wide, call.name)
    else:
        backend = Backend.of(call.name, call.hidden.device)
        z = ColumnProducts.apply(call.hidden, call.weight, ids, first, options.wide, backend, group)
    if call.bias is not None:
        at = ids - first
        here = (at >= 0) & (at < len(call.bias))
        # Wide before it is picked from: the gradients of an entry that many rows have are summed there.
        bias = call.bias.to(z.dtype)[at.where(here, 0)].where(here, 0.0)
        z = z + (bias if group is None else _Summed.apply(bias, group))
    temperature = 1.0 if call.inv_temperature is None else 1 / call.inv_temperature.unsqueeze(1)
    return finish_head(z, logit_scale=options.logit_scale, softcap=options.softcap, temperature=temperature)


class _LogSumExp(torch.autograd.Function):
    """lse, which is z_t - logp_t, with that difference's gradient.

    Its value is not taken from there: a logit rounded here as in the pass is one of two neighbours, and both are
    infinite where a target has probability 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: torch.Tensor, logps: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return lse.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return grad, -grad, None


class _Summed(torch.autograd.Function):
    """Over ranks, of which one has each entry: its gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:  # type: ignore[override]
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return grad, None


def check(columns: Any, targets: torch.Tensor, ignore_index: int, vocabulary: int | None) -> None:
    """columns (..., K) of targets (...); vocabulary: None where no rank knows it yet."""
    _check.tensor("columns", columns, dtypes=_check.INTS, device=targets.device)
    if columns.ndim != targets.ndim + 1 or columns.shape[:-1] != targets.shape or not columns.shape[-1]:
        wanted = f"shape ({', '.join(map(str, (*targets.shape, 'K')))}), K at least 1"
        _check.bad_value("columns", wanted, tuple(columns.shape))
    if vocabulary is None or not _check.readable(columns):
        return
    sound = (columns == ignore_index) | (targets == ignore_index).unsqueeze(-1)
    bad = ~(sound | ((columns >= 0) & (columns < vocabulary)))
    if bool(bad.any()):
        wanted = f"tokens in [0, {vocabulary}) or ignore_index = {ignore_index}"
        _check.bad_value("columns", wanted, int(columns[bad][0]))


def _outside(columns: torch.Tensor, support: Support, vocabulary: int) -> torch.Tensor:
    """(N, K) bool: not in their row's set."""
    ids, offsets = support
    n = len(columns)
    rows = torch.arange(n, device=columns.device, dtype=torch.int64)
    of = rows.repeat_interleave(offsets.long().diff(), output_size=len(ids))
    kept = of * vocabulary + ids.long()
    return ~torch.isin(rows.unsqueeze(1) * vocabulary + columns, kept)


def _columns(call: Call, out: Scored, columns: _Optional, support: Support | None) -> tuple[torch.Tensor, _Optional]:
    """(lse (N,), log-probs of columns (N, K) or None), both differentiable."""
    assert out.lse is not None
    first, vocabulary = out.place
    counted = call.targets != call.ignore_index
    ids = call.targets.unsqueeze(1) if columns is None else torch.cat([call.targets.unsqueeze(1), columns], 1)
    wanted = counted.unsqueeze(1) & (ids != call.ignore_index)
    sound = wanted & (ids >= 0) & (ids < vocabulary)
    z = _logits(call, ids.where(wanted, 0), first)
    lse = _LogSumExp.apply(z[:, 0], out.logps, out.lse.sum(1))  # type: ignore[no-untyped-call]
    lse = lse.where(counted, 0.0)
    if columns is None:
        return lse, None
    sound, wanted = sound[:, 1:], wanted[:, 1:]
    # The target's own column is its log-prob, value and gradient: two products that cancel leave their rounding.
    same = ids[:, 1:] == ids[:, :1]
    picked = torch.where(same, out.logps.unsqueeze(1), z[:, 1:] - lse.unsqueeze(1))
    picked = picked.masked_fill(wanted & ~sound, torch.nan)
    if support is not None:
        picked = picked.masked_fill(sound & _outside(columns.where(sound, 0), support, vocabulary), -torch.inf)
    return lse, picked.where(wanted, 0.0)


class _Mean(torch.autograd.Function):
    """Of x (V, ...) the mean over its first axis in the dtype of sums, or of a shard its part of that over all rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, over: int) -> torch.Tensor:  # type: ignore[override]
        return x.sum(0, dtype=accumulator(x.dtype)) / over

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.over = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        # Rounded once and not V times, and expanded: it takes no memory of V rows until autograd adds it to dweight.
        return (grad / ctx.over).to(ctx.dtype).expand(ctx.shape), None


def mean_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: _Optional,
    factor: float | torch.Tensor,
    vocabulary: int,
    group: Any = None,
) -> torch.Tensor:
    """(N,) mean_j z_j = factor (h . mean_j w_j + mean_j b_j): 2 N D operations and one read of the weight."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        out = _Mean.apply(x, vocabulary)  # type: ignore[no-untyped-call]
        return out if group is None else _Summed.apply(out, group)  # type: ignore[no-untyped-call]

    w = mean(weight)
    # No matmul, which autocast would run in half precision: 0.09 off at a mean of 30.
    z = (hidden.to(w.dtype) * w).sum(1)
    return factor * (z if bias is None else z + mean(bias).to(z.dtype))


def _mean_logits(call: Call, vocabulary: int) -> torch.Tensor:
    options, counted = call.options, call.targets != call.ignore_index
    scale = options.logit_scale
    factor = scale if call.inv_temperature is None else scale * call.inv_temperature
    hidden = call.hidden.where(counted.unsqueeze(1), 0.0)
    return mean_logits(hidden, call.weight, call.bias, factor, vocabulary, options.group).where(counted, 0.0)


def composed(
    call: Call, out: Scored, more: Wanted, support: Support | None
) -> tuple[torch.Tensor, _Optional, _Optional, _Optional, _Optional]:
    """logps, lse, columns' log-probs (N, K), top1 and mean_logits as asked for; out has lse."""
    logps, lse, picked, top1, mean = out.logps, None, None, None, None
    if more.top1:
        assert out.lse is not None
        # log p = (z_t - max z) - log sum: at the maximum minus the second part, to the bit.
        top1 = (logps.detach() >= -out.lse[:, 1]) & (call.targets != call.ignore_index)
    if more.products:
        lse, picked = _columns(call, out, more.columns, support)
    if more.mean:
        mean = _mean_logits(call, out.place[1])
    if more.label_smoothing and lse is not None and mean is not None:
        logps = (1 - more.label_smoothing) * logps + more.label_smoothing * (mean - lse)
    return logps, lse if more.lse else None, picked, top1, mean if more.mean_logits else None
