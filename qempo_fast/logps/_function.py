"""The autograd layer of the log-prob ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .. import _check
from .._door import dense, owned
from ..reference.once import once, single
from ._backward import backward as driver_backward
from ._forward import forward as driver_forward
from ._head import HeadTensors, Kept, Logits, RowGrads
from ._options import Options, accumulator
from ._order import by_likeness
from ._row_stats import RowStats
from ._slopes import Slopes
from ._slopes import forward as slopes_forward
from ._tile_pass import TilePass

_Optional = torch.Tensor | None


def live_rows(counted: torch.Tensor) -> _Optional:
    """Indices of the counted rows, or None where that is all of them."""
    # nonzero alone, whose length says whether that is all: all() first would be a second stall on a GPU.
    live = counted.nonzero().squeeze(1)
    return None if len(live) == len(counted) else live


def arranged(hidden: torch.Tensor, vocabulary: int, live: _Optional, tiles: TilePass, options: Options) -> _Optional:
    """live in the order in which a sampled gradient takes its rows, None where that is all as they are."""
    # Ranks whose states differ in a last bit would take theirs in different orders, and merge other rows' statistics.
    if not options.sampled or options.group is not None or not tiles.ordered(hidden, vocabulary):
        return live
    hidden = dense("hidden", hidden)
    with _check.own_dtypes(hidden.device.type):
        return by_likeness(hidden, live, tiles.sizes(True, hidden).chunk)


def pick(x: torch.Tensor, live: _Optional) -> torch.Tensor:
    """The counted rows of x."""
    return x if live is None else x[live]


def scatter(values: torch.Tensor, live: _Optional, n: int) -> torch.Tensor:
    """Results of the counted rows to all n rows, 0 elsewhere."""
    return values if live is None else values.new_zeros(n, *values.shape[1:]).index_copy_(0, live, values)


def head_of(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: _Optional,
    targets: torch.Tensor,
    inv_temperature: _Optional,
    live: _Optional,
) -> HeadTensors:
    """The counted rows as the driver takes them."""
    acc = accumulator(hidden.dtype)
    wide = None if bias is None else dense("bias", bias.to(acc))
    rows = dense("targets", targets), dense("temperature", inv_temperature)
    head = HeadTensors(dense("hidden", hidden), owned("weight", weight), wide, *rows)
    return head if live is None else head.rows(live)


def forward(
    tiles: TilePass, head: HeadTensors, options: Options, first_column: int, logits: Logits | None = None
) -> tuple[RowStats, list[Kept], tuple[_Optional, _Optional]]:
    """Row statistics, what the columns are that a sampled gradient keeps, and Slopes where they are asked for."""
    with _check.own_dtypes(head.hidden.device.type):
        if options.slopes:
            stats, slopes = slopes_forward(tiles, head, options)
            return stats, [], slopes
        return *driver_forward(tiles, head, options, first_column, logits), (None, None)


def backward(
    tiles: TilePass,
    head: HeadTensors,
    lse: torch.Tensor,
    entropy: _Optional,
    live: _Optional,
    kept: list[Kept],
    options: Options,
    grads: tuple[_Optional, _Optional],
    needs: tuple[bool, bool, bool],
    n: int,
    logits: Logits | None = None,
    slopes: Slopes | None = None,
) -> tuple[_Optional, _Optional, _Optional]:
    """Gradients of hidden (n rows), weight and bias from those of all rows' logps and entropy.

    lse, entropy and slopes are of counted rows.
    """

    def rows(g: _Optional) -> _Optional:
        return None if g is None else dense("grad", pick(g, live).to(lse.dtype))

    g, gh = map(rows, grads)
    g = lse.new_zeros(len(lse)) if g is None else g
    dh: _Optional
    if slopes is not None and gh is None and not (needs[1] or needs[2]):
        dh, dw, db = slopes.times(g, head.hidden.dtype), None, None
    else:
        row_grads = RowGrads(lse, g, gh, None if gh is None else entropy)
        with _check.own_dtypes(head.hidden.device.type):
            dh, dw, db = driver_backward(tiles, head, row_grads, kept, options, needs, logits)
    if dh is not None and options.group is not None:
        # Each shard holds its columns' part of the sum.
        dist.all_reduce(dh, group=options.group)
    if dh is not None and live is not None:
        dh = dh.new_zeros(n, dh.shape[1]).index_copy_(0, live, dh)
    return dh, dw, db


class LinearLogps(torch.autograd.Function):
    """(logps, entropy, sum_sq, lse) of (N, D) rows, the last three or None; lse has no graph.

    Targets are checked already, ignored rows marked by live.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: _Optional,
        targets: torch.Tensor,
        inv_temperature: _Optional,
        live: _Optional,
        first_column: int,
        tiles: TilePass,
        options: Options,
    ) -> tuple[torch.Tensor, _Optional, _Optional, _Optional]:
        n = hidden.shape[0]
        live = arranged(hidden, weight.shape[0], live, tiles, options)
        ctx.targets, ctx.inv_temperature, ctx.live = targets - first_column, inv_temperature, live
        head = head_of(hidden, weight, bias, ctx.targets, inv_temperature, live)
        logits = Logits(options.keep_logits) if options.keep_logits else None
        stats, kept, slopes = forward(tiles, head, options, first_column, logits)
        lse, entropy = stats.lse(), stats.entropy()
        ctx.save_for_backward(hidden, weight, bias, lse, entropy, *slopes)
        ctx.kept, ctx.tiles, ctx.options, ctx.logits = kept, tiles, options, logits
        ctx.set_materialize_grads(False)
        # A copy of the entropy: who edits what is returned leaves alone what the backward reads.
        outputs = [stats.logps(lse), None if entropy is None else entropy.clone(), stats.log_sum_sq()]
        outputs.append(lse if options.lse else None)
        full = [None if x is None else scatter(x, live, n) for x in outputs]
        ctx.mark_non_differentiable(*(x for x in full[2:] if x is not None))
        return tuple(full)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, grad: _Optional, grad_entropy: _Optional, *_: _Optional) -> tuple[Any, ...]:
        single(grad, grad_entropy)
        hidden, weight, bias, lse, entropy, values, size = ctx.saved_tensors
        with torch.no_grad():
            head = head_of(hidden, weight, bias, ctx.targets, ctx.inv_temperature, ctx.live)
            three = backward(
                *(ctx.tiles, head, lse, entropy, ctx.live, ctx.kept, ctx.options, (grad, grad_entropy)),
                tuple(ctx.needs_input_grad[:3]),  # type: ignore[arg-type]
                hidden.shape[0],
                ctx.logits,
                None if values is None else Slopes(values, size),
            )
        return *once("linear_logps", three, (grad, grad_entropy, hidden, weight, bias)), *[None] * 6
