"""The surroundings that a call runs in: each runs it and gives its results and gradients."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import torch
import torch._dynamo  # Here, and not in each worker's first call that needs it: seconds.
import torch.nested._internal.nested_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from .functions import Function
from .kinds import Plain

Arguments = dict[str, Any]


class Results(NamedTuple):
    """Tensors that a call gave, in order, and the gradient of each argument that has one."""

    values: list[torch.Tensor]
    grads: dict[str, torch.Tensor]


Run = Callable[[Function, Arguments], Results]


class Mode(NamedTuple):
    """foreign: what torch itself may say there; good: a good call has to return; slow ones come seldom."""

    run: Run
    weight: float
    foreign: str = ""
    good: bool = True


def tensors(out: Any) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, (int, float)) and not isinstance(out, bool):
        return [torch.tensor(float(out), dtype=torch.float64, device="cpu")]
    return [x for part in out for x in tensors(part)] if isinstance(out, (tuple, list)) else []


def weighed(values: list[torch.Tensor]) -> torch.Tensor | None:
    """A scalar of every value that has a graph, each entry with a weight of its own."""
    parts = []
    for x in values:
        if x.requires_grad and x.is_floating_point():
            weights = torch.arange(1, x.numel() + 1, dtype=x.dtype, device=x.device).reshape(x.shape).cos()
            # Entries without a value, a group's baseline of one, take no part.
            parts.append((x * weights).sum())
    return sum(parts[1:], parts[0]) if parts else None


def _leaves(function: Function, arguments: Arguments) -> Arguments:
    """The policy's tensors that can have a gradient."""
    return {
        name: x
        for name in function.policy
        if isinstance(x := arguments.get(name), torch.Tensor) and x.is_floating_point() and not x.is_inference()
    }


def called(function: Function, arguments: Arguments, differentiate: bool = True) -> Results:
    """The call and its backward pass, of leaves that share their memory with the arguments."""
    leaves = {}
    for name, x in _leaves(function, arguments).items() if differentiate else ():
        leaf = x.detach() if not isinstance(x, torch.nn.Parameter) else x
        leaves[name] = leaf.requires_grad_()
    values = tensors(function.call(**{**arguments, **leaves}))
    total = weighed(values)
    if total is None or not leaves:
        return Results(values, {})
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return Results(values, {name: g for name, g in zip(leaves, grads, strict=True) if g is not None})


def _around(context: Callable[[], Any], differentiate: bool = True) -> Run:
    def run(function: Function, arguments: Arguments) -> Results:
        with context():
            return called(function, arguments, differentiate)

    return run


