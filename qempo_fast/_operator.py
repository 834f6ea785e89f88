"""Operators of torch's library that are differentiable wherever torch differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.autograd import make_autograd_impl
from torch._library.utils import fill_defaults
from torch.autograd.function import _SingleLevelFunction

from . import _check


def differentiable(operator: Any, setup: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """operator with this backward pass, to be called instead of it.

    An operator's own autograd knows neither functorch (torch.func.grad raises) nor forward-mode AD, where its tangent
    is 0 without a word. An autograd function takes the one, by rules that torch derives, and refuses the other.
    """
    operator.register_autograd(backward, setup_context=setup)
    _pass_transforms(operator, setup, backward)
    node: Any = type(
        operator._name.rpartition("::")[2],
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda *args: operator(*args)),
            "setup_context": staticmethod(setup),
            "backward": staticmethod(backward),
            "generate_vmap_rule": True,
        },
    )

    def call(*args: Any) -> Any:
        return node.apply(*args) if _check.transformed() and not _functionalizes() else operator(*args)

    return call


def _pass_transforms(operator: Any, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Let the operator itself pass torch.func.grad: torch.compile puts it into a graph with the transform's levels.

    torch's own autograd of an operator asks there for a function with setup_context. Dynamo could trace node.apply in
    its place, and then took gradients that were asked for as unwanted: zeros.
    """
    overload = operator._opoverload
    plain = make_autograd_impl(overload, operator)

    def kernel(keyset: Any, *args: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return plain(keyset, *args)

        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                out = overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
            setup(ctx, fill_defaults(overload._schema, args, {})[0], out)
            return out

        parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        level: Any = type(overload._opname, (_SingleLevelFunction,), parts)
        with enable_single_level_autograd_function():
            return level.apply(*args)

    # Fake tensors are of the second. torch's own is of the alias of all these keys: to take its place would warn.
    for key in ("AutogradCPU", "AutogradMeta", "AutogradCUDA"):
        operator._lib.impl(operator._name, kernel, key, with_keyset=True)


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply without its own step in Python, which looks for functorch's wrappers in each argument for 2 to 5
    microseconds: where _check.traced() has looked.
    """
    out: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return out


def scalar(x: float | None) -> torch.Tensor | None:
    """x as an operator takes a number: () float64 on the CPU, where reading it stalls no GPU.

    A float of a schema is a constant of the graph, and the ninth value of a temperature or a multiplier raises under
    fullgraph=True. torch.compile keeps a float that changes where it is a factor of a tensor, and not in scalar_tensor
    or full.
    """
    return None if x is None else torch.ones((), dtype=torch.float64, device="cpu") * float(x)


def number(name: str, x: torch.Tensor) -> float:
    """What scalar() was made of. An operator that reads one is unsafe in a CUDA graph, which would keep the first."""
    _check.tensor(name, x, dtypes=(torch.float64,), shape=())
    return float(x.item())


def _functionalizes() -> bool:
    """Whether the innermost transform is functionalize, which has a rule for operators and none for functions."""
    stack = torch._C._functorch.peek_interpreter_stack()
    return stack is not None and stack.key() == torch._C._functorch.TransformType.Functionalize
