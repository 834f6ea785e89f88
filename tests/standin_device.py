"""QEMPO_STANDIN=device: the GPU test files on tensors of a device of their own, whose numbers are CPU tensors'.

Kernels run in Triton's interpreter, so results are right, and a test fails where it would fail on any GPU: a tensor
left on the CPU beside those of the device, an address of the CPU in a launch, a value that is not read on a GPU. The
device is torch's PrivateUse1, named "standin": that of CUDA cannot be had in a process without a driver. What only
CUDA has, streams and captured graphs, it has not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import standin_plugin
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyDeviceGuard, _DummyPrivateUse1Hook

NAME = "standin"


class OnDevice(torch.Tensor):
    """A tensor that says it lies on the device; inner holds its numbers."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        device = torch.device(NAME, 0)
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device=device)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def trigger_wait(self) -> OnDevice:
        return self  # to the library a wrapper that can be read, as the result of a collective is

    def get_device(self) -> int:
        return -1  # as on the CPU: to launchers, what has a number has streams

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees what no tensor of the device is an argument of: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


MODE = _Mode()
# Arguments that may lie on the CPU beside tensors of a GPU: what is copied, and indices.
_MIXES = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_")


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func.namespace == "qempo_fast":
        with MODE:
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1), *args, **kwargs)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here, name = [x for x in tensors if isinstance(x, OnDevice)], func.overloadpacket.__name__
    # A tensor without dimensions counts as a number.
    if here and name not in _MIXES and any(x.dim() and not isinstance(x, OnDevice) for x in tensors):
        found = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, got {found}")
    wraps = bool(here)
    if kwargs.get("device") is not None:
        wraps = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    # In place and out=: what comes back is the argument itself.
    known = {id(_inner(x)): x for x in tensors}

    def wrap(x: Any) -> Any:
        if not wraps or not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else OnDevice(x)

    return tree_map(wrap, out) if name != "_local_scalar_dense" else out


def _register() -> None:
    """The device, and what torch.tensor(..., device=...) needs where no mode is asked."""
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = ModuleType(f"torch.{NAME}")
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.is_available = module.is_initialized = lambda: True
    module.device_count, module.current_device, module._lazy_init = lambda: 1, lambda: 0, lambda: None
    torch._register_device_module(NAME, module)
    torch._C._acc.register_python_privateuseone_hook(_DummyPrivateUse1Hook())  # type: ignore[attr-defined]
    torch._C._acc.register_python_privateuseone_device_guard(_DummyDeviceGuard())  # type: ignore[attr-defined]
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, stride: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
        return OnDevice(torch.ops.aten.empty_strided.default(size, stride, dtype=dtype))

    def copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        _inner(target).copy_(_inner(source))
        return target

    library.impl("empty_strided", empty, "PrivateUse1")
    library.impl("_copy_from", copy, "PrivateUse1")
    # It goes when its last name does.
    module.library = library


def _interpreted(run: Callable[..., None]) -> Callable[..., None]:
    """GridExecutor's call, on what tensors of the device hold."""

    def bare(x: Any) -> Any:
        if hasattr(x, "block_shape"):  # a tensor descriptor
            return type(x)(bare(x.base), x.shape, x.strides, x.block_shape)
        if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        return _inner(x)

    def call(self: Any, *args: Any, **more: Any) -> None:
        if _get_current_dispatch_mode() is None:
            return run(self, *args, **more)  # a test that does not ask for the device
        with _disable_current_modes():
            return run(self, *map(bare, args), **{name: bare(x) for name, x in more.items()})

    return call


def _of_inner(address: Callable[..., Any]) -> Callable[..., Any]:
    """The door's address() of what tensors of the device hold: the CPU's, which emulated CUDA kernels read."""
    return lambda x, dtype, count, device: address(_inner(x), dtype, count, device)


class Plugin:
    """conftest registers it before any test file is imported."""

    def pytest_sessionstart(self) -> None:
        from triton.runtime.interpreter import GridExecutor

        from qempo_fast import _backends, _check, _door
        from qempo_fast.dpp import cuda

        _register()
        self._patches = [
            mock.patch.object(GridExecutor, "__call__", _interpreted(GridExecutor.__call__)),
            mock.patch.dict(_backends._ORDER, {NAME: ("triton", "reference")}),
            # The device's own mode would make every call an operator's.
            mock.patch.object(_check, "_modes", return_value=0),
            *(mock.patch.object(cuda, name, _of_inner(getattr(_door, name))) for name in ("address", "maybe")),
        ]
        for patch in self._patches:
            patch.start()

    def pytest_sessionfinish(self) -> None:
        for patch in self._patches:
            patch.stop()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # The second counts torch's operators: a wrapper is detached at the door, a GPU's tensor is not.
        standin_plugin.leave_out(items, {"test_each_op_is_one_launch", "test_torch_only_allocates"})

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        """device, and the emulated CUDA kernels, which read addresses of the CPU's."""
        where, found = torch.device(NAME, 0), None
        if fixturedef.argname == "device":
            found = where
        elif fixturedef.argname == "native" and request.param == "emulated":
            found = request.getfixturevalue("emulated"), where
        if found is not None:
            fixturedef.cached_result = (found, fixturedef.cache_key(request), None)
        return found

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Generator[None, Any, Any]:
        if not {"device", "native"} & set(item.fixturenames):
            return (yield)
        # Backward runs in this thread, where the mode is.
        with MODE, torch.autograd.set_multithreading_enabled(False):
            return (yield)
