"""The hot kernels, twice each: what Nsight Compute watches in bench/gpu/run.sh second."""

from __future__ import annotations

import argparse

import torch

import qempo_fast as qf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divide every size by this, for a rehearsal")
    args = parser.parse_args()
    device, s = torch.device(args.device), args.scale
    x = torch.randn(4096 // s, 16, 1024 // s, device=device, requires_grad=True)
    # 1024 rows: one chunk of the sampled mode. The first 64 of them take the fused kernel.
    hidden = torch.randn(1024 // s, 4096 // s, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(131072 // s, 4096 // s, device=device) / 64).bfloat16().requires_grad_()
    targets = torch.randint(weight.shape[0], hidden.shape[:1], device=device)
    logps = torch.randn(4096 // s, device=device, requires_grad=True)
    rewards = torch.randn_like(logps)
    for _ in range(2):
        out = qf.dpp_gains(x)
        (out.logdet.sum() + out.gains.square().sum()).backward()
        qf.qempo_loss(logps, rewards, lam=2.0, group_size=8).backward()
        qf.linear_logps(hidden, weight, targets, grad="exact").logps.sum().backward()
        # At this threshold such a head keeps about a tenth.
        qf.linear_logps(hidden, weight, targets, grad="sampled", tau=2.0**-9).logps.sum().backward()
        with torch.no_grad():
            qf.linear_logps(hidden[:64], weight, targets[:64], grad="exact")
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
