"""Checks that read values: on CPU, and on a GPU only where QEMPO_CHECK=1 asks for the synchronisation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from .. import _check
from .._backends import OPS

# What the values of an argument have to be, in whichever loss has it.
WANTED = {"rewards": "finite", "advantages": "finite", "aligned_mean_logps": "finite", "lengths": "positive"}


def _check_positive(name: str, x: torch.Tensor) -> None:
    if _check.readable(x) and not bool((x > 0).all()):
        _check.bad_value(name, f"{name} above 0", float(x.min()))


_CHECKS = {"finite": _check.finite, "positive": _check_positive}


# Tracing cannot read values. An operator that returns what it has checked stays in the graph and raises where it runs.
@torch.library.custom_op("qempo_fast::values", mutates_args=())
def _values(name: str, x: torch.Tensor, wanted: str) -> torch.Tensor:
    _CHECKS[wanted](name, x)
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
    _CHECKS[wanted](name, x)
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


def arguments(op: str) -> tuple[dict[str, str], dict[str, str]]:
    """Annotations of the op's arguments, those by position and those by keyword, as its definition has them."""
    reference = OPS[op].reference
    assert reference is not None
    every = inspect.signature(reference).parameters.values()
    by_keyword = {p.name: p.annotation for p in every if p.kind is p.KEYWORD_ONLY}
    return {p.name: p.annotation for p in every if p.name not in by_keyword}, by_keyword


_POSITIONAL = {op: tuple(arguments(op)[0]) for op, row in OPS.items() if row.room == "losses"}


def checked(op: str, args: Sequence[Any], settings: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """args and settings of a loss op, once their values are checked."""
    n = args[0].shape[0]
    out = []
    for name, x in zip(_POSITIONAL[op], args, strict=True):
        if name == "cu_seqlens":
            x = offsets(name, x, n)
        elif name in WANTED:
            x = values(name, x, WANTED[name])
        out.append(x)
    if "offsets" in settings:
        at_least = least(settings.get("baseline", "mean"), settings.get("k"))
        settings = {**settings, "offsets": groups(n, settings["offsets"], at_least)}
    return tuple(out), settings
