"""The (alpha, beta) family for plot_losses.py: its optimum on a dozen responses, and entropy against quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import matplotlib.pyplot as plt
import torch

import qempo_fast as qf
from qempo_fast.reference.family import AlphaBeta

# Okabe and Ito's palette, told apart under every common colour blindness; markers and dashes repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#777777"

# The dozen: what each response is worth, and how likely the reference gives it. Its favourite is good but not best.
REWARDS = torch.tensor([1.0, 1.0, 1.0, 0.9, 0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.1, 0.0], dtype=torch.float64)
_WEIGHTS = torch.tensor([8, 3, 1, 30, 2, 1, 12, 20, 3, 10, 4, 6], dtype=torch.float64)
REFERENCE = (_WEIGHTS / _WEIGHTS.sum()).log()

plt.rcParams.update(
    {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "lines.linewidth": 1.9,
    }
)


def entropy(p: torch.Tensor) -> float:
    return float(torch.special.entr(p).sum())


def reward(p: torch.Tensor) -> float:
    return float(p @ REWARDS)


def optimum(alpha: float, beta: float) -> torch.Tensor:
    return qf.target_distribution(REWARDS, REFERENCE, alpha=alpha, beta=beta)


def panels(n: int) -> tuple[plt.Figure, list[plt.Axes]]:
    figure, axes = plt.subplots(1, n, figsize=(5.2 * n, 4.2), layout="constrained")
    return figure, list(axes)


def shapes(axis: plt.Axes, title: str, policies: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Probability of each of the dozen under several policies, the reference as grey bars."""
    x = range(len(REWARDS))
    axis.bar(x, REFERENCE.exp(), color="#cfcfcf", label="reference", width=0.8)
    for (label, p), colour, marker in zip(policies, COLOURS, MARKERS, strict=False):
        axis.plot(x, p, color=colour, marker=marker, markersize=5, label=label)
    axis.set_xticks(x, [f"{r:g}" for r in REWARDS.tolist()])
    axis.grid(axis="x", visible=False)
    axis.set(xlabel="response, named by its reward", ylabel="probability", title=title, ylim=(0, None))
    axis.legend()


def trade(
    axis: plt.Axes,
    label: str,
    policy: Callable[[float], torch.Tensor],
    values: Sequence[float],
    marks: Sequence[float],
    *,
    style: int,
    name: str = "",
    side: str = "right",
) -> None:
    """Entropy against mean reward as a parameter runs over values, with some of its values marked."""
    path = [policy(v) for v in values]
    colour, marker = COLOURS[style], MARKERS[style]
    line = ("-", "--", "-.", ":")[style % 4]
    axis.plot([reward(p) for p in path], [entropy(p) for p in path], color=colour, linestyle=line, label=label)
    for value in marks:
        p = policy(value)
        axis.plot(reward(p), entropy(p), marker, color=colour, markersize=7)
        axis.annotate(
            f"{name}{value:g}",
            (reward(p), entropy(p)),
            xytext=(8, 2) if side == "right" else (-8, -3),
            ha="left" if side == "right" else "right",
            va="bottom" if side == "right" else "top",
            textcoords="offset points",
            color=colour,
            fontsize=9,
        )


def finish_trade(axis: plt.Axes, title: str) -> None:
    start = REFERENCE.exp()
    axis.plot(reward(start), entropy(start), "X", color=GREY, markersize=10, label="reference")
    axis.axhline(math.log(len(REWARDS)), color=GREY, linewidth=1, linestyle=":")
    axis.text(0.51, math.log(len(REWARDS)) + 0.02, "uniform over all 12", va="bottom", color=GREY, fontsize=9)
    axis.set(xlabel="quality: mean reward", ylabel="entropy, nats", title=title, xlim=(0.5, 1.09), ylim=(-0.05, 2.7))
    axis.legend(loc="lower left")


def grid(low: float, high: float) -> list[float]:
    return torch.logspace(math.log10(low), math.log10(high), 200, dtype=torch.float64).tolist()


def rlhf_curve(axis: plt.Axes, *, style: int = 1, marks: Sequence[float] = ()) -> None:
    trade(
        axis,
        "KL-RLHF, DPO: beta moves",
        lambda b: optimum(b, b),
        grid(0.004, 50),
        marks,
        style=style,
        name="beta ",
        side="left",
    )


def at_betas(
    axis: plt.Axes,
    what: str,
    betas: tuple[float, float],
    policy: Callable[[float, float], torch.Tensor],
    values: Sequence[float],
    marks: Sequence[float],
    name: str,
) -> None:
    """A curve for each of two betas, on both of which the method's other number moves."""
    for beta, style, side in zip(betas, (0, 2), ("left", "right"), strict=True):
        trade(axis, what.format(beta), partial(policy, b=beta), values, marks, style=style, name=name, side=side)


def dpo() -> plt.Figure:
    figure, (left, right) = panels(2)
    shapes(left, "Optimum pi_ref exp(r / beta)", [(f"beta = {b:g}", optimum(b, b)) for b in (1.0, 0.3, 0.1)])
    rlhf_curve(right, style=0, marks=(1.0, 0.3, 0.1, 0.05, 0.02))
    finish_trade(right, "A lower beta buys quality with entropy")
    return figure


