"""Checks that read values: on CPU, and on a GPU only where QEMPO_CHECK=1 asks for the synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _check

# Leading arguments of each loss op that get a gradient.
POLICY = {
    "pair_loss": 2,
    "group_loss": 1,
    "variance_loss": 1,
    "epa_loss": 3,
    "poft_loss": 1,
    "rspo_loss": 1,
    "token_loss": 1,
}


def _check_positive(name: str, x: torch.Tensor) -> None:
    if _check.readable(x) and not bool((x > 0).all()):
        _check.bad_value(name, f"{name} above 0", float(x.min()))


_WANTED = {"finite": _check.finite, "positive": _check_positive}


# Tracing cannot read values. An operator that returns what it has checked stays in the graph and raises where it runs.
@torch.library.custom_op("qempo_fast::values", mutates_args=())
def _values(name: str, x: torch.Tensor, wanted: str) -> torch.Tensor:
    _WANTED[wanted](name, x)
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


@torch.library.custom_op("qempo_fast::groups", mutates_args=())
def _groups(n: int, offsets: torch.Tensor, at_least: int) -> torch.Tensor:
    _check.groups(n, None, offsets, at_least=at_least, device=offsets.device)
    return offsets.clone()


@_groups.register_fake
def _(_: int, offsets: Any, __: int) -> Any:
    return torch.empty_like(offsets)


def values(name: str, x: torch.Tensor, wanted: str = "finite") -> torch.Tensor:
    """x, which has no graph, once its values are checked: "finite" or "positive"."""
    if torch.compiler.is_compiling():
        return _values(name, x, wanted)
    _WANTED[wanted](name, x)
    return x


def offsets(name: str, x: Any, total: int) -> torch.Tensor:
    """x, checked to be offsets that cover total."""
    if torch.compiler.is_compiling():
        return _offsets(name, x, total)
    _check.offsets(name, x, total)
    return x


def groups(n: int, offsets: torch.Tensor | None, at_least: int) -> torch.Tensor | None:
    """offsets, checked to be groups of at_least that cover n; None where groups have one size."""
    if offsets is None:
        return None
    if torch.compiler.is_compiling():
        return _groups(n, offsets, at_least)
    _check.groups(n, None, offsets, at_least=at_least, device=offsets.device)
    return offsets


def least(baseline: str, k: int | None = None) -> int:
    """Smallest group that a baseline allows; k is Max@k's, whose own baseline counts at k = 1 alone."""
    if k is not None and k > 1:
        return k
    return 1 if baseline == "none" else 2


def _unread(*args: Any, **settings: Any) -> Any:
    return args, settings


def _group(logps: Any, ref_logps: Any, rewards: Any, **settings: Any) -> Any:
    at_least = least(settings.get("baseline", "mean"))
    rewards = values("rewards", rewards)
    return (logps, ref_logps, rewards), {
        **settings,
        "offsets": groups(logps.shape[0], settings["offsets"], at_least),
    }


def _rspo(logps: Any, rewards: Any, **settings: Any) -> Any:
    at_least = least(settings["baseline"], settings["k"])
    rewards = values("rewards", rewards)
    return (logps, rewards), {**settings, "offsets": groups(logps.shape[0], settings["offsets"], at_least)}


def _poft(logps: Any, lengths: Any, aligned: Any, **settings: Any) -> Any:
    aligned = values("aligned_mean_logps", aligned)
    return (logps, values("lengths", lengths, "positive"), aligned), settings


def _token(token_logps: Any, old: Any, advantages: Any, cu_seqlens: Any, **settings: Any) -> Any:
    cu_seqlens = offsets("cu_seqlens", cu_seqlens, token_logps.shape[0])
    return (token_logps, old, values("advantages", advantages), cu_seqlens), settings


def _advantages(rewards: Any, **settings: Any) -> Any:
    return (values("rewards", rewards),), {**settings, "offsets": groups(rewards.shape[0], settings["offsets"], 2)}


# CHECKS[op](*args, **settings) of a loss op: the same, once their values are checked.
CHECKS: dict[str, Callable[..., Any]] = {
    "pair_loss": _unread,
    "group_loss": _group,
    "variance_loss": _group,
    "epa_loss": _unread,
    "poft_loss": _poft,
    "rspo_loss": _rspo,
    "token_loss": _token,
    "group_advantages": _advantages,
}
