"""What the kernel files share: the guard around a launch and the entry of the offline compiler."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Signature:
    """One form in which a kernel is launched, for compiling it without a GPU.

    ``types`` gives Triton's name of the type of each runtime argument ("*fp32", "*i64", "i32", "fp32").
    Pointers are taken as 16-byte aligned, as torch allocates them, and the integers named in ``aligned`` as
    multiples of 16, as strides and widths are at a launch: without it loads are not vectorised. ``hot`` marks a
    kernel that carries an op's running time: a spill there fails. ``targets`` are beginnings of the names of the
    targets that are launched so, such as "cuda", "cuda:90" or "hip:gfx942".
    """

    kernel: Any
    types: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    hot: bool = False
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("cuda", "hip")


_HERE = contextlib.nullcontext()


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, wherever its arguments lie: make that the device of x."""
    # Nearly always it is: to switch to it all the same took a microsecond or two of a launch.
    return _HERE if not x.is_cuda or x.get_device() == torch.cuda.current_device() else torch.cuda.device(x.device)
