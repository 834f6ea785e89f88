"""Entry points of the Triton kernels; Triton itself is imported at the first call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from .pass_triton import TritonPass


def tile_pass() -> TritonPass:
    from .pass_triton import TritonPass

    return TritonPass()


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        from ..kernels.segment_sum import segment_sum_fwd

        ctx.save_for_backward(cu_seqlens)
        ctx.n, ctx.dtype = values.shape[0], values.dtype
        return segment_sum_fwd(values, cu_seqlens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        from ..kernels.segment_sum import segment_sum_bwd

        return segment_sum_bwd(grad, *ctx.saved_tensors, ctx.n).to(ctx.dtype), None


def segment_sum(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return _SegmentSum.apply(values, cu_seqlens)
