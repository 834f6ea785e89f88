"""The host's part of a loss: the sizes of a launch, room for the sums of its programs, and the launch itself.

It takes longer than the GPU's part, so it is short. Triton 3.6 finds the compiled form of a call by naming the type of
each argument, and hands what it found to hooks that are not there: 8 microseconds of a loss's 80, 11 where there is a
GPU. launch() remembers a form by what Triton compiles it by: which tensors there are, their dtypes, the constants, the
warps and the device. Two more things that Triton looks at are settled beforehand: tensors lie at multiples of 16 bytes,
or Triton launches, and the kernels declare their numbers' types and name them in do_not_specialize.
"""

from __future__ import annotations

import functools
import struct
import types
from typing import Any

import torch
import triton
from triton.runtime.driver import driver

from qempo_fast._door import own

from ._launch import cdiv, power_of_2, sizes_of

# (elements of a program's tile, warps), by architecture. Not measured yet: no GPU has run these. With 4 elements a
# thread nothing spills, with 8 three kernels do.
LAUNCH = {"interpreter": (64, 1), "cuda:80": (512, 4), "cuda:90": (512, 4), "hip:gfx942": (512, 4)}
block_of = sizes_of(LAUNCH)
# Whose JITFunction.run hands a compiled kernel what launch() does, read line by line. AMD's forms depend on sizes too.
_KNOWN = triton.__version__.startswith(("3.6.", "3.9.")) and torch.version.hip is None
# Of Triton 3.4 and newer.
_knobs: Any = getattr(triton, "knobs", None)
# Triton's interpreter compiles nothing.
_DIRECT = _KNOWN and not _knobs.runtime.interpret
_NONE = types.SimpleNamespace(calls=())
# Eight bytes each: for captured launches, beside one another, of one device; and of each stream at first.
_POOL, _ROOM = 2**17, 1024
_FREE: dict[torch.device, torch.Tensor] = {}
_HELD: dict[tuple[int, int], torch.Tensor] = {}
_DOUBLE, _LONG = struct.Struct("<d"), struct.Struct("<q")


@functools.lru_cache(1024)
def bits(x: float) -> int:
    """x for number(): a float reaches a kernel as float32, its 64 bits as an integer arrive whole."""
    return int(_LONG.unpack(_DOUBLE.pack(x))[0])


def flat(x: torch.Tensor | None) -> torch.Tensor | None:
    """A keyword argument as the kernels read it; positional ones come so."""
    return None if x is None else x.contiguous()


@functools.cache
def _scalar_of(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty((), dtype=dtype, device=device)


def scalar(x: torch.Tensor) -> torch.Tensor:
    """Memory of a loss of x: half a microsecond less than x.new_empty(())."""
    return torch.empty_like(_scalar_of(x.dtype, x.device))


def tile(total: int, count: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a program's tile, for count rows of total / count columns on average."""
    columns = min(power_of_2(max(cdiv(total, count), 1)), elements)
    return min(elements // columns, power_of_2(count)), columns


def _captured(size: int, device: torch.device) -> torch.Tensor:
    """Room of a captured launch's own, as its graph may be replayed on any stream, beside anything."""
    pool = _FREE.get(device)
    if pool is None or size > pool.shape[0]:
        # The zeros are filled by a launch of the graph's own.
        return torch.zeros(size, dtype=torch.int64, device=device)
    # What is left, were it nothing, holds the memory that graphs go on using.
    _FREE[device] = pool[size:]
    return pool[:size]


def _of_stream(size: int, key: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The room that launches of one stream share, as they take turns, at its first use or larger than before."""
    if device.type == "cuda" and device not in _FREE:
        _FREE[device] = torch.zeros(_POOL, dtype=torch.int64, device=device)
        # Graphs use it on other streams. Once in a process, as compiling a kernel is.
        torch.cuda.current_stream(device).synchronize()
    # Cleared by this stream, in front of the launches that use it.
    _HELD[key] = torch.zeros(max(_ROOM, power_of_2(size)), dtype=torch.int64, device=device)
    return _HELD[key]


def _room(programs: int, index: int, stream: int, device: torch.device) -> torch.Tensor:
    """Where several programs leave their sums: int64, a counter that is 0 between launches, then one place for each."""
    # Even: at a multiple of 16 bytes, all launches are of one compiled form.
    size = programs + 2 - programs % 2
    if index >= 0 and torch.cuda.is_current_stream_capturing():
        return _captured(size, device)
    held = _HELD.get((index, stream))
    return held if held is not None and held.shape[0] >= size else _of_stream(size, (index, stream), device)


@functools.cache
def _forms() -> dict[tuple[Any, ...], Any]:
    """The compiled forms by what they depend on; cache_clear forgets them."""
    return {}


def launch(
    kernel: Any,
    programs: int,
    given: tuple[torch.Tensor | None, ...],
    made: tuple[torch.Tensor, ...],
    numbers: tuple[int, ...],
    constants: tuple[Any, ...],
    warps: int,
    summed: bool = True,
) -> None:
    """kernel[(programs,)](*given, *made, room, *numbers, *constants, num_warps=warps) where the tensors are.

    given: the first not None. made: just allocated, in the first one's dtype. summed: whether several programs need a
    room for their sums. Triton's binder is passed by where its answer is known, as the head of this file says.
    """
    first = given[0]
    assert first is not None
    index, stream, ends = first.get_device(), 0, 0
    if index >= 0:
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return launch(kernel, programs, given, made, numbers, constants, warps, summed)
        stream = driver.active.get_current_stream(index)
    room = _room(programs, index, stream, first.device) if summed and programs > 1 else None
    addresses = [x if x is None else own(x) for x in (*given, *made, room)]
    # What torch has just allocated lies at multiples of 64 bytes and more.
    for address in addresses[: len(given)]:
        ends |= address or 0
    form = (kernel.fn, index, warps, constants, room is None, *[x if x is None else x.dtype for x in given])
    found = None if ends & 15 else _forms().get(form)
    # A profiler's hooks want to see the launch, and its instrumentation kernels of their own.
    if (
        found is None
        or (_knobs.runtime.launch_enter_hook or _NONE).calls
        or (_knobs.runtime.launch_exit_hook or _NONE).calls
        or _knobs.compilation.instrumentation_mode
    ):
        found = kernel[(programs,)](*given, *made, room, *numbers, *constants, num_warps=warps)
        if _DIRECT and not ends & 15:
            _forms()[form] = found
        return
    found.run(
        *(programs, 1, 1, stream, found.function, found.packed_metadata, None, None, None),
        *(*addresses, *numbers, *constants),
    )
