"""The CUDA C++ kernels of the DPP ops: csrc/cuda/dpp.cu on torch's tensors."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import _C
from ..kernels._common import on_device
from . import _gpu

_CODES = {dtype: code for code, dtype in enumerate((*_gpu.DTYPES, torch.float64))}


def launchers(native: Any) -> _gpu.Launchers:
    """The CUDA C++ kernels of a module that has the functions of csrc/bindings/dpp_cuda.cpp."""

    def address(t: torch.Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    def run(function: Any, x: Any, log_quality: Any, offsets: Any, *settings: Any) -> None:
        groups, k, ridge, normalize, *rest = settings
        width = x.shape[-1]
        quality = 0 if log_quality is None else _CODES[log_quality.dtype]
        pointers = (x.data_ptr(), address(log_quality), quality, address(offsets))
        of = (*pointers, groups, x.shape[0] if k == 0 else groups * k, width, k, ridge, normalize)
        # torch.cuda.current_stream makes an object of the stream: 2 microseconds.
        stream = torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0
        with on_device(x):
            error = function(_CODES[x.dtype], of, *rest, stream)
        if error:
            raise RuntimeError(f"dpp: the CUDA launch failed: {error}")

    def fwd(
        x: Any, log_quality: Any, offsets: Any, groups: int, k: int, ridge: float, normalize: bool, slab: Any, out: Any
    ) -> None:
        logdet, gains, baselines = out
        results = (logdet.data_ptr(), gains.data_ptr(), baselines.data_ptr())
        settings = (groups, k, ridge, normalize)
        run(native.dpp_cuda_fwd, x, log_quality, offsets, *settings, slab.data_ptr(), results)

    def bwd(x: Any, offsets: Any, groups: int, k: int, normalize: bool, slab: Any, grads: Any) -> None:
        grad_logdet, grad_gains, grad_x, grad_quality = grads
        addresses = (address(grad_logdet), address(grad_gains), grad_x.data_ptr(), address(grad_quality))
        # The backward pass finds quality and ridge in what was kept.
        run(native.dpp_cuda_bwd, x, None, offsets, groups, k, 1.0, normalize, slab.data_ptr(), addresses)

    def select(x: Any, log_quality: Any, offsets: Any, groups: int, k: int, ridge: float, picks: torch.Tensor) -> None:
        settings = (groups, k, ridge, True)
        run(native.dpp_cuda_select, x, log_quality, offsets, *settings, picks.shape[1], picks.data_ptr())

    return _gpu.Launchers(fwd, bwd, select)


_BUILT = launchers(_C)
dpp = functools.partial(_gpu.dpp_fwd, _BUILT)
dpp_select = functools.partial(_gpu.dpp_select, _BUILT)
