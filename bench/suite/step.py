"""A whole training step of SmolLM2-135M, forward to optimiser: stock TRL against ours: qempo-fast bench --op step.

Backbone, head, loss, backward and AdamW on one batch of English text; no sampling. Every provider trains all parameters
in float32. The learning rate is 0: AdamW does its whole work, and every repetition sees the same weights.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import qempo_fast as qf
from suite import heads
from suite.interleave import Step, require
from suite.provider import Provider, Set

BETA, EPS = 0.1, 0.2
# All parameters together. One draw is 0.02 off on text, 0.05 on the tiny model's untrained head.
LIMITS = {False: 1e-4, True: 0.1}


class Case(NamedTuple):
    """rows of prompt + completion tokens; DPO: the first half chosen, the second rejected."""

    method: str
    rows: int
    prompt: int
    completion: int

    def __str__(self) -> str:
        return f"{self.method} rows={self.rows} prompt={self.prompt} completion={self.completion}"


class Inputs(NamedTuple):
    """ids (rows, prompt + completion); scores: advantages of GRPO, (rows,), or reference log-probs of DPO, (rows,)."""

    model: Any
    tokenizer: Any
    ids: torch.Tensor
    scores: torch.Tensor


# A third of the tokens are prompts, as in short chat data.
MAIN = [Case(method, 4, 32, 64) for method in ("DPO", "GRPO")]
SETS = {
    "main": Set(MAIN, rounds=3),
    "memory": Set(
        [MAIN[0]._replace(rows=16)],
        ("qempo_fast", "TRL with use_fused_logps", "TRL", "plain torch"),
        memory=True,
        timed=False,
    ),
    "tiny": Set([Case("DPO", 2, 3, 4), Case("GRPO", 4, 3, 4)], threads=("one",)),
    "gpu": Set([Case(method, 32, 128, 512) for method in ("DPO", "GRPO")]),
}
Loss = Callable[[], torch.Tensor]


def _plain_loss(case: Case, logps: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """DPO, or one on-policy step of GRPO, of token log-probs (rows, completion); the textbook form."""
    if case.method == "DPO":
        chosen, rejected = (logps.sum(1) - scores).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()
    ratio, advantages = torch.exp(logps - logps.detach()), scores[:, None]
    clipped = ratio.clamp(1 - EPS, 1 + EPS)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean(1).mean()


def _plain(case: Case, made: Inputs) -> Loss:
    """The model's own logits, cut to the completion, and their log-softmax."""

    def loss() -> torch.Tensor:
        logits = made.model(made.ids, logits_to_keep=case.completion + 1).logits[:, :-1]
        targets = made.ids[:, case.prompt :]
        logps = torch.log_softmax(logits, -1).gather(2, targets[..., None])[..., 0]
        return _plain_loss(case, logps, made.scores.to(logps.dtype))

    return loss


