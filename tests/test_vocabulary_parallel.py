"""Vocabulary-parallel linear_logps on 2 and 4 gloo processes, uneven shards, against one process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import qempo_fast as qf
from qempo_fast.logps._options import ERROR
from qempo_fast.logps._pilots import AIM

N, D, V = 30, 5, 403
# Rows of weight on each rank; the last shard of four holds one row.
SHARDS = {2: [150, 253], 4: [100, 202, 100, 1]}
# Of so small a vocabulary a draw that adds no more than the usual error keeps nearly every column.
MOST = 0.1


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, D, dtype=torch.float64, generator=generator) * 2
    weight = torch.randn(V, D, dtype=torch.float64, generator=generator)
    bias = torch.randn(V, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[4] = V - 1
    targets[7] = -100
    return hidden, weight, bias, targets


def step(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    grad: str,
    group: object,
    entropy: bool = True,
) -> list[torch.Tensor]:
    """grad: "chosen" is sampled, at the threshold that the pilots give."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    tau = 0.3 if grad == "sampled" else None
    head = {"bias": leaves[2], "softcap": 9.0, "temperature": 0.8}
    asked = {"entropy": entropy, "sum_sq": True, "grad": "exact" if grad == "exact" else "sampled", "tau": tau}
    out = qf.linear_logps(leaves[0], leaves[1], targets, **head, **asked, process_group=group)
    coefficients = torch.linspace(-1, 1, N, dtype=torch.float64)
    if entropy:
        ((out.logps * coefficients).sum() + (out.entropy * coefficients.flip(0)).sum()).backward()
    else:
        (out.logps * coefficients.sign()).sum().backward()  # the estimate is of rows that weigh alike
    return [x.detach() for x in out if x is not None] + [x.grad for x in leaves]


def worker(rank: int, world: int, grad: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        ERROR[torch.float64] = MOST
        hidden, weight, bias, targets = inputs()
        start = sum(SHARDS[world][:rank])
        mine = slice(start, start + SHARDS[world][rank])
        torch.manual_seed(100)
        draws = 1 if grad == "exact" else 300
        runs = [
            step(hidden, weight[mine], bias[mine], targets, grad, dist.group.WORLD, grad != "chosen")
            for _ in range(draws)
        ]
        mean = [torch.stack(x).mean(0) for x in zip(*runs, strict=True)]
        variance = [torch.stack(x).var(0).sum() / draws if draws > 1 else 0.0 for x in zip(*runs, strict=True)]
        stats = qf.last_stats()
        assert stats is not None
        torch.save((mean, variance, stats.tau, stats.error, stats.row_errors), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("world", "grad"), [(2, "exact"), (4, "exact"), (2, "sampled"), (2, "chosen")])
def test_shards_agree_with_one_process(world: int, grad: str) -> None:
    wanted = step(*inputs(), "exact", None, grad != "chosen")
    with tempfile.TemporaryDirectory() as folder:
        # Scripts, not mp.spawn: a child cannot import this module by the name that pytest's importlib mode gives it.
        ranks = [
            subprocess.Popen([sys.executable, __file__, str(rank), str(world), grad, folder]) for rank in range(world)
        ]
        try:
            assert [process.wait(timeout=200) for process in ranks] == [0] * world
        finally:
            for process in ranks:
                process.kill()
        parts = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]
    if grad == "chosen":
        (_, variance, *chosen), (_, _, *other) = parts
        assert chosen == other
        error = float((variance[-3] * 300).sqrt() / wanted[-3].norm())
        assert 0.8 < error / chosen[1] < 1.25, (error, chosen)
        assert 0 < chosen[1] <= AIM * MOST
    start = 0
    for rank, (mean, variance, *_) in enumerate(parts):
        rows = slice(start, start + SHARDS[world][rank])
        start = rows.stop
        truth = [*wanted[:-2], wanted[-2][rows], wanted[-1][rows]]
        names = ["logps", "entropy", "sum_sq", "dhidden", "dweight", "dbias"]
        if grad == "chosen":
            names.remove("entropy")
        for name, value, var, true in zip(names, mean, variance, truth, strict=True):
            if grad != "exact" and name.startswith("d") and len(true) > 1:
                ratio = ((value - true).square().sum() / var).item()
                assert ratio < 2.5, f"rank {rank}, {name}: squared error over squared standard error {ratio:.2f}"
            else:
                torch.testing.assert_close(value, true, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
