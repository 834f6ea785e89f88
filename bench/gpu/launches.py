"""Launches of a log-prob step on a GPU, and the host's microseconds for them, without a GPU.

    python -P bench/gpu/launches.py                    SmolLM2's head, both gradients, a tenth of the columns kept
    python -P bench/gpu/launches.py --ops              what is launched, by name
    python -P bench/gpu/launches.py --shape 8192 4096 131072 --kept 0.35 --json launches.jsonl

Triton launches are those of the stand-in driver, nothing runs. Of torch's operators those count that compute: not
views, allocations and reads of sizes. Some are several kernels (nonzero, a sum of few long rows), which is not seen.
Host time: the same step with as many row chunks and tiles, each as small as can be, and without its products, so that
little but the host's work is left; a call of cuBLAS, some 10 microseconds, is to be added for each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpu.standin import as_on_a_gpu, no_products, wide_products

# They give memory, or a number to the host; randint and scalar_tensor run on the CPU.
_FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "lift_fresh"),
    *("_local_scalar_dense", "randint", "scalar_tensor", "_unsafe_view", "is_same_size"),
}
PRODUCTS = ("mm", "addmm", "addmm_")


class Ops(TorchDispatchMode):
    """Counts operators that launch; products are not computed, since nothing reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if not self.paused and not func.is_view and name not in _FREE:
            self.found[name] += 1
        if name not in PRODUCTS:
            return func(*args, **kwargs)
        out = kwargs.get("out", args[0] if name == "addmm_" else None)
        if out is not None:
            return out
        a, b = args[-2:] if func._overloadname == "default" else args[:2]
        wide = a.dtype if func._overloadname == "default" else args[2]
        return a.new_empty(a.shape[0], b.shape[1], dtype=wide)


@contextlib.contextmanager
def on_a_gpu(kept: float, ops: Ops | None) -> Iterator[Counter[str]]:
    """Triton's kernels for CPU tensors, GEMMs that may write float32, a share of the columns as if it were drawn."""
    from qempo_fast.kernels.linear_logps_select import select_columns
    from qempo_fast.logps import triton as logps_triton

    def select(*args: Any, **more: Any) -> Any:
        index, inverse, counts = select_columns(*args, **more)
        if ops is not None:
            ops.paused = True
        vocabulary = index.shape[-1]
        count = math.ceil(kept * vocabulary)
        every = torch.arange(vocabulary) * vocabulary // count
        index.copy_(every.clamp(max=vocabulary - 1))
        inverse.fill_(1 / kept)
        counts.fill_(count)
        if ops is not None:
            ops.paused = False
        return index, inverse, counts

    with (
        as_on_a_gpu(compiles=False) as launches,
        mock.patch.object(logps_triton, "select_columns", select),
        wide_products(),
        # Where operators are counted, Ops keeps the products from being computed.
        no_products(torch.empty) if ops is None else contextlib.nullcontext(),
    ):
        yield launches


def _inputs(n: int, d: int, v: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = torch.zeros(n, d, dtype=torch.bfloat16), torch.zeros(v, d, dtype=torch.bfloat16)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.arange(n) % v


# "chosen" looks for its threshold, as a sampled step without tau does.
MODES: dict[str, dict[str, Any]] = {
    "sampled": {"grad": "sampled", "tau": 2.0**-9}, "chosen": {"grad": "sampled"}, "exact": {"grad": "exact"},
}  # fmt: skip


def counts(n: int, d: int, v: int, mode: str, kept: float) -> dict[str, Counter[str]]:
    """Launches by name, forward and backward; Triton's have the kernel's name."""
    import qempo_fast as qf

    hidden, weight, targets = _inputs(n, d, v)
    out = {}
    with Ops() as ops, on_a_gpu(kept, ops) as launches:
        logps = qf.linear_logps(hidden, weight, targets, **MODES[mode], backend="triton").logps
        out["forward"] = launches + ops.found
        launches.clear()
        ops.found.clear()
        ops.paused = True
        ones = torch.ones(n)
        ops.paused = False
        logps.backward(ones)
        out["backward"] = launches + ops.found
    return out


@contextlib.contextmanager
def _small(n: int, d: int, v: int) -> Iterator[tuple[int, int, int]]:
    """As many chunks and tiles, each as small as may be: chunks of 128 rows, tiles of 128 columns."""
    from qempo_fast.logps.triton import TritonPass

    with as_on_a_gpu(compiles=False):
        sizes = {s: TritonPass().sizes(s, torch.empty(n, d, dtype=torch.bfloat16)) for s in (True, False)}
    chunks = -(-n // sizes[True].chunk)
    rows = 128 * chunks

    def scaled(self: Any, sampled: bool, *_: Any) -> Any:
        size, settings = sizes[sampled], {}
        settings["rows"] = max(1, math.ceil(size.rows * rows / n))
        settings["columns"] = max(1, math.ceil(size.columns * columns / v))
        for name in ("shared", "kept", "block"):
            value = getattr(size, name)
            settings[name] = math.ceil(value * (rows / n if name == "shared" else columns / v)) if value else 0
        return replace(size, **settings)

    columns = 128 * max(-(-v // s.columns) for s in sizes.values())
    with mock.patch.object(TritonPass, "sizes", scaled):
        yield rows, 8, columns


def host(n: int, d: int, v: int, mode: str, kept: float, rounds: int = 60) -> dict[str, float]:
    """Microseconds of the host, forward and backward: the fastest of the rounds, since other work only adds."""
    import qempo_fast as qf

    times: dict[str, list[float]] = {"forward": [], "backward": []}
    with _small(n, d, v) as small, on_a_gpu(kept, None):
        hidden, weight, targets = _inputs(*small)
        for _ in range(rounds):
            start = time.perf_counter()
            logps = qf.linear_logps(hidden, weight, targets, **MODES[mode], backend="triton").logps
            middle = time.perf_counter()
            torch.autograd.grad(logps, (hidden, weight), torch.ones(small[0]))
            times["forward"].append(middle - start)
            times["backward"].append(time.perf_counter() - middle)
    return {key: 1e6 * min(value) for key, value in times.items()}


def measure(shape: Sequence[int], kept: float, timed: bool) -> list[dict[str, Any]]:
    rows = []
    for mode in MODES:
        found = counts(*shape, mode, kept)
        row: dict[str, Any] = {"mode": mode, "shape": list(shape), "kept": kept}
        for part, names in found.items():
            triton = sum(k for name, k in names.items() if name.startswith("_") and name.endswith("_kernel"))
            row[part] = {"triton": triton, "torch": names.total() - triton, "ops": dict(names.most_common())}
        if timed:
            row["host_us"] = host(*shape, mode, kept)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(2048, 576, 49152), metavar=("N", "D", "V"))
    parser.add_argument("--kept", type=float, default=0.1, help="share of the columns kept")
    parser.add_argument("--ops", action="store_true", help="list the launches")
    parser.add_argument("--no-time", action="store_true", help="count alone")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("gpu/launches: unset TRITON_INTERPRET, under which no kernel is launched")
    torch.set_num_threads(1)
    for row in measure(given.shape, given.kept, not given.no_time):
        if given.json:
            with given.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
        for part in ("forward", "backward"):
            line = f"{row['mode']:8} {part:8} {row[part]['triton']:4} Triton + {row[part]['torch']:4} torch"
            print(line + (f" {row['host_us'][part]:8.0f} us of the host" if "host_us" in row else ""))
            for name, number in row[part]["ops"].items() if given.ops else ():
                print(f"    {number:4} {name}")


if __name__ == "__main__":
    main()
