"""Host microseconds of a call on a GPU, measured without one: Triton launches for a stand-in, and nothing runs.

    python -P bench/gpu/host.py                            every op
    python -P bench/gpu/host.py dpo qempo --json host.jsonl
    python -P bench/gpu/host.py --against FOLDER --turns 5  in turns with the library in FOLDER, on whose sys.path it is

Losses and dpp_gains: forward and backward by `loss.backward()`, several programs a launch. Values are not checked, as
on a GPU without QEMPO_CHECK=1. Launchers of the log-probs: one call. A number is the fastest of the turns in a process:
what else runs on the machine only adds to it. Not seen: the driver's own part of a launch, the GPU's allocator, and
asking for the current stream and device; some 2 to 6 microseconds a launch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gpu.standin import as_on_a_gpu

# 520 samples are several programs; the product that CPU tensors really do in the backward pass is short.
S, SIZE, ROWS, COLUMNS = 520, 8, 256, 512
Call = Callable[[], object]


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def losses() -> dict[str, tuple[list[torch.Tensor], Callable[[], torch.Tensor]]]:
    """name: (the policy's log-probs, the loss of them)."""
    import qempo_fast as qf

    w, x, own = _leaf(S), _leaf(S), _leaf(S)
    strong, weak = _leaf(S, 1), _leaf(S, 2)
    f, g, r = (torch.randn(S) for _ in range(3))
    fs, fv = torch.randn(S, 1), torch.randn(S, 2)
    equal: dict[str, Any] = {"group_size": SIZE}
    starts = torch.arange(0, S + 1, SIZE)
    lengths, aligned, embeddings = torch.full((S,), 9.0), torch.randn(S, 2), torch.randn(S // SIZE, SIZE, 4)
    advantages = torch.randn(S // SIZE)
    token: dict[str, Any] = {"ref_token_logps": g, "kl": 0.1}
    gspo: dict[str, Any] = {"ratio": "sequence", "eps_low": 3e-4, "eps_high": 4e-4}
    return {
        "dpo": ([w, x], lambda: qf.dpo_loss(w, x, f, g)),
        "dpo, each": ([w, x], lambda: qf.dpo_loss(w, x, f, g, reduction="none").sum()),
        "spl_pair": ([w, x], lambda: qf.spl_pair_loss(w, x, f, g, alpha=0.3)),
        "hdpo": ([w, x], lambda: qf.hdpo_loss(w, x, f, g, alpha=1.2)),
        "qempo_pair": ([w, x], lambda: qf.qempo_pair_loss(w, x, lam=4.0)),
        "qempo_kl_pair": ([w, x], lambda: qf.qempo_kl_pair_loss(w, x, f, g, lam=4.0, mu=0.5)),
        "epa": ([w, strong, weak], lambda: qf.epa_loss(w, strong, weak, f, fs, fv)),
        "poft": ([w], lambda: qf.poft_loss(w, lengths, aligned)),
        "spl": ([own], lambda: qf.spl_loss(own, f, r, alpha=0.3, beta=0.1, **equal)),
        "qempo": ([own], lambda: qf.qempo_loss(own, r, lam=4.0, **equal)),
        "qempo, ragged": ([own], lambda: qf.qempo_loss(own, r, lam=4.0, offsets=starts)),
        "qempo_kl": ([own], lambda: qf.qempo_kl_loss(own, f, r, lam=4.0, mu=0.5, **equal)),
        "gvpo": ([own], lambda: qf.gvpo_loss(own, f, r, **equal)),
        "variance": ([own], lambda: qf.variance_loss(own, f, r, alpha=0.3, beta=0.1, **equal)),
        "rspo": ([own], lambda: qf.rspo_loss(own, r, k=2, **equal)),
        "rspo, ragged": ([own], lambda: qf.rspo_loss(own, r, k=2, offsets=starts)),
        "grpo": ([own], lambda: qf.grpo_loss(own, f, advantages, starts, **token)),
        "gspo": ([own], lambda: qf.grpo_loss(own, f, advantages, starts, **gspo)),
        "dqo": ([own], lambda: qf.dqo_loss(own, r, embeddings, ref_logps=f, beta=0.1, **equal)),
    }


def _step(leaves: list[torch.Tensor], loss: Callable[[], torch.Tensor]) -> Call:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return run


def _dpp() -> Call:
    import qempo_fast as qf

    x = _leaf(S // SIZE, SIZE, 4)
    return _step([x], lambda: qf.dpp_gains(x).gains.sum())


def _launchers() -> dict[str, Call]:
    """One call of each launcher of the log-probs, at a tile that no value of which is read."""
    from qempo_fast.kernels import linear_logps_fused as fused
    from qempo_fast.kernels import linear_logps_grad as grad
    from qempo_fast.kernels import linear_logps_tiles as tiles

    z, targets = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16), torch.zeros(ROWS, dtype=torch.int64)
    h, w = torch.zeros(ROWS, 64, dtype=z.dtype), torch.zeros(COLUMNS, 64, dtype=z.dtype)
    row, lse, kept = torch.zeros(ROWS), torch.zeros(ROWS, 2), torch.zeros(COLUMNS)
    stats = (torch.zeros(ROWS), torch.zeros(ROWS), None, None, torch.zeros(ROWS))
    columns = torch.zeros(math.ceil(ROWS / tiles.COLUMN_ROWS), COLUMNS)
    calls: dict[str, Call] = {
        "tile_bwd": lambda: grad.tile_bwd(z, None, None, lse, row, None, None, kept, targets, 1.0, None),
        "fused": lambda: fused.fused_fwd(h, w, None, None, targets, stats, None, None, 1.0, None),
    }
    if hasattr(tiles, "tile_fwd"):
        calls["rows"] = lambda: tiles.tile_fwd(z, None, None, targets, stats, row, None, 0, 1.0, None)
        # Not of the first tile, which takes two passes; nothing runs here, so columns need not be wider.
        calls["rows and columns"] = lambda: tiles.tile_fwd(
            z, None, None, targets, stats, row, columns, COLUMNS, 1.0, None
        )
    else:
        calls["rows"] = lambda: tiles.rows_fwd(z, None, None, targets, stats, 0, 1.0, None)

        def both() -> None:
            tiles.rows_fwd(z, None, None, targets, stats, 0, 1.0, None)
            tiles.columns_fwd(z, None, None, stats, row, columns, 0, 1.0, None)

        calls["rows and columns"] = both
    return calls


def ops() -> dict[str, Call]:
    return {n: _step(*made) for n, made in losses().items()} | {"dpp_gains": _dpp()} | _launchers()


def _slice(call: Call, seconds: float) -> float:
    """CPU seconds of one call, over a slice of time."""
    start, count = time.thread_time(), 0
    while True:
        for _ in range(10):
            call()
        count += 10
        passed = time.thread_time() - start
        if passed >= seconds:
            return passed / count


def measure(names: list[str], turns: int = 30, seconds: float = 0.004) -> list[dict[str, Any]]:
    """A row for each op, measured a slice at a time in turns; one that cannot be called has a reason for a time."""
    torch.set_num_threads(1)
    # Coefficients that no kernel wrote are whatever memory held, and a denormal number is slow to multiply.
    torch.set_flush_denormal(True)
    best: dict[str, float] = {}
    reasons: dict[str, str] = {}
    with as_on_a_gpu(compiles=False):
        chosen = {name: call for name, call in ops().items() if not names or name in names}
        for turn in range(turns + 1):
            for name, call in chosen.items():
                try:
                    spent = _slice(call, seconds)
                except (AttributeError, RuntimeError, TypeError, ValueError) as error:
                    reasons[name] = f"{type(error).__name__}: {error}"
                    continue
                # The first turn builds what is built once.
                best[name] = min(spent, best.get(name, math.inf)) if turn else math.inf
    return [
        {"op": name, "reason": reasons[name]}
        if name in reasons
        else {"op": name, "host_us": round(best[name] * 1e6, 2)}
        for name in chosen
    ]


def _elsewhere(names: list[str], folder: str | None) -> dict[str, dict[str, Any]]:
    """measure() in a process of its own, with the library in folder."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if folder is not None:
        environment["PYTHONPATH"] = folder
    words = [sys.executable, "-P", str(Path(__file__).resolve()), *names, "--json", "-"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {row["op"]: row for row in map(json.loads, done.stdout.splitlines())}


def compare(names: list[str], folder: str, turns: int) -> list[dict[str, Any]]:
    """The two libraries in turns: the median of each one's processes, and their ratio."""
    runs = [(_elsewhere(names, folder), _elsewhere(names, None)) for _ in range(turns)]
    rows = []
    for name in runs[0][1]:
        before, after = ([run[i].get(name, {}).get("host_us") for run in runs] for i in (0, 1))
        if None in before or None in after:
            reason = next(run[i].get(name, {}).get("reason", "not there") for run in runs for i in (0, 1))
            rows.append({"op": name, "reason": reason})
            continue
        then, now = statistics.median(before), statistics.median(after)
        rows.append({"op": name, "before_us": then, "host_us": now, "ratio": round(now / then, 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="names of rows; all without")
    parser.add_argument("--json", help="file for a line of JSON an op; - prints them in place of the table")
    parser.add_argument("--against", help="folder of another version of the library")
    parser.add_argument("--turns", type=int, default=5, help="processes of each library under --against")
    given = parser.parse_args()
    rows = compare(given.ops, given.against, given.turns) if given.against else measure(given.ops)
    missing = set(given.ops) - {row["op"] for row in rows}
    if missing:
        parser.error(f"no op {', '.join(sorted(missing))}")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if given.json == "-":
        print(lines, end="")
        return
    if given.json:
        Path(given.json).write_text(lines)
    for row in rows:
        numbers = [f"{row[key]:8.1f}" for key in ("before_us", "host_us") if key in row]
        numbers += [f"{row['ratio']:6.2f}"] if "ratio" in row else []
        print(f"{row['op']:18}", *numbers, row.get("reason", ""))


if __name__ == "__main__":
    main()
