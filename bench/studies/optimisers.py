"""What grad="sampled" is to an optimiser: small models trained with it, and its error beside the noise of batches.

    OMP_NUM_THREADS=1 python -P bench/studies/optimisers.py --json bench/results/optimisers.json      (20 minutes)
    ... --only safer --json bench/results/optimisers_safer.json                                       (15 minutes)

training   a causal transformer with a fresh, untied head, from scratch on English text, once with each gradient and
           seed. A seed is one initialisation, one order of the data and one sequence of draws; all modes share the
           former two. Losses are exact, over held-out windows. float32, so that sampling is all that differs.
safer      the same under AdamW with dWeight alone sampled, in plain torch, and what might make that safe: a floor under
           the keep probabilities, or the dropped columns by a product of rounded factors.
noise      SmolLM2-135M's hidden states and head, loss = -mean log-prob: how far dW of one batch is from that of
           another, and one draw of a batch from its exact dW. Tail rows are those that are no token's target.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import qempo_fast as qf
from studies.table import record
from suite import heads
from suite.provenance import environment

Row = dict[str, Any]
Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
TAUS = {"2^-7": 2.0**-7, "2^-9": 2.0**-9, "2^-11": 2.0**-11}


@dataclass(frozen=True)
class Settings:
    """Sizes of both experiments."""

    vocabulary: int = 8192
    width: int = 128
    layers: int = 2
    window: int = 64
    windows_a_step: int = 8
    held_out_every: int = 32
    # Losses are taken at these steps; the last one ends the run.
    steps: tuple[int, ...] = (10, 20, 40, 80, 150)
    warmup: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)
    # The best for the exact gradient, seed 0, after 100 steps: of 1e-3, 3e-3, 1e-2, and of 0.03, 0.1, 0.3 (diverges).
    adamw_rate: float = 3e-3
    sgd_rate: float = 0.1
    momentum: float = 0.9
    batches: tuple[int, ...] = (512, 2048)
    batches_of_a_size: int = 8
    draws: int = 16


QUICK = Settings(steps=(5, 10), seeds=(0, 1), batches=(512,), batches_of_a_size=4, draws=4)


class Model(nn.Module):
    """Causal transformer with learnt positions; its head is a bare weight, not the embedding's."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.embedding = nn.Embedding(settings.vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(settings.window, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Parameter(torch.randn(settings.vocabulary, width) * 0.02)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(settings.window))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) + self.positions
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.norm(x)


def exact_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, step: int = 0) -> torch.Tensor:
    return -qf.linear_logps(hidden, weight, targets, grad="exact").logps.mean()


def sampled_loss(tau: float) -> Loss:
    def loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, step: int) -> torch.Tensor:
        return -qf.linear_logps(hidden, weight, targets, grad="sampled", tau=tau).logps.mean()

    return loss


def half_sampled_loss(tau: float) -> Loss:
    """dHidden is sampled and dWeight exact; the value is twice the loss."""
    sampled = sampled_loss(tau)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, step: int) -> torch.Tensor:
        return exact_loss(hidden.detach(), weight, targets) + sampled(hidden, weight.detach(), targets, step)

    return loss


def mixed_loss(tau: float, every: int) -> Loss:
    """Exact at every n-th step, beginning with the first."""
    sampled = sampled_loss(tau)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, step: int) -> torch.Tensor:
        return (exact_loss if step % every == 0 else sampled)(hidden, weight, targets, step)

    return loss


MODES: dict[str, Loss] = {
    "exact": exact_loss,
    **{f"sampled {name}": sampled_loss(tau) for name, tau in TAUS.items()},
    "dH sampled 2^-9, dW exact": half_sampled_loss(TAUS["2^-9"]),
    "sampled 2^-9, exact every 4th step": mixed_loss(TAUS["2^-9"], 4),
}


# Rows that choose their columns together, as in the library.
SHARED = 256


