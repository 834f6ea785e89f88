"""Log-probs of SmolLM2-135M's real hidden states, forward and backward, against what public libraries do.

    python bench/bench_logps.py --dtype float32 --threads 2 --json bench/results/logps_cpu_float32.json
    pytest -o pythonpath=bench bench/bench_logps.py --benchmark-only     (float32, providers one after another)

With --memory: peak memory, in one process for each provider, instead of time (logps_cpu_memory_float32.json).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from interleave import Step, console, environment, interleaved, reason, relative, require, rows, write

import qempo_fast as qf
from qempo_fast.logps.gemm import linear
from qempo_fast.logps.pass_cpu import CpuPass

# Relative Frobenius errors of dHidden and dWeight. Sampling at 2^-9 costs 0.006 (docs/linear_logps.md), bfloat16 0.016.
LIMITS = {
    ("float32", False): 1e-4,
    ("float32", True): 0.02,
    ("bfloat16", False): 0.04,
    ("bfloat16", True): 0.04,
}


class Inputs(NamedTuple):
    """hidden (N, D), weight (V, D), targets (N,), float64 gradients for the coefficients (N,)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    incoming: torch.Tensor
    grad_hidden: torch.Tensor
    grad_weight: torch.Tensor


Logps = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plain() -> Logps:
    return lambda h, w, t: -F.cross_entropy(F.linear(h, w).float(), t, reduction="none")


def torch_chunked() -> Logps:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none", options=options)


def trl() -> Logps:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as tile

    return lambda h, w, t: ChunkedLogProbFunction.apply(h, w, None, t, 1.0, tile, None, 1.0, ())[0]


def cut_cross_entropy() -> Logps:
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, w, t: -linear_cross_entropy(h, w, t, reduction="none", impl="torch_compile")


def needs_gpu(module: str) -> Logps:
    if not torch.cuda.is_available():
        raise RuntimeError(f"{module} is Triton code for a GPU, and there is none")
    raise RuntimeError(f"{module} is timed by the GPU benchmark")


def ours(**keywords: Any) -> Logps:
    return lambda h, w, t: qf.linear_logps(h, w, t, **keywords).logps


# name: (kind, whether the gradient is sampled, how to make the function)
PROVIDERS: dict[str, tuple[str, bool, Callable[[], Logps]]] = {
    "qempo_fast sampled": ("ours", True, lambda: ours(grad="sampled", tau=2.0**-9)),
    "qempo_fast sampled 2^-10": ("ours", True, lambda: ours(grad="sampled", tau=2.0**-10)),
    "qempo_fast exact": ("ours", False, lambda: ours(grad="exact")),
    "plain torch": ("peer", False, plain),
    "torch linear_cross_entropy": ("peer", False, torch_chunked),
    "TRL ChunkedLogProbFunction": ("peer", False, trl),
    "cut-cross-entropy torch_compile": ("peer", False, cut_cross_entropy),
    "cut-cross-entropy cce": ("peer", False, lambda: needs_gpu("cut-cross-entropy's cce")),
    "Liger": ("peer", False, lambda: needs_gpu("Liger's fused linear cross-entropy")),
}


def bare_gemm(inputs: Inputs, sampled: bool) -> Step:
    """The forward GEMMs alone, in the tiles and by the GEMM of the op."""
    size = CpuPass().sizes(sampled)
    out = torch.empty(size.rows * size.columns, dtype=inputs.hidden.dtype)

    def run() -> torch.Tensor:
        for h in inputs.hidden.split(size.rows):
            for w in inputs.weight.split(size.columns):
                z = linear(h, w, out[: len(h) * len(w)].view(len(h), len(w)))
        return z

    return Step(run)


def _truth(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, incoming: torch.Tensor) -> tuple:
    """Float64 gradients by plain torch, 256 rows at a time: the logits of all would take gigabytes."""
    w = weight.double().requires_grad_()
    grads = []
    for h, t, g in zip(hidden.split(256), targets.split(256), incoming.split(256), strict=True):
        leaf = h.double().requires_grad_()
        out = qf.reference.linear_logps(leaf, w, t).logps
        out.backward(g.double())
        grads.append(leaf.grad)
    return torch.cat(grads), w.grad


def inputs(n: int, dtype: torch.dtype, cache: Path) -> Inputs:
    """Real hidden states (n rows), or with n = 0 a tiny random head; computed once and kept in cache."""
    path = cache / f"logps_{n}_{str(dtype).removeprefix('torch.')}.pt"
    if path.exists():
        return Inputs(*torch.load(path))
    generator = torch.Generator().manual_seed(0)
    if n:
        from sampled_error import smollm2

        hidden, weight, targets = smollm2(n)
    else:
        hidden, weight = (torch.randn(rows, 16, generator=generator) for rows in (24, 512))
        targets = torch.randint(512, (24,), generator=generator)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    incoming = torch.randn(len(targets), generator=generator)
    made = Inputs(hidden, weight, targets, incoming, *_truth(hidden, weight, targets, incoming))
    torch.save(tuple(x.contiguous() for x in made), path)
    return made


