"""What is done to one argument of a call that was good.

A change takes the argument and a generator and gives (given, plain): what the call gets, and the plain contiguous
tensor or number that it stands for; REFUSED where there is none, so that the call has to raise.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

from . import kinds

REFUSED = object()
# Around the values of a strided tensor: a kernel that reads it by other strides gives a wrong number.
_POISON = {torch.int32: 2**30, torch.int64: 2**40}


class Change(NamedTuple):
    """apply(x, rng) -> (given, plain); good: the values are the same or as good, so the call has to return."""

    apply: Callable[[Any, Random], tuple[Any, Any]]
    weight: int
    good: bool = False


def _poison(x: torch.Tensor) -> Any:
    return _POISON.get(x.dtype, math.nan if x.is_floating_point() else 1)


def _transposed(x: torch.Tensor) -> torch.Tensor:
    if x.ndim < 2:
        return torch.stack([x, torch.full_like(x, _poison(x))], -1)[..., 0]
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _permuted(x: torch.Tensor) -> torch.Tensor:
    back = tuple(reversed(range(x.ndim)))
    return x.permute(back).contiguous().permute(back)


def _sliced(x: torch.Tensor) -> torch.Tensor:
    border = x.new_full((*x.shape[:-1], 3), _poison(x))
    return torch.cat([border, x, border], -1)[..., 3 : 3 + x.shape[-1]]


def _rows_sliced(x: torch.Tensor) -> torch.Tensor:
    border = x.new_full((2, *x.shape[1:]), _poison(x))
    return torch.cat([border, x, border])[2:-2]


def _stepped(x: torch.Tensor) -> torch.Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), _poison(x))
    wide[..., ::2] = x
    return wide[..., ::2]


def _rows_stepped(x: torch.Tensor) -> torch.Tensor:
    wide = x.new_full((2 * x.shape[0], *x.shape[1:]), _poison(x))
    wide[1::2] = x
    return wide[1::2]


def _offset(x: torch.Tensor) -> torch.Tensor:
    flat = x.new_full((x.numel() + 4,), _poison(x))
    flat[1:-3] = x.reshape(-1)
    return flat[1:-3].view(x.shape)


def _negated(x: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(-x)


def _conjugate(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def _kept(make: Callable[[torch.Tensor], torch.Tensor], weight: int = 4) -> Change:
    """Other strides, the same values."""

    def apply(x: torch.Tensor, _: Random) -> tuple[Any, Any]:
        return make(x), x

    return Change(apply, weight, good=True)


def _moved(make: Callable[[torch.Tensor, Random], torch.Tensor], weight: int = 2) -> Change:
    """Other values, of which the plain tensor is a copy."""

    def apply(x: torch.Tensor, rng: Random) -> tuple[Any, Any]:
        given = make(x, rng)
        return given, given.detach().clone(memory_format=torch.contiguous_format)

    return Change(apply, weight)


def _at_one(value: float) -> Callable[[torch.Tensor, Random], torch.Tensor]:
    def make(x: torch.Tensor, rng: Random) -> torch.Tensor:
        out = x.clone()
        if x.numel():
            out.view(-1)[rng.randrange(x.numel())] = value
        return out

    return make


def _cast(dtype: torch.dtype) -> Callable[[torch.Tensor, Random], torch.Tensor]:
    return lambda x, _: x.to(dtype)


def _swapped(x: torch.Tensor, rng: Random) -> torch.Tensor:
    i, j = rng.randrange(len(x)), rng.randrange(len(x))
    out = x.clone()
    out[i], out[j] = x[j], x[i]
    return out


def _expanded(x: torch.Tensor, _: Random) -> torch.Tensor:
    return x[:1].expand(x.shape)


def _overlapping(x: torch.Tensor, _: Random) -> torch.Tensor:
    return x.reshape(-1).as_strided(x.shape, (1,) * x.ndim)


def _other(value: Any, weight: int = 1) -> Change:
    """Something that no tensor may be; None may stand for an argument that is left out."""
    return Change(lambda x, _: (value, REFUSED if value is not None else None), weight)


def _number(value: Any) -> Change:
    return Change(lambda x, _: (value, value), 1)


LAYOUTS = {
    "transposed": _kept(_transposed),
    "sliced": _kept(_sliced),
    "stepped": _kept(_stepped),
    "offset": _kept(_offset),
    "negated": _kept(_negated),
    "rows_sliced": _kept(_rows_sliced),
    "rows_stepped": _kept(_rows_stepped),
    "permuted": _kept(_permuted),
}
FLOAT_LAYOUTS = {"conjugate": _kept(_conjugate)}
SHAPES = {
    "expanded": _moved(_expanded, 4),
    "overlapping": _moved(_overlapping),
    "empty": _moved(lambda x, _: x[:0]),
    "no_width": _moved(lambda x, _: x[..., :0]),
    "shorter": _moved(lambda x, _: x[:-1]),
    "longer": _moved(lambda x, _: torch.cat([x, x[-1:]])),
    "narrower": _moved(lambda x, _: x[..., :-1]),
    "one_more_axis": _moved(lambda x, _: x[None]),
    "column": _moved(lambda x, _: x[..., None]),
    "scalar": _moved(lambda x, _: x.sum().to(x.dtype)),
}
DTYPES = {
    str(dtype).removeprefix("torch."): _moved(_cast(dtype), 1)
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
        *(torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint32, torch.bool, torch.complex64),
    )
}
FLOAT_VALUES = {
    **{f"one_{name}": _moved(_at_one(value), 1) for name, value in (
        ("nan", math.nan), ("inf", math.inf), ("-inf", -math.inf), ("1e30", 1e30), ("-1e9", -1e9), ("0", 0.0),
    )},
    "zeros": _moved(lambda x, _: torch.zeros_like(x), 1),
    "nans": _moved(lambda x, _: torch.full_like(x, math.nan), 1),
    "large": _moved(lambda x, _: x * 300, 1),
    "tiny": _moved(lambda x, _: x * 1e-30, 1),
}  # fmt: skip
INT_VALUES = {
    **{f"one_{value}": _moved(_at_one(value), 1) for value in (-1, 0, 1, -100, 2**31 - 1, -(2**31))},
    "swapped": _moved(_swapped),
    "falling": _moved(lambda x, _: x.flip(0)),
    "plus_one": _moved(lambda x, _: x + 1),
    "times_3": _moved(lambda x, _: x * 3),
}
NO_TENSORS = {
    "list": Change(lambda x, _: (x.tolist(), REFUSED), 1),
    "array": Change(lambda x, _: (x.float().numpy() if x.is_floating_point() else x.numpy(), REFUSED), 1),
    "none": _other(None),
    "string": _other("tensor"),
    "number": _other(0.5),
}
NUMBERS = {
    f"is_{name}": _number(value)
    for name, value in {
        "nan": math.nan, "inf": math.inf, "-1": -1, "0": 0, "0.0": 0.0, "1": 1, "2": 2, "3": 3, "0.5": 0.5,
        "1e-30": 1e-30, "1e30": 1e30,
        "2^63": 2**63, "2^70": 2**70, "-2^40": -(2**40), "true": True, "none": None, "string": "0.1",
        "tensor": torch.tensor(0.5), "array": np.float32(0.5), "int64": np.int64(2), "list": [1.0], "complex": 1j,
    }.items()
}  # fmt: skip
WORDS = {
    f"is_{name}": _number(value)
    for name, value in {"none": None, "bad": "nonsense", "empty": "", "0": 0, "list": [], "bytes": b"mean"}.items()
}
KINDS = {
    name: Change(lambda x, _, make=kind.make: (make(x), x), kind.weight, kind.good)
    for name, kind in kinds.KINDS.items()
}
ALL = LAYOUTS | FLOAT_LAYOUTS | SHAPES | DTYPES | FLOAT_VALUES | INT_VALUES | NO_TENSORS | NUMBERS | WORDS | KINDS
_TENSORS = LAYOUTS | SHAPES | DTYPES | NO_TENSORS | KINDS


def fitting(x: Any) -> dict[str, int]:
    """Names of the changes that fit an argument, with their weights."""
    if isinstance(x, torch.Tensor):
        if not x.ndim or not x.numel():
            found = DTYPES | NO_TENSORS | KINDS
        elif x.is_floating_point():
            found = _TENSORS | FLOAT_VALUES | (FLOAT_LAYOUTS if x.dtype in (torch.float32, torch.float64) else {})
        else:
            found = _TENSORS | INT_VALUES
    elif isinstance(x, (bool, int, float)):
        found = NUMBERS
    else:
        found = WORDS
    return {name: change.weight for name, change in found.items()}


def apply(change: str, x: Any, seed: int) -> tuple[Any, Any]:
    """(given, plain) of an argument."""
    return ALL[change].apply(x, Random(seed + zlib.crc32(change.encode())))
