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
    _check.finite("rewards", tensors[1])
    return tensors


def score_dtype(*policy: torch.Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (x.dtype for x in policy), torch.float32)


def needs_reference(name: str, ref: Any, beta: float, hyperparameter: str = "beta") -> None:
    if ref is None and beta > 0:
        _check.bad_value(name, f"the reference's log-probs, since {hyperparameter} > 0", None)


def group_layout(logps: torch.Tensor, group_size: Any, offsets: Any, *, at_least: int) -> None:
    _check.groups(logps.shape[0], group_size, offsets, at_least=at_least, device=logps.device)
