"""Checks and casts shared by the public losses."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch

from .. import _check

REDUCTIONS = ("mean", "sum", "none")
BASELINES = ("loo", "mean", "none")


def scores(policy: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[Any]:
    """Check 1-D scores of one length and device and cast them to one dtype; only policy keeps its graph.

    The dtype is float64 where a policy tensor is, else float32. A fixed tensor may be None.
    """
    first = next(iter(policy.values()))
    _check.tensor(next(iter(policy)), first, ndim=1)
    given = {**policy, **{name: x for name, x in fixed.items() if x is not None}}
    for name, x in given.items():
        _check.tensor(name, x, shape=first.shape, device=first.device)
    dtype = score_dtype(*policy.values())
    return [x.to(dtype) for x in policy.values()] + [
        None if x is None else x.detach().to(dtype) for x in fixed.values()
    ]


def with_rewards(logps: Any, rewards: Any, *fixed: Any) -> list[Any]:
    """scores() of logps, finite rewards and at most one more fixed tensor, ref_logps."""
    names = ("rewards", "ref_logps")
    tensors = scores({"logps": logps}, dict(zip(names, (rewards, *fixed), strict=False)))
    _check.tensor("rewards", rewards)
    tensors[1] = values("rewards", tensors[1])
    return tensors


def _check_positive(name: str, x: torch.Tensor) -> None:
    if _check.readable(x) and not bool((x > 0).all()):
        _check.bad_value(name, f"{name} above 0", float(x.min()))


_VALUES = {"finite": _check.finite, "positive": _check_positive}


# Tracing cannot read values. An operator that returns what it has checked stays in the graph and raises where it runs.
@torch.library.custom_op("qempo_fast::values", mutates_args=())
def _values(name: str, x: torch.Tensor, wanted: str) -> torch.Tensor:
    _VALUES[wanted](name, x)
    return x.clone()


@_values.register_fake
def _(_: str, x: Any, __: str) -> Any:
    return torch.empty_like(x)


@torch.library.custom_op("qempo_fast::offsets", mutates_args=())
def _offsets(name: str, x: torch.Tensor, total: int) -> torch.Tensor:
    _check.offsets(name, x, total)
    return x.clone()


@_offsets.register_fake
def _(_: str, x: Any, __: int) -> Any:
    return torch.empty_like(x)


def values(name: str, x: torch.Tensor, wanted: str = "finite") -> torch.Tensor:
    """x, which has no graph, once its values are checked: "finite" or "positive"."""
    if torch.compiler.is_compiling():
        return _values(name, x, wanted)
    _VALUES[wanted](name, x)
    return x


def offsets(name: str, x: Any, total: int, device: torch.device) -> torch.Tensor:
    """x, checked to be offsets that cover total."""
    _check.offsets(name, x, total, device)
    return _offsets(name, x, total) if torch.compiler.is_compiling() else x


def score_dtype(*policy: torch.Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (x.dtype for x in policy), torch.float32)


def needs_reference(name: str, ref: Any, beta: float, hyperparameter: str = "beta") -> None:
    if ref is None and beta > 0:
        _check.bad_value(name, f"the reference's log-probs, since {hyperparameter} > 0", None)


@torch.library.custom_op("qempo_fast::groups", mutates_args=())
def _groups(n: int, offsets: torch.Tensor, at_least: int) -> torch.Tensor:
    _check.groups(n, None, offsets, at_least=at_least, device=offsets.device)
    return offsets.clone()


@_groups.register_fake
def _(_: int, offsets: Any, __: int) -> Any:
    return torch.empty_like(offsets)


def group_layout(logps: torch.Tensor, group_size: Any, offsets: Any, *, at_least: int) -> Any:
    """offsets, checked with group_size to be groups that cover logps."""
    _check.groups(logps.shape[0], group_size, offsets, at_least=at_least, device=logps.device)
    if offsets is None or not torch.compiler.is_compiling():
        return offsets
    return _groups(logps.shape[0], offsets, at_least)
