"""Pictures of docs/losses, drawn without any input: python bench/report/plot_losses.py [folder]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")  # before pyplot
import matplotlib.pyplot as plt
import torch

import qempo_fast as qf
from report.pictures import save
from report.plot_losses_family import COLOURS, GREY, MARKERS, dpo, entropy, gvpo, hdpo, panels, qempo, qempo_kl, spl

# ---- DQO: seven responses in three clusters, drawn three at a time

EMBEDDED = torch.tensor(
    [[1, 0, 0], [1, 0.1, 0.1], [1, 0.2, 0], [0.4, 1, 0], [0.3, 1, 0.1], [0.1, 0, 1], [0.2, 0.1, 1]], dtype=torch.float64
)
EMBEDDED_REWARDS = torch.tensor([1.0, 0.97, 0.95, 0.9, 0.8, 0.85, 0.4], dtype=torch.float64)
CLUSTERS = (slice(0, 3), slice(3, 5), slice(5, 7))


def dqo_optimum(alpha: float, k: int = 3) -> torch.Tensor:
    """The i.i.d. policy that maximises E[sum r + alpha log det(L + I)], every one of the 7^3 groups counted."""
    n = len(EMBEDDED)
    groups = torch.cartesian_prod(*[torch.arange(n)] * k)
    value = EMBEDDED_REWARDS[groups].sum(1) + alpha * qf.dpp_logdet(EMBEDDED[groups])
    logits = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(800):
        logps = torch.log_softmax(logits, 0)
        objective = (logps[groups].sum(1).exp() * value).sum()
        optimizer.zero_grad()
        (-objective).backward()
        optimizer.step()
    return torch.softmax(logits.detach(), 0)


def dqo() -> plt.Figure:
    figure, (left, middle, right) = panels(3)
    alphas = [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0]
    best = {a: dqo_optimum(a) for a in alphas}
    x = torch.arange(len(EMBEDDED))
    shown = (0.0, 0.5, 1.0, 2.0)
    for i, (a, colour) in enumerate(zip(shown, (GREY, *COLOURS), strict=False)):
        left.bar(x + 0.2 * (i - 1.5), best[a], width=0.19, color=colour, label=f"alpha = {a:g}")
    for edge in (2.5, 4.5):
        left.axvline(edge, color=GREY, linewidth=1, linestyle=":")
    left.set_xticks(x, [f"{r:g}" for r in EMBEDDED_REWARDS.tolist()])
    left.grid(axis="x", visible=False)
    left.set(xlabel="response, by its reward; dotted: borders of meaning", ylabel="probability")
    left.set_title("Best i.i.d. policy, k = 3")
    left.legend()
    logdet = {a: _mean_logdet(best[a]) for a in alphas}
    for axis, what, label in (
        (middle, {a: entropy(best[a]) for a in alphas}, "entropy, nats"),
        (right, logdet, "E[log det(L + I)] of 3 draws"),
    ):
        quality = [float(best[a] @ EMBEDDED_REWARDS) for a in alphas]
        axis.plot(quality, list(what.values()), color=COLOURS[0], marker="o", markersize=5)
        for a, q in zip(alphas, quality, strict=True):
            if a in (0.0, 0.5, 1.0, 2.0, 5.0):
                place = (-4, -14) if a == 5.0 else (7, 4)
                axis.annotate(f"alpha {a:g}", (q, what[a]), xytext=place, textcoords="offset points", fontsize=9)
        axis.set(xlabel="quality: mean reward", ylabel=label, xlim=(None, 1.03))
    middle.set_title("What alpha buys, as entropy")
    right.set_title("The same, as volume")
    return figure


def _mean_logdet(p: torch.Tensor, k: int = 3) -> float:
    groups = torch.cartesian_prod(*[torch.arange(len(p))] * k)
    return float((p[groups].prod(1) * qf.dpp_logdet(EMBEDDED[groups])).sum())


# ---- RSPO: six kinds of answer, of which a user wants one, not said which

WANTED = torch.tensor([0.4, 0.24, 0.15, 0.1, 0.07, 0.04], dtype=torch.float64)


def pass_at(p: torch.Tensor, k: int) -> torch.Tensor:
    return (WANTED * (1 - (1 - p) ** k)).sum()


def rspo_optimum(k: int) -> torch.Tensor:
    logits = WANTED.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(1500):
        optimizer.zero_grad()
        (-pass_at(torch.softmax(logits, 0), k)).backward()
        optimizer.step()
    return torch.softmax(logits.detach(), 0)


def rspo() -> plt.Figure:
    figure, (left, middle, right) = panels(3)
    ks = (1, 2, 4, 8, 16, 64)
    best = {k: rspo_optimum(k) for k in ks}
    x = torch.arange(len(WANTED))
    left.bar(x, WANTED, color="#cfcfcf", width=0.8, label="how often it is wanted")
    for k, colour, marker in zip((1, 2, 4, 16), COLOURS, MARKERS, strict=False):
        left.plot(x, best[k], color=colour, marker=marker, label=f"k = {k}")
    left.set_xticks(x, list("ABCDEF"))
    left.set(xlabel="answer", ylabel="probability", title="The policy with the best Pass@k")
    left.grid(axis="x", visible=False)
    left.legend()
    for n, colour, marker in zip((1, 4, 16), COLOURS, MARKERS, strict=False):
        path = [(entropy(best[k]), float(pass_at(best[k], n))) for k in ks]
        middle.plot(*zip(*path, strict=True), color=colour, marker=marker, label=f"pass@{n}")
    for k in ks[:4]:
        middle.annotate(
            f"k = {k}", (entropy(best[k]), 0.0), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=9
        )
    middle.set(xlabel="entropy of the best policy for k, nats", ylabel="chance of a wanted answer", ylim=(0, 1.02))
    middle.set_title("Trained for k, asked n times")
    middle.legend(loc="upper left")
    rewards = torch.tensor([0.0, 0.1, 0.2, 0.4, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
    zeros, n = torch.zeros_like(rewards), len(rewards)
    for k, colour, marker in zip((1, 2, 4, 8), COLOURS, MARKERS, strict=False):
        _, coefficient = qf.coefficients(qf.rspo_loss, zeros, rewards, k=k, group_size=n)
        right.plot(rewards, -coefficient * n, color=colour, marker=marker, label=f"k = {k}")
    right.axhline(0, color=GREY, linewidth=1)
    right.set(xlabel="reward of a sample, in one group of 8", ylabel="weight of its log-prob")
    right.set_title("No ride for what is not the best")
    right.legend()
    return figure


# ---- EPA

_P = torch.tensor([0.46, 0.21, 0.10, 0.23], dtype=torch.float64)
_Q = torch.tensor([0.23, 0.37, 0.25, 0.15], dtype=torch.float64)


def _epa_fit(positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """Centred implicit reward of the four responses that minimises epa_loss on these draws."""
    u = torch.zeros(len(_P), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([u], max_iter=25, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        zero = torch.zeros_like(negatives, dtype=torch.float64)
        none = zero[:, :0]
        loss = qf.epa_loss(u[positives], u[negatives], none, zero[:, 0], zero, none, beta=1.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    return (u - u.mean()).detach()


def epa() -> plt.Figure:
    figure, (left, right) = panels(2)
    counts = (1, 2, 4, 8, 16)
    true = (_P / _Q).log()
    true = true - true.mean()
    torch.manual_seed(0)
    for rows, colour, marker in zip((100, 400, 1600), COLOURS, MARKERS, strict=False):
        errors = []
        for n in counts:
            fits = [
                _epa_fit(
                    torch.multinomial(_P, rows, replacement=True),
                    torch.multinomial(_Q, rows * n, replacement=True).view(rows, n),
                )
                for _ in range(300)
            ]
            errors.append(float(torch.stack([(f - true).square().mean() for f in fits]).mean().sqrt()))
        left.plot(counts, errors, color=colour, marker=marker, label=f"{rows} positives")
    left.set_xscale("log", base=2)
    left.set_xticks(counts, [str(n) for n in counts])
    left.set(xlabel="negatives for each positive (1 is DPO)", ylabel="RMS error of the implicit reward", ylim=(0, None))
    left.set_title("More negatives, a better estimate of log p/q")
    left.legend()
    margin = torch.linspace(-6, 10, 200, dtype=torch.float64)
    for n, colour, line in zip((1, 4, 16, 64), COLOURS, ("-", "--", "-.", ":"), strict=False):
        weak = torch.zeros(len(margin), n - 1, dtype=torch.float64)
        strong, zero = torch.zeros(len(margin), 1, dtype=torch.float64), torch.zeros(len(margin), dtype=torch.float64)

        def loss(positive: torch.Tensor, strong=strong, weak=weak, zero=zero) -> torch.Tensor:
            return qf.epa_loss(positive, strong, weak, zero, strong, weak, beta=1.0, reduction="sum")

        _, coefficient = qf.coefficients(loss, margin)
        label = "1 strong, no weak: DPO" if n == 1 else f"1 strong, {n - 1} weak"
        right.plot(margin, -coefficient, color=colour, linestyle=line, label=label)
    right.set(
        xlabel="implicit reward of the positive over every negative", ylabel="pull on the positive, in units of beta"
    )
    right.set(xlim=(-6, 15), title="Many negatives pull for longer")
    right.legend(loc="upper right")
    return figure


def poft() -> plt.Figure:
    figure, (left, right) = panels(2)
    mean = torch.linspace(-4, 2, 200, dtype=torch.float64)  # the target's mean log-prob above the aligned models'
    ones, zero = torch.ones_like(mean), torch.zeros(len(mean), 1, dtype=torch.float64)
    for beta, colour, line in zip((0.5, 1.0, 2.0), COLOURS, ("--", "-", "-."), strict=False):

        def loss(logps: torch.Tensor, beta: float = beta) -> torch.Tensor:
            return qf.poft_loss(logps, ones, zero, beta=beta, reduction="sum")

        _, coefficient = qf.coefficients(loss, mean)
        values = qf.poft_loss(mean, ones, zero, beta=beta, reduction="none")
        label = f"PoFT, beta = {beta:g}"
        left.plot(mean, values, color=colour, linestyle=line, label=label)
        right.plot(mean, -coefficient, color=colour, linestyle=line, label=label)
    left.plot(mean, -mean, color=GREY, linestyle=":", label="cross-entropy")
    right.axhline(1, color=GREY, linestyle=":", label="cross-entropy: every text pulls alike")
    for axis in (left, right):
        axis.axvline(0, color=GREY, linewidth=1)
        axis.set_xlabel("target's mean log-prob less the aligned models', nats a token")
    left.legend(loc="lower left")
    right.legend(loc="upper right")
    left.set(ylabel="loss", title="Loss of one text", ylim=(-1.6, 4.2))
    right.set(ylabel="pull on the text's mean log-prob", ylim=(-0.05, 2.9))
    right.set_title("A text that the aligned models rate low pulls less")
    return figure


def grpo() -> plt.Figure:
    figure, axes = panels(3)
    ratio = torch.linspace(0.5, 1.6, 1101, dtype=torch.float64)
    near = torch.linspace(0.999, 1.001, 1001, dtype=torch.float64)
    settings = (
        ("GRPO, Dr.GRPO: 0.2 / 0.2", 0.2, 0.2, "-"),
        ("DAPO: 0.2 / 0.28", 0.2, 0.28, "--"),
    )
    for axis, advantage in zip(axes, (1.0, -1.0), strict=False):
        for (label, low, high, line), colour in zip(settings, COLOURS, strict=False):
            c = _token_coefficients(ratio, advantage, low, high, "token")
            axis.plot(ratio, c, color=colour, linestyle=line, label=label)
        axis.set_title(f"Advantage {advantage:+g}")
        axis.set_xlabel("ratio of new to old probability")
    for advantage, colour, line in ((1.0, COLOURS[0], "-"), (-1.0, COLOURS[1], "--")):
        c = _token_coefficients(near, advantage, 3e-4, 4e-4, "sequence")
        axes[2].plot(near, c, color=colour, linestyle=line, label=f"advantage {advantage:+g}")
    axes[2].set(title="GSPO: 3e-4 / 4e-4, of a whole sequence", xlabel="geometric mean of the sequence's ratios")
    axes[2].set_xticks([0.9991, 0.9997, 1.0, 1.0004, 1.0009], ["0.9991", "0.9997", "1", "1.0004", "1.0009"])
    for axis in axes:
        axis.axvline(1, color=GREY, linewidth=1)
        axis.axhline(0, color=GREY, linewidth=1)
        axis.set_ylabel("coefficient of the log-prob, a token")
        axis.legend()
    return figure


def _token_coefficients(ratio: torch.Tensor, advantage: float, low: float, high: float, kind: str) -> torch.Tensor:
    """Coefficient of each of many responses of one token, times their number."""
    n = len(ratio)
    zeros, ends = torch.zeros_like(ratio), torch.arange(n + 1)
    advantages = torch.full_like(ratio, advantage)
    kw = {"eps_low": low, "eps_high": high, "ratio": kind}
    return qf.coefficients(qf.grpo_loss, ratio.log(), zeros, advantages, ends, **kw)[1] * n


PICTURES = (dpo, hdpo, spl, qempo, qempo_kl, gvpo, dqo, epa, rspo, poft, grpo)


def main(folder: Path) -> None:
    for draw in PICTURES:
        save(draw(), folder / f"{draw.__name__}.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2] / "docs" / "images" / "losses")
