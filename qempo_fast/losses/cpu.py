"""CPU kernels of the losses: the C++ of csrc/cpu/loss_*.cpp on torch's tensors.

Each function takes the arguments of the reference function of its name, whose types they have, and returns (value,
coefs), as _function.py asks. The kernels look at the values that checked() looks at; only where one is bad does it run,
to raise its error.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from .. import _C, _check
from .._door import address, maybe, own
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


def _refuse(op: str, *args: Any, **settings: Any) -> None:
    """Raise the error of the values that a kernel has refused."""
    checked(op, args, settings)
    raise AssertionError(f"{op}: the kernel refuses values that the check takes")


def _value(x: torch.Tensor, reduction: str) -> torch.Tensor:
    """Memory of the loss of rows x."""
    return x.new_empty(x.shape if reduction == "none" else ())


def _layout(n: int, group_size: int | None, offsets: torch.Tensor | None) -> tuple[int | None, bool, int, int]:
    """Address of offsets, whether they are int64, groups, size of equal groups."""
    if offsets is None:
        # The public functions have looked; a graph's operator comes here with what it was traced with.
        if group_size is None or group_size < 1 or n % group_size:
            _check.bad_value("group_size", f"a divisor of the {n} samples", group_size)
        return None, False, n // group_size, group_size
    dtype = _I64 if offsets.dtype is _I64 else torch.int32
    return address(offsets, dtype, offsets.shape[0]), dtype is _I64, offsets.shape[0] - 1, 0


def pair_loss(
    chosen, rejected, ref_chosen, ref_rejected, *, alpha, beta, label_smoothing=0.0, reduction="mean"
) -> Result:
    dtype, n = chosen.dtype, chosen.shape[0]
    value = _value(chosen, reduction)
    coefs = torch.empty_like(chosen), torch.empty_like(chosen)
    _C.pair_loss(
        dtype is _F64,
        n,
        address(chosen, dtype, n),
        address(rejected, dtype, n),
        maybe(ref_chosen, dtype, n),
        maybe(ref_rejected, dtype, n),
        alpha,
        beta,
        label_smoothing,
        REDUCTIONS[reduction],
        own(value),
        own(coefs[0]),
        own(coefs[1]),
        torch.get_num_threads(),
    )
    return value, coefs


def poft_loss(logps, lengths, aligned_mean_logps, *, beta=1.0, gamma=0.0, reduction="mean") -> Result:
    dtype, (n, models) = logps.dtype, aligned_mean_logps.shape
    value, coef = _value(logps, reduction), torch.empty_like(logps)
    if not _C.poft_loss(
        dtype is _F64,
        n,
        models,
        address(logps, dtype, n),
        address(lengths, dtype, n),
        address(aligned_mean_logps, dtype, n * models),
        beta,
        gamma,
        REDUCTIONS[reduction],
        own(value),
        own(coef),
        torch.get_num_threads(),
    ):
        _refuse("poft_loss", logps, lengths, aligned_mean_logps)
    return value, (coef,)


def epa_loss(positive, strong, weak, ref_positive, ref_strong, ref_weak, *, beta=0.1, reduction="mean") -> Result:
    dtype, n = positive.dtype, positive.shape[0]
    strong_count, weak_count = strong.shape[1], weak.shape[1]
    value = _value(positive, reduction)
    coefs = torch.empty_like(positive), torch.empty_like(strong), torch.empty_like(weak)
    _C.epa_loss(
        dtype is _F64,
        n,
        strong_count,
        weak_count,
        address(positive, dtype, n),
        address(strong, dtype, n * strong_count),
        address(weak, dtype, n * weak_count),
        address(ref_positive, dtype, n),
        address(ref_strong, dtype, n * strong_count),
        address(ref_weak, dtype, n * weak_count),
        beta,
        REDUCTIONS[reduction],
        own(value),
        own(coefs[0]),
        own(coefs[1]),
        own(coefs[2]),
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
    dtype, n = logps.dtype, logps.shape[0]
    value, coef = logps.new_empty(()), torch.empty_like(logps)
    if not _C.group_loss(
        dtype is _F64,
        op == "variance_loss",
        n,
        *_layout(n, *groups),
        least(baseline),
        address(logps, dtype, n),
        maybe(ref_logps, dtype, n),
        address(rewards, dtype, n),
        maybe(bonus, dtype, n),
        alpha,
        beta,
        BASELINES[baseline],
        own(value),
        own(coef),
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
    dtype, n = logps.dtype, logps.shape[0]
    value, coef = logps.new_empty(()), torch.empty_like(logps)
    if not _C.rspo_loss(
        dtype is _F64,
        n,
        *_layout(n, group_size, offsets),
        k,
        address(logps, dtype, n),
        address(rewards, dtype, n),
        own(value),
        own(coef),
        torch.get_num_threads(),
    ):
        _refuse("rspo_loss", logps, rewards, k=k, baseline=baseline, offsets=offsets)
    return value, (coef,)


def token_loss(
    token_logps, old_token_logps, advantages, cu_seqlens, *, ref_token_logps=None,
    kl=0.0, eps_low=0.2, eps_high=0.2, ratio="token", normalize="sequence", surrogate="clip",
) -> Result:  # fmt: skip
    dtype, n = token_logps.dtype, token_logps.shape[0]
    value, coef = token_logps.new_empty(()), torch.empty_like(token_logps)
    starts, wide, sequences, _ = _layout(0, None, cu_seqlens)
    if not _C.token_loss(
        dtype is _F64,
        n,
        starts,
        wide,
        sequences,
        address(token_logps, dtype, n),
        address(old_token_logps, dtype, n),
        maybe(ref_token_logps, dtype, n),
        address(advantages, dtype, sequences),
        kl,
        eps_low,
        eps_high,
        ratio == "sequence",
        NORMALIZE[normalize if isinstance(normalize, str) else "number"],
        0.0 if isinstance(normalize, str) else normalize,
        SURROGATES[surrogate],
        own(value),
        own(coef),
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
        address(rewards, rewards.dtype, n),
        SCALES[scale],
        STD_EPS,
        BASELINES[baseline],
        own(out),
        torch.get_num_threads(),
    ):
        _refuse("group_advantages", rewards, offsets=offsets)
    return out
