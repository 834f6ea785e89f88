"""The GPU kernels of the DPP op: what both share, CUDA C++ and Triton, and what they leave to plain torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
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

Tensors = tuple[torch.Tensor, ...]


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


def _flat(x: torch.Tensor, offsets: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Rows (M, d), offsets in int64 and the size of equal groups, as the kernels read them."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    return rows, None if offsets is None else offsets.long().contiguous(), 0 if offsets is not None else x.shape[1]


def _quality(log_quality: torch.Tensor | None) -> torch.Tensor | None:
    return None if log_quality is None else log_quality.detach().double().contiguous()


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
    rows, starts, k = _flat(x, offsets)
    quality = _quality(log_quality)
    groups = x.shape[0] if starts is None else starts.numel() - 1
    # P and Q: k columns, or for ragged groups as many as the largest may have.
    pitch = k or max(1, min(LARGEST, rows.shape[0]))
    sizes = ((groups,), x.shape[:-1], x.shape[:-1])
    logdet, gains, baselines = (torch.empty(size, device=x.device) for size in sizes)
    columns = ((rows.shape[0], n) for n in (pitch, pitch, 3))
    p, q, line = (torch.empty(size, dtype=torch.float64, device=x.device) for size in columns)
    kept = (p, q, line, torch.empty(groups, dtype=torch.int32, device=x.device))
    if groups == 0:
        # No program runs to mark rows that no group owns, which only wrong offsets leave.
        gains.fill_(torch.nan)
        baselines.fill_(torch.nan)
    launch.fwd(rows, quality, starts, k, ridge, normalize, kept, (logdet, gains, baselines))
    return DppForward(logdet, gains, baselines, kept, functools.partial(dpp_bwd, launch))


def dpp_bwd(
    launch: Launchers,
    grad_logdet: torch.Tensor,
    grad_gains: torch.Tensor,
    x: torch.Tensor,
    log_quality: torch.Tensor | None,
    offsets: torch.Tensor | None,
    saved: Tensors,
    ridge: float,
    normalize: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients with respect to x and log_quality from what dpp_fwd kept."""
    rows, starts, k = _flat(x, offsets)
    grad_x = torch.empty_like(rows)
    grad_quality = None if log_quality is None else torch.empty(x.shape[:-1], device=x.device)
    if saved[3].numel() == 0:
        for grad in (grad_x, grad_quality):
            if grad is not None:
                grad.fill_(torch.nan)
    incoming = (grad_logdet.float().contiguous(), grad_gains.float().contiguous())
    launch.bwd(rows, starts, k, normalize, saved, (*incoming, grad_x, grad_quality))
    if grad_quality is None or log_quality is None:
        return grad_x.view(x.shape), None
    return grad_x.view(x.shape), grad_quality.to(log_quality.dtype)


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
    rows, starts, k = _flat(x, offsets)
    groups = x.shape[0] if starts is None else starts.numel() - 1
    picks = torch.empty((groups, n), dtype=torch.int64, device=x.device)
    launch.select(rows, _quality(log_quality), starts, k, ridge, picks)
    return picks


def cuda_launchers(native: Any) -> Launchers:
    """The CUDA C++ kernels of a module that has the functions of csrc/cuda/bindings_cuda.cpp."""

    def address(t: torch.Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    def run(function: Any, inputs: tuple[Any, ...], groups: int, settings: tuple[Any, ...], *rest: Any) -> None:
        x = inputs[0]
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        with on_device(x):
            of = (*(address(t) for t in inputs), groups, *x.shape, *settings)
            error = function(DTYPES.index(x.dtype), of, *rest, stream)
        if error:
            raise RuntimeError(f"dpp: the CUDA launch failed: {error}")

    def addresses(kept: Tensors, out: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (*(address(t) for t in kept), kept[0].shape[1]), tuple(address(t) for t in out)

    def fwd(
        x: Any, log_quality: Any, offsets: Any, k: int, ridge: float, normalize: bool, kept: Tensors, out: Tensors
    ) -> None:
        inputs, settings = (x, log_quality, offsets), (k, ridge, normalize)
        run(native.dpp_cuda_fwd, inputs, kept[3].numel(), settings, *addresses(kept, out))

    def bwd(x: Any, offsets: Any, k: int, normalize: bool, kept: Tensors, grads: Any) -> None:
        # The backward pass finds quality and ridge in what was kept.
        inputs, settings = (x, None, offsets), (k, 1.0, normalize)
        run(native.dpp_cuda_bwd, inputs, kept[3].numel(), settings, *addresses(kept, grads))

    def select(x: Any, log_quality: Any, offsets: Any, k: int, ridge: float, picks: torch.Tensor) -> None:
        groups, n = picks.shape
        run(native.dpp_cuda_select, (x, log_quality, offsets), groups, (k, ridge, True), n, address(picks))

    return Launchers(fwd, bwd, select)


def triton_launchers() -> Launchers:
    """The kernels of qempo_fast/kernels."""
    from .kernels import dpp, dpp_select

    return Launchers(dpp.dpp_fwd, dpp.dpp_bwd, dpp_select.dpp_select)


def _triton_fwd(*arguments: Any) -> DppForward:
    return dpp_fwd(triton_launchers(), *arguments)


def _triton_select(*arguments: Any, **settings: Any) -> torch.Tensor:
    return dpp_select(triton_launchers(), *arguments, **settings)


def _cuda_fwd(*arguments: Any) -> DppForward:
    return dpp_fwd(cuda_launchers(_C), *arguments)


def _cuda_select(*arguments: Any, **settings: Any) -> torch.Tensor:
    return dpp_select(cuda_launchers(_C), *arguments, **settings)


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
