"""The autograd layer of log-probs of logits that already exist."""

from __future__ import annotations

from typing import Any

import torch

from .._door import dense, owned
from ..reference.once import once, single
from ._head import RowGrads, Tile
from ._options import Options, accumulator
from ._row_stats import RowStats
from ._tile_pass import TilePass

_PLAIN = Options(1.0, None, False, False, None, 0, None)
_WITH_ENTROPY = Options(1.0, None, True, False, None, 0, None)


_Optional = torch.Tensor | None


def _settled(
    z: torch.Tensor, targets: torch.Tensor, inv_temperature: _Optional
) -> tuple[torch.Tensor, torch.Tensor, _Optional]:
    """Rows of z may lie apart: they are large."""
    z = owned("logits", z)
    z = z if z.stride(-1) == 1 else z.contiguous()
    return z, dense("targets", targets), dense("temperature", inv_temperature)


def forward(
    z: torch.Tensor,
    targets: torch.Tensor,
    counted: torch.Tensor,
    inv_temperature: _Optional,
    tiles: TilePass,
    entropy: bool,
) -> tuple[torch.Tensor, _Optional, torch.Tensor]:
    """logps, 0 where not counted, and of all rows the entropy and lse in two parts."""
    z, targets, inv_temperature = _settled(z, targets, inv_temperature)
    options = _WITH_ENTROPY if entropy else _PLAIN
    stats = RowStats.new(len(z), accumulator(z.dtype), z.device, entropy, False)
    if len(z):
        tiles.forward(Tile(z, None, inv_temperature, targets), stats, None, None, 0, options)
    lse = stats.lse()
    return torch.where(counted, stats.logps(lse), lse.new_zeros(())), stats.entropy(), lse


def backward(
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, _Optional],
    inv_temperature: _Optional,
    tiles: TilePass,
    grad: _Optional,
    grad_entropy: _Optional,
) -> torch.Tensor:
    """Gradient of rows = (z, targets, counted, lse, entropy)."""
    logits, targets, counted, lse, h = rows
    z, targets, inv_temperature = _settled(logits, targets, inv_temperature)
    if not len(z):
        return torch.zeros_like(z, memory_format=torch.contiguous_format)
    g, gh = (None if g is None else dense("grad", g.to(lse.dtype)) for g in (grad, grad_entropy))
    g = lse.new_zeros(len(lse)) if g is None else g
    options = _PLAIN if h is None else _WITH_ENTROPY
    grads = RowGrads(lse, g, gh, None if gh is None else h)
    return tiles.logits_gradient(Tile(z, None, inv_temperature, targets), counted, grads, options)


class LogpsFromLogits(torch.autograd.Function):
    """(logps, entropy or None) of (N, V) logits; targets of ignored rows are 0 and counted marks the others."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        counted: torch.Tensor,
        inv_temperature: _Optional,
        tiles: TilePass,
        entropy: bool,
    ) -> tuple[torch.Tensor, _Optional]:
        logps, h, lse = forward(logits, targets, counted, inv_temperature, tiles, entropy)
        ctx.save_for_backward(logits, targets, counted, lse, h)
        ctx.inv_temperature, ctx.tiles = inv_temperature, tiles
        ctx.set_materialize_grads(False)
        return logps, None if h is None else torch.where(counted, h, lse.new_zeros(()))

    @staticmethod
    def backward(ctx: Any, grad: _Optional, grad_entropy: _Optional) -> tuple[Any, ...]:
        single(grad, grad_entropy)
        rows = ctx.saved_tensors
        with torch.no_grad():
            out = backward(rows, ctx.inv_temperature, ctx.tiles, grad, grad_entropy)
        return *once("logps_from_logits", (out,), (grad, grad_entropy, rows[0])), *[None] * 5
