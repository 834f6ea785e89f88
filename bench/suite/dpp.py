"""DPP gains, forward and backward, against torch.linalg: qempo-fast bench --op dpp.

Peers compute gains alone; the op also gives log-determinants and leave-one-out baselines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import qempo_fast as qf
from suite.interleave import Step, relative, require
from suite.provider import Provider, Set, gpu_set


class Case(NamedTuple):
    """G groups of k embeddings of width d, float32."""

    groups: int
    k: int
    d: int

    def __str__(self) -> str:
        return f"G={self.groups} k={self.k} d={self.d}"


class Inputs(NamedTuple):
    """embeddings (G, k, d), incoming (G, k)."""

    embeddings: torch.Tensor
    incoming: torch.Tensor


# The loop costs milliseconds a group.
SMALL = Case(64, 8, 384)
# all-MiniLM-L6-v2 has d = 384. Fewer groups at k = 32 and 64, where eager torch needs seconds; the work is linear in G.
MAIN = [
    Case(4096, 4, 384),
    Case(4096, 8, 384),
    Case(4096, 16, 384),
    Case(1024, 32, 384),
    Case(512, 64, 384),
    Case(4096, 8, 128),
    Case(4096, 8, 1024),
    SMALL,
]
# float32 rounding; of the gradient more, since eager torch inverts in float32.
LIMITS = {"error_gains": 1e-5, "error_grad": 1e-4}


def _shifted(x: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(x, dim=-1)
    return unit @ unit.mT + torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)


def eager_inv(x: torch.Tensor) -> torch.Tensor:
    return -torch.linalg.inv(_shifted(x)).diagonal(dim1=-2, dim2=-1).log()


def eager_cholesky(x: torch.Tensor) -> torch.Tensor:
    lower = torch.linalg.cholesky(_shifted(x))
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device).expand_as(lower)
    return -torch.linalg.solve_triangular(lower, eye, upper=False).square().sum(-2).log()


def loop(x: torch.Tensor) -> torch.Tensor:
    """gain_i as its definition has it, one determinant for each group and sample left out."""
    out = []
    for group in x:
        a = _shifted(group)
        whole = torch.logdet(a)
        others = [[j for j in range(len(a)) if j != i] for i in range(len(a))]
        out.append(torch.stack([whole - torch.logdet(a[keep][:, keep]) for keep in others]))
    return torch.stack(out)


def ours(backend: str, x: torch.Tensor) -> torch.Tensor:
    return qf.dpp_gains(x, backend=backend).gains


Function = Callable[[torch.Tensor], torch.Tensor]


def _ours(backend: str, device: str) -> Provider:
    def make(case: Case, on: str) -> Function:
        if on != device:
            raise RuntimeError(f"the {backend} backend does not run on {on} tensors")
        return functools.partial(ours, backend)

    return Provider("ours", make)


def _loop(case: Case, device: str) -> Function:
    if case.groups > SMALL.groups:
        raise RuntimeError(f"takes seconds: timed at {SMALL} only")
    return loop


PROVIDERS: dict[str, Provider] = {
    "qempo_fast cpu": _ours("cpu", "cpu"),
    "qempo_fast cuda": _ours("cuda", "cuda"),
    "qempo_fast triton": _ours("triton", "cuda"),
    "qempo_fast reference": Provider("ours", lambda case, device: functools.partial(ours, "reference")),
    "eager inv": Provider("peer", lambda case, device: eager_inv),
    "eager cholesky": Provider("peer", lambda case, device: eager_cholesky),
    "compile inv": Provider("peer", lambda case, device: torch.compile(eager_inv, dynamic=False)),
    "compile cholesky": Provider("peer", lambda case, device: torch.compile(eager_cholesky, dynamic=False)),
    "python loop": Provider("peer", _loop),
}
SETS = {
    "quick": Set([SMALL, Case(512, 16, 384)], threads=("all",)),
    "main": Set(MAIN, threads=("one", "all")),
    # Against G; 512 at k = 16 is the case that --quick compares.
    "scaling": Set([Case(512, 16, 384), Case(256, 8, 384), Case(1024, 8, 384), Case(16384, 8, 384)]),
    "tiny": Set([Case(16, 4, 24), Case(8, 8, 24)], threads=("one",)),
    # A GPU's case: 268 MB of embeddings.
    "gpu": gpu_set([Case(4096, 16, 1024), *MAIN], PROVIDERS),
}


def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(case, generator=generator), torch.randn(case[:2], generator=generator)
    return Inputs(*(x.to(device) for x in made))


def checked(name: str, case: Case, made: Inputs) -> tuple[Step, dict[str, float]]:
    """The provider's step, run once, and its errors against float64 on every 64th group (all of a small case)."""
    leaf = made.embeddings.detach().requires_grad_()
    function = PROVIDERS[name].make(case, str(leaf.device.type))
    step = Step(lambda: function(leaf), (leaf,), made.incoming, leaf.device.type)
    gains, (grad,), _ = step.run()
    every = slice(None, None, 64 if case.groups > 64 else 1)
    exact = made.embeddings[every].double().requires_grad_()
    truth = qf.reference.dpp_gains(exact).gains
    (truth_grad,) = torch.autograd.grad(truth, exact, made.incoming[every].double())
    errors = {
        "error_gains": relative(gains[every], truth.detach()),
        "error_grad": relative(grad[every], truth_grad),
    }
    require(f"{name}, {case}", errors, LIMITS)
    return step, errors


def baselines(case: Case, made: Inputs) -> dict[str, Step]:
    """The floor, run: X read twice, its gradient written once, into memory that exists."""
    x = made.embeddings
    out = torch.empty_like(x)

    def run() -> torch.Tensor:
        x.sum()
        return torch.neg(x, out=out)

    return {"three passes": Step(run, device=x.device.type)}


def floors(case: Case) -> dict[str, dict[str, Any]]:
    """X read forward; read and its gradient written backward. Gram: half of k^2 products of length d; pull-back all."""
    one = case.groups * case.k * case.d
    gram, pull_back = one * (case.k + 1), one * case.k * 2
    return {
        "forward": {"floor_bytes": 4 * one, "floor_flops": gram},
        "backward": {"floor_bytes": 8 * one, "floor_flops": pull_back},
        "full": {"floor_bytes": 12 * one, "floor_flops": gram + pull_back},
    }
