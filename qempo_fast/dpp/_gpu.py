"""The GPU kernels of the DPP ops: what both share, CUDA C++ and Triton, and what they leave to plain torch.

A call at d = 384 costs the host more time than the GPU: nothing is checked, converted or allocated here that a kernel
could do without (docs/dpp_gpu.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .. import _check
from .._door import dense
from ..reference import dpp as _reference
from ..reference.dpp import DppForward, Grads, Inputs

_Optional = torch.Tensor | None
# Rows of the largest group that the kernels take.
LARGEST = 64
# In the order of qempo::cuda::DppDtype.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def _layout(x: torch.Tensor, offsets: _Optional) -> tuple[_Optional, int, int]:
    """int64 offsets of ragged groups, how many groups, k of equal ones."""
    if offsets is None:
        return None, x.shape[0], x.shape[1]
    starts: torch.Tensor = dense("offsets", offsets if offsets.dtype == torch.int64 else offsets.long())
    return starts, starts.numel() - 1, 0


def kept_parts(groups: int, rows: int, pitch: int) -> tuple[int, int, int, int]:
    """Where P, Q, the rows' and the groups' numbers lie in the slab, and its end, less P's 0: in doubles.

    P and Q are (rows, pitch), the rest (rows, 3) and (groups,). Each begins on 16 bytes, as kept_in of
    csrc/include/qempo/dpp_cuda.h and kept_in of kernels/_dpp.py have it.
    """
    square = (rows * pitch + 1) // 2 * 2
    careful = 2 * square + (3 * rows + 1) // 2 * 2
    return square, 2 * square, careful, careful + groups


def dpp_fwd(
    launch: Launchers, x: torch.Tensor, log_quality: _Optional, offsets: _Optional, ridge: float, normalize: bool
) -> DppForward:
    """Forward pass of equal groups (G, k, d), or of (M, d) with offsets."""
    if for_reference(x, offsets):
        return _reference.dpp_fwd(x, log_quality, offsets, ridge, normalize)
    starts, groups, k = _layout(x, offsets)
    shape = x.shape[:-1]
    rows = shape.numel()
    pitch = min(LARGEST, rows) if k == 0 else k
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
        quality = dense("log_quality", log_quality)
        launch.fwd(
            dense("embeddings", x), quality, starts, groups, k, ridge, normalize, slab, (logdet, gains, baselines)
        )
    return DppForward(logdet, gains, baselines, (slab,), functools.partial(dpp_bwd, launch))


def dpp_bwd(
    launch: Launchers, grads: Grads, inputs: Inputs, saved: Sequence[torch.Tensor], ridge: float, normalize: bool
) -> Grads:
    """As the reference's, from what the forward pass here kept."""
    (grad_logdet, grad_gains), (x, log_quality, offsets) = grads, inputs
    starts, groups, k = _layout(x, offsets)
    embeddings: torch.Tensor = dense("embeddings", x)
    grad_x = torch.empty_like(embeddings)
    grad_quality = None
    if log_quality is not None:
        grad_quality = torch.empty_like(log_quality, dtype=torch.float32, memory_format=torch.contiguous_format)
    if groups == 0:
        grad_x.fill_(torch.nan)
        if grad_quality is not None:
            grad_quality.fill_(torch.nan)
    else:
        incoming = (dense("grad", g) for g in (grad_logdet, grad_gains))
        launch.bwd(embeddings, starts, groups, k, normalize, saved[0], (*incoming, grad_x, grad_quality))
    if grad_quality is None or log_quality is None:
        return grad_x, None
    return grad_x, grad_quality.to(log_quality.dtype)


def dpp_select(
    launch: Launchers, x: torch.Tensor, n: int, *, log_quality: _Optional, offsets: _Optional, ridge: float
) -> torch.Tensor:
    """Greedy choice of n rows from each of equal groups (G, k, d), or of (M, d) with offsets."""
    if for_reference(x, offsets):
        return _reference.dpp_select(x, n, log_quality=log_quality, offsets=offsets, ridge=ridge)
    starts, groups, k = _layout(x, offsets)
    picks = torch.empty((groups, n), dtype=torch.int64, device=x.device)
    if groups:
        quality = dense("log_quality", log_quality)
        launch.select(dense("embeddings", x), quality, starts, groups, k, ridge, picks)
    return picks
