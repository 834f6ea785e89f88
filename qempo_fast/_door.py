"""The one door to native code: what a tensor has to be before its address is taken, and the only place that takes it.

A pointer knows nothing of strides, dtypes, devices, lazily negated views or wrappers without memory of their own. Each
tensor that goes to C++, CUDA or Triton passes dense() first, at the seam that knows its name; each address that leaves
Python comes from address(), which believes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch

from . import _C, _check

_Tensor = torch.Tensor
# As torch.Tensor.get_device has it.
_CPU = -1


def dense(name: str, x: Any) -> Any:
    """x as native code can read it, row after row in memory of its own: x itself, or a copy. None stays None.

    For arguments that need no graph. What it cannot make readable it refuses by name.
    """
    # Nearly every call. is_neg: a view that torch negates when it is read, and C++ would not.
    if type(x) is _Tensor and x.layout is torch.strided and x.is_contiguous() and not x.is_neg():
        return x
    return None if x is None else owned(name, x).contiguous()


def all_dense(tensors: Sequence[Any]) -> bool:
    """Whether dense() would give each of tensors back; False may also mean that it cannot be said at once."""
    return _C.all_dense(tensors)


def owned(name: str, x: Any) -> torch.Tensor:
    """x with the strides that it has, its values in memory of its own; for arguments that need no graph."""
    if type(x) is not _Tensor:
        _check.plain(name, x)
        x = x.detach()
        # The result of a collective that may still run: what was detached is a wrapper too.
        x = x.trigger_wait() if hasattr(x, "trigger_wait") else x.as_subclass(_Tensor)
    elif x.is_nested or x.layout is not torch.strided:
        _check.plain(name, x)
    out: torch.Tensor = x.resolve_neg()
    if not out.data_ptr() and out.numel():
        _check.bad_value(name, "a tensor with memory of its own", "one that has none, or whose storage was freed")
    return out


def _address(x: torch.Tensor, dtype: torch.dtype, count: int, device: int = _CPU) -> int:
    at = x.data_ptr()
    there = x.is_cpu if device < 0 else x.get_device() == device
    if x.dtype is dtype and x.numel() == count and there and x.is_contiguous() and (at or not count):
        return at
    _unsuited(x, dtype, count, device)


def _maybe(x: torch.Tensor | None, dtype: torch.dtype, count: int, device: int = _CPU) -> int | None:
    return None if x is None else _address(x, dtype, count, device)


def _unsuited(x: torch.Tensor, dtype: torch.dtype, count: int, device: int) -> NoReturn:
    _wrong(x, f"{count} entries of {dtype}, dense, on " + ("the CPU" if device < 0 else f"GPU {device}"))


def _native() -> bool:
    """Whether this torch can be asked from C++: address() took 0.6 microseconds in Python, and a loss has eight."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    return exchange is not None and _C.use_tensors(exchange, _Tensor, _DLPACK, _unsuited)


# By DLPack's code of a kind, and bits.
_DLPACK = [
    *((torch.float16, 2, 16), (torch.bfloat16, 4, 16), (torch.float32, 2, 32), (torch.float64, 2, 64)),
    *((torch.int32, 0, 32), (torch.int64, 0, 64), (torch.uint8, 1, 8)),
]
# address(x, dtype, count, device=-1): where the count entries of x begin, which dense() gave; 0 only where there are
# none. maybe: of an argument that may be absent. Absence is None, as 0 is the address of what is empty.
address, maybe = (_C.address, _C.maybe) if _native() else (_address, _maybe)


def own(x: torch.Tensor) -> int:
    """Address of memory just made like what dense() gave, by a call that says its size; and of what Triton is given,
    whose kernels are typed by their tensors.
    """
    at = x.data_ptr()
    # Made like a wrapper without entries, which has no address to miss, it is one as well.
    if not at and x.numel():
        _wrong(x, "memory of its own")
    return at


def tile(x: torch.Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Address of an (n, c) CPU tensor whose rows may lie apart, and their distance in entries."""
    at, (n, c) = x.data_ptr(), x.shape
    stride = x.stride(0) if n > 1 else c
    if x.dtype is not dtype or not x.is_cpu or (c > 1 and x.stride(1) != 1) or (at == 0 and n * c):
        _wrong(x, f"rows of {dtype} on the CPU, dense each")
    return at, stride


def aligned(x: torch.Tensor, bytes_: int) -> bool:
    """Whether x begins at a multiple of so many bytes."""
    return x.data_ptr() % bytes_ == 0


class Unreadable(RuntimeError):
    """What came to native code is not what it reads. named() says which argument that was."""


def named(names: Iterable[str], tensors: Iterable[Any]) -> None:
    """Raise for the first of tensors that has no memory: looked at once something is wrong, not before each call."""
    for name, x in zip(names, tensors, strict=True):
        if x is not None:
            owned(name, x)


def _wrong(x: torch.Tensor, wanted: str) -> NoReturn:
    got = f"{type(x).__name__} {tuple(x.shape)} of {x.dtype} on {x.device}, strides {x.stride()}"
    raise Unreadable(f"native code wants {wanted}, got {got}" + ("" if x.data_ptr() else ", without memory"))
