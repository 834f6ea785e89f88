"""CPU kernels of the losses: the C++ of csrc/cpu/loss_*.cpp on torch's tensors.

Each function takes the arguments of the reference function of its name, whose types they have, and returns (value,
coefs), as _function.py asks. The kernels look at the values that checked() looks at; only where one is bad does it run,
to raise its error.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from .. import _C, _check
from ..reference.groups import STD_EPS
from ._values import checked, least


class _Words(dict[str, int]):
    """A setting's words as an enum of csrc/include/qempo/losses.h numbers them; another word raises."""

    def __init__(self, setting: str, *words: str) -> None:
        super().__init__((word, number) for number, word in enumerate(words))
        self._setting = setting

    def __missing__(self, word: str) -> NoReturn:
        _check.bad_value(self._setting, " or ".join(map(repr, self)), repr(word))


REDUCTIONS = _Words("reduction", "mean", "sum", "none")
BASELINES = _Words("baseline", "none", "mean", "loo")
SCALES = _Words("scale", "none", "std")
NORMALIZE = _Words("normalize", "sequence", "token", "number")
SURROGATES = _Words("surrogate", "clip")
_F64, _I64 = torch.float64, torch.int64

Result = tuple[torch.Tensor, tuple[torch.Tensor, ...]]


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _refuse(op: str, *args: Any, **settings: Any) -> None:
    """Raise the error of the values that a kernel has refused."""
    checked(op, args, settings)
    raise AssertionError(f"{op}: the kernel refuses values that the check takes")


def _layout(n: int, group_size: int | None, offsets: torch.Tensor | None) -> tuple[int, bool, int, int]:
    """Address of offsets, whether they are int64, groups, size of equal groups."""
    if offsets is None:
        assert group_size is not None
        return 0, False, n // group_size, group_size
    return offsets.data_ptr(), offsets.dtype is _I64, offsets.shape[0] - 1, 0


def pair_loss(
    chosen, rejected, ref_chosen, ref_rejected, *, alpha, beta, label_smoothing=0.0, reduction="mean"
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
        REDUCTIONS[reduction],
        value.data_ptr(),
        coefs[0].data_ptr(),
        coefs[1].data_ptr(),
        torch.get_num_threads(),
    )
    return value, coefs


def poft_loss(logps, lengths, aligned_mean_logps, *, beta=1.0, gamma=0.0, reduction="mean") -> Result:
    value, coef = logps.new_empty(logps.shape if reduction == "none" else ()), torch.empty_like(logps)
    if not _C.poft_loss(
        logps.dtype is _F64,
        *aligned_mean_logps.shape,
        logps.data_ptr(),
        lengths.data_ptr(),
        aligned_mean_logps.data_ptr(),
        beta,
        gamma,
        REDUCTIONS[reduction],
        value.data_ptr(),
        coef.data_ptr(),
        torch.get_num_threads(),
    ):
        _refuse("poft_loss", logps, lengths, aligned_mean_logps)
    return value, (coef,)


def epa_loss(positive, strong, weak, ref_positive, ref_strong, ref_weak, *, beta=0.1, reduction="mean") -> Result:
    value = positive.new_empty(positive.shape if reduction == "none" else ())
    coefs = torch.empty_like(positive), torch.empty_like(strong), torch.empty_like(weak)
    _C.epa_loss(
        positive.dtype is _F64,
        *strong.shape,
        weak.shape[1],
        *[x.data_ptr() for x in (positive, strong, weak, ref_positive, ref_strong, ref_weak)],
        beta,
        REDUCTIONS[reduction],
        value.data_ptr(),
        *[x.data_ptr() for x in coefs],
        torch.get_num_threads(),
    )
    return value, coefs


def _group_loss(
    op: str,
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    rewards: torch.Tensor,
    alpha: float,
    beta: float,
    groups: tuple[int | None, torch.Tensor | None],
    baseline: str,
    bonus: torch.Tensor | None,
) -> Result:
    """Both losses of the family on groups, which differ in what they do with centred samples."""
    n, value, coef = logps.shape[0], logps.new_empty(()), torch.empty_like(logps)
    if not _C.group_loss(
        logps.dtype is _F64,
        op == "variance_loss",
        n,
        *_layout(n, *groups),
        least(baseline),
        logps.data_ptr(),
        _address(ref_logps),
        rewards.data_ptr(),
        _address(bonus),
        alpha,
        beta,
        BASELINES[baseline],
        value.data_ptr(),
        coef.data_ptr(),
        torch.get_num_threads(),
    ):
        _refuse(op, logps, ref_logps, rewards, baseline=baseline, offsets=groups[1])
    return value, (coef,)


def group_loss(
    logps, ref_logps, rewards, *, alpha, beta, group_size=None, offsets=None, baseline="loo", bonus=None
) -> Result:
    groups = group_size, offsets
    return _group_loss("group_loss", logps, ref_logps, rewards, alpha, beta, groups, baseline, bonus)


def variance_loss(logps, ref_logps, rewards, *, alpha, beta, group_size=None, offsets=None) -> Result:
    """The squared form of group_loss, about the group's mean."""
    groups = group_size, offsets
    return _group_loss("variance_loss", logps, ref_logps, rewards, alpha, beta, groups, "mean", None)


def rspo_loss(logps, rewards, *, k, group_size=None, offsets=None, baseline="loo") -> Result:
    if k == 1:
        groups: dict[str, Any] = {"group_size": group_size, "offsets": offsets}
        return group_loss(logps, None, rewards, alpha=0.0, beta=0.0, baseline=baseline, **groups)
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
        _refuse("rspo_loss", logps, rewards, k=k, baseline=baseline, offsets=offsets)
    return value, (coef,)


def token_loss(
    token_logps, old_token_logps, advantages, cu_seqlens, *, ref_token_logps=None,
    kl=0.0, eps_low=0.2, eps_high=0.2, ratio="token", normalize="sequence", surrogate="clip",
) -> Result:  # fmt: skip
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
        NORMALIZE[normalize if isinstance(normalize, str) else "number"],
        0.0 if isinstance(normalize, str) else normalize,
        SURROGATES[surrogate],
        value.data_ptr(),
        coef.data_ptr(),
        torch.get_num_threads(),
    ):
        _refuse("token_loss", token_logps, old_token_logps, advantages, cu_seqlens)
    return value, (coef,)


def group_advantages(rewards, *, group_size=None, offsets=None, scale="std", baseline="mean") -> torch.Tensor:
    """The advantages themselves: they have no gradient."""
    n, out = rewards.shape[0], torch.empty_like(rewards)
    if not _C.group_advantages(
        rewards.dtype is _F64,
        n,
        *_layout(n, group_size, offsets),
        rewards.data_ptr(),
        SCALES[scale],
        STD_EPS,
        BASELINES[baseline],
        out.data_ptr(),
        torch.get_num_threads(),
    ):
        _refuse("group_advantages", rewards, offsets=offsets)
    return out
