"""CPU kernels of the losses: the C++ of csrc/cpu/losses_*.cpp on torch's tensors.

Each function takes the arguments of the reference function of its name and returns (value, coefs), as
losses/_fused.py asks. The kernels look at the values that CHECKS looks at; only where one is bad does CHECKS run, to
raise its error.
"""

from __future__ import annotations

from typing import Any

import torch

from . import _C
from .losses._values import CHECKS, least
from .reference.groups import STD_EPS

_REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}
_BASELINES = {"none": 0, "mean": 1, "loo": 2}
_NORMALIZE = {"sequence": 0, "token": 1}
_F64, _I64 = torch.float64, torch.int64

Result = tuple[torch.Tensor, tuple[torch.Tensor, ...]]


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _refuse(op: str, *args: Any, **settings: Any) -> None:
    """Raise the error of the values that a kernel has refused."""
    CHECKS[op](*args, **settings)
    raise AssertionError(f"{op}: the kernel refuses values that the check takes")


def _layout(n: int, group_size: int | None, offsets: torch.Tensor | None) -> tuple[int, bool, int, int]:
    """Address of offsets, whether they are int64, groups, size of equal groups."""
    if offsets is None:
        assert group_size is not None
        return 0, False, n // group_size, group_size
    return offsets.data_ptr(), offsets.dtype is _I64, offsets.shape[0] - 1, 0


def pair_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor | None,
    ref_rejected: torch.Tensor | None,
    *,
    alpha: float,
    beta: float,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Result:
    value = chosen.new_empty(chosen.shape if reduction == "none" else ())
    coefs = torch.empty_like(chosen), torch.empty_like(chosen)
    _C.pair_loss(
        chosen.dtype is _F64,
        chosen.shape[0],
        chosen.data_ptr(),
        rejected.data_ptr(),
        _address(ref_chosen),
        _address(ref_rejected),
        alpha,
        beta,
        label_smoothing,
        _REDUCTIONS[reduction],
        value.data_ptr(),
        coefs[0].data_ptr(),
        coefs[1].data_ptr(),
        torch.get_num_threads(),
    )
    return value, coefs


def poft_loss(
    logps: torch.Tensor,
    lengths: torch.Tensor,
    aligned_mean_logps: torch.Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 0.0,
    reduction: str = "mean",
) -> Result:
    value, coef = logps.new_empty(logps.shape if reduction == "none" else ()), torch.empty_like(logps)
    if not _C.poft_loss(
        logps.dtype is _F64,
        *aligned_mean_logps.shape,
        logps.data_ptr(),
        lengths.data_ptr(),
        aligned_mean_logps.data_ptr(),
        beta,
        gamma,
        _REDUCTIONS[reduction],
        value.data_ptr(),
        coef.data_ptr(),
        torch.get_num_threads(),
    ):
        _refuse("poft_loss", logps, lengths, aligned_mean_logps)
    return value, (coef,)


def epa_loss(
    positive: torch.Tensor,
    strong: torch.Tensor,
    weak: torch.Tensor,
    ref_positive: torch.Tensor,
    ref_strong: torch.Tensor,
    ref_weak: torch.Tensor,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
) -> Result:
    value = positive.new_empty(positive.shape if reduction == "none" else ())
    coefs = torch.empty_like(positive), torch.empty_like(strong), torch.empty_like(weak)
    _C.epa_loss(
        positive.dtype is _F64,
        *strong.shape,
        weak.shape[1],
        *[x.data_ptr() for x in (positive, strong, weak, ref_positive, ref_strong, ref_weak)],
        beta,
        _REDUCTIONS[reduction],
        value.data_ptr(),
        *[x.data_ptr() for x in coefs],
        torch.get_num_threads(),
    )
    return value, coefs


