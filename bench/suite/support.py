"""Log-probs over the sampler's kept sets, forward and backward, against masked logits: qempo-fast bench --op support.

Hidden states and targets are those of completions that SmolLM2 drew at top_p 0.95; the sets are what vLLM's rule keeps
of its logits there, and the target, which a rule or a rounding other than that of the draw may leave out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import qempo_fast as qf
from suite import heads
from suite.interleave import Step, relative, require
from suite.provider import Provider, Set

# Relative Frobenius errors of dHidden and dWeight.
LIMITS = {"float32": 1e-4, "bfloat16": 0.04}


class Case(NamedTuple):
    """N rows of SmolLM2-135M's head, V = 49152, and the rule of their sets."""

    n: int
    top_p: float
    top_k: int
    dtype: str = "float32"
    v: int = 49152

    def __str__(self) -> str:
        rule = f"top_k={self.top_k}" if self.top_k else f"top_p={self.top_p:g}"
        return f"{heads.NUCLEUS} N={self.n} D=576 V={self.v} {rule} {self.dtype}"


class Inputs(NamedTuple):
    """hidden (N, D), weight (V, D), targets (N,), coefficients (N,), and the sets as a mask (N, V) and as a Support."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    incoming: torch.Tensor
    mask: torch.Tensor
    support: qf.Support


Function = Callable[[torch.Tensor, torch.Tensor, Inputs], torch.Tensor]


def masked(hidden: torch.Tensor, weight: torch.Tensor, made: Inputs) -> torch.Tensor:
    """What one writes without this library: -inf at what was not kept."""
    z = F.linear(hidden, weight).masked_fill(~made.mask, -torch.inf)
    return -F.cross_entropy(z.float() if z.dtype == torch.bfloat16 else z, made.targets, reduction="none")


def kept(hidden: torch.Tensor, weight: torch.Tensor, made: Inputs) -> torch.Tensor:
    return qf.linear_logps(hidden, weight, made.targets, support=made.support).logps


def whole(hidden: torch.Tensor, weight: torch.Tensor, made: Inputs) -> torch.Tensor:
    """Another number: over the whole vocabulary."""
    return qf.linear_logps(hidden, weight, made.targets, grad="exact").logps


WHOLE = "qempo_fast exact, whole vocabulary"
PROVIDERS: dict[str, Provider] = {
    "qempo_fast support": Provider("ours", lambda case, device: kept),
    WHOLE: Provider("ours", lambda case, device: whole),
    "masked plain torch": Provider("peer", lambda case, device: masked),
}
SETS = {
    "support": Set([Case(1024, 0.95, 0), Case(1024, 1.0, 50)], rounds=3),
    "tiny": Set([Case(32, 0.95, 0, v=1024)], threads=("one",)),
}


@functools.lru_cache(maxsize=1)
def inputs(case: Case, device: str) -> Inputs:
    hidden, weight, targets = heads.real(heads.NUCLEUS, case.n)
    weight, targets = weight[: case.v], targets % case.v
    mask = torch.zeros(case.n, case.v, dtype=torch.bool)
    for a, part in enumerate(hidden.split(256)):
        found = qf.Support.from_logits(part @ weight.T, case.top_p, case.top_k)
        rows = torch.arange(len(part)).repeat_interleave(found.offsets.diff())
        mask[a * 256 + rows, found.ids] = True
    mask[torch.arange(case.n), targets] = True
    incoming = torch.randn(case.n, generator=torch.Generator().manual_seed(0))
    support = qf.Support.from_mask(mask)
    dtype = getattr(torch, case.dtype)
    hidden, weight = (x.to(device, dtype).contiguous() for x in (hidden, weight))
    return Inputs(hidden, weight, targets.to(device), incoming.to(device), mask.to(device), support.to(device))


@functools.lru_cache(maxsize=1)
def truth(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """dhidden and dweight in float64, by masked logits of 64 rows at a time."""
    made = inputs(case, device)
    weight = made.weight.double().requires_grad_()
    grads = []
    for rows in torch.arange(case.n, device=device).split(64):
        hidden = made.hidden[rows].double().requires_grad_()
        part = made._replace(mask=made.mask[rows], targets=made.targets[rows])
        masked(hidden, weight, part).backward(made.incoming[rows].double())
        grads.append(hidden.grad)
    assert weight.grad is not None
    return torch.cat([g for g in grads if g is not None]), weight.grad


def _step(function: Function, made: Inputs) -> Step:
    leaves = (made.hidden.detach().requires_grad_(), made.weight.detach().requires_grad_())
    with torch.no_grad():
        incoming = made.incoming.to(function(*leaves, made).dtype)
    return Step(lambda: function(*leaves, made), leaves, incoming, made.hidden.device.type)


def checked(name: str, case: Case, made: Inputs) -> tuple[Step, dict[str, Any]]:
    """The provider's step, run once; mean size of the sets, and errors of the gradients against float64."""
    step = _step(PROVIDERS[name].make(case, made.hidden.device.type), made)
    size = len(made.support.ids) / case.n
    _, grads, _ = step.run()
    if name == WHOLE:
        return step, {"set_size": size}
    true = truth(case, made.hidden.device.type)
    errors = {f"error_{what}": relative(g, t) for what, g, t in zip(("hidden", "weight"), grads, true, strict=True)}
    require(f"{name}, {case}", errors, dict.fromkeys(errors, LIMITS[case.dtype]))
    return step, {"set_size": size, **errors}


def baselines(case: Case, made: Inputs) -> dict[str, Step]:
    return {}


def floors(case: Case) -> dict[str, dict[str, float]]:
    """Inputs read once, gradients written once; the products depend on the sets."""
    once = (case.n + case.v) * 576 * getattr(torch, case.dtype).itemsize
    return {"forward": {"floor_bytes": once, "floor_flops": 0}, "full": {"floor_bytes": 2 * once, "floor_flops": 0}}
