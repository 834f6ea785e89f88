"""The Triton kernels of the losses; Triton itself is imported at the first call."""

from __future__ import annotations

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


def _launcher(op: str) -> Callable[..., _Result]:
    def run(*args: Any, **settings: Any) -> _Result:
        module = importlib.import_module(f"qempo_fast.kernels.{_FILES[op]}")
        result: _Result = getattr(module, f"{op}_fwd")(*args, **settings)
        return result

    return run


_sorted_in_registers = _launcher("rspo_loss")


def _for_reference(n: int, k: int, group_size: int | None, offsets: torch.Tensor | None) -> bool:
    """Whether plain torch runs this call: a group too large for the registers.

    The sizes of ragged groups on a GPU are read only where QEMPO_CHECK=1 allows the synchronisation; otherwise the
    kernel turns such a group into NaN.
    """
    from .kernels.loss_risk import LARGEST

    if k == 1 or n <= LARGEST:
        return False
    if offsets is None:
        return (group_size or 0) > LARGEST
    return _check.readable(offsets) and bool((offsets.diff() > LARGEST).any())


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
        return _sorted_in_registers(logps, rewards, k=k, group_size=group_size, offsets=offsets, baseline=baseline)
    weights = losses.rspo_weights(rewards, k=k, group_size=group_size, offsets=offsets)
    coef = weights * (-k / logps.shape[0])
    return (coef * logps).sum(), (coef,)


def register() -> None:
    """Enter the kernels in the table of backends."""
    for op in _FILES:
        run = rspo_loss if op == "rspo_loss" else _launcher(op)
        _backends.register(op, "triton", run, _backends.needs_triton)
