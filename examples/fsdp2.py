"""FSDP2, with the answers to one prompt spread over the processes.

    torchrun --nproc-per-node 2 examples/fsdp2.py

gather_groups brings whole groups to every process, so that any group loss takes them; gradients reach own rows only.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from toy import PROMPTS, answer_labels, embed, report, rewards, sample, tiny_model

import qempo_fast as qf
from qempo_fast.integrations.hf import fused_forward

K, STEPS = 16, 60


def main() -> None:
    if "RANK" not in os.environ:
        raise SystemExit("run it as: torchrun --nproc-per-node 2 examples/fsdp2.py")
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (world,))
    model = tiny_model()
    fused_forward(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    # The head stays with the root, whose forward calls the op: it is whole there.
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(rank)
    mine = torch.arange(len(PROMPTS)).repeat_interleave(K // world)  # each rank answers every prompt K / world times
    before = sample(model, PROMPTS[mine])
    for _ in range(STEPS):
        ids = sample(model, PROMPTS[mine])
        logps = model(input_ids=ids, labels=answer_labels(ids)).logps.sum(1)
        g = qf.gather_groups(mine, logps, rewards(ids), embed(ids))
        loss = qf.dqo_loss(*g.tensors, alpha=0.1, offsets=g.offsets)
        optimizer.zero_grad()
        (loss * world).backward()  # FSDP averages gradients over ranks; those of a gathered loss add up
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    g = qf.gather_groups(mine, before, sample(model, PROMPTS[mine]))
    if rank == 0:
        report("fsdp2", *g.tensors)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