def four_bits(x: torch.Tensor, dim: int) -> torch.Tensor:
    """To 4 significant bits, as float8 e4m3 has, without its bounds: what a scale for each slice would give."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 16).round_() / 16, exponent)


def int8(x: torch.Tensor, dim: int) -> torch.Tensor:
    """To -127 .. 127 times a scale for each slice along dim; over rows, which a product sums up, none can differ."""
    scale = x.abs().amax(dim, keepdim=True).clamp_(min=1e-30) / 127
    return (x / scale).round_() * scale


ROUNDING: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {"4 bits": four_bits, "int8": int8}


@dataclass(frozen=True)
class Safer:
    """dWeight keeps column j with probability max(floor, min(1, u_j / tau)); rounding: the dropped ones are not 0 but
    come from rounded dz and hidden, and the kept ones are not scaled; logits: theirs come from rounded factors too.
    kept: the shares that were drawn, of all runs.
    """

    tau: float
    floor: float = 0.0
    rounding: str | None = None
    logits: bool = False
    kept: list[float] = field(default_factory=list)

    def columns_gradient(
        self, dz: torch.Tensor, p: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Of one choice of columns; dz (n, V) is overwritten."""
        keep_probability = (p.amax(0) / self.tau).clamp_(self.floor, 1.0)
        keep_probability[targets] = 1.0
        kept = torch.rand_like(keep_probability) < keep_probability
        self.kept.append(float(kept.float().mean()))
        if self.rounding is None:
            return dz.mul_(kept / keep_probability.clamp_(min=1e-30)).T @ h
        out, rounded, dropped = dz.T @ h, ROUNDING[self.rounding], dz[:, ~kept]
        if self.logits:
            w = weight[~kept]
            dropped *= (rounded(h, 1) @ rounded(w, 1).T - h @ w.T).exp_()
        out[~kept] = rounded(dropped, 0).T @ rounded(h, 0)
        return out

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, step: int) -> torch.Tensor:
        return -SaferLogps.apply(hidden.flatten(0, 1), weight, targets.flatten(), self).mean()


class SaferLogps(torch.autograd.Function):
    """Log-probs of the targets, all of the softmax at once; dHidden is exact and dWeight what `safer` makes of it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, safer: Safer
    ) -> torch.Tensor:
        logps = (hidden @ weight.T).log_softmax(1)
        ctx.save_for_backward(hidden, weight, targets, logps)
        ctx.safer = safer
        return logps.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, logps = ctx.saved_tensors
        dh, dw = [], torch.zeros_like(weight)
        for h, t, g, p in zip(*(x.split(SHARED) for x in (hidden, targets, grad, logps.exp())), strict=True):
            dz = p * -g[:, None]
            dz[torch.arange(len(g)), t] += g
            dh.append(dz @ weight)
            dw += ctx.safer.columns_gradient(dz, p, h, weight, t)
        return torch.cat(dh), dw, None, None


SAFER: dict[str, Loss] = {
    "exact": exact_loss,
    "dW sampled 2^-9": Safer(TAUS["2^-9"]),
    "dW sampled 2^-9, floor 1/4": Safer(TAUS["2^-9"], 0.25),
    "dW sampled 2^-9, floor 1/2": Safer(TAUS["2^-9"], 0.5),
    **{
        f"dW sampled 2^-9, dropped columns in {name}{', their logits too' * logits}": Safer(
            TAUS["2^-9"], rounding=name, logits=logits
        )
        for logits in (False, True)
        for name in ROUNDING
    },
}


@dataclass
class Text:
    """Windows of one id more than the model reads; ids go by falling frequency, those from `used` on never occur."""

    training: torch.Tensor
    held_out: torch.Tensor
    used: int


def read_text(tokenizer: Any, settings: Settings) -> Text:
    """Python's reference manual and the descriptions of packages, 130,000 tokens: more than a run reads."""
    topics = pydoc_data.topics.topics
    manual = torch.tensor(tokenizer("\n".join(topics[name] for name in sorted(topics))).input_ids)
    ids = torch.cat([manual, heads.english(tokenizer, 16384)])
    order = ids.bincount().argsort(descending=True, stable=True)
    rank = order.argsort()[ids]
    kept, length = rank[rank < settings.vocabulary], settings.window + 1
    windows = kept[: len(kept) // length * length].view(-1, length)
    out = torch.arange(len(windows)) % settings.held_out_every == 0
    return Text(windows[~out], windows[out], int(kept.max()) + 1)


@torch.no_grad()
def evaluate(model: Model, text: Text, settings: Settings) -> tuple[float, float]:
    """(held-out loss, mean probability of the columns that never occur)."""
    losses, unused = [], []
    for part in text.held_out.split(settings.windows_a_step):
        hidden = model(part[:, :-1])
        losses.append(-qf.linear_logps(hidden, model.head, part[:, 1:]).logps.flatten())
        unused.append((hidden.flatten(0, 1) @ model.head.T).softmax(1)[:, text.used :].sum(1))
    return float(torch.cat(losses).mean()), float(torch.cat(unused).mean())


def make_optimiser(name: str, model: Model, settings: Settings) -> torch.optim.Optimizer:
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), settings.adamw_rate)
    return torch.optim.SGD(model.parameters(), settings.sgd_rate, settings.momentum)


