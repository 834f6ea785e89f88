"""Peak memory of one provider on one case, in a process of its own and never together with timing.

python -P bench/suite/memory.py OP CASE PROVIDER THREADS DEVICE         prints one line of JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from suite.ops import load


def _status(key: str) -> float:
    """MiB under key in this process's status. Not ru_maxrss: a child inherits its parent's and cannot set it back."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def _on_cpu(run: Callable[[], Sequence[torch.Tensor]]) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")
    before, anonymous = _status("VmHWM"), _status("RssAnon")
    grads = run()
    peak = _status("VmHWM") - before - sum(g.nbytes for g in grads) / 2**20
    del grads
    return {"memory_mib": peak, "kept_mib": _status("RssAnon") - anonymous}


def on_gpu(run: Callable[[], Sequence[torch.Tensor]]) -> dict[str, float]:
    """MiB that run() takes above what is there and the gradients that it gives, and what stays after it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
    del grads
    return {"memory_mib": peak / 2**20, "kept_mib": (torch.cuda.memory_allocated() - before) / 2**20}


def of(op: str, case: str, provider: str, threads: int, device: str) -> dict[str, float]:
    """MiB above the inputs and the gradients at the peak of a process's first step, and what stays after it.

    What stays is scratch of the GEMM libraries and blocks that malloc does not give back. A smaller step of the same
    widths comes first: it loads the libraries, and compiles.
    """
    module = load(op)
    torch.set_num_threads(threads)
    cases = {str(c): c for s in module.SETS.values() for c in s.cases}
    made = module.inputs(cases[case], device)
    small, step = module.unchecked(provider, cases[case], made)
    small.run()

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(step.function(), step.leaves, step.incoming)

    return on_gpu(run) if device == "cuda" else _on_cpu(run)


def table_of(run: Any, columns: dict[str, Any], device: str, failed: set[str]) -> list[dict]:
    """A row of mode "memory" for each provider of a run, but those that failed already."""
    kinds, table = load(run.op).PROVIDERS, []
    for name in run.names:
        if name in failed:
            continue
        words = [run.op, str(run.case), name, str(run.threads), device]
        done = subprocess.run([sys.executable, "-P", __file__, *words], capture_output=True, text=True)
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        found = {"reason": last} if done.returncode else json.loads(done.stdout.splitlines()[-1])
        table.append({**columns, "provider": name, "kind": kinds[name].kind, "mode": "memory", **found})
    return table


if __name__ == "__main__":
    op, case, provider, threads, device = sys.argv[1:]
    print(json.dumps(of(op, case, provider, int(threads), device)))
