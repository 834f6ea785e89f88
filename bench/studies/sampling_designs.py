"""Expected error and kept share of sampling designs on SmolLM2's hidden states, from the variance formula: no draws.

    python -P bench/studies/sampling_designs.py

Column j of a chunk of n rows is kept with probability q_j = min(1, u_j / tau), targets always. The expected squared
errors are sum_ij g_i^2 p_ij^2 (1 / q_j - 1) |W_j - c|^2 for dH and sum_j (1 / q_j - 1) |sum_i g_i p_ij h_i|^2 for dW.
docs/linear_logps.md has the table and what was chosen.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from suite.heads import ENGLISH, real

# Statistic over the chunk's rows; whether rows count by |g|; whether the mean row is taken off; whether u is
# multiplied by the size of W_j - c.
DESIGNS = [
    ("max", False, False, False),
    ("max", False, True, False),
    ("max", False, True, True),
    ("l2", False, False, False),
    ("l2", True, True, True),
]
ROWS, TAUS = (64, 128, 256, 512), (2.0**-10, 2.0**-9, 2.0**-8)


@dataclass
class Step:
    """p (N, V), g (N,), the head and the gradients without sampling."""

    p: torch.Tensor
    g: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        dz = -self.g[:, None] * self.p
        dz[torch.arange(len(self.g)), self.targets] += self.g
        return dz @ self.weight, dz.T @ self.hidden


def design(
    step: Step, n: int, tau: float, statistic: str, by_g: bool, centred: bool, sized: bool
) -> tuple[float, float, float]:
    """(kept share, squared error of dH, squared error of dW)."""
    centre = step.weight.mean(0) if centred else 0.0
    size = (step.weight - centre).square().sum(1)
    kept, dh, dw = 0.0, 0.0, 0.0
    for p, g, h, t in zip(*(x.split(n) for x in (step.p, step.g, step.hidden, step.targets)), strict=True):
        x = p * (g.abs() / g.abs().mean())[:, None] if by_g else p
        u = x.amax(0) if statistic == "max" else x.square().sum(0).sqrt()
        u = u * (size / size.mean()).sqrt() if sized else u
        q = (u / tau).clamp(1e-30, 1)
        q[t] = 1
        kept += float(q.mean()) * len(g) / len(step.g)
        spread = 1 / q - 1
        dh += float(((g.square() @ p.square()) * spread * size).sum())
        dw += float((spread * ((p * g[:, None]).T @ h).square().sum(1)).sum())
    return kept, dh, dw


def main() -> None:
    hidden, weight, targets = real(ENGLISH, 2048)
    g = torch.randn(len(targets), generator=torch.Generator().manual_seed(0))
    step = Step(torch.softmax(hidden @ weight.T, 1), g, hidden, weight, targets)
    scale = [float(x.square().sum()) for x in step.gradients()]
    print("| statistic | rows by g | centred | by size | rows | " + " | ".join(f"tau = {tau:.2g}" for tau in TAUS))
    for statistic, *flags in DESIGNS:
        for n in ROWS:
            cells = []
            for tau in TAUS:
                kept, *errors = design(step, n, tau, statistic, *flags)
                dh, dw = ((e / s) ** 0.5 for e, s in zip(errors, scale, strict=True))
                cells.append(f"{kept:.3f}: {dh:.4f}, {dw:.4f}")
            print(f"| {statistic} | {' | '.join(map(str, flags))} | {n} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
