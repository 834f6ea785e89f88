"""A GPU that is not there: Triton compiles for it, launches are counted, nothing runs.

Kernels take CPU tensors as if these lay on the GPU, so that a machine without one can find what fails to compile or to
launch, count launches, time the host's part of a call, and fill Triton's cache. Results are whatever the memory held,
but for the columns that the sampled gradient keeps: the first quarter of them, so that there is a gradient to launch.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from .. import _backends
from .compile import gpu_target

# What an H100 tells Triton of itself.
_SHARED, _PROCESSORS = 232_448, 132


class Launches(Counter[str]):
    """Launches by kernel; forms: what tells apart the specialisations that were launched."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: set[str] = set()
        self._lock = threading.Lock()

    def add(self, name: str) -> None:
        # A loss's backward may launch from a thread of autograd's.
        with self._lock:
            self[name] += 1


class _Utils:
    """Of Triton's driver: what loads a binary and knows the device."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
        # Module, function, registers, spills, threads of a block at most. No module: Triton 3.9 asks the driver to
        # unload one when its kernel goes, which may be long after this driver.
        return None, 1, 64, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED, "multiprocessor_count": _PROCESSORS, "warpSize": 32}


class _Driver:
    def __init__(self, target: Any, launches: Launches) -> None:
        self.target, self.utils = target, _Utils()

        class Launcher:
            def __init__(self, src: Any, metadata: Any) -> None:
                self.name = metadata.name
                launches.forms.add(metadata.hash)

            def __call__(self, *args: Any) -> None:
                launches.add(self.name)

        self.launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True


def _uncompiled(launches: Launches) -> Callable[..., Any]:
    """In place of JITFunction._do_compile: a kernel that counts its launches and was never built."""

    def fake(self: Any, key: str, signature: Any, device: int, *args: Any) -> Any:
        name = self.fn.__name__
        launches.forms.add(hashlib.sha256(f"{name} {key}".encode()).hexdigest())
        kernel = SimpleNamespace(
            launch_metadata=lambda *a: None,
            run=lambda *a: launches.add(name),
            function=1,
            packed_metadata=None,
        )
        self.device_caches[device][0][key] = kernel
        return kernel

    return fake


def _first_quarter(select: Callable[..., Any]) -> Callable[..., Any]:
    """In place of select_columns: the same launches, and results that name columns where the kernels would have."""

    def select_columns(*args: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index, inverse, counts = select(*args, **more)
        vocabulary = index.shape[-1]
        index.copy_(torch.arange(vocabulary, dtype=torch.int64, device="cpu"))
        inverse.fill_(1.0)
        counts.fill_(-(-vocabulary // 4))
        return index, inverse, counts

    return select_columns


def _ours() -> Iterator[Any]:
    return (module for name, module in list(sys.modules.items()) if name.startswith("qempo_fast"))


def _everywhere(patches: contextlib.ExitStack, original: Callable[..., Any], other: Callable[..., Any]) -> None:
    """Replace a function in every module of the library that has imported it."""
    for module in _ours():
        for name, value in list(vars(module).items()):
            if value is original:
                patches.enter_context(mock.patch.object(module, name, other))


def _forget() -> None:
    """Empty what was remembered of the device: choices of backends, functions' caches, each kernel's compiled forms."""
    _backends._DEFAULTS.clear()
    for module in _ours():
        for value in list(vars(module).values()):
            if hasattr(value, "device_caches"):
                value.device_caches.clear()
            elif hasattr(value, "cache_clear") and getattr(value, "__module__", "").startswith("qempo_fast.kernels"):
                value.cache_clear()


@contextlib.contextmanager
def standin(target: str = "cuda:90", *, compiles: bool = True) -> Iterator[Launches]:
    """Within it every Triton kernel takes CPU tensors for those of a GPU; gives the launches so far, by kernel.

    Args:
        target: of the GPU, as `qempo-fast compile --target` takes it.
        compiles: False to launch without building: a hundredth of the time, and no error of the compiler is seen.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, which replaces the kernels by their interpreter when Triton is imported.
    """
    import triton
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    import qempo_fast.kernels  # noqa: F401
    from qempo_fast.kernels import _launch, linear_logps_select

    from .compile import signatures

    if triton.knobs.runtime.interpret:
        raise RuntimeError("standin: unset TRITON_INTERPRET, which replaces the kernels by their interpreter")
    signatures()  # imports every kernel
    for op, row in _backends.OPS.items():
        if "triton" in row.backends:
            # Imports what calls them: a module that came in later would keep the replacements below for good.
            _backends.implementation(op, "triton")
    launches = Launches()
    reason = _backends._reason

    def takes_cpu(op: str, backend: str, device_type: str) -> str | None:
        known = (backend, device_type) == ("triton", "cpu") and backend in _backends.OPS[op].backends
        return None if known else reason(op, backend, device_type)

    before = driver._active
    with contextlib.ExitStack() as patches:
        patches.callback(lambda: setattr(driver, "_active", before))
        patches.callback(_forget)
        driver.set_active(_Driver(gpu_target(target), launches))
        _forget()
        _everywhere(patches, _launch.architecture, lambda device: target)
        _everywhere(patches, _launch.processors, lambda device: _PROCESSORS)
        select = linear_logps_select.select_columns
        _everywhere(patches, select, _first_quarter(select))
        patches.enter_context(mock.patch.object(_backends, "_reason", takes_cpu))
        if not compiles:
            patches.enter_context(mock.patch.object(JITFunction, "_do_compile", _uncompiled(launches)))
        yield launches