@contextlib.contextmanager
def _held(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """A setting of torch's at a value, and what it was before afterwards."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def _default_dtype(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    return _held(torch.get_default_dtype, torch.set_default_dtype, dtype)


def _threads(count: int) -> contextlib.AbstractContextManager[None]:
    return _held(torch.get_num_threads, torch.set_num_threads, count)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@contextlib.contextmanager
def _unpoisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class _Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def _first(function: Function, arguments: Arguments) -> str | None:
    return next(iter(_leaves(function, arguments)), None)


def _functional(function: Function, arguments: Arguments, name: str) -> Callable[[torch.Tensor], Any]:
    return lambda x: tensors(function.call(**{**arguments, name: x}))


def _grad(function: Function, arguments: Arguments) -> Results:
    """torch.func.grad by the first argument that has a gradient."""
    name = _first(function, arguments)
    if name is None:
        return called(function, arguments)
    call = _functional(function, arguments, name)

    def total(x: torch.Tensor) -> Any:
        values = call(x)
        parts = []
        for v in values:
            if v.is_floating_point():
                weights = torch.arange(1, v.numel() + 1, dtype=v.dtype, device=v.device).reshape(v.shape).cos()
                parts.append((v * weights).sum())
        return sum(parts[1:], parts[0]), [v.detach() for v in values]

    grad, values = torch.func.grad(total, has_aux=True)(arguments[name].detach())
    return Results(values, {name: grad})


def _vmap(function: Function, arguments: Arguments) -> Results:
    """The second of two equal calls that vmap makes one."""
    name = _first(function, arguments)
    if name is None:
        return called(function, arguments, False)
    x = arguments[name]
    values = torch.func.vmap(_functional(function, arguments, name))(torch.stack([x.detach(), x.detach()]))
    return Results([v[1] for v in values], {})


def _functionalize(function: Function, arguments: Arguments) -> Results:
    name = _first(function, arguments)
    if name is None:
        return called(function, arguments, False)
    return Results(torch.func.functionalize(_functional(function, arguments, name))(arguments[name].detach()), {})


def _make_fx(function: Function, arguments: Arguments) -> Results:
    name = _first(function, arguments)
    if name is None:
        return called(function, arguments, False)
    x = arguments[name].detach()
    return Results(make_fx(_functional(function, arguments, name))(x)(x), {})


def _jit(function: Function, arguments: Arguments) -> Results:
    """Traced with other values, so that a result kept as a constant shows."""
    name = _first(function, arguments)
    if name is None:
        return called(function, arguments, False)
    x = arguments[name].detach()
    call = _functional(function, arguments, name)
    traced = torch.jit.trace(lambda x: tuple(call(x)), (_made(torch.Tensor.abs, x),), check_trace=False)
    return Results(list(traced(x)), {})


def _compiled(backend: str) -> Run:
    def run(function: Function, arguments: Arguments) -> Results:
        torch._dynamo.reset()
        call = torch.compile(function.call, backend=backend)
        return called(replace(function, call=call), arguments)

    return run


def _checkpoint(function: Function, arguments: Arguments) -> Results:
    def call(**arguments: Any) -> Any:
        return checkpoint(lambda: function.call(**arguments), use_reentrant=False)

    return called(replace(function, call=call), arguments)


def _in_a_thread(function: Function, arguments: Arguments) -> Results:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(called(function, arguments))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]  # type: ignore[no-any-return]


class NotMade(Exception):
    """Torch makes no such tensor of this one."""


def _made(make: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
    try:
        return make(x.detach())
    except Exception as error:
        raise NotMade(str(error)) from error


def _every(make: Callable[[torch.Tensor], Any]) -> Run:
    """All tensors as another kind at once."""

    def run(function: Function, arguments: Arguments) -> Results:
        made = {k: _made(make, x) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
        out = called(function, made)
        return Results([x.as_subclass(torch.Tensor) if isinstance(x, Plain) else x for x in out.values], out.grads)

    return run


def _faked(function: Function, arguments: Arguments) -> Results:
    mode = FakeTensorMode()
    fakes = {k: _made(mode.from_tensor, x) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
    with mode:
        return called(function, fakes)


_FUNCTORCH = (
    "functorch|vmap|[Bb]atching|setup_context|once_differentiable|[Ff]unctionalize|not supported|UserWarning|"
    "SystemError: <built-in method apply of FunctionMeta|"
    "incompatible with mkldnn|Multiple dispatch failed|"
    # functorch's wrapper of one of these says that it is strided.
    "Mkldnn tensor does not support|reshape is not implemented for sparse|Sparse CSR tensors do not have"
)
_SUBCLASS = "must implement __coerce_same_metadata|Multiple dispatch failed"
MODES = {
    "plain": Mode(called, 100),
    "no_grad": Mode(_around(torch.no_grad, False), 8),
    "inference": Mode(_around(torch.inference_mode, False), 8),
    "autocast": Mode(_around(lambda: torch.autocast("cpu", torch.bfloat16)), 6),
    "default_float64": Mode(_around(lambda: _default_dtype(torch.float64)), 5),
    "default_bfloat16": Mode(_around(lambda: _default_dtype(torch.bfloat16)), 5),
    "default_float16": Mode(_around(lambda: _default_dtype(torch.float16)), 5),
    "default_meta": Mode(_around(lambda: torch.device("meta")), 5),
    "unpoisoned": Mode(_around(_unpoisoned), 5),
    "three_threads": Mode(_around(lambda: _threads(3)), 3),
    "function_mode": Mode(_around(_Functions), 3),
    "dispatch_mode": Mode(_around(_Dispatches), 3),
    "saved_hooks": Mode(_around(lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)), 3),
    "anomaly": Mode(_around(torch.autograd.detect_anomaly), 1, "returned nan values"),
    "checkpoint": Mode(_checkpoint, 2),
    "in_a_thread": Mode(_in_a_thread, 2),
    "all_subclass": Mode(_every(lambda x: x.clone().as_subclass(Plain)), 3),
    "all_meta": Mode(_every(lambda x: x.to("meta")), 2, good=False),
    "fake_mode": Mode(_faked, 2, "[Dd]ata.dependent|DataDependent|DynamicOutputShape", good=False),
    "grad": Mode(_grad, 3, _FUNCTORCH, good=False),
    "vmap": Mode(_vmap, 2, _FUNCTORCH, good=False),
    "functionalize": Mode(_functionalize, 2, _FUNCTORCH, good=False),
    "make_fx": Mode(_make_fx, 1, "prim::layout|Multiple dispatch failed|NestedIntNode", good=False),
    "jit": Mode(_jit, 1, "Tensor that requires grad as a constant", good=False),
    "triton": Mode(_around(lambda: _environment("QEMPO_BACKEND", "triton")), 0.5),
    # A second each.
    "compile_eager": Mode(_compiled("eager"), 0.1),
    "compile_aot": Mode(_compiled("aot_eager"), 0.1, _SUBCLASS),
}  # fmt: skip


def draw(rng: Random, function: Function) -> str:
    names = ["plain", "no_grad", "inference", "in_a_thread"] if function.operator else list(MODES)
    return rng.choices(names, [MODES[name].weight for name in names])[0]
