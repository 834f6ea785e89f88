"""CPU kernels of the DPP ops: the C++ of csrc/cpu/dpp.cpp on torch's tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _C
from .._door import address, dense, maybe
from ..reference import dpp as reference
from ..reference.dpp import DppForward, Grads, Inputs

_Optional = torch.Tensor | None
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_F64, _I64 = torch.float64, torch.int64


def _layout(
    x: torch.Tensor, offsets: torch.Tensor | None
) -> tuple[int, int, torch.Tensor | None, torch.Tensor | None, int]:
    """Groups, k of equal groups, int64 offsets of rows and of k x k matrices, entries of all matrices."""
    if offsets is None:
        groups, k, _ = x.shape
        return groups, k, None, None, groups * k * k
    offsets = dense("offsets", offsets.long())
    matrices = torch.zeros_like(offsets)
    torch.cumsum(offsets.diff().square(), 0, out=matrices[1:])
    return offsets.numel() - 1, 0, offsets, matrices, int(matrices[-1])


def _largest(x: torch.Tensor, offsets: torch.Tensor | None) -> int:
    if offsets is None:
        return x.shape[1]
    return int(offsets.diff().max()) if offsets.numel() > 1 else 0


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Contiguous rows in a type that the kernel reads; float16 is widened."""
    rows: torch.Tensor = dense("embeddings", x.float() if x.dtype == torch.float16 else x)
    return rows


def _quality(log_quality: torch.Tensor | None) -> torch.Tensor | None:
    return None if log_quality is None else dense("log_quality", log_quality.double())


def _doubles(*sizes: int | tuple[int, ...]) -> list[torch.Tensor]:
    """Memory for numbers of the kernel's own type."""
    return [torch.empty(size, dtype=_F64, device="cpu") for size in sizes]


def _grads(grad: _Optional, shape: tuple[int, ...]) -> torch.Tensor:
    """An incoming gradient, zeros where it is None."""
    if grad is None:
        return torch.zeros(shape, dtype=_F64, device="cpu")
    given: torch.Tensor = dense("grad", grad.double())
    return given


def dpp(x: torch.Tensor, log_quality: _Optional, offsets: _Optional, ridge: float, normalize: bool) -> DppForward:
    """Forward pass in C++; groups of more than 64 rows take plain torch."""
    if _largest(x, offsets) > _C.dpp_largest:
        return reference.dpp_fwd(x, log_quality, offsets, ridge, normalize)
    groups, k, starts, matrices, entries = _layout(x, offsets)
    rows, quality, samples = _rows(x), _quality(log_quality), x.shape[:-1].numel()
    sizes = (groups,), (entries,), *[x.shape[:-1]] * 3
    logdet, inverse, gains, baselines, lengths = _doubles(*sizes)
    _C.dpp_fwd(
        _DTYPES[rows.dtype],
        address(rows, rows.dtype, x.numel()),
        x.shape[-1],
        groups,
        k,
        maybe(starts, _I64, groups + 1),
        maybe(matrices, _I64, groups + 1),
        maybe(quality, _F64, samples),
        ridge,
        normalize,
        address(logdet, _F64, groups),
        address(gains, _F64, samples),
        address(baselines, _F64, samples),
        address(inverse, _F64, entries),
        address(lengths, _F64, samples),
        torch.get_num_threads(),
    )
    out = torch.float64 if x.dtype == torch.float64 else torch.float32
    return DppForward(logdet.to(out), gains.to(out), baselines.to(out), (inverse, lengths), dpp_bwd)


def dpp_bwd(grads: Grads, inputs: Inputs, saved: Sequence[torch.Tensor], ridge: float, normalize: bool) -> Grads:
    """As the reference's, from what the forward pass here kept."""
    (grad_logdet, grad_gains), (x, log_quality, offsets) = grads, inputs
    groups, k, starts, matrices, entries = _layout(x, offsets)
    rows, quality, samples = _rows(x), _quality(log_quality), x.shape[:-1].numel()
    of_logdet, of_gains = _grads(grad_logdet, (groups,)), _grads(grad_gains, x.shape[:-1])
    inverse, lengths = saved
    grad, (grad_quality,) = torch.empty_like(rows), _doubles(x.shape[:-1])
    _C.dpp_bwd(
        _DTYPES[rows.dtype],
        address(rows, rows.dtype, x.numel()),
        x.shape[-1],
        groups,
        k,
        maybe(starts, _I64, groups + 1),
        maybe(matrices, _I64, groups + 1),
        maybe(quality, _F64, samples),
        ridge,
        normalize,
        address(of_logdet, _F64, groups),
        address(of_gains, _F64, samples),
        address(inverse, _F64, entries),
        address(lengths, _F64, samples),
        address(grad, rows.dtype, x.numel()),
        address(grad_quality, _F64, samples),
        torch.get_num_threads(),
    )
    return grad.to(x.dtype), None if log_quality is None else grad_quality.to(log_quality.dtype)


def dpp_select(x: torch.Tensor, n: int, *, log_quality: _Optional, offsets: _Optional, ridge: float) -> torch.Tensor:
    """Greedy choice in C++; groups of more than 64 rows take plain torch."""
    if _largest(x, offsets) > _C.dpp_largest:
        return reference.dpp_select(x, n, log_quality=log_quality, offsets=offsets, ridge=ridge)
    groups, k, starts, _, _ = _layout(x, offsets)
    rows, quality, samples = _rows(x), _quality(log_quality), x.shape[:-1].numel()
    picks = torch.empty(groups, n, dtype=_I64, device="cpu")
    _C.dpp_select(
        _DTYPES[rows.dtype],
        address(rows, rows.dtype, x.numel()),
        x.shape[-1],
        groups,
        k,
        maybe(starts, _I64, groups + 1),
        maybe(quality, _F64, samples),
        ridge,
        n,
        address(picks, _I64, groups * n),
        torch.get_num_threads(),
    )
    return picks