@dataclass
class Run:
    """Held-out losses and unused mass at settings.steps, and the kept share of each sampled step."""

    losses: list[float]
    unused: list[float]
    kept: list[float]


def train(mode: str, optimiser: str, seed: int, text: Text, settings: Settings) -> Run:
    torch.manual_seed(seed)
    model = Model(settings)
    opt = make_optimiser(optimiser, model, settings)
    warm = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1.0, (step + 1) / settings.warmup))
    order = torch.randperm(len(text.training), generator=torch.Generator().manual_seed(seed))
    run, loss_of = Run([], [], []), (MODES | SAFER)[mode]
    for step in range(settings.steps[-1]):
        first = step * settings.windows_a_step
        batch = text.training[order[first : first + settings.windows_a_step]]
        loss = loss_of(model(batch[:, :-1]), model.head, batch[:, 1:], step)
        if (stats := qf.last_stats()) and stats.tau is not None:
            run.kept.append(stats.kept_share)
        opt.zero_grad()
        loss.backward()
        opt.step()
        warm.step()
        if step + 1 in settings.steps:
            for column, value in zip((run.losses, run.unused), evaluate(model, text, settings), strict=True):
                column.append(value)
    if isinstance(loss_of, Safer):
        run.kept += loss_of.kept
        loss_of.kept.clear()
    return run


def spread(values: Sequence[float]) -> Row:
    return {"mean": fmean(values), "min": min(values), "max": max(values)}


def training_row(mode: str, optimiser: str, runs: Sequence[Run], exact: Sequence[Run], settings: Settings) -> Row:
    """One mode over all seeds; differences are of runs of one seed, the exact one taken off."""
    row: Row = {"experiment": "training", "optimiser": optimiser, "mode": mode}
    if any(run.kept for run in runs):
        row["kept_share"] = {
            "mean": fmean(share for run in runs for share in run.kept),
            "first": fmean(run.kept[0] for run in runs),
            "last": fmean(run.kept[-1] for run in runs),
            "at_break_even": fmean(share == 1 for run in runs for share in run.kept),
        }
    for i, step in enumerate(settings.steps):
        losses, others = ([run.losses[i] for run in table] for table in (runs, exact))
        gaps = [a - b for a, b in zip(losses, others, strict=True)]
        row[f"step {step}"] = {
            **spread(losses),
            "losses": losses,
            "less_exact": spread(gaps),
            "unused_mass": fmean(run.unused[i] for run in runs),
            "inside_exact": min(others) <= min(losses) and max(losses) <= max(others),
            "overlaps_exact": min(losses) <= max(others) and max(losses) >= min(others),
        }
    return row


def training(
    tokenizer: Any, settings: Settings, modes: Iterable[str] = MODES, optimisers: Iterable[str] = ("AdamW", "SGD")
) -> Iterator[Row]:
    text = read_text(tokenizer, settings)
    print(f"text: {len(text.training)} windows, {len(text.held_out)} held out, {text.used} ids occur", flush=True)
    for optimiser in optimisers:
        exact: list[Run] = []
        for mode in modes:
            runs = [train(mode, optimiser, seed, text, settings) for seed in settings.seeds]
            exact = exact or runs
            yield training_row(mode, optimiser, runs, exact, settings)


