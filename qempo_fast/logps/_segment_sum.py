"""The seam between segment_sum and its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._door import dense
from .._operator import apply_of
from ..reference.once import batched
from ..reference.segments import spread

_Kernels = tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]


def segment_sum(kernels: _Kernels, values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The op by kernels: forward(values, cu_seqlens), and backward(grad, cu_seqlens, n), its gradient.

    Both get dense tensors.
    """
    cu_seqlens = dense("cu_seqlens", cu_seqlens)
    if values.requires_grad and torch.is_grad_enabled():
        out: torch.Tensor = _apply(kernels, values, cu_seqlens)
        return out
    return kernels[0](dense("values", values), cu_seqlens)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, kernels: _Kernels, values: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        run, ctx.spread = kernels
        ctx.save_for_backward(cu_seqlens)
        ctx.n, ctx.dtype = values.shape[0], values.dtype
        return run(dense("values", values), cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        # Plain torch where a graph of the gradient is asked for, or a batch of them.
        plain = torch.is_grad_enabled() or batched(grad)
        run: Callable[..., torch.Tensor] = spread if plain else ctx.spread
        given = grad if plain else dense("grad", grad)
        return None, run(given, *ctx.saved_tensors, ctx.n).to(ctx.dtype), None


_apply = apply_of(_SegmentSum)