def hdpo() -> plt.Figure:
    figure, (left, right) = panels(2)
    beta = 0.3
    of = AlphaBeta.of_hdpo
    policies = [(f"alpha = {a:g}{', DPO' if a == 1 else ''}", optimum(*of(a, beta))) for a in (0.5, 1.0, 2.0)]
    shapes(left, f"Optimum at beta = {beta:g}", policies)
    what, values = "H-DPO at beta = {:g}: alpha moves", grid(0.1, 30)
    at_betas(right, what, (0.3, 0.1), lambda a, b: optimum(*of(a, b)), values, (0.5, 2.0, 4.0), "alpha ")
    rlhf_curve(right)
    finish_trade(right, "alpha < 1 sharpens, alpha > 1 keeps entropy")
    return figure


def spl() -> plt.Figure:
    figure, (left, right) = panels(2)
    beta = 0.1
    policies = [(f"alpha / beta = {t:g}{', DPO' if t == 1 else ''}", optimum(t * beta, beta)) for t in (1.0, 2.0, 4.0)]
    shapes(left, f"Optimum at beta = {beta:g}", policies)
    what, values = "SPL at beta = {:g}: alpha / beta moves", grid(1.0, 300)
    at_betas(right, what, (0.1, 0.02), lambda t, b: optimum(t * b, b), values, (2.0, 4.0, 11.0), "ratio ")
    rlhf_curve(right)
    finish_trade(right, "At one quality SPL has more entropy")
    return figure


def qempo() -> plt.Figure:
    figure, (left, right) = panels(2)
    shapes(left, "Optimum exp(lam r): no reference in it", [(f"lam = {m:g}", optimum(1 / m, 0.0)) for m in (2, 6, 20)])
    trade(
        right,
        "QEMPO: lam moves",
        lambda m: optimum(1 / m, 0.0),
        grid(0.01, 300),
        (2, 6, 20, 60),
        style=0,
        name="lam ",
    )
    rlhf_curve(right, marks=(0.3, 0.1))
    finish_trade(right, "No policy lies above QEMPO's curve")
    return figure


def qempo_kl() -> plt.Figure:
    figure, (left, right) = panels(2)
    beta = 0.15
    start = optimum(beta, beta)
    floor = reward(start) - 1e-9
    least = float(start @ (start.log() - REFERENCE))
    free = qf.solve_qempo(REWARDS, min_reward=floor).probs
    slack = float(free @ (free.log() - REFERENCE))
    caps = [least + (1.25 * slack - least) * t**2 for t in torch.linspace(0.01, 1, 120).tolist()]
    solved = [qf.solve_qempo(REWARDS, REFERENCE, min_reward=floor, max_kl=c) for c in caps]
    middle = least + 0.4 * (slack - least)
    between = qf.solve_qempo(REWARDS, REFERENCE, min_reward=floor, max_kl=middle)
    policies = [
        ("KL-RLHF", start),
        (f"QEMPO-KL, K = {middle:.2f}", between.probs),
        (f"QEMPO-KL, K >= {slack:.2f}: QEMPO", free),
    ]
    shapes(left, f"Three policies with mean reward {floor:.2f}", policies)
    right.plot(caps, [entropy(s.probs) for s in solved], color=COLOURS[0], label="entropy of QEMPO-KL")
    for value, (label, p), colour, marker in zip((least, middle, slack), policies, COLOURS, MARKERS, strict=False):
        right.plot(value, entropy(p), marker, color=colour, markersize=9, label=label)
    right.axvline(least, color=GREY, linestyle=":")
    right.text(least - 0.01, 1.95, "below: infeasible", rotation=90, ha="right", va="center", color=GREY, fontsize=9)
    right.set(xlabel="K, cap on KL to the reference, nats", ylabel="entropy, nats")
    right.set_title(f"Entropy that K leaves at mean reward {floor:.2f}")
    right.legend(loc="lower right")
    return figure


def _descend(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], target: torch.Tensor) -> list[float]:
    """KL(policy || target) over steps on groups of 8 that the reference samples, not the policy."""
    torch.manual_seed(0)
    logits = REFERENCE.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    seen = []
    for _ in range(200):
        logps = torch.log_softmax(logits, 0)
        seen.append(float((logps.exp() * (logps - target.log())).sum().detach()))
        rows = torch.multinomial(REFERENCE.exp(), 64, replacement=True)
        optimizer.zero_grad()
        loss(logps[rows], rows).backward()
        optimizer.step()
    return seen


def gvpo() -> plt.Figure:
    figure, (left, middle, right) = panels(3)
    shapes(left, "Optimum pi_ref exp(r / beta)", [(f"beta = {b:g}", optimum(b, b)) for b in (0.4, 0.2, 0.1)])
    rlhf_curve(middle, style=0, marks=(0.2, 0.1, 0.05))
    trade(
        middle,
        "variance_loss, alpha = 2 beta",
        lambda b: optimum(2 * b, b),
        grid(0.004, 50),
        (0.2, 0.1, 0.05),
        style=2,
        name="beta ",
    )
    finish_trade(middle, "beta moves")
    beta = 0.2
    target = optimum(beta, beta)
    kw = {"group_size": 8, "beta": beta}
    runs = (
        ("gvpo_loss", lambda logps, i: qf.gvpo_loss(logps, REFERENCE[i], REWARDS[i], **kw) / beta),
        (
            "spl_loss, no baseline",
            lambda logps, i: qf.spl_loss(logps, REFERENCE[i], REWARDS[i], alpha=beta, baseline="none", **kw),
        ),
    )
    for (label, loss), colour, line in zip(runs, COLOURS, ("-", "--"), strict=False):
        right.plot(_descend(loss, target), color=colour, linestyle=line, label=label)
    right.set_yscale("log")
    right.set(ylim=(1e-9, 10), xlabel="step", ylabel=f"KL(policy || optimum at beta = {beta:g}), nats")
    right.set_title("Descent on samples of the reference")
    right.legend()
    return figure
