"""The Triton kernels of the losses; Triton itself is imported at the first call."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from . import _backends, _check
from .reference import losses

_Result = tuple[torch.Tensor, tuple[torch.Tensor, ...]]
# The file of kernels/ that holds each op's launcher, <op>_fwd.
_FILES = {
    "pair_loss": "loss_pairs",
    "group_loss": "loss_groups",
    "variance_loss": "loss_groups",
    "epa_loss": "loss_contrastive",
    "poft_loss": "loss_contrastive",
    "rspo_loss": "loss_risk",
    "token_loss": "loss_tokens",
}


@functools.cache
def _launcher(op: str) -> Callable[..., _Result]:
    launcher: Callable[..., _Result] = getattr(importlib.import_module(f"qempo_fast.kernels.{_FILES[op]}"), f"{op}_fwd")
    return launcher


def _first(op: str) -> Callable[..., _Result]:
    """Imports the launcher of op and takes its place in the table: the detour costs a microsecond of a call's 40."""

    def run(*args: Any, **settings: Any) -> _Result:
        _backends.register(op, "triton", _launcher(op), _backends.needs_triton)
        return _launcher(op)(*args, **settings)

    return run


@functools.cache
def _largest() -> int:
    """Responses of the largest group that the kernel sorts in registers."""
    from .kernels.loss_risk import LARGEST

    return LARGEST


def _for_reference(n: int, k: int, group_size: int | None, offsets: torch.Tensor | None) -> bool:
    """Whether plain torch runs this call: a group too large for the registers, or more samples than 32 bits count.

    The sizes of ragged groups on a GPU are read only where QEMPO_CHECK=1 allows the synchronisation; otherwise the
    kernel turns such a group into NaN.
    """
    if k == 1 or n <= _largest():
        return False
    if offsets is None:
        return (group_size or 0) > _largest() or n >= 2**31
    return n >= 2**31 or (_check.readable(offsets) and bool((offsets.diff() > _largest()).any()))


def rspo_loss(
    logps: torch.Tensor,
    rewards: torch.Tensor,
    *,
    k: int,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    baseline: str = "loo",
) -> _Result:
    """The kernel, or the reference's weights for groups of more than 1024."""
    if not _for_reference(logps.shape[0], k, group_size, offsets):
        return _launcher("rspo_loss")(logps, rewards, k=k, group_size=group_size, offsets=offsets, baseline=baseline)
    weights = losses.rspo_weights(rewards, k=k, group_size=group_size, offsets=offsets)
    coef = weights * (-k / logps.shape[0])
    return (coef * logps).sum(), (coef,)


def register() -> None:
    """Enter the kernels in the table of backends."""
    for op in _FILES:
        run = rspo_loss if op == "rspo_loss" else _first(op)
        _backends.register(op, "triton", run, _backends.needs_triton)
