"""Which sizes a kernel is launched with: a committed row per architecture, or a search under QEMPO_AUTOTUNE=1."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
# Read once: os.environ takes 2 microseconds a look, of 8 that a launch costs.
AUTOTUNE = os.environ.get("QEMPO_AUTOTUNE", "0") == "1"
_FOUND: dict[Hashable, object] = {}


def cdiv(a: int, b: int) -> int:
    """ceil(a / b). triton.cdiv is made for kernels and takes 2.4 microseconds on the host; launchers call it often."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, which is at least 1."""
    return 1 << (n - 1).bit_length()


@functools.cache
def architecture(device: torch.device) -> str:
    """ "cuda:90", "hip:gfx942", ..., or "interpreter" for a CPU tensor."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "hip:" + properties.gcnArchName.split(":")[0]
    return f"cuda:{properties.major}{properties.minor}"


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors (compute units) to fill; the interpreter counts as two, so that small tests split too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def row(table: Mapping[str, T], arch: str) -> T:
    """The entry of arch, or that of the newest older capability of the same maker (cuda:89 takes cuda:80's)."""
    if arch in table:
        return table[arch]
    kind, _, name = arch.partition(":")
    same = sorted((k for k in table if k.startswith(kind + ":")), key=lambda k: (len(k), k))
    older = [k for k in same if (len(k), k) <= (len(arch), arch)]
    if not same:
        raise LookupError(f"no launch sizes for {kind}:{name}; the table has {', '.join(table)}")
    return table[(older or same[:1])[-1]]


def sizes_of(table: Mapping[str, T]) -> Callable[[torch.device], T]:
    """The function that gives the table's row of a device, looked up once for each."""

    @functools.cache
    def of(device: torch.device) -> T:
        return row(table, architecture(device))

    return of


def _milliseconds(run: Callable[[], None]) -> float:
    import triton.testing
    from triton.runtime.errors import OutOfResources

    try:
        return float(triton.testing.do_bench(run))
    except OutOfResources:  # a candidate for a device with more shared memory
        return float("inf")


def tuned(
    name: str, shape: Hashable, device: torch.device, default: T, candidates: Sequence[T], run: Callable[[T], None]
) -> T:
    """default, or with QEMPO_AUTOTUNE=1 the fastest candidate at this shape, printed once as the row to commit.

    A launcher asks AUTOTUNE first: to name the shape alone takes a microsecond.

    run(candidate) must leave nothing behind that the caller reads: it runs many times.
    """
    if not AUTOTUNE or architecture(device) == "interpreter":
        return default
    key = (name, shape, device)
    if key not in _FOUND:
        times = {c: _milliseconds(functools.partial(run, c)) for c in candidates}
        best = min(times, key=lambda c: times[c])
        _FOUND[key] = best
        chip = torch.cuda.get_device_name(device)
        print(f'{name}, {shape}: "{architecture(device)}": {best!r},  # {times[best]:.4f} ms, {chip}', file=sys.stderr)
    return _FOUND[key]  # type: ignore[return-value]
