"""What grad="sampled" does to the training of a pretrained model: SmolLM2-135M, with each gradient from the same start.

    OMP_NUM_THREADS=1 python -P bench/studies/finetuning.py --json bench/results/finetuning.json      (30 minutes)

finetuning AdamW on English text, float32; exact losses, held out. "full, tied" trains every weight, and its head is the
           embedding. The rest trains on top of a trunk whose states are computed once, as the demo does: "top and
           head" the last layers and an untied head; "LoRA" adapters of their attention before a frozen head; "DPO" the
           same, on pairs of a text's own continuation and another text's. A seed is one order of the data, one
           sequence of draws and one start of the adapters; all gradients share the first and the last.
grpo+dqo   the demo's training, which has a frozen head; the loss is of fixed answers that the base model drew.
noise      loss = -mean log-prob over sequences of 32 tokens: how far dW of one batch is from that of another one, and
           one draw of a batch from its exact dW. Tail rows are those that are no token's target.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peft
import torch

import qempo_fast as qf
from qempo_fast.demo import run as demo_run
from studies.optimisers import Batch, Row, average, compare, spread
from studies.table import record
from suite import heads
from suite.provenance import environment

MODES: dict[str, Row] = {
    "exact": {"grad": "exact"},
    "sampled, tau chosen": {"grad": "sampled"},
    "sampled 2^-9": {"grad": "sampled", "tau": 2.0**-9},
    "sampled 2^-11": {"grad": "sampled", "tau": 2.0**-11},
}


@dataclass(frozen=True)
class Case:
    """What is trained; losses are taken at `steps`, the last of which ends the run."""

    name: str
    rate: float
    windows_a_step: int
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """Sizes of all three experiments."""

    cases: tuple[Case, ...] = (
        Case("full, tied", 3e-5, 4, (2, 4, 8)),
        Case("top and head", 1e-4, 4, (2, 4, 8)),
        Case("LoRA", 1e-3, 8, (3, 6)),
        Case("DPO", 1e-3, 4, (2, 5)),
    )
    window: int = 64
    windows: int = 56
    held_out: int = 8
    trained_layers: int = 10  # the demo's
    lora_rank: int = 8
    prompt: int = 16  # tokens of a pair's window that both of its sides share
    beta: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)
    dqo_steps: int = 8
    noise_window: int = 32
    batches: tuple[int, ...] = (256, 2048, 8192)


QUICK = Settings(
    cases=tuple(replace(case, steps=(1, 2)) for case in Settings.cases),
    windows=16, held_out=2, seeds=(0, 1), dqo_steps=2, batches=(256,),
)  # fmt: skip


def windows_of_text(tokenizer: Any, length: int, number: int) -> torch.Tensor:
    """Python's reference manual and the descriptions of packages: windows (number, length), evenly apart."""
    topics = pydoc_data.topics.topics
    manual = torch.tensor(tokenizer("\n".join(topics[name] for name in sorted(topics))).input_ids)
    ids = torch.cat([manual, heads.english(tokenizer, 16384)])
    windows = ids[: len(ids) // length * length].view(-1, length)
    return windows[torch.linspace(0, len(windows) - 1, number).long()]


@dataclass(frozen=True)
class Data:
    """What a body reads, ids (W, L) or a trunk's states (W, L, D), and the next ids (W, L); of pairs, (W, 2, ...)."""

    inputs: torch.Tensor
    targets: torch.Tensor
    reference: torch.Tensor | None = None  # (W, 2): log-probs of the pairs' continuations before training

    def __getitem__(self, rows: torch.Tensor) -> Data:
        return Data(self.inputs[rows], self.targets[rows], None if self.reference is None else self.reference[rows])


@dataclass
class Base:
    """The model as loaded, and its windows of one id more than it reads."""

    model: Any
    settings: Settings
    training: torch.Tensor
    held_out: torch.Tensor

    def body(self, whole: bool) -> Any:
        body = copy.deepcopy(self.model.model)
        if not whole:
            body.layers = body.layers[-self.settings.trained_layers :]
            body.config.num_hidden_layers = self.settings.trained_layers
        return body

    @torch.no_grad()
    def trunk(self, ids: torch.Tensor) -> torch.Tensor:
        """States that the top layers read."""
        layer = len(self.model.model.layers) - self.settings.trained_layers
        parts = [self.model.model(part, output_hidden_states=True).hidden_states[layer] for part in ids.split(8)]
        return torch.cat(parts)

    def data(self, windows: torch.Tensor, case: Case) -> Data:
        if case.name != "DPO":
            ids = windows[:, :-1]
            return Data(ids if case.name == "full, tied" else self.trunk(ids), windows[:, 1:])
        prompt = self.settings.prompt
        other = torch.cat([windows[:, :prompt], windows.roll(len(windows) // 2, 0)[:, prompt:]], 1)
        both = torch.stack([windows, other], 1)
        inputs = torch.stack([self.trunk(both[:, i, :-1]) for i in (0, 1)], 1)
        pairs, body, head = Data(inputs, both[:, :, 1:]), self.body(False), self.model.lm_head.weight
        parts = [pairs[part] for part in torch.arange(len(windows)).split(4)]
        with torch.no_grad():
            reference = [answer_logps(body, head, part, prompt, MODES["exact"]) for part in parts]
        return replace(pairs, reference=torch.cat(reference))


def read(model: Any, tokenizer: Any, settings: Settings) -> Base:
    windows = windows_of_text(tokenizer, settings.window + 1, settings.windows + settings.held_out)
    out = torch.arange(len(windows)) % (len(windows) // settings.held_out) == 0
    return Base(model, settings, windows[~out], windows[out])


def states(body: Any, inputs: torch.Tensor) -> Any:
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    return body(**{name: inputs}, use_cache=False).last_hidden_state


def answer_logps(body: Any, head: torch.Tensor, pairs: Data, prompt: int, mode: Row) -> torch.Tensor:
    """(B, 2): of each side's tokens after the prompt."""
    hidden = states(body, pairs.inputs.flatten(0, 1))[:, prompt - 1 :]
    targets = pairs.targets.flatten(0, 1)[:, prompt - 1 :]
    return qf.linear_logps(hidden, head, targets, **mode).logps.sum(1).view(-1, 2)


@dataclass
class Trainee:
    """One run's model; `head` is its own, the embedding, or the frozen one."""

    body: Any
    head: torch.Tensor
    settings: Settings

    def parameters(self) -> list[torch.Tensor]:
        # Each once: where the two are tied, the body has the head too.
        return [p for p in dict.fromkeys([*self.body.parameters(), self.head]) if p.requires_grad]

    def loss(self, batch: Data, mode: Row) -> torch.Tensor:
        if batch.reference is None:
            return -qf.linear_logps(states(self.body, batch.inputs), self.head, batch.targets, **mode).logps.mean()
        own = answer_logps(self.body, self.head, batch, self.settings.prompt, mode)
        return qf.dpo_loss(*own.unbind(1), *batch.reference.unbind(1), beta=self.settings.beta)

    @torch.no_grad()
    def evaluate(self, held_out: Data) -> float:
        parts = torch.arange(len(held_out.targets)).split(4)
        return fmean(float(self.loss(held_out[part], MODES["exact"])) for part in parts)


def trainee(base: Base, case: Case) -> Trainee:
    whole, settings = case.name == "full, tied", base.settings
    body, head = base.body(whole), base.model.lm_head.weight
    if whole or case.name == "top and head":
        # The latter's embedding is not read, and so stays as it is.
        body.requires_grad_(True)
        return Trainee(body, body.embed_tokens.weight if whole else torch.nn.Parameter(head.detach().clone()), settings)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapters = peft.LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules=names)
    return Trainee(peft.inject_adapter_in_model(adapters, body), head, settings)


@dataclass
class Run:
    """Held-out losses at the case's steps, and what each sampled step kept."""

    losses: list[float] = field(default_factory=list)
    steps: list[qf.LogpsStats] = field(default_factory=list)

    def note(self) -> None:
        """Call it after a step's forward."""
        if (stats := qf.last_stats()) and stats.tau is not None:
            self.steps.append(stats)


def train(base: Base, case: Case, mode: str, seed: int, training: Data, held_out: Data) -> Run:
    torch.manual_seed(seed)
    model, run = trainee(base, case), Run()
    opt = torch.optim.AdamW(model.parameters(), case.rate, fused=True)
    order = torch.randperm(len(training.targets), generator=torch.Generator().manual_seed(seed))
    for step, rows in enumerate(order.split(case.windows_a_step)[: case.steps[-1]], 1):
        loss = model.loss(training[rows], MODES[mode])
        run.note()
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step in case.steps:
            run.losses.append(model.evaluate(held_out))
    return run


def case_row(case: str, mode: str, steps: Sequence[int], runs: Sequence[Run], exact: Sequence[Run]) -> Row:
    """One gradient over all seeds; differences are of runs of one seed, the exact one taken off."""
    row: Row = {"experiment": "finetuning", "case": case, "mode": mode}
    if stats := [step for run in runs for step in run.steps]:
        row["kept_share"] = spread([step.kept_share for step in stats])
        row["tau"] = spread([step.tau for step in stats if step.tau is not None])
        row["exact_chunks"] = fmean(step.exact_chunks / len(step.kept_columns) for step in stats)
    if errors := [step.error for step in stats if step.error is not None]:
        row["expected_error"] = spread(errors)
    for i, step in enumerate(steps):
        losses, others = ([run.losses[i] for run in table] for table in (runs, exact))
        row[f"step {step}"] = {
            **spread(losses),
            "losses": losses,
            "less_exact": spread([a - b for a, b in zip(losses, others, strict=True)]),
            "overlaps_exact": min(losses) <= max(others) and max(losses) >= min(others),
        }
    return row


def finetuning(base: Base) -> Iterator[Row]:
    for case in base.settings.cases:
        training, held_out = base.data(base.training, case), base.data(base.held_out, case)
        start, exact = trainee(base, case).evaluate(held_out), list[Run]()
        for mode in MODES:
            runs = [train(base, case, mode, seed, training, held_out) for seed in base.settings.seeds]
            exact = exact or runs
            yield {**case_row(case.name, mode, case.steps, runs, exact), "loss_before": start}


def dqo(settings: Settings) -> Iterator[Row]:
    """32 answers a step, of the policy: they differ between the gradients as soon as the policies do."""
    demo = replace(demo_run.FULL, steps=settings.dqo_steps)
    model, task = demo_run.load(demo)
    fixed = model.sample(model.reference, 100, torch.Generator().manual_seed(10_000))
    original, exact = qf.sequence_logps, list[Run]()

    @torch.no_grad()
    def loss_of(policy: Any) -> float:
        return -float(model.logps(policy, fixed).logps.mean())

    def trained(mode: str, seed: int) -> Run:
        run, generator = Run(), torch.Generator().manual_seed(seed)

        def logps(*inputs: Any, **options: Any) -> Any:
            scores = original(*inputs, **(options | MODES[mode]))
            # The reference's log-probs are asked for without a gradient.
            if torch.is_grad_enabled():
                run.note()
            return scores

        torch.manual_seed(seed)
        with mock.patch.object(qf, "sequence_logps", logps):
            policy = demo_run.train("grpo+dqo", model, task, demo, None, generator, lambda step: None)
            run.losses.append(loss_of(policy))
        return run

    start = loss_of(model.reference)
    for mode in MODES:
        runs = [trained(mode, seed) for seed in settings.seeds]
        exact = exact or runs
        yield {**case_row("GRPO + DQO", mode, (settings.dqo_steps,), runs, exact), "loss_before": start}


def weight_gradient(batch: Batch, weight: torch.Tensor, mode: Row) -> torch.Tensor:
    hidden, targets = batch
    leaf = weight.detach().requires_grad_()
    return torch.autograd.grad(-qf.linear_logps(hidden, leaf, targets, **mode).logps.mean(), leaf)[0]


def noise(model: Any, tokenizer: Any, settings: Settings) -> Iterator[Row]:
    length, weight = settings.noise_window, model.lm_head.weight.detach()
    windows = windows_of_text(tokenizer, length + 1, 2 * max(settings.batches) // length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))  # neighbours are of one text
    with torch.no_grad():
        parts = [model.model(part).last_hidden_state for part in windows[order, :-1].split(32)]
    hidden, targets = torch.cat(parts).flatten(0, 1), windows[order, 1:].flatten()
    tail = torch.ones(len(weight), dtype=torch.bool).index_fill_(0, targets, False)
    for n in settings.batches:
        batches: list[Batch] = list(zip(hidden.split(n), targets.split(n), strict=True))[:4]
        exact = [weight_gradient(one, weight, MODES["exact"]) for one in batches[::2]]
        for mode, options in MODES.items():
            torch.manual_seed(0)
            rows = list[Row]()
            for batch, right in zip(batches[int(mode == "exact") :: 2], exact, strict=True):
                rows.append(compare(weight_gradient(batch, weight, options), right, tail))
                rows[-1]["kept_share"] = getattr(qf.last_stats(), "kept_share", 1.0)
            yield {
                "experiment": "noise", "n": n, "sequences": n // length, "tail_rows": int(tail.sum()),
                "case": "another batch" if mode == "exact" else f"one draw, {mode}",
                "compared": len(rows), **average(rows),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of the results, written anew")
    parser.add_argument("--quick", action="store_true", help="a few steps and draws: does it run?")
    parser.add_argument("--only", choices=["finetuning", "grpo+dqo", "noise"], help="one experiment")
    args = parser.parse_args()
    settings = QUICK if args.quick else Settings()
    provenance = {**environment(()), "threads": torch.get_num_threads(), "settings": asdict(settings)}
    model, tokenizer = heads.smollm2()
    model.eval().requires_grad_(False)
    experiments = {
        "finetuning": finetuning(read(model, tokenizer, settings)),
        "grpo+dqo": dqo(settings),
        "noise": noise(model, tokenizer, settings),
    }
    record(args.json, provenance, chain(*([experiments[args.only]] if args.only else experiments.values())))


if __name__ == "__main__":
    main()
