"""CPU kernels of the DPP ops: the C++ of csrc/cpu/dpp.cpp on torch's tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _C
from ..reference import dpp as reference
from ..reference.dpp import DppForward, Grads, Inputs

_Optional = torch.Tensor | None
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


def _layout(
    x: torch.Tensor, offsets: torch.Tensor | None
) -> tuple[int, int, torch.Tensor | None, torch.Tensor | None, int]:
    """Groups, k of equal groups, int64 offsets of rows and of k x k matrices, entries of all matrices."""
    if offsets is None:
        groups, k, _ = x.shape
        return groups, k, None, None, groups * k * k
    offsets = offsets.long().contiguous()
    matrices = torch.zeros_like(offsets)
    torch.cumsum(offsets.diff().square(), 0, out=matrices[1:])
    return offsets.numel() - 1, 0, offsets, matrices, int(matrices[-1])


def _largest(x: torch.Tensor, offsets: torch.Tensor | None) -> int:
    if offsets is None:
        return x.shape[1]
    return int(offsets.diff().max()) if offsets.numel() > 1 else 0


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Contiguous rows in a type that the kernel reads; float16 is widened."""
    return (x.float() if x.dtype == torch.float16 else x).contiguous()


def _quality(log_quality: torch.Tensor | None) -> torch.Tensor | None:
    return None if log_quality is None else log_quality.double().contiguous()


def dpp(x: torch.Tensor, log_quality: _Optional, offsets: _Optional, ridge: float, normalize: bool) -> DppForward:
    """Forward pass in C++; groups of more than 64 rows take plain torch."""
    if _largest(x, offsets) > _C.dpp_largest:
        return reference.dpp_fwd(x, log_quality, offsets, ridge, normalize)
    groups, k, starts, matrices, entries = _layout(x, offsets)
    rows, quality = _rows(x), _quality(log_quality)
    logdet, inverse = (torch.empty(n, dtype=torch.float64) for n in (groups, entries))
    gains, baselines, lengths = (torch.empty(x.shape[:-1], dtype=torch.float64) for _ in range(3))
    _C.dpp_fwd(
        _DTYPES[rows.dtype],
        rows.data_ptr(),
        x.shape[-1],
        groups,
        k,
        _address(starts),
        _address(matrices),
        _address(quality),
        ridge,
        normalize,
        [t.data_ptr() for t in (logdet, gains, baselines, inverse, lengths)],
        torch.get_num_threads(),
    )
    out = torch.float64 if x.dtype == torch.float64 else torch.float32
    return DppForward(logdet.to(out), gains.to(out), baselines.to(out), (inverse, lengths), dpp_bwd)


def dpp_bwd(grads: Grads, inputs: Inputs, saved: Sequence[torch.Tensor], ridge: float, normalize: bool) -> Grads:
    """As the reference's, from what the forward pass here kept."""
    (grad_logdet, grad_gains), (x, log_quality, offsets) = grads, inputs
    groups, k, starts, matrices, _ = _layout(x, offsets)
    rows, quality = _rows(x), _quality(log_quality)
    sizes = ((groups,), x.shape[:-1])
    incoming = [
        torch.zeros(size, dtype=torch.float64) if g is None else g.double().contiguous()
        for g, size in zip((grad_logdet, grad_gains), sizes, strict=True)
    ]
    incoming += saved
    grad = torch.empty_like(rows)
    grad_quality = torch.empty(x.shape[:-1], dtype=torch.float64)
    _C.dpp_bwd(
        _DTYPES[rows.dtype],
        rows.data_ptr(),
        x.shape[-1],
        groups,
        k,
        _address(starts),
        _address(matrices),
        _address(quality),
        ridge,
        normalize,
        [t.data_ptr() for t in incoming],
        grad.data_ptr(),
        grad_quality.data_ptr(),
        torch.get_num_threads(),
    )
    return grad.to(x.dtype), None if log_quality is None else grad_quality.to(log_quality.dtype)


def dpp_select(x: torch.Tensor, n: int, *, log_quality: _Optional, offsets: _Optional, ridge: float) -> torch.Tensor:
    """Greedy choice in C++; groups of more than 64 rows take plain torch."""
    if _largest(x, offsets) > _C.dpp_largest:
        return reference.dpp_select(x, n, log_quality=log_quality, offsets=offsets, ridge=ridge)
    groups, k, starts, _, _ = _layout(x, offsets)
    rows, quality = _rows(x), _quality(log_quality)
    picks = torch.empty(groups, n, dtype=torch.int64)
    _C.dpp_select(
        _DTYPES[rows.dtype],
        rows.data_ptr(),
        x.shape[-1],
        groups,
        k,
        _address(starts),
        _address(quality),
        ridge,
        n,
        picks.data_ptr(),
        torch.get_num_threads(),
    )
    return picks
