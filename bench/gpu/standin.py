"""CPU tensors as if they lay on a GPU: Triton launches for a driver that stands in, values and products are not read.

as_on_a_gpu takes another version of the library too, which host.py times against this one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from suite.provenance import ROOT


def standin() -> Any:
    """The stand-in driver; a library from before it had one gets this tree's."""
    try:
        from qempo_fast.cli import standin as module
    except ImportError:
        path = ROOT / "qempo_fast" / "cli" / "standin.py"
        spec = importlib.util.spec_from_file_location("qempo_fast.cli.standin", path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.standin


@contextlib.contextmanager
def as_on_a_gpu(compiles: bool = True) -> Iterator[Any]:
    """CPU tensors go to the Triton kernels by default, and values are read only under QEMPO_CHECK=1; the launches."""
    from qempo_fast import _backends, _check

    # A library from before this one has neither.
    look, name = (
        getattr(_check, "environment", os.environ.get),
        "may_read" if hasattr(_check, "may_read") else "readable",
    )

    def on_a_gpu(x: torch.Tensor) -> bool:
        return look("QEMPO_CHECK") == "1"

    with (
        standin()("cuda:90", compiles=compiles) as launches,
        mock.patch.dict(_backends._ORDER, cpu=("triton", "reference")),
        mock.patch.object(_check, name, on_a_gpu),
        # A mode that counts operators would make each call one; a library from before this one has no _modes.
        mock.patch.object(_check, "_modes", return_value=0, create=True),
    ):
        _backends._DEFAULTS.clear()
        try:
            yield launches
        finally:
            _backends._DEFAULTS.clear()


@contextlib.contextmanager
def wide_products() -> Iterator[None]:
    """GEMMs of half precision may write float32, as cuBLAS's may."""
    from qempo_fast.logps import _gemm

    with (
        mock.patch.object(_gemm, "widens", lambda a: a.dtype in (torch.float16, torch.bfloat16)),
        mock.patch.object(_gemm, "_in_float32", return_value=False),
    ):
        yield


@contextlib.contextmanager
def no_products(made: Callable[..., torch.Tensor]) -> Iterator[None]:
    """mm and addmm give what is there, or made() of the shape: on a CPU the headline's would take minutes."""

    def mm(a: torch.Tensor, b: torch.Tensor, *, out: Any = None, out_dtype: Any = None) -> torch.Tensor:
        return made(a.shape[0], b.shape[1], dtype=out_dtype or a.dtype) if out is None else out

    def addmm(total: torch.Tensor, *args: Any, out: Any = None, **more: Any) -> torch.Tensor:
        return total if out is None else out

    with mock.patch.object(torch, "mm", mm), mock.patch.object(torch, "addmm", addmm):
        yield
