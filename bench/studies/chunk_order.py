"""Does the order of rows matter for the share of columns that the chunks of a sampled gradient keep, and their size?

    OMP_NUM_THREADS=1 python -P bench/studies/chunk_order.py --json bench/results/chunk_order.json       (15 minutes)

order   SmolLM2-135M's states of English text, ordered and cut into chunks: the kept share f and the relative error of
        dHidden, both expected, from p itself and the formula of sampling_designs.py. At two thresholds, and at those
        that give each order the same error. cost_*: forward and backward over the forward's GEMMs, frozen head
        1 + f (2 + gather / rows), trained 1 + f (3 + (gather + scatter) / rows).
time    CPU seconds of a step at equal error, with chunks of each size in qempo_fast itself, in turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import qempo_fast as qf
from qempo_fast.logps import cpu
from qempo_fast.logps._options import TileSizes
from studies.sampling_designs import Step
from studies.table import record
from suite import heads
from suite.machine import keep_freed_memory
from suite.provenance import environment

Row = dict[str, Any]
SIZES, TAUS, ERRORS = (64, 128, 256, 512, 1024, 2048), (2.0**-9, 2.0**-11), (2.0**-7, 2.0**-9)
TIMED = ((torch.float32, 2.0**-7), (torch.bfloat16, 2.0**-9))  # with the error that each states without tau


@torch.no_grad()
def read_step(n: int) -> Step:
    """Windows of 512 tokens, one after another; all rows weigh alike."""
    model, tokenizer = heads.smollm2()
    ids, weight = heads.english(tokenizer, n + 1), model.lm_head.weight.detach()
    hidden = torch.cat([model.eval().model(part[None]).last_hidden_state[0] for part in ids[:-1].split(512)])
    p = torch.cat([(h @ weight.T).softmax(1) for h in hidden.split(512)])
    return Step(p, torch.ones(n), hidden, weight, ids[1:])


def first_component(x: torch.Tensor) -> torch.Tensor:
    """Of each row along the first principal direction, nearly: 8 steps of power iteration, 32 N D operations."""
    x = x - x.mean(0)
    direction = x[x.square().sum(1).argmax()]
    for _ in range(8):
        direction = torch.nn.functional.normalize((x @ direction) @ x, dim=0)
    return x @ direction


def tree(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Cut in halves at the median along the first principal direction, down to chunks of so many rows."""
    order = first_component(x).argsort()
    if len(x) <= rows:
        return order
    return torch.cat([part[tree(x[part], rows)] for part in order.split(-(-len(x) // 2 // rows) * rows)])


def k_means(x: torch.Tensor, rows: int) -> torch.Tensor:
    """As many clusters as chunks; centres, and so clusters, go along their first principal direction."""
    centres = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: -(-len(x) // rows)]]
    for _ in range(20):
        near = torch.cdist(x, centres).argmin(1)
        count = near.bincount(minlength=len(centres))
        centres[count > 0] = (torch.zeros_like(centres).index_add_(0, near, x) / count[:, None])[count > 0]
    return first_component(centres).argsort().argsort()[near].argsort(stable=True)


def sketch(step: Step) -> torch.Tensor:
    """256 random signs' products with each row's own keep probabilities at 2^-9."""
    signs = torch.randn(step.p.shape[1], 256, generator=torch.Generator().manual_seed(0)).sign_()
    return torch.cat([(p * 2**9).clamp_(max=1) @ signs for p in step.p.split(256)])


ORDERS: dict[str, Callable[[Step, int], torch.Tensor]] = {
    "text": lambda step, n: torch.arange(len(step.p)),
    "random": lambda step, n: torch.randperm(len(step.p), generator=torch.Generator().manual_seed(0)),
    "target id": lambda step, n: step.targets.argsort(stable=True),
    "target frequency": lambda s, n: (s.targets.bincount()[s.targets] * -len(s.weight) + s.targets).argsort(),
    "confidence": lambda step, n: step.p.gather(1, step.targets[:, None])[:, 0].argsort(),
    "entropy": lambda step, n: torch.cat([torch.special.entr(p).sum(1) for p in step.p.split(256)]).argsort(),
    "arg-max column": lambda step, n: step.p.argmax(1).argsort(stable=True),
    "first component of hidden": lambda step, n: first_component(step.hidden).argsort(),
    "tree of hidden": lambda step, n: tree(step.hidden, n),
    "k-means of hidden": lambda step, n: k_means(step.hidden, n),
    "k-means of keep probabilities": lambda step, n: k_means(sketch(step), n),
    "tree of keep probabilities": lambda step, n: tree(sketch(step), n),
}


class Chunks:
    """Column bounds and sums of squares of each chunk of n rows; a target's bound is infinite."""

    def __init__(self, step: Step, order: torch.Tensor, n: int, norm: float) -> None:
        bounds, squares = [], []
        for part in order.split(n):
            p = step.p[part]
            bounds.append(p.amax(0).index_fill_(0, step.targets[part], torch.inf))
            squares.append(p.square_().sum(0))
        self.bound, size = torch.stack(bounds), (step.weight - step.weight.mean(0)).square().sum(1)
        self.variance = torch.stack(squares) * (size / norm**2)

    def at(self, tau: float) -> Row:
        q = (self.bound / tau).clamp_(1e-30, 1)
        return {"tau": tau, "kept_share": float(q.mean()), "error": float((self.variance * (1 / q - 1)).sum()) ** 0.5}

    def at_error(self, error: float) -> Row:
        exponent = -24.0
        for more in (24 / 2**i for i in range(1, 17)):
            exponent += more * (self.at(2.0 ** (exponent + more))["error"] < error)
        return self.at(2.0**exponent)


def seconds(function: Callable[..., object], *arguments: Any) -> float:
    """CPU time, which is steady where other work shares the machine."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def moving(step: Step) -> tuple[float, float]:
    """(gather, scatter): rows of a GEMM's column that take as long as to read, or add to, one row of W."""
    at = torch.randperm(len(step.weight), generator=torch.Generator().manual_seed(0))[:8192].sort()[0]
    h, w, out, rows = step.hidden[:512], step.weight[:8192], torch.zeros_like(step.weight), step.weight[at]
    moves = (lambda: torch.index_select(step.weight, 0, at, out=rows), lambda: out.index_add_(0, at, rows))
    product_s, *moved = (median(seconds(function) for _ in range(9)) for function in (lambda: h @ w.T, *moves))
    return moved[0] / product_s * len(h), moved[1] / product_s * len(h)


def order_rows(step: Step) -> Iterator[Row]:
    norm, (gather, scatter) = float(step.gradients()[0].norm()), moving(step)
    for name, n in product(ORDERS, SIZES):
        start = time.process_time()
        order = ORDERS[name](step, n)
        row: Row = {"experiment": "order", "order": name, "rows": n, "order_s": time.process_time() - start}
        chunks = Chunks(step, order, n, norm)
        row |= {f"tau {tau:.2g}": chunks.at(tau) for tau in TAUS}
        for error in ERRORS:
            f = (at := chunks.at_error(error))["kept_share"]
            costs = {"cost_frozen": 1 + f * (2 + gather / n), "cost_trained": 1 + f * (3 + (gather + scatter) / n)}
            row[f"error {error:.2g}"] = {**at, **costs}
        yield {**row, "gather": gather, "scatter": scatter}


def run(label: Row, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, sizes: TileSizes) -> None:
    leaf = weight.detach().requires_grad_(label["head"] == "trained")
    mode = {"grad": "sampled", "tau": label["tau"]} if label["rows"] else {"grad": "exact"}
    with mock.patch.object(cpu, "SAMPLED", sizes):
        qf.linear_logps(hidden.detach().requires_grad_(), leaf, targets, **mode).logps.sum().backward()


def cases(step: Step) -> Iterator[tuple[Row, torch.Tensor, torch.Tensor, torch.Tensor, TileSizes]]:
    """What run takes; the row of results begins with the first. Rows 0: the exact gradient."""
    norm, shared = float(step.gradients()[0].norm()), {"experiment": "time", "n": len(step.p)}
    for dtype, error in TIMED:
        for name, n in (("text", 0), *product(("text", "tree of hidden"), SIZES[:5])):
            order = ORDERS[name](step, n)
            drawn = Chunks(step, order, n, norm).at_error(error) if n else {}
            sizes = TileSizes(max(512, n), 2**22 // max(512, n), n, 2048, 12288)
            for kind in ("frozen", "trained"):
                label = {**shared, "dtype": str(dtype)[6:], "order": name, "rows": n, "head": kind, **drawn}
                yield label, step.hidden[order].to(dtype), step.weight.to(dtype), step.targets[order], sizes


def time_rows(step: Step, rounds: int) -> Iterator[Row]:
    table = list(cases(step))
    taken = [[seconds(run, *case) for case in table] for _ in range(rounds)]
    for (label, *_), times in zip(table, zip(*taken, strict=True), strict=True):
        yield {**label, "cpu_s": median(times), "least_s": min(times), "most_s": max(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of the results, written anew")
    parser.add_argument("--rounds", type=int, default=3, help="of the time experiment")
    args = parser.parse_args()
    step = read_step(4096)
    provenance = {**environment(()), "threads": torch.get_num_threads(), "n": len(step.p), "keeps": keep_freed_memory()}
    short = replace(step, **{name: getattr(step, name)[:2048] for name in ("p", "g", "hidden", "targets")})
    record(args.json, provenance, chain(order_rows(step), time_rows(short, args.rounds)))


if __name__ == "__main__":
    main()
