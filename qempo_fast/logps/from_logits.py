"""The autograd layer of log-probs of logits that already exist."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .options import Options, accumulator
from .stats import RowStats
from .tile_pass import TilePass

_PLAIN = Options(1.0, None, False, False, None, 0, None)
_WITH_ENTROPY = Options(1.0, None, True, False, None, 0, None)


class LogpsFromLogits(torch.autograd.Function):
    """(logps, entropy or None) of (N, V) logits; targets of ignored rows are 0 and counted marks the others."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        counted: torch.Tensor,
        inv_temperature: torch.Tensor | None,
        tiles: TilePass,
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        z = logits if logits.stride(-1) == 1 else logits.contiguous()
        options = _WITH_ENTROPY if entropy else _PLAIN
        stats = RowStats.new(len(z), accumulator(z.dtype), z.device, entropy, False)
        if len(z):
            tiles.forward(z, None, inv_temperature, targets, stats, None, None, 0, options)
        lse, h = stats.lse(), stats.entropy()
        ctx.save_for_backward(z, targets, counted, lse, h)
        ctx.inv_temperature, ctx.tiles, ctx.options = inv_temperature, tiles, options
        ctx.set_materialize_grads(False)
        zero = lse.new_zeros(())
        return torch.where(counted, stats.target - lse, zero), None if h is None else torch.where(counted, h, zero)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, grad_entropy: torch.Tensor | None) -> tuple[Any, ...]:
        z, targets, counted, lse, h = ctx.saved_tensors
        zero = lse.new_zeros(())

        def rows(g: torch.Tensor | None) -> torch.Tensor | None:
            return None if g is None else torch.where(counted, g.to(lse.dtype), zero).contiguous()

        g, gh = rows(grad), rows(grad_entropy)
        g = torch.zeros_like(lse) if g is None else g
        out = z.clone(memory_format=torch.contiguous_format)
        if len(out):
            h = None if gh is None else h
            ctx.tiles.backward(out, None, ctx.inv_temperature, lse, g, gh, h, None, targets, ctx.options)
            # An ignored row may hold anything, NaN too, and 0 * NaN is NaN.
            out[~counted] = 0
        return out, None, None, None, None, None