def group_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    rewards: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    baseline: str = "loo",
    bonus: torch.Tensor | None = None,
) -> Result:
    n, value, coef = logps.shape[0], logps.new_empty(()), torch.empty_like(logps)
    if not _C.group_loss(
        logps.dtype is _F64,
        False,
        n,
        *_layout(n, group_size, offsets),
        least(baseline),
        logps.data_ptr(),
        _address(ref_logps),
        rewards.data_ptr(),
        _address(bonus),
        alpha,
        beta,
        _BASELINES[baseline],
        value.data_ptr(),
        coef.data_ptr(),
        torch.get_num_threads(),
    ):
        _refuse("group_loss", logps, ref_logps, rewards, offsets=offsets, baseline=baseline)
    return value, (coef,)


def variance_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    rewards: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
) -> Result:
    n, value, coef = logps.shape[0], logps.new_empty(()), torch.empty_like(logps)
    if not _C.group_loss(
        logps.dtype is _F64,
        True,
        n,
        *_layout(n, group_size, offsets),
        2,
        logps.data_ptr(),
        _address(ref_logps),
        rewards.data_ptr(),
        0,
        alpha,
        beta,
        _BASELINES["mean"],
        value.data_ptr(),
        coef.data_ptr(),
        torch.get_num_threads(),
    ):
        _refuse("variance_loss", logps, ref_logps, rewards, offsets=offsets)
    return value, (coef,)


def rspo_loss(
    logps: torch.Tensor,
    rewards: torch.Tensor,
    *,
    k: int,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    baseline: str = "loo",
) -> Result:
    if k == 1:
        groups: dict[str, Any] = {"group_size": group_size, "offsets": offsets, "baseline": baseline}
        return group_loss(logps, None, rewards, alpha=0.0, beta=0.0, **groups)
    n, value, coef = logps.shape[0], logps.new_empty(()), torch.empty_like(logps)
    if not _C.rspo_loss(
        logps.dtype is _F64,
        n,
        *_layout(n, group_size, offsets),
        k,
        logps.data_ptr(),
        rewards.data_ptr(),
        value.data_ptr(),
        coef.data_ptr(),
        torch.get_num_threads(),
    ):
        _refuse("rspo_loss", logps, rewards, k=k, offsets=offsets, baseline=baseline)
    return value, (coef,)


def token_loss(
    token_logps: torch.Tensor,
    old_token_logps: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    ref_token_logps: torch.Tensor | None = None,
    kl: float = 0.0,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    ratio: str = "token",
    normalize: str | float = "sequence",
) -> Result:
    value, coef = token_logps.new_empty(()), torch.empty_like(token_logps)
    if not _C.token_loss(
        token_logps.dtype is _F64,
        token_logps.shape[0],
        *_layout(0, None, cu_seqlens)[:3],
        token_logps.data_ptr(),
        old_token_logps.data_ptr(),
        _address(ref_token_logps),
        advantages.data_ptr(),
        kl,
        eps_low,
        eps_high,
        ratio == "sequence",
        _NORMALIZE[normalize] if isinstance(normalize, str) else 2,
        0.0 if isinstance(normalize, str) else normalize,
        value.data_ptr(),
        coef.data_ptr(),
        torch.get_num_threads(),
    ):
        _refuse("token_loss", token_logps, old_token_logps, advantages, cu_seqlens)
    return value, (coef,)


def group_advantages(
    rewards: torch.Tensor,
    *,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    scale: str = "std",
    baseline: str = "mean",
) -> torch.Tensor:
    """The advantages themselves: they have no gradient."""
    n, out = rewards.shape[0], torch.empty_like(rewards)
    if not _C.group_advantages(
        rewards.dtype is _F64,
        n,
        *_layout(n, group_size, offsets),
        rewards.data_ptr(),
        scale == "std",
        STD_EPS,
        _BASELINES[baseline],
        out.data_ptr(),
        torch.get_num_threads(),
    ):
        _refuse("group_advantages", rewards, offsets=offsets)
    return out
