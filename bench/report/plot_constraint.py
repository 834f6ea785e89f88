"""docs/images/constraint.png: lam, reward and entropy under three settings of QualityConstraint, trained here.

python -P bench/report/plot_constraint.py [file]        half a minute on one core
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")  # before pyplot
import matplotlib.pyplot as plt
import torch

import qempo_fast as qf
from report.pictures import save
from report.plot_losses_family import COLOURS, GREY, entropy, panels

# The problem of hold() in tests/test_science_constraint.py: 500 answers, of which the first 100 are right.
ANSWERS, RIGHT, FLOOR, STEPS, SEEDS = 500, 100, 0.95, 300, 8
NATS = math.log(ANSWERS)
SETTINGS = {
    "defaults: additive 0.05 from lam = 1": {},
    "multiplicative 0.1 without a ceiling": {"step": "multiplicative", "lr": 0.1},
    "recommended: multiplicative 1 from lam = lam_max = log 500": {
        **{"step": "multiplicative", "lr": 1.0},
        **{"lam": NATS, "lam_max": NATS},
    },
}


def train(settings: dict[str, float | str], seed: int) -> torch.Tensor:
    """(STEPS, 3): lam, and the policy's exact reward and entropy, in front of each step of QEMPO."""
    random = torch.Generator().manual_seed(seed)
    constraint = qf.QualityConstraint(FLOOR, **settings)
    rewards = (torch.arange(ANSWERS) < RIGHT).double()
    scores = 2.75 * torch.randn(ANSWERS, dtype=torch.float64, generator=random) + 1.9 * rewards
    adam = torch.optim.Adam([scores.requires_grad_()], lr=0.05)
    seen = torch.empty(STEPS, 3)
    for row in seen:
        log_policy = scores.log_softmax(0)
        policy = log_policy.detach().exp()
        lam = float(constraint.lam)
        row.copy_(torch.tensor([lam, float(policy @ rewards), float(entropy(policy))]))
        drawn = torch.multinomial(policy, 32, replacement=True, generator=random)
        adam.zero_grad()
        qf.qempo_loss(log_policy[drawn], rewards[drawn], lam=lam, group_size=16).backward()
        adam.step()
        constraint.update(rewards[drawn])
    return seen


def constraint() -> plt.Figure:
    figure, axes = panels(3)
    for (label, settings), colour in zip(SETTINGS.items(), COLOURS, strict=False):
        runs = torch.stack([train(settings, seed) for seed in range(SEEDS)])
        middle, low, high = runs.mean(0), runs.amin(0), runs.amax(0)
        for column, axis in enumerate(axes):
            axis.plot(middle[:, column], color=colour, label=label)
            axis.fill_between(range(STEPS), low[:, column], high[:, column], color=colour, alpha=0.15, linewidth=0)
    for axis, title in zip(axes, ("lam", "mean reward", "entropy, nats"), strict=True):
        axis.set(title=title, xlabel="step")
    axes[0].axhline(NATS, color=GREY, linewidth=1, linestyle=":")
    axes[1].axhline(FLOOR, color=GREY, linewidth=1, linestyle=":")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    images = Path(__file__).resolve().parents[2] / "docs" / "images"
    save(constraint(), Path(sys.argv[1]) if len(sys.argv) > 1 else images / "constraint.png", dpi=110)