@torch.no_grad()
def hidden_states(model: Any, tokenizer: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States and targets of windows of 512 tokens of English, shuffled: neighbours are of one document."""
    ids = heads.english(tokenizer, tokens + 1)
    order = torch.randperm(tokens // 512, generator=torch.Generator().manual_seed(0))
    windows, targets = ids[:-1].view(-1, 512)[order], ids[1:].view(-1, 512)[order]
    hidden = [model.eval().model(window[None]).last_hidden_state[0] for window in windows]
    return torch.cat(hidden), targets.flatten()


def weight_gradient(batch: Batch, weight: torch.Tensor, tau: float | None) -> torch.Tensor:
    """dW of -mean log-prob; tau None is the exact one."""
    hidden, targets = batch
    leaf = weight.detach().requires_grad_()
    mode: Row = {"grad": "exact"} if tau is None else {"grad": "sampled", "tau": tau}
    logps = qf.linear_logps(hidden, leaf, targets, **mode).logps
    return torch.autograd.grad(-logps.mean(), leaf)[0]


def compare(other: torch.Tensor, one: torch.Tensor, tail: torch.Tensor) -> Row:
    """How far `other` lies from `one`, relative to `one`; an entry of 0 has neither the right sign nor the wrong."""
    a, b = other[tail], one[tail]
    sizes = b.norm(dim=1)
    agree = a.sign() * b.sign()
    return {
        "whole": float((other - one).norm() / one.norm()),
        "tail": float((a - b).norm() / b.norm()),
        "row_median": float(((a - b).norm(dim=1) / sizes)[sizes > 0].median()),
        "zero_rows": float((a == 0).all(1).float().mean()),
        "right_sign": float((agree > 0).float().mean()),
        "wrong_sign": float((agree < 0).float().mean()),
    }


def average(rows: Sequence[Row]) -> Row:
    return {key: fmean(row[key] for row in rows) for key in rows[0]}


def adam_ratio(gradients: Iterable[torch.Tensor], tail: torch.Tensor) -> float:
    """Mean over tail entries of |mean| / root mean square over the gradients; 0 where all of them are 0."""
    total, square = torch.zeros(1), torch.zeros(1)
    for n, gradient in enumerate(gradients, 1):
        # Scaled, which leaves the ratio as it is: an entry's square may lie under float32's smallest number.
        g = gradient[tail].mul_(2.0**20)
        total, square = (g.clone(), g.square_()) if n == 1 else (total.add_(g), square.addcmul_(g, g))
    return float((total.abs_() / (square * n).sqrt_()).nan_to_num_(0.0).mean())


def noise_rows(n: int, batches: Sequence[Batch], weight: torch.Tensor, tail: torch.Tensor, draws: int) -> Iterator[Row]:
    shared = {"experiment": "noise", "n": n, "tail_rows": int(tail.sum()), "v": len(weight)}

    def over_batches(tau: float | None) -> float:
        return adam_ratio((weight_gradient(batch, weight, tau) for batch in batches), tail)

    pairs = zip(batches[::2], batches[1::2], strict=True)
    apart = [compare(weight_gradient(b, weight, None), weight_gradient(a, weight, None), tail) for a, b in pairs]
    yield {
        **shared, "case": "another batch", "compared": len(apart), **average(apart),
        "adam_one_batch": 1.0, "adam_batches": over_batches(None), "adam_batches_of": len(batches),
    }  # fmt: skip
    exact = weight_gradient(batches[0], weight, None)
    for name, tau in TAUS.items():
        torch.manual_seed(0)
        kept, errors = list[float](), list[Row]()

        def drawn(tau: float = tau, kept: list[float] = kept, errors: list[Row] = errors) -> Iterator[torch.Tensor]:
            for _ in range(draws):
                draw = weight_gradient(batches[0], weight, tau)
                if stats := qf.last_stats():
                    kept.append(stats.kept_share)
                if len(errors) < 4:
                    errors.append(compare(draw, exact, tail))
                yield draw

        one_batch = adam_ratio(drawn(), tail)
        yield {
            **shared, "case": f"one draw at {name}", "tau": tau, "kept_share": fmean(kept), "compared": len(errors),
            **average(errors), "adam_one_batch": one_batch, "adam_one_batch_of": draws,
            "adam_batches": over_batches(tau), "adam_batches_of": len(batches),
        }  # fmt: skip


def noise(model: Any, tokenizer: Any, settings: Settings) -> Iterator[Row]:
    tokens = max(settings.batches) * settings.batches_of_a_size
    hidden, targets = hidden_states(model, tokenizer, tokens)
    weight = model.lm_head.weight.detach()
    tail = torch.ones(len(weight), dtype=torch.bool)
    tail[targets] = False
    for n in settings.batches:
        batches = list(zip(hidden.split(n), targets.split(n), strict=True))[: settings.batches_of_a_size]
        yield from noise_rows(n, batches, weight, tail, settings.draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of the results, written anew")
    parser.add_argument("--quick", action="store_true", help="a few steps and draws: does it run?")
    parser.add_argument("--only", choices=["safer"], help="the exact gradient and the safer modes under AdamW")
    args = parser.parse_args()
    settings = QUICK if args.quick else Settings()
    provenance = {**environment(()), "threads": torch.get_num_threads(), "settings": asdict(settings)}
    model, tokenizer = heads.smollm2()
    if args.only == "safer":
        table = training(tokenizer, settings, SAFER, ("AdamW",))
    else:
        table = chain(training(tokenizer, settings), noise(model, tokenizer, settings))
    record(args.json, provenance, table)


if __name__ == "__main__":
    main()