def checked(name: str, made: Inputs, dtype: str) -> tuple[Step, dict[str, float]]:
    """The provider's step, run once, and the errors of its gradients against float64."""
    _, sampled, make = PROVIDERS[name]
    leaves = (made.hidden.detach().requires_grad_(), made.weight.detach().requires_grad_())
    function = make()
    torch.manual_seed(0)
    with torch.no_grad():
        out_dtype = function(made.hidden[:2], made.weight, made.targets[:2]).dtype
    step = Step(lambda: function(*leaves, made.targets), leaves, made.incoming.to(out_dtype))
    _, (grad_hidden, grad_weight), _ = step.run()
    errors = {
        "error_hidden": relative(grad_hidden, made.grad_hidden),
        "error_weight": relative(grad_weight, made.grad_weight),
    }
    require(f"{name}, {dtype}", errors, dict.fromkeys(errors, LIMITS[dtype, sampled]))
    return step, errors


def _status(key: str) -> float:
    """MiB under key in this process's status. Not ru_maxrss: a child inherits its parent's and cannot set it back."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def memory(name: str, made: Inputs) -> dict[str, float]:
    """MiB above the inputs and the two gradients at the peak of a process's first step, and what stays after it.

    What stays is scratch of the GEMM libraries and blocks that malloc does not give back.
    """
    function = PROVIDERS[name][2]()
    leaves = (made.hidden.requires_grad_(), made.weight.requires_grad_())
    # Loads the libraries, and compiles, on few columns; sizes differ from the step's, which dynamic shapes allow.
    small = function(made.hidden[:64], made.weight[:256], made.targets[:64] % 256)
    small.sum().backward()
    made.hidden.grad = made.weight.grad = None
    incoming = made.incoming.to(small.dtype)
    Path("/proc/self/clear_refs").write_text("5")
    before, anonymous = _status("VmHWM"), _status("RssAnon")
    grads = torch.autograd.grad(function(*leaves, made.targets), leaves, incoming)
    peak = _status("VmHWM") - before - sum(g.nbytes for g in grads) / 2**20
    del grads
    return {"memory_mib": peak, "kept_mib": _status("RssAnon") - anonymous}


def in_own_process(name: str, args: argparse.Namespace) -> dict[str, float]:
    words = ["--dtype", args.dtype, "--threads", str(args.threads), "--n", str(args.n), "--cache", str(args.cache)]
    command = [sys.executable, __file__, *words, "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_rows(names: list[str], args: argparse.Namespace) -> list[dict]:
    table = []
    for name in names:
        try:
            PROVIDERS[name][2]()
        except (ImportError, RuntimeError):
            continue
        table.append({"dtype": args.dtype, "n": args.n, "provider": name, **in_own_process(name, args)})
        console.print(table[-1], highlight=False)
    return table


def run_case(made: Inputs, names: list[str], args: argparse.Namespace) -> list[dict]:
    n, (v, d) = len(made.targets), made.weight.shape
    model = "SmolLM2-135M" if args.n else "random head"
    case = {"case": f"{model} N={n} D={d} V={v} {args.dtype}", "n": n, "d": d, "v": v, "dtype": args.dtype}
    table: list[dict] = []
    steps, bases = {}, {}
    for name in names:
        base: dict[str, Any] = {**case, "provider": name, "kind": PROVIDERS[name][0]}
        try:
            steps[name], errors = checked(name, made, args.dtype)
        except (ImportError, RuntimeError) as error:
            table.append({**base, "reason": reason(error)})
            continue
        bases[name] = {**base, **errors}
    for name, sampled in (("GEMMs of sampled's forward", True), ("GEMMs of exact's forward", False)):
        steps[name] = bare_gemm(made, sampled)
        bases[name] = {**case, "provider": name, "kind": "floor"}
    flops = 2 * n * d * v
    floors = {"forward": {"floor_flops": flops}, "full": {"floor_flops": flops}}
    for name, samples in interleaved(steps, args.rounds, 1.0).items():
        table += rows(bases[name], samples, floors)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--n", type=int, default=2048, help="tokens; 0 for a tiny random head")
    parser.add_argument("--providers", nargs="*", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()), help="folder for the hidden states")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", action="store_true", help="peak memory of each provider, and no timing")
    parser.add_argument("--memory-of", choices=list(PROVIDERS), help="print the peak memory of one provider, and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made = inputs(args.n, getattr(torch, args.dtype), args.cache)
    if args.memory_of:
        print(json.dumps(memory(args.memory_of, made)))
        return
    if args.json is None:
        parser.error("--json is needed")
    header = environment(("trl", "cut-cross-entropy", "liger-kernel"))
    if args.memory:
        args.json.write_text(json.dumps({**header, "rows": memory_rows(args.providers, args)}, indent=1) + "\n")
    else:
        write(args.json, {**header, "rounds": args.rounds}, run_case(made, args.providers, args))


@pytest.fixture(scope="module")
def smollm2_inputs() -> Inputs:
    return inputs(2048, torch.float32, Path(tempfile.gettempdir()))


@pytest.mark.parametrize("name", PROVIDERS)
def test_logps(benchmark: Any, smollm2_inputs: Inputs, name: str) -> None:
    try:
        step, _ = checked(name, smollm2_inputs, "float32")
    except (ImportError, RuntimeError) as error:
        pytest.skip(reason(error))
    benchmark.pedantic(step.run, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