def _our_loss(case: Case, logps: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if case.method == "DPO":
        return qf.dpo_loss(*logps.view(case.rows, -1).sum(1).chunk(2), *scores.chunk(2), beta=BETA)
    cu_seqlens = torch.arange(0, len(logps) + 1, case.completion, device=logps.device)
    return qf.grpo_loss(logps, logps.detach(), scores, cu_seqlens, eps_low=EPS, eps_high=EPS)


def _ours(case: Case, made: Inputs, grad: str) -> Loss:
    """The backbone, then linear_logps on the completions' hidden states, and our loss."""

    def loss() -> torch.Tensor:
        hidden = made.model.model(made.ids).last_hidden_state[:, case.prompt - 1 : -1].flatten(0, 1)
        targets = made.ids[:, case.prompt :].flatten()
        return _our_loss(
            case, qf.linear_logps(hidden, made.model.lm_head.weight, targets, grad=grad).logps, made.scores
        )

    return loss


@functools.lru_cache(maxsize=1)
def _trainer(method: str, model: Any, tokenizer: Any) -> Any:
    """Stock TRL's trainer around the model, on a data set that is never read."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": next(model.parameters()).device.type == "cpu", "bf16": False,
        "report_to": "none", "save_strategy": "no", "activation_checkpointing": False, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    # Both draw a bar for each pass over the data set.
    with contextlib.redirect_stderr(io.StringIO()):
        if method == "DPO":
            pair = {"prompt": ["a"], "chosen": [" b"], "rejected": [" c"]}
            # The reference log-probs come with the batch: no reference model is run in a step.
            settings = DPOConfig(beta=BETA, precompute_ref_log_probs=True, **common)
            return DPOTrainer(model, args=settings, train_dataset=Dataset.from_dict(pair), processing_class=tokenizer)
        settings = GRPOConfig(
            beta=0.0, epsilon=EPS, loss_type="grpo", num_generations=4, per_device_train_batch_size=4, **common
        )
        trainer = GRPOTrainer(
            model, lambda completions, **_: [0.0] * len(completions), args=settings,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * 4}), processing_class=tokenizer,
        )  # fmt: skip
    # Trainer.train sets it; only a step is wanted here.
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _trl(case: Case, made: Inputs) -> Loss:
    trainer, ids = _trainer(case.method, made.model, made.tokenizer), made.ids
    mask = torch.ones_like(ids)
    if case.method == "DPO":
        completion = mask.clone()
        completion[:, : case.prompt] = 0
        chosen, rejected = made.scores.chunk(2)
        batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion,
                 "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}  # fmt: skip
    else:
        (prompt, completion), masks = ids.tensor_split([case.prompt], 1), mask.tensor_split([case.prompt], 1)
        batch = {"prompt_ids": prompt, "prompt_mask": masks[0], "completion_ids": completion,
                 "completion_mask": masks[1], "advantages": made.scores,
                 "num_items_in_batch": masks[1].sum()}  # fmt: skip
    return lambda: trainer.compute_loss(made.model, batch)


def _trl_fused(case: Case, made: Inputs, grad: str) -> Loss:
    from qempo_fast.integrations.trl import use_fused_logps

    stock = _trl(case, made)

    def loss() -> torch.Tensor:
        with use_fused_logps(grad=grad):
            return stock()

    return loss


PROVIDERS: dict[str, Provider] = {
    "qempo_fast": Provider("ours", functools.partial(_ours, grad="auto")),
    "qempo_fast sampled": Provider("ours", functools.partial(_ours, grad="sampled")),
    "TRL with use_fused_logps": Provider("ours", functools.partial(_trl_fused, grad="auto")),
    "TRL with use_fused_logps, sampled": Provider("ours", functools.partial(_trl_fused, grad="sampled")),
    "TRL": Provider("peer", _trl),
    "plain torch": Provider("peer", _plain),
}


def _tiny() -> tuple[Any, Any]:
    """A model and a tokenizer of SmolLM2's kind, small enough for a test."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "c": 3}, unk_token="a"))
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=4096,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


@functools.lru_cache(maxsize=1)
def inputs(case: Case, device: str) -> Inputs:
    torch.manual_seed(0)
    length = case.prompt + case.completion
    if case in SETS["tiny"].cases:
        model, tokenizer = _tiny()
        ids = torch.randint(model.config.vocab_size, (case.rows * length,))
    else:
        model, tokenizer = heads.smollm2()
        ids = heads.english(tokenizer, case.rows * length)
    model, ids = model.to(device).requires_grad_().train(), ids.view(case.rows, length).to(device)
    scores = torch.randn(case.rows, device=device)
    if case.method == "DPO":
        # The reference a little away from the policy, so that the loss does not sit at its start.
        hidden = model.model(ids).last_hidden_state[:, case.prompt - 1 : -1].detach()
        logps = qf.linear_logps(hidden, model.lm_head.weight.detach(), ids[:, case.prompt :]).logps
        scores = logps.sum(1) + scores
    return Inputs(model, tokenizer, ids, scores)


@functools.lru_cache(maxsize=1)
def _exact(case: Case, device: str) -> list[torch.Tensor]:
    """The gradient of every parameter, computed in float64 by plain torch."""
    made = inputs(case, device)
    wide = copy.deepcopy(made.model)
    # A trainer may have put its own forward on the model.
    wide.__dict__.pop("forward", None)
    wide = wide.double()
    exact = made._replace(model=wide, scores=made.scores.double())
    return [g.float() for g in torch.autograd.grad(_plain(case, exact)(), tuple(wide.parameters()))]


def _step(loss: Loss, made: Inputs) -> Step:
    parameters = tuple(made.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def update(grads: tuple[torch.Tensor, ...]) -> None:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        optimizer.zero_grad()

    return Step(loss, parameters, None, made.ids.device.type, update)


def unchecked(name: str, case: Case, made: Inputs) -> tuple[Step, Step]:
    """(a step on few tokens, the step)."""
    few = case._replace(rows=2, completion=4)
    small = made._replace(ids=made.ids[:2, : case.prompt + 4], scores=made.scores[:2])
    return _step(PROVIDERS[name].make(few, small), small), _step(PROVIDERS[name].make(case, made), made)


def checked(name: str, case: Case, made: Inputs) -> tuple[Step, dict[str, Any]]:
    """The provider's step, run once, and the error of all parameters' gradient against float64."""
    step = _step(PROVIDERS[name].make(case, made), made)
    torch.manual_seed(0)
    _, grads, _ = step.run()
    truth = _exact(case, made.ids.device.type)
    off = sum(float((a.double() - b).square().sum()) for a, b in zip(grads, truth, strict=True))
    norm = sum(float(b.double().square().sum()) for b in truth)
    columns = {"error_grad": (off / norm) ** 0.5}
    require(f"{name}, {case}", columns, {"error_grad": LIMITS["sampled" in name]})
    return step, columns


def baselines(case: Case, made: Inputs) -> dict[str, Step]:
    """The same step with a head that costs nothing: backbone forward and backward, and AdamW."""
    body = made._replace(model=made.model.model)
    return {"backbone and optimiser": _step(lambda: body.model(made.ids).last_hidden_state.square().mean(), body)}


def floors(case: Case) -> dict[str, dict[str, float]]:
    """Backbone 6 x its 106 million weights x tokens, head one GEMM over the completions; AdamW: seven passes."""
    if case in SETS["tiny"].cases:
        return {}
    tokens, scored = case.rows * (case.prompt + case.completion), case.rows * case.completion
    body, head = 106_203_456, 576 * 49152
    return {"full": {"floor_flops": 6.0 * body * tokens + 2 * head * scored, "floor_bytes": 7 * 4.0 * (body + head)}}
