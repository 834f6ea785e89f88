"""The classes that a model and its output head have while the model is patched.

Subclasses made here, and not an attribute ``forward`` on the instance: a method of a class is bound when it is called,
so that deep copies, pickles and the replicas of nn.DataParallel run on their own weights, and accelerate finds the
plain function that it wraps.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ... import _check

# On the model: its patches, of which the last answers, and an attribute ``forward`` that stood there before them.
_PATCHES, _BEFORE = "_qempo_patches", "_qempo_forward_before"
# On the head, for the length of a call: what answers in its place.
_STAND_IN = "_qempo_stand_in"
# On the model, while what wrapped its forward before runs: that may lead to ours again.
_INSIDE = "_qempo_inside"
# On a class made here: the class that it was made from; the arguments of its forward that have a place, and all that
# it takes, or None where it takes any.
_OWN, _NAMES, _TAKEN = "_qempo_own", "_qempo_names", "_qempo_taken"


def push(model: Any, patch: Any) -> None:
    """Put a patch on the model; its ``_forward(model, args, kwargs)`` is called from now on."""
    if not hasattr(type(model), _OWN):
        # What wrapped the model's forward before stays between our forward and the model's own: accelerate's autocast.
        before = model.__dict__.pop("forward", None)
        kind: Any = type(model)
        model.__class__ = _model_class(kind)
        if before is not None:
            setattr(model, _BEFORE, before)
    model.__dict__.setdefault(_PATCHES, []).append(patch)


def patches(model: Any) -> list[Any]:
    return model.__dict__.get(_PATCHES) or []


def drop(model: Any, patch: Any) -> None:
    """Take a patch off, in any order; with the last of them everything that was put on the model."""
    left = [other for other in patches(model) if other is not patch]
    model.__dict__[_PATCHES] = left
    if left:
        return
    del model.__dict__[_PATCHES]
    # A wrapper put over ours still leads to it, and through it to what was there before.
    if "forward" not in model.__dict__ and _BEFORE in model.__dict__:
        model.forward = model.__dict__.pop(_BEFORE)
    for module in model.modules():
        # Not where another class was made from ours since, as FSDP does: ours then passes every call on.
        if _OWN in type(module).__dict__:
            module.__class__ = getattr(type(module), _OWN)
            module.__dict__.pop(_STAND_IN, None)


def own_forward(model: Any, kwargs: dict[str, Any]) -> Any:
    """The model's forward without any patch, in what wrapped it before."""
    before = model.__dict__.get(_BEFORE)
    if before is None:
        return getattr(type(model), _OWN).forward(model, **kwargs)
    # A method runs on this model: it is bound to another one where this is a replica.
    method = getattr(before, "__func__", None)
    model.__dict__[_INSIDE] = True
    try:
        return before(**kwargs) if method is None else method(model, **kwargs)
    finally:
        model.__dict__[_INSIDE] = False


def named(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names."""
    if not args:
        return kwargs
    names = getattr(type(model), _NAMES)
    if len(args) > len(names):
        _check.bad_type("forward", f"at most {len(names)} arguments without their names", len(args))
    return {**dict(zip(names, args, strict=False)), **kwargs}


def taken(model: Any) -> frozenset[str] | None:
    """Names of what the model's own forward takes, or None where it takes anything."""
    found: frozenset[str] | None = getattr(type(model), _TAKEN)
    return found


def prepare_head(head: Any) -> None:
    """Let stand_in find a plain Linear ready: torch.compile does not trace the change of a class."""
    if type(head) is torch.nn.Linear:
        head.__class__ = _head_class(torch.nn.Linear)


def stand_in(head: Any, answer: Callable[..., Any], run: Callable[[], Any]) -> Any:
    """What run() gives while answer(hidden) is called in the head's place, hooks and all."""
    kind: Any = type(head)
    if not hasattr(kind, _OWN):
        head.__class__ = _head_class(kind)
    head.__dict__[_STAND_IN] = answer
    try:
        return run()
    finally:
        head.__dict__[_STAND_IN] = None
        # A parametrised Linear gets its class back: torch looks at the class's bases to take parametrisations off.
        if kind is not torch.nn.Linear and not hasattr(kind, _OWN):
            head.__class__ = kind


def _subclass(own: Any, body: dict[str, Any]) -> Any:
    def reduce(self: Any, protocol: Any) -> Any:
        made = own.__reduce_ex__(self, protocol)
        return (_remake, (own, "__call__" in body), *made[2:])

    # The name and the module of the original: transformers looks up losses, files and records by them.
    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own)(own.__name__, (own,), {**body, **names, "__reduce_ex__": reduce, _OWN: own})


def _remake(own: type, is_head: bool) -> Any:
    """An empty object of the class made from own, for copy and pickle to fill."""
    kind = _head_class(own) if is_head else _model_class(own)
    return kind.__new__(kind)


@functools.cache
def _model_class(own: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = self.__dict__.get(_PATCHES)
        if self.__dict__.get(_INSIDE):
            return own.forward(self, *args, **kwargs)
        if found:
            return found[-1]._forward(self, named(self, args, kwargs))
        before = self.__dict__.get(_BEFORE)
        return own.forward(self, *args, **kwargs) if before is None else before(*args, **kwargs)

    # generate and Trainer look at the signature; accelerate unwraps as far as __wrapped__ leads, which has to be here.
    signature = inspect.signature(own.forward)
    outer = functools.wraps(own.forward)(lambda self, *args, **kwargs: forward(self, *args, **kwargs))
    outer.__wrapped__ = forward
    for function in (forward, outer):
        function.__signature__ = signature  # type: ignore[attr-defined]
    placed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(name for name, p in signature.parameters.items() if p.kind in placed)[1:]
    anything = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    taken = None if anything else frozenset(signature.parameters)
    return _subclass(own, {"forward": outer, _NAMES: names, _TAKEN: taken})


@functools.cache
def _head_class(own: Any) -> Any:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = self.__dict__.get(_STAND_IN)
        return own.__call__(self, *args, **kwargs) if answer is None else answer(*args, **kwargs)

    return _subclass(own, {"__call__": __call__})
