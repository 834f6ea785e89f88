"""The same loop under Accelerate; whole groups on each process.

accelerate launch examples/accelerate_loop.py        (or python, for one process)
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from toy import PROMPTS, answer_labels, embed, report, rewards, sample, tiny_model

import qempo_fast as qf
from qempo_fast.integrations.hf import fused_forward

K, STEPS = 16, 60


def main() -> None:
    accelerator = Accelerator(cpu=True)
    model = tiny_model()
    fused_forward(model)  # before prepare: what wraps the model then wraps the fused forward
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    set_seed(accelerator.process_index)  # other answers on each process
    with accelerator.split_between_processes(PROMPTS) as prompts:
        everywhere = prompts.repeat_interleave(K, 0)
    before = sample(model, everywhere)
    for _ in range(STEPS):
        ids = sample(model, everywhere)
        logps = model(input_ids=ids, labels=answer_labels(ids)).logps.sum(1)
        loss = qf.dqo_loss(logps, rewards(ids), embed(ids), alpha=0.1, group_size=K)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    before, after = (accelerator.gather(ids) for ids in (before, sample(model, everywhere)))
    if accelerator.is_main_process:
        report("accelerate", before, after)
    accelerator.end_training()


if __name__ == "__main__":
    main()
