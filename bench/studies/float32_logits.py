"""What rounding the logits to half precision costs, and what keeping them in float32 costs.

    OMP_NUM_THREADS=1 python -P bench/studies/float32_logits.py --json bench/results/float32_logits.json    (15 minutes)

error   SmolLM2-135M's states of English text and its head, rounded to the dtype; against float64 of those. log p: root
        mean square, mean and largest error. dhidden, dweight: of all, relative to its norm. Of sure rows, with p of the
        target from 0.99 to 0.9999: the median and the largest relative error of a row of dhidden, and of
        |sum_j dz_j| / (1 - p), which is 0 where the backward's softmax is the forward's.
time    CPU seconds in turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import chain, product
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import qempo_fast as qf
from qempo_fast import reference
from studies.chunk_order import seconds
from studies.table import record
from suite import heads
from suite.machine import keep_freed_memory
from suite.provenance import environment

Row = dict[str, Any]
LOGITS = {"own": None, "float32": torch.float32}
PROVIDERS: dict[str, Callable[..., Any]] = {"plain torch": reference.linear_logps, "qempo_fast": qf.linear_logps}
SURE = (0.99, 0.9999)
CHECKED = 24


def gradients(function: Callable[..., Any], head: heads.Head, dtype: torch.dtype, **how: Any) -> list[torch.Tensor]:
    """log p, dhidden and dweight of the sum of log p, in float64."""
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in head[:2])
    logps = function(hidden, weight, head[2], **how).logps
    return [x.detach().double() for x in (logps, *torch.autograd.grad(logps.sum(), (hidden, weight)))]


def leaks(head: heads.Head, rows: torch.Tensor, **how: Any) -> torch.Tensor:
    """|sum_j dz_j| of each row; dz is the gradient of a bias."""
    hidden, weight, targets = head
    found = []
    for i in rows.tolist():
        bias = torch.zeros(len(weight), requires_grad=True)
        out = qf.linear_logps(hidden[i : i + 1], weight, targets[i : i + 1], bias=bias, **how)
        found.append(torch.autograd.grad(out.logps.sum(), bias)[0].double().sum().abs())
    return torch.stack(found)


def errors(n: int) -> Iterator[Row]:
    for dtype in (torch.bfloat16, torch.float16):
        hidden, weight, targets = heads.real(heads.ENGLISH, n)
        head = (hidden.detach().to(dtype), weight.detach().to(dtype), targets)
        truth = gradients(reference.linear_logps, head, torch.float64)
        p = truth[0].exp()
        sure = ((p > SURE[0]) & (p < SURE[1])).nonzero().squeeze(1)
        norms = [x.norm() for x in truth]
        for (provider, function), (logits, kind) in product(PROVIDERS.items(), LOGITS.items()):
            off = [a - b for a, b in zip(gradients(function, head, dtype, logits_dtype=kind), truth, strict=True)]
            rows = off[1][sure].norm(dim=1) / truth[1][sure].norm(dim=1)
            row: Row = {"experiment": "error", "dtype": str(dtype)[6:], "provider": provider, "logits": logits}
            row |= {"rms": float(off[0].square().mean().sqrt()), "mean": float(off[0].mean())}
            row |= {"most": float(off[0].abs().max())}
            row |= {"dhidden": float(off[1].norm() / norms[1]), "dweight": float(off[2].norm() / norms[2])}
            row |= {"sure_rows": len(sure), "sure_median": float(rows.median()), "sure_most": float(rows.max())}
            if function is qf.linear_logps:
                some = sure[:CHECKED]
                leak = leaks(head, some, logits_dtype=kind) / (1 - p[some])
                row |= {"leak_median": float(leak.median()), "leak_most": float(leak.max())}
            yield row


def step(head: heads.Head, what: str, logits: str) -> None:
    hidden, weight, targets = head
    if what == "forward":
        qf.linear_logps(hidden, weight, targets, logits_dtype=LOGITS[logits])
        return
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_(what == "trained")
    qf.linear_logps(*leaves, targets, logits_dtype=LOGITS[logits]).logps.sum().backward()


def times(n: int, rounds: int) -> Iterator[Row]:
    hidden, weight, targets = heads.real(heads.ENGLISH, n)
    head = (hidden.detach().bfloat16(), weight.detach().bfloat16(), targets)
    cases = list(product(("forward", "frozen", "trained"), LOGITS))
    taken = [[seconds(step, head, *case) for case in cases] for _ in range(rounds + 1)][1:]
    for (what, logits), found in zip(cases, zip(*taken, strict=True), strict=True):
        row: Row = {"experiment": "time", "dtype": "bfloat16", "n": n, "step": what, "logits": logits}
        yield row | {"cpu_s": median(found), "least_s": min(found), "most_s": max(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of the results, written anew")
    parser.add_argument("--rounds", type=int, default=5, help="of the time experiment")
    args = parser.parse_args()
    provenance = {**environment(()), "threads": torch.get_num_threads(), "n": 512, "keeps": keep_freed_memory()}
    record(args.json, provenance, chain(errors(512), times(1024, args.rounds)))


if __name__ == "__main__":
    main()
