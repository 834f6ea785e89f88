"""What the options of linear_logps cost, each beside the call without it: qempo-fast bench --op options --set options.

Columns are the 64 likeliest tokens of each row, as distillation from a teacher's top tokens has them.
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
COLUMNS, WIDE, INVARIANT = "columns", "logits_dtype", "batch_invariant"


class Case(NamedTuple):
    """N rows of SmolLM2-135M's head, V = 49152, and the option; k columns, where it is that."""

    option: str
    n: int
    dtype: str = "float32"
    v: int = 49152
    k: int = 64

    def __str__(self) -> str:
        shown = {COLUMNS: f"columns=(N, {self.k})", WIDE: "logits_dtype=float32", INVARIANT: "batch_invariant=True"}
        return f"{heads.ENGLISH} N={self.n} D=576 V={self.v} {self.dtype} {shown[self.option]}"


class Inputs(NamedTuple):
    """hidden (N, D), weight (V, D), picks (N, 1 + k): targets, then columns; coefficients (N, 1 + k)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    picks: torch.Tensor
    incoming: torch.Tensor


# (hidden, weight, picks) -> log-probs (N, 1) of the targets or (N, 1 + k) of all picks.
Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _plain(hidden: torch.Tensor, weight: torch.Tensor, picks: torch.Tensor, option: str) -> torch.Tensor:
    """What one writes without this library; it promises no order of sums."""
    if option == WIDE:
        hidden, weight = hidden.float(), weight.float()
    z = F.linear(hidden, weight)
    z = z.float() if z.dtype == torch.bfloat16 else z
    if option == COLUMNS:
        return z.log_softmax(-1).gather(1, picks)
    return -F.cross_entropy(z, picks[:, 0], reduction="none")[:, None]


def _with(hidden: torch.Tensor, weight: torch.Tensor, picks: torch.Tensor, option: str) -> torch.Tensor:
    call = functools.partial(qf.linear_logps, hidden, weight, picks[:, 0])
    if option == COLUMNS:
        out = call(columns=picks[:, 1:])
        return torch.cat([out.logps[:, None], out.columns], 1)
    return call(**{option: torch.float32 if option == WIDE else True}).logps[:, None]


def _without(hidden: torch.Tensor, weight: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
    return qf.linear_logps(hidden, weight, picks[:, 0]).logps[:, None]


PROVIDERS: dict[str, Provider] = {
    "qempo_fast without the option": Provider("ours", lambda case, device: _without),
    "qempo_fast with the option": Provider("ours", lambda case, device: functools.partial(_with, option=case.option)),
    "plain torch": Provider("peer", lambda case, device: functools.partial(_plain, option=case.option)),
}
# Without bfloat16 products a processor spends seconds on each hundred rows of them.
SETS = {
    "options": Set([Case(COLUMNS, 1024), Case(INVARIANT, 1024), Case(WIDE, 128, "bfloat16")], threads=("one",)),
    "tiny": Set([Case(COLUMNS, 32, v=1024, k=4), Case(INVARIANT, 32, v=1024), Case(WIDE, 32, "bfloat16", 1024)],
                threads=("one",)),
}  # fmt: skip


@functools.lru_cache(maxsize=1)
def inputs(case: Case, device: str) -> Inputs:
    hidden, weight, targets = heads.real(heads.ENGLISH, case.n)
    weight, targets = weight[: case.v], targets % case.v
    columns = torch.cat([(part @ weight.T).topk(case.k).indices for part in hidden.split(256)])
    picks = torch.cat([targets[:, None], columns], 1)
    incoming = torch.randn(picks.shape, generator=torch.Generator().manual_seed(0))
    hidden, weight = (x.to(device, getattr(torch, case.dtype)).contiguous() for x in (hidden, weight))
    return Inputs(hidden, weight, picks.to(device), incoming.to(device))


@functools.lru_cache(maxsize=2)
def truth(case: Case, device: str, option: str) -> tuple[torch.Tensor, torch.Tensor]:
    """dhidden and dweight in float64, by logits of 64 rows at a time."""
    made = inputs(case, device)
    weight = made.weight.double().requires_grad_()
    grads = []
    for rows in torch.arange(case.n, device=device).split(64):
        hidden = made.hidden[rows].double().requires_grad_()
        out = _plain(hidden, weight, made.picks[rows], COLUMNS if option == COLUMNS else "")
        out.backward(made.incoming[rows, : out.shape[1]].double())
        assert hidden.grad is not None
        grads.append(hidden.grad)
    assert weight.grad is not None
    return torch.cat(grads), weight.grad


def _step(function: Function, made: Inputs) -> Step:
    leaves = (made.hidden.detach().requires_grad_(), made.weight.detach().requires_grad_())
    with torch.no_grad():
        out = function(*leaves, made.picks)
    incoming = made.incoming[:, : out.shape[1]].to(out.dtype).contiguous()
    return Step(lambda: function(*leaves, made.picks), leaves, incoming, made.hidden.device.type)


def checked(name: str, case: Case, made: Inputs) -> tuple[Step, dict[str, Any]]:
    """The provider's step, run once, and errors of its gradients against float64."""
    device = made.hidden.device.type
    step = _step(PROVIDERS[name].make(case, device), made)
    _, grads, _ = step.run()
    true = truth(case, device, "" if "without" in name else case.option)
    errors = {f"error_{what}": relative(g, t) for what, g, t in zip(("hidden", "weight"), grads, true, strict=True)}
    require(f"{name}, {case}", errors, dict.fromkeys(errors, LIMITS[case.dtype]))
    return step, errors


def baselines(case: Case, made: Inputs) -> dict[str, Step]:
    return {}


def floors(case: Case) -> dict[str, dict[str, float]]:
    """One GEMM, 2NDV; inputs read once, gradients written once."""
    once = (case.n + case.v) * 576 * getattr(torch, case.dtype).itemsize
    flops = 2 * case.n * 576 * case.v
    return {
        "forward": {"floor_bytes": once, "floor_flops": flops},
        "full": {"floor_bytes": 2 * once, "floor_flops": flops},
    }
