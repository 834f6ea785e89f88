"""The GPU kernels of the DPP op: what both share, CUDA C++ and Triton, and what they leave to plain torch.

A call at d = 384 costs the host more time than the GPU: nothing is checked, converted or allocated here that a kernel
could do without (docs/dpp_gpu.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import _C, _backends, _check
from .kernels._common import on_device
from .reference import dpp as _reference
from .reference.dpp import DppForward

# Rows of the largest group that the kernels take.
LARGEST = 64
# In the order of qempo::cuda::DppDtype.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CODES = {dtype: code for code, dtype in enumerate((*DTYPES, torch.float64))}


class Launchers(NamedTuple):
    """fwd, bwd and select of one kernel, as qempo_fast/kernels/dpp.py and dpp_select.py document them."""

    fwd: Callable[..., None]
    bwd: Callable[..., None]
    select: Callable[..., None]


def for_reference(x: torch.Tensor, offsets: torch.Tensor | None) -> bool:
    """Whether plain torch runs this call: float64, or a group beyond 64 rows.

    The sizes of ragged groups on a GPU are read only where QEMPO_CHECK=1 allows the synchronisation; otherwise
    the kernels turn a group beyond 64 rows into NaN.
    """
    if x.dtype not in DTYPES:
        return True
    if offsets is None:
        return x.shape[1] > LARGEST
    if x.shape[0] <= LARGEST or not _check.readable(offsets):
        return False
    return bool((offsets.diff() > LARGEST).any())


def _solid(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_contiguous() else x.detach().contiguous()


def _starts(offsets: torch.Tensor) -> torch.Tensor:
    return _solid(offsets if offsets.dtype == torch.int64 else offsets.long())


def kept_parts(groups: int, rows: int, pitch: int) -> tuple[int, int, int, int]:
    """Where P, Q, the rows' and the groups' numbers lie in the slab, and its end, less P's 0: in doubles.

    P and Q are (rows, pitch), the rest (rows, 3) and (groups,). Each begins on 16 bytes, as kept_in of
    csrc/include/qempo/cuda_dpp.h and kept_in of kernels/_dpp.py have it.
    """
    square = (rows * pitch + 1) // 2 * 2
    careful = 2 * square + (3 * rows + 1) // 2 * 2
    return square, 2 * square, careful, careful + groups


def dpp_fwd(
    launch: Launchers,
    x: torch.Tensor,
    log_quality: torch.Tensor | None,
    offsets: torch.Tensor | None,
    ridge: float,
    normalize: bool,
) -> DppForward:
    """Forward pass of equal groups (G, k, d), or of (M, d) with offsets."""
    if for_reference(x, offsets):
        return _reference.dpp_fwd(x, log_quality, offsets, ridge, normalize)
    if offsets is None:
        starts, (groups, k, _) = None, x.shape
        shape: tuple[int, ...] = (groups, k)
        rows, pitch = groups * k, k
    else:
        starts, k, rows = _starts(offsets), 0, x.shape[0]
        groups, shape, pitch = starts.numel() - 1, (rows,), min(LARGEST, rows)
    # One slab for all that only the backward pass reads. The results stay apart from it and from each other: users keep
    # them, and change them in place, which autograd refuses to views.
    size = kept_parts(groups, rows, pitch)[-1]
    slab = torch.empty(size, dtype=torch.float64, device=x.device)
    gains = x.new_empty(shape, dtype=torch.float32)
    baselines = torch.empty_like(gains)
    logdet = gains.new_empty(groups)
    if groups == 0:
        # No program runs to mark rows that no group owns, which only wrong offsets leave.
        gains.fill_(torch.nan)
        baselines.fill_(torch.nan)
    else:
        quality = None if log_quality is None else _solid(log_quality)
        launch.fwd(_solid(x), quality, starts, groups, k, ridge, normalize, slab, (logdet, gains, baselines))
    return DppForward(logdet, gains, baselines, (slab,), functools.partial(dpp_bwd, launch))


def dpp_bwd(
    launch: Launchers,
    grad_logdet: torch.Tensor | None,
    grad_gains: torch.Tensor | None,
    x: torch.Tensor,
    log_quality: torch.Tensor | None,
    offsets: torch.Tensor | None,
    saved: Sequence[torch.Tensor],
    ridge: float,
    normalize: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients with respect to x and log_quality from what dpp_fwd kept; an incoming gradient of None is zero."""
    if offsets is None:
        starts, (groups, k, _) = None, x.shape
    else:
        starts, k = _starts(offsets), 0
        groups = starts.numel() - 1
    embeddings = _solid(x)
    grad_x = torch.empty_like(embeddings)
    grad_quality = None
    if log_quality is not None:
        grad_quality = torch.empty_like(log_quality, dtype=torch.float32, memory_format=torch.contiguous_format)
    if groups == 0:
        grad_x.fill_(torch.nan)
        if grad_quality is not None:
            grad_quality.fill_(torch.nan)
    else:
        incoming = (None if g is None else _solid(g) for g in (grad_logdet, grad_gains))
        launch.bwd(embeddings, starts, groups, k, normalize, saved[0], (*incoming, grad_x, grad_quality))
    if grad_quality is None or log_quality is None:
        return grad_x, None
    return grad_x, grad_quality.to(log_quality.dtype)


