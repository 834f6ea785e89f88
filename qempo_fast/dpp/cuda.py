"""The CUDA C++ kernels of the DPP ops: csrc/cuda/dpp.cu on torch's tensors."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import _C
from .._door import address, maybe
from ..kernels._common import on_device
from . import _gpu

_F32 = torch.float32
_CODES = {dtype: code for code, dtype in enumerate((*_gpu.DTYPES, torch.float64))}


def _slab(slab: torch.Tensor, x: torch.Tensor, groups: int, k: int) -> int:
    """Address of what the passes keep, which is as large as they take it to be."""
    rows = x.shape[:-1].numel()
    size = _gpu.kept_parts(groups, rows, min(_gpu.LARGEST, rows) if k == 0 else k)[-1]
    return address(slab, torch.float64, size, x.get_device())


def launchers(native: Any) -> _gpu.Launchers:
    """The CUDA C++ kernels of a module that has the functions of csrc/bindings/dpp_cuda.cpp."""

    def run(function: Any, x: Any, log_quality: Any, offsets: Any, *settings: Any) -> None:
        groups, k, ridge, normalize, *rest = settings
        width, device = x.shape[-1], x.get_device()
        rows = x.shape[0] if k == 0 else groups * k
        kind = _F32 if log_quality is None else log_quality.dtype
        quality = maybe(log_quality, kind, rows, device), _CODES[kind]
        starts = maybe(offsets, torch.int64, groups + 1, device)
        of = (address(x, x.dtype, rows * width, device), *quality, starts, groups, rows, width, k, ridge, normalize)
        # torch.cuda.current_stream makes an object of the stream: 2 microseconds.
        stream = torch._C._cuda_getCurrentRawStream(device) if x.is_cuda else 0
        with on_device(x):
            error = function(_CODES[x.dtype], of, *rest, stream)
        if error:
            raise RuntimeError(f"dpp: the CUDA launch failed: {error}")

    def fwd(
        x: Any, log_quality: Any, offsets: Any, groups: int, k: int, ridge: float, normalize: bool, slab: Any, out: Any
    ) -> None:
        device, rows = x.get_device(), x.shape[:-1].numel()
        results = tuple(address(t, _F32, n, device) for t, n in zip(out, (groups, rows, rows), strict=True))
        settings = (groups, k, ridge, normalize)
        run(native.dpp_cuda_fwd, x, log_quality, offsets, *settings, _slab(slab, x, groups, k), results)

    def bwd(x: Any, offsets: Any, groups: int, k: int, normalize: bool, slab: Any, grads: Any) -> None:
        grad_logdet, grad_gains, grad_x, grad_quality = grads
        device, rows = x.get_device(), x.shape[:-1].numel()
        addresses = (
            maybe(grad_logdet, _F32, groups, device),
            maybe(grad_gains, _F32, rows, device),
            address(grad_x, x.dtype, x.numel(), device),
            maybe(grad_quality, _F32, rows, device),
        )
        # The backward pass finds quality and ridge in what was kept.
        run(native.dpp_cuda_bwd, x, None, offsets, groups, k, 1.0, normalize, _slab(slab, x, groups, k), addresses)

    def select(x: Any, log_quality: Any, offsets: Any, groups: int, k: int, ridge: float, picks: torch.Tensor) -> None:
        settings = (groups, k, ridge, True)
        at = address(picks, torch.int64, groups * picks.shape[1], x.get_device())
        run(native.dpp_cuda_select, x, log_quality, offsets, *settings, picks.shape[1], at)

    return _gpu.Launchers(fwd, bwd, select)


_BUILT = launchers(_C)
dpp = functools.partial(_gpu.dpp_fwd, _BUILT)
dpp_select = functools.partial(_gpu.dpp_select, _BUILT)
