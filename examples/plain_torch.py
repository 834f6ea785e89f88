"""A plain torch loop: GRPO, GRPO with DQO's diversity, or SPL, on a toy model.

    python examples/plain_torch.py --loss grpo+dqo

The loss line is all that differs; sequence log-probs come without logits from fused_forward.
"""

from __future__ import annotations

import argparse
import copy

import torch
from toy import PROMPTS, answer_labels, embed, report, rewards, sample, tiny_model

import qempo_fast as qf
from qempo_fast.integrations.hf import fused_forward

K, STEPS = 16, 60


def logps(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(S, tokens) log-probs of the answers' tokens, 0 elsewhere."""
    return model(input_ids=ids, labels=answer_labels(ids)).logps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=("grpo", "grpo+dqo", "spl"), default="grpo+dqo")
    name = parser.parse_args().loss
    model = tiny_model()
    reference = copy.deepcopy(model).requires_grad_(False)
    fused_forward(model)
    fused_forward(reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    everywhere = PROMPTS.repeat_interleave(K, 0)  # groups lie together
    before = sample(model, everywhere)
    for _ in range(STEPS):
        ids = sample(model, everywhere)
        r, tokens = rewards(ids), logps(model, ids)
        if name == "grpo":
            flat, length = tokens.flatten(), tokens.shape[1]
            advantages = qf.group_advantages(r, group_size=K)
            # One step a rollout: the old policy is the policy.
            loss = qf.grpo_loss(flat, flat.detach(), advantages, torch.arange(len(ids) + 1) * length)
        elif name == "grpo+dqo":
            loss = qf.dqo_loss(tokens.sum(1), r, embed(ids), alpha=0.1, group_size=K)
        else:
            ref = logps(reference, ids).sum(1)
            loss = qf.spl_loss(tokens.sum(1), ref, r, alpha=0.02, beta=0.01, group_size=K)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    report(name, before, sample(model, everywhere))


if __name__ == "__main__":
    main()
