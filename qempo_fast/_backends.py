"""The table of ops and their backends; which backend runs an op on a device, and why.

Order of choice: the ``backend=`` argument, then ``QEMPO_BACKEND``, then the default order below. A backend
named in the argument that cannot run raises with the reason; a default falls to the next in the order.
``QEMPO_BACKEND`` is one name ("triton"), taken by every op that has such a kernel, or a list by op
("linear_logps=triton,dpp=reference").
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import _C, _check
from .reference import contrastive, dpp, groups, pairs, risk, segments, tokens

NAMES = ("cuda", "triton", "cpu", "reference")
# "reference" is plain torch and closes every list.
_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


@dataclass(frozen=True)
class Op:
    """One op. Its backend b is the function of its name in ``qempo_fast/<room>/<b>.py``, imported at the first call.

    reference is its definition in plain torch; None where the room has one of its own, in ``reference.py``.
    policy, of a loss: leading arguments that get a gradient.
    """

    room: str
    backends: tuple[str, ...]
    reference: Callable[..., Any] | None = None
    policy: int = 0


def _loss(reference: Callable[..., Any], policy: int = 1) -> Op:
    return Op("losses", ("triton", "cpu"), reference, policy)


OPS = {
    "linear_logps": Op("logps", ("triton", "cpu")),
    "logps_from_logits": Op("logps", ("triton", "cpu")),
    "support_logps": Op("logps", ("triton", "cpu")),
    "segment_sum": Op("logps", ("triton", "cpu"), segments.segment_sum),
    "dpp": Op("dpp", ("cuda", "triton", "cpu"), dpp.dpp_fwd),
    "dpp_select": Op("dpp", ("cuda", "triton", "cpu"), dpp.dpp_select),
    "pair_loss": _loss(pairs.pair_loss, policy=2),
    "epa_loss": _loss(contrastive.epa_loss, policy=3),
    "poft_loss": _loss(contrastive.poft_loss),
    "group_loss": _loss(groups.group_loss),
    "variance_loss": _loss(groups.variance_loss),
    "rspo_loss": _loss(risk.rspo_loss),
    "token_loss": _loss(tokens.token_loss),
    "group_advantages": Op("losses", ("cpu",), groups.group_advantages),
}


def _no_triton() -> str | None:
    """Why no Triton kernel can run in this process, or None."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _no_cuda() -> str | None:
    """Why the CUDA kernels cannot run here, or None."""
    if not hasattr(_C, "dpp_cuda_fwd"):
        return "this build holds no CUDA kernels: nvcc was not found, or QEMPO_CUDA=0"
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or newer"
    return None


# Why a backend's kernels cannot run on this machine; those that are not here can.
_UNAVAILABLE = {"triton": _no_triton, "cuda": _no_cuda}
_DEFAULTS: dict[tuple[str, torch.device, str | None], tuple[str, Callable[..., Any]]] = {}


@functools.cache
def implementation(op: str, backend: str) -> Callable[..., Any]:
    """What runs op there: the function that the table promises."""
    row = OPS[op]
    if backend == "reference" and row.reference is not None:
        return row.reference
    found: Callable[..., Any] = getattr(importlib.import_module(f"{__package__}.{row.room}.{backend}"), op)
    return found


def _has(op: str, backend: str) -> bool:
    return backend == "reference" or backend in OPS[op].backends


def _reason(op: str, backend: str, device_type: str) -> str | None:
    """Why backend cannot run op on this kind of device, or None where it can."""
    if not _has(op, backend):
        return f"{op} has no {backend} kernel in this version"
    # Named outright, Triton also takes CPU tensors in its interpreter: slow, and how kernels are tested without a GPU.
    interpreted = (backend, device_type, os.environ.get("TRITON_INTERPRET")) == ("triton", "cpu", "1")
    if backend not in _ORDER.get(device_type, ("reference",)) and not interpreted:
        return f"{backend} does not run on {device_type} tensors"
    return _UNAVAILABLE[backend]() if backend in _UNAVAILABLE else None


def _from_environment(op: str) -> str | None:
    value = os.environ.get("QEMPO_BACKEND", "").strip()
    if not value:
        return None
    if "=" not in value:
        _check.choice("QEMPO_BACKEND", value, NAMES)
        return value if _has(op, value) else None
    wanted = None
    for part in value.split(","):
        name, _, backend = (p.strip() for p in part.partition("="))
        _check.choice(f"QEMPO_BACKEND, op {name}", name, sorted(OPS))
        _check.choice(f"QEMPO_BACKEND, {name}", backend, NAMES)
        wanted = backend if name == op else wanted
    return wanted


def choose(op: str, device: torch.device, backend: str | None = None) -> str:
    """Name of the backend that runs op on device; raises where one was named and cannot run."""
    source = "backend"
    if backend is None:
        backend, source = _from_environment(op), "QEMPO_BACKEND"
    if backend is not None:
        _check.choice(source, backend, NAMES)
        reason = _reason(op, backend, device.type)
        if reason is not None:
            _check.bad_value(source, f"a backend that runs {op} on {device.type}", f"{backend!r}: {reason}")
        return backend
    return next(b for b in _ORDER.get(device.type, ("reference",)) if _reason(op, b, device.type) is None)


def kernel(op: str, device: torch.device, backend: str | None = None) -> Callable[..., Any]:
    """The implementation of op that choose() names."""
    return default(op, device)[1] if backend is None else implementation(op, choose(op, device, backend))


def default(op: str, device: torch.device) -> tuple[str, Callable[..., Any]]:
    """choose() and its kernel where no argument names a backend; remembered: choose() takes 4 microseconds and more.

    Not while torch.compile traces, which would guard on what is remembered.
    """
    key = op, device, _check.environment("QEMPO_BACKEND")
    found = _DEFAULTS.get(key)
    if found is None:
        name = choose(op, device)
        found = _DEFAULTS[key] = name, implementation(op, name)
    return found


@dataclass(frozen=True)
class Row:
    """One line of the table: what runs op on device, and why each backend before it in the order does not."""

    op: str
    device: str
    backend: str
    passed_over: dict[str, str]


class Table(list[Row]):
    """Rows of backends(); prints as aligned text."""

    def __str__(self) -> str:
        head = ("op", "device", "runs on", "passed over")
        cells = [head] + [
            (r.op, r.device, r.backend, "; ".join(f"{b}: {why}" for b, why in r.passed_over.items()) or "-")
            for r in self
        ]
        widths = [max(len(c[i]) for c in cells) for i in range(3)]
        return "\n".join("  ".join([*(c[i].ljust(widths[i]) for i in range(3)), c[3]]) for c in cells)


def backends() -> Table:
    """Table of what runs each op on each kind of device of this process, with the reasons.

    Returns:
        A list of rows (op, device, backend, passed_over) that prints as a table.
    """
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    rows = Table()
    for op in sorted(OPS):
        for device in devices:
            chosen = choose(op, device)
            order = _ORDER[device.type]
            before = order[: order.index(chosen)] if chosen in order else order
            why = {b: _reason(op, b, device.type) or "not chosen" for b in before}
            rows.append(Row(op, device.type, chosen, why))
    return rows