def dpp_select(
    launch: Launchers,
    x: torch.Tensor,
    n: int,
    *,
    log_quality: torch.Tensor | None,
    offsets: torch.Tensor | None,
    ridge: float,
) -> torch.Tensor:
    """Greedy choice of n rows from each of equal groups (G, k, d), or of (M, d) with offsets."""
    if for_reference(x, offsets):
        return _reference.dpp_select(x, n, log_quality=log_quality, offsets=offsets, ridge=ridge)
    if offsets is None:
        starts, (groups, k, _) = None, x.shape
    else:
        starts, k = _starts(offsets), 0
        groups = starts.numel() - 1
    picks = torch.empty((groups, n), dtype=torch.int64, device=x.device)
    if groups:
        quality = None if log_quality is None else _solid(log_quality)
        launch.select(_solid(x), quality, starts, groups, k, ridge, picks)
    return picks


def cuda_launchers(native: Any) -> Launchers:
    """The CUDA C++ kernels of a module that has the functions of csrc/cuda/bindings_cuda.cpp."""

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

    return Launchers(fwd, bwd, select)


@functools.cache
def triton_launchers() -> Launchers:
    """The kernels of qempo_fast/kernels."""
    from .kernels import dpp, dpp_select

    return Launchers(dpp.dpp_fwd, dpp.dpp_bwd, dpp_select.dpp_select)


@functools.cache
def _built() -> Launchers:
    """The CUDA C++ kernels of this build."""
    return cuda_launchers(_C)


def _triton_fwd(x: Any, log_quality: Any, offsets: Any, ridge: float, normalize: bool) -> DppForward:
    return dpp_fwd(triton_launchers(), x, log_quality, offsets, ridge, normalize)


def _triton_select(x: Any, n: int, **settings: Any) -> torch.Tensor:
    return dpp_select(triton_launchers(), x, n, **settings)


def _cuda_fwd(x: Any, log_quality: Any, offsets: Any, ridge: float, normalize: bool) -> DppForward:
    return dpp_fwd(_built(), x, log_quality, offsets, ridge, normalize)


def _cuda_select(x: Any, n: int, **settings: Any) -> torch.Tensor:
    return dpp_select(_built(), x, n, **settings)


def _no_cuda() -> str | None:
    """Why the CUDA kernels cannot run here."""
    if not hasattr(_C, "dpp_cuda_fwd"):
        return "this build holds no CUDA kernels: nvcc was not found, or QEMPO_CUDA=0"
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or newer"
    return None


def register() -> None:
    """Enter the kernels in the table of backends."""
    _backends.register("dpp", "cuda", _cuda_fwd, _no_cuda)
    _backends.register("dpp", "triton", _triton_fwd, _backends.needs_triton)
    _backends.register("dpp_select", "cuda", _cuda_select, _no_cuda)
    _backends.register("dpp_select", "triton", _triton_select, _backends.needs_triton)
