"""Checks and casts shared by the public losses; what reads values is in _values.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from .. import _check

REDUCTIONS = ("mean", "sum", "none")
BASELINES = ("loo", "mean", "none")


def scores(names: Sequence[str], tensors: tuple[Any, ...], policy: int = 1) -> Sequence[Any]:
    """1-D tensors, checked to have one length and device, in one dtype: the widest of the policy's, at least float32.

    The first `policy` are the policy's; another may be None.
    """
    if _check.alike(tensors, vectors=True):
        return tensors
    first = tensors[0]
    _check.tensor(names[0], first, ndim=1)
    for name, x in zip(names, tensors, strict=True):
        if x is not None:
            _check.tensor(name, x, shape=first.shape, device=first.device)
    dtype = score_dtype(*tensors[:policy])
    return [None if x is None else x.to(dtype) for x in tensors]


def score_dtype(*policy: torch.Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (x.dtype for x in policy), torch.float32)


def needs_reference(name: str, ref: Any, beta: float, hyperparameter: str = "beta") -> None:
    if ref is None and beta > 0:
        _check.bad_value(name, f"the reference's log-probs, since {hyperparameter} > 0", None)


def given(name: str, x: Any) -> None:
    """Refuse None where scores() lets it pass."""
    if x is None:
        _check.tensor(name, x)


def group_layout(
    n: int, group_size: Any, offsets: Any, device: torch.device, *, at_least: int, k: int | None = None
) -> Any:
    """offsets. One of group_size and offsets is checked to be given, and all of group_size; not what offsets hold."""
    if group_size is not None or offsets is None:
        _check.groups(n, group_size, offsets, at_least=at_least, k=k)
        return None
    return offsets_like("offsets", offsets, device)


def offsets_like(name: str, x: Any, device: torch.device) -> torch.Tensor:
    """x, checked to be offsets but for what it holds."""
    _check.tensor(name, x, dtypes=_check.INTS, ndim=1, device=device)
    if not x.shape[0]:
        _check.bad_value(name, "at least one entry, the first 0", "an empty tensor")
    return x.contiguous()
