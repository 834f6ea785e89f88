"""What an op of the suite is made of: providers, and sets of cases that are run alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple


class Provider(NamedTuple):
    """One way to compute an op: kind "ours" or "peer", and how to make its function on a device."""

    kind: str
    make: Callable[..., Any]


class Set(NamedTuple):
    """Cases that are run alike; providers None for all, threads "one" and "all"; not timed: memory alone.

    rounds: the most turns, where each costs a minute.
    """

    cases: Sequence[Any]
    providers: tuple[str, ...] | None = None
    threads: tuple[str, ...] = ("all",)
    memory: bool = False
    timed: bool = True
    rounds: int = 100


def gpu_set(cases: Sequence[Any], providers: Iterable[str]) -> Set:
    """Of a GPU, where minutes are few: no peers that compile; bench/gpu/run.sh second has those for four cases."""
    return Set(cases, tuple(p for p in providers if "compile" not in p), rounds=2)
