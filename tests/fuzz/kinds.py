"""Tensors that are more than a tensor: subclasses, wrappers, other layouts of memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map


class Kind(NamedTuple):
    """good: still the same tensor to a reader, so that a call has to return; foreign: what torch itself may say."""

    make: Callable[[torch.Tensor], Any]
    weight: int = 1
    good: bool = False
    foreign: str = ""


class Plain(torch.Tensor):
    """A subclass that adds nothing."""


class Wrapper(torch.Tensor):
    """Holds its tensor; has a null pointer of its own."""

    x: torch.Tensor

    @staticmethod
    def __new__(cls, x: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def inner(a: Any) -> Any:
            return a.x if isinstance(a, Wrapper) else a

        out = function(*tree_map(inner, args), **tree_map(inner, kwargs or {}))
        return tree_map(lambda a: Wrapper(a) if isinstance(a, torch.Tensor) else a, out)


def _waiting(x: torch.Tensor) -> Any:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return AsyncCollectiveTensor(x)


def _masked(x: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool))


def _nested(x: torch.Tensor) -> Any:
    rows = list(x) if x.ndim > 1 and len(x) else [x]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


def _inference(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone()


def _quantized(x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


def _requires_grad(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_() * 1 if x.is_floating_point() else x


# Among tensors that are not fake.
_FAKE = (
    "DynamicOutputShape|DataDependentOutput|convert all Tensors to FakeTensors|Mixing fake modes|"
    "Multiple dispatch failed|as_subclass"
)
# Nothing in Python tells one from a plain tensor; outside of torch's own functionalisation nobody holds one.
_BARE = (
    "native code wants .* without memory|unallocated storage|INTERNAL ASSERT FAILED|version_counter for inference|"
    "convert all Tensors to FakeTensors|AssertionError: True != False|"
    "must not already be a functional tensor"
)

KINDS = {
    "parameter": Kind(lambda x: torch.nn.Parameter(x.clone(), requires_grad=False), 2, good=True),
    "subclass": Kind(lambda x: x.clone().as_subclass(Plain), 3, good=True),
    "buffer": Kind(lambda x: torch.nn.Buffer(x.clone()), 1, good=True),
    "inference": Kind(_inference, 1, foreign="Inference tensors cannot be saved"),
    "requires_grad": Kind(_requires_grad, 2, good=True),
    "waiting": Kind(_waiting, 2, foreign="version_counter for inference tensor"),
    "wrapper": Kind(Wrapper, 3),
    "fake": Kind(lambda x: FakeTensorMode().from_tensor(x), 2, foreign=_FAKE),
    "meta": Kind(lambda x: x.to("meta"), 2),
    # vmap's own fallback warns of it, and fails at that.
    "sparse": Kind(lambda x: x.to_sparse(), 1, foreign="SystemError.*UserWarning"),
    "csr": Kind(lambda x: x.to_sparse_csr() if x.ndim == 2 else x.to_sparse(), 1),
    "masked": Kind(_masked, 2),
    "nested": Kind(_nested, 2),
    "functional": Kind(torch._to_functional_tensor, 2, foreign=_BARE),
    "mkldnn": Kind(lambda x: x.to_mkldnn() if x.dtype == torch.float32 else x.to_sparse(), 1),
    "quantized": Kind(_quantized, 1),
}
