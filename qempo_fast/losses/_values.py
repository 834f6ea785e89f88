"""Checks that read values: on CPU, and on a GPU only where QEMPO_CHECK=1 asks for the synchronisation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from .. import _check, _door
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
    # A graph's tracer takes any layout for a dense one.
    _check.plain(name, x)
    _CHECKS[wanted](name, x)
    return x.clone()


@_values.register_fake
def _(_: str, x: Any, __: str) -> Any:
    return torch.empty_like(x)


@torch.library.custom_op("qempo_fast::offsets", mutates_args=())
def _offsets(name: str, x: torch.Tensor, total: int) -> torch.Tensor:
    _check.plain(name, x)
    _check.offsets(name, x, total)
    return x.clone()


@_offsets.register_fake
def _(_: str, x: Any, __: int) -> Any:
    return torch.empty_like(x)


@torch.library.custom_op("qempo_fast::groups", mutates_args=())
def _groups(n: int, offsets: torch.Tensor, at_least: int, k: int | None) -> torch.Tensor:
    _check.groups(n, None, offsets, at_least=at_least, k=k, device=offsets.device)
    return offsets.clone()


@_groups.register_fake
def _(_: int, offsets: Any, __: int, ___: int | None) -> Any:
    return torch.empty_like(offsets)


def values(name: str, x: torch.Tensor, wanted: str = "finite") -> torch.Tensor:
    """x, which has no graph, once its values are checked: "finite" or "positive"."""
    if _check.traced(x):
        return _values(name, x, wanted)
    if x.layout is not torch.strided:
        _check.plain(name, x)
    _CHECKS[wanted](name, x)
    return x


def offsets(name: str, x: Any, total: int) -> torch.Tensor:
    """x, checked to be offsets that cover total."""
    if _check.traced(x):
        return _offsets(name, x, total)
    _check.offsets(name, x, total)
    return x


def groups(n: int, offsets: torch.Tensor | None, at_least: int, k: int | None = None) -> torch.Tensor | None:
    """offsets, checked to be groups of at_least that cover n; None where groups have one size. k: see _check.groups."""
    if offsets is None:
        return None
    if _check.traced(offsets):
        return _groups(n, offsets, at_least, k)
    _check.groups(n, None, offsets, at_least=at_least, k=k, device=offsets.device)
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


_LOSSES = [op for op, row in OPS.items() if row.room == "losses"]
_POSITIONAL = {op: tuple(arguments(op)[0]) for op in _LOSSES}
# Keyword arguments that are tensors.
_TENSORS = {op: tuple(name for name, kind in arguments(op)[1].items() if "Tensor" in kind) for op in _LOSSES}


def solid(op: str, args: Sequence[Any], settings: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """args and settings of a loss op, each tensor as native code reads it; for what needs no graph."""
    if not _door.all_dense(args):
        args = [_door.dense(name, x) for name, x in zip(_POSITIONAL[op], args, strict=True)]
    for name in _TENSORS[op]:
        x = settings.get(name)
        if x is not None and (there := _door.dense(name, x)) is not x:
            settings = {**settings, name: there}
    return args, settings


def blame(op: str, args: Sequence[Any], settings: dict[str, Any]) -> None:
    """Raise for an argument that cannot be read."""
    _door.named(_POSITIONAL[op], args)
    _door.named(_TENSORS[op], [settings.get(name) for name in _TENSORS[op]])


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
        k = settings.get("k", 1)
        at_least = least(settings.get("baseline", "mean"), k)
        settings = {**settings, "offsets": groups(n, settings["offsets"], at_least, k if k > 1 else None)}
    return tuple(out), settings
