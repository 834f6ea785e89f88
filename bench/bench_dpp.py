"""DPP gains, forward and backward, against torch.linalg.

    python bench/bench_dpp.py --threads 1 --json bench/results/dpp_cpu_1.json
    pytest -o pythonpath=bench bench/bench_dpp.py --benchmark-only       (providers one after another)

Peers compute gains alone; the op also gives log-determinants and leave-one-out baselines.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from interleave import Step, console, environment, interleaved, reason, relative, require, rows, write

import qempo_fast as qf


class Case(NamedTuple):
    """G groups of k embeddings of width d, float32."""

    groups: int
    k: int
    d: int

    def __str__(self) -> str:
        return f"G={self.groups} k={self.k} d={self.d}"


# all-MiniLM-L6-v2 has d = 384. Fewer groups at k = 32 and 64, where eager torch needs seconds; the work is linear in G.
CASES = [
    Case(4096, 4, 384),
    Case(4096, 8, 384),
    Case(4096, 16, 384),
    Case(1024, 32, 384),
    Case(512, 64, 384),
    Case(4096, 8, 128),
    Case(4096, 8, 1024),
]
# The loop costs milliseconds a group.
SMALL = Case(64, 8, 384)
TINY = [Case(16, 4, 24), Case(8, 8, 24)]
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


# name: (kind, how to make the function)
PROVIDERS: dict[str, tuple[str, Callable[[], Function]]] = {
    "qempo_fast cpu": ("ours", lambda: functools.partial(ours, "cpu")),
    "qempo_fast reference": ("ours", lambda: functools.partial(ours, "reference")),
    "eager inv": ("peer", lambda: eager_inv),
    "eager cholesky": ("peer", lambda: eager_cholesky),
    "compile inv": ("peer", lambda: torch.compile(eager_inv, dynamic=False)),
    "compile cholesky": ("peer", lambda: torch.compile(eager_cholesky, dynamic=False)),
    "python loop": ("peer", lambda: loop),
}


def three_passes(x: torch.Tensor) -> Step:
    """The floor: X read twice, its gradient written once."""
    out = torch.empty_like(x)

    def run() -> torch.Tensor:
        x.sum()
        return torch.neg(x, out=out)

    return Step(run)


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(case, generator=generator), torch.randn(case[:2], generator=generator)


def checked(name: str, case: Case, x: torch.Tensor, incoming: torch.Tensor) -> tuple[Step, dict[str, float]]:
    """The provider's step, run once, and its errors against float64 on every 64th group (all of a small case)."""
    leaf = x.requires_grad_()
    function = PROVIDERS[name][1]()
    step = Step(lambda: function(leaf), (leaf,), incoming)
    gains, (grad,), _ = step.run()
    every = slice(None, None, 64 if case.groups > 64 else 1)
    exact = x.detach()[every].double().requires_grad_()
    truth = qf.reference.dpp_gains(exact).gains
    (truth_grad,) = torch.autograd.grad(truth, exact, incoming[every].double())
    errors = {
        "error_gains": relative(gains[every], truth.detach()),
        "error_grad": relative(grad[every], truth_grad),
    }
    require(f"{name}, {case}", errors, LIMITS)
    return step, errors


def floors(case: Case) -> dict[str, dict[str, float]]:
    one = case.groups * case.k * case.d * 4
    return {mode: {"floor_bytes": passes * one} for mode, passes in (("forward", 1), ("backward", 2), ("full", 3))}


def run_case(case: Case, names: list[str], rounds: int) -> list[dict]:
    x, incoming = inputs(case)
    table: list[dict] = []
    steps, bases = {}, {}
    for name in names:
        base: dict[str, Any] = {
            "case": str(case), "groups": case.groups, "k": case.k, "d": case.d, "provider": name,
            "kind": PROVIDERS[name][0],
        }  # fmt: skip
        if name == "python loop" and case.groups > SMALL.groups:
            table.append({**base, "reason": f"takes seconds: timed at {SMALL} only"})
            continue
        try:
            steps[name], errors = checked(name, case, x, incoming)
        except (ImportError, RuntimeError) as error:
            table.append({**base, "reason": reason(error)})
            continue
        bases[name] = {**base, **errors}
    steps["three passes"] = three_passes(x.detach())
    bases["three passes"] = {**base, "provider": "three passes", "kind": "floor"}
    for name, samples in interleaved(steps, rounds, 0.25).items():
        table += rows(bases[name], samples, floors(case))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--providers", nargs="*", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--tiny", action="store_true", help="two tiny cases, to see that everything runs")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header, table = environment(()), []
    for case in TINY if args.tiny else [*CASES, SMALL]:
        console.print(str(case))
        table += run_case(case, args.providers, args.rounds)
        # A compiled function is tied to its shapes; without this the eighth case would meet dynamo's limit.
        torch.compiler.reset()
    write(args.json, {**header, "rounds": args.rounds}, table)


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("case", [*CASES, SMALL], ids=str)
def test_dpp(benchmark: Any, case: Case, name: str) -> None:
    if name == "python loop" and case != SMALL:
        pytest.skip("takes seconds")
    step, _ = checked(name, case, *inputs(case))
    benchmark.group = str(case)
    benchmark.pedantic(step.run, rounds=10, warmup_rounds=1)


if __name__ == "__main__":
    main()
