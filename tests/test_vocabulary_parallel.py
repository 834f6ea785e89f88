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

N, D, V = 30, 5, 403
# Rows of weight on each rank; the last shard of four holds one row.
SHARDS = {2: [150, 253], 4: [100, 202, 100, 1]}


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
) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    tau = 0.3 if grad == "sampled" else None
    head = {"bias": leaves[2], "softcap": 9.0, "temperature": 0.8}
    asked = {"entropy": True, "sum_sq": True, "grad": grad, "tau": tau}
    out = qf.linear_logps(leaves[0], leaves[1], targets, **head, **asked, process_group=group)
    coefficients = torch.linspace(-1, 1, N, dtype=torch.float64)
    ((out.logps * coefficients).sum() + (out.entropy * coefficients.flip(0)).sum()).backward()
    return [x.detach() for x in out] + [x.grad for x in leaves]


def worker(rank: int, world: int, grad: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        hidden, weight, bias, targets = inputs()
        start = sum(SHARDS[world][:rank])
        mine = slice(start, start + SHARDS[world][rank])
        torch.manual_seed(100)
        draws = 300 if grad == "sampled" else 1
        runs = [step(hidden, weight[mine], bias[mine], targets, grad, dist.group.WORLD) for _ in range(draws)]
        mean = [torch.stack(x).mean(0) for x in zip(*runs, strict=True)]
        variance = [torch.stack(x).var(0).sum() / draws if draws > 1 else 0.0 for x in zip(*runs, strict=True)]
        torch.save((mean, variance), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("world", "grad"), [(2, "exact"), (4, "exact"), (2, "sampled")])
def test_shards_agree_with_one_process(world: int, grad: str) -> None:
    wanted = step(*inputs(), "exact", None)
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
    start = 0
    for rank, (mean, variance) in enumerate(parts):
        rows = slice(start, start + SHARDS[world][rank])
        start = rows.stop
        truth = [*wanted[:4], wanted[4][rows], wanted[5][rows]]
        names = ["logps", "entropy", "sum_sq", "dhidden", "dweight", "dbias"]
        for name, value, var, true in zip(names, mean, variance, truth, strict=True):
            if grad == "sampled" and name.startswith("d") and len(true) > 1:
                ratio = ((value - true).square().sum() / var).item()
                assert ratio < 2.5, f"rank {rank}, {name}: squared error over squared standard error {ratio:.2f}"
            else:
                torch.testing.assert_close(value, true, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
