"""OpenRLHF: its actor's log-probs without logits, and group losses as its advantages.

    from qempo_fast.integrations import openrlhf as qempo
    qempo.use_fused_logps()                                  # last line of openrlhf/models/__init__.py
    qempo.use_group_loss("spl", alpha=0.05, beta=0.02)       # last line of .../ppo_utils/experience_maker.py

OpenRLHF has no registry and runs in Ray processes of its own, so the lines go into its files
(docs/integrations/openrlhf.md).
Written against OpenRLHF 0.11.2; its own dependencies need a GPU, so no training job has run with it yet.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .. import _check
from . import missing, scoring
from .known import refuse_under_sets
from .methods import GROUPS, by_name, group_advantages

_ACTOR = "openrlhf.models.actor"
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
# What the replacements take the place of, and the arguments that they rely on.
HOOKS: dict[tuple[str, str], tuple[str, ...]] = {
    (_ACTOR, "Actor.forward"): (
        *("self", "sequences", "action_mask", "attention_mask", "return_output", "allgather_logits"),
        *("return_logprobs", "ring_attn_group", "packed_seq_lens", "return_entropy", "mm_inputs"),
    ),
    (_ACTOR, "unpad_and_slice_tensor"): ("sequences", "attention_mask", "ring_attn_group"),
    (_ACTOR, "gather_and_pad_tensor"): (
        *("tensor", "ring_attn_group", "ring_attn_pad_len", "indices", "batch", "seqlen"),
    ),
    (_MAKER, "RemoteExperienceMaker.compute_advantages_and_returns"): ("self", "experiences"),
}  # fmt: skip


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise missing(error, "openrlhf") from error


def _checked(module: Any, name: str) -> Callable[..., Any]:
    """The hook, once its arguments are those that HOOKS names."""
    found = functools.reduce(lambda x, part: getattr(x, part, None), name.split("."), module)
    wanted, got = HOOKS[module.__name__, name], "no such name"
    if found is not None:
        names = tuple(inspect.signature(found).parameters)
        if names == wanted:
            return found  # type: ignore[no-any-return]
        got = f"arguments {names}"
    raise ImportError(f"openrlhf: wanted {module.__name__}.{name}{wanted} as OpenRLHF 0.11.2 has it, got {got}")


# Of the actors that are built from now on: what use_fused_logps was last called with.
_options: dict[str, Any] = {}


def use_fused_logps(
    *,
    grad: str = "auto",
    tau: float | None = None,
    logits_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> None:
    """Make ``openrlhf.models.Actor`` compute log-probs and entropies from hidden states, never keeping logits.

    Calls that ask for logits, and vision models, run OpenRLHF's own forward. DeepSpeed ZeRO-3 raises: it empties the
    head's weight outside the layer that owns it.

    Args:
        grad, tau: as ``qf.linear_logps``.
        logits_dtype, batch_invariant: as ``hf.fused_forward``; both are the head's. A float64 actor with a logits_dtype
            raises at its first step.

    Raises:
        ImportError: OpenRLHF is not installed, or its actor is not the one of 0.11.2.
        TypeError, ValueError: an argument; in a step, log-probs of a vision model with batch_invariant.
    """
    _options.update(scoring(grad, tau, logits_dtype, batch_invariant))
    actor = _module(_ACTOR)
    _checked(actor, "unpad_and_slice_tensor")
    _checked(actor, "gather_and_pad_tensor")
    original = _checked(actor, "Actor.forward")
    if hasattr(original, "__wrapped__"):
        return  # a second call

    @functools.wraps(original)
    def forward(
        self: Any,
        sequences: torch.Tensor,
        action_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: Any = None,
        return_entropy: bool = False,
        **mm_inputs: Any,
    ) -> Any:
        asks, vision = action_mask is not None or return_logprobs, bool(mm_inputs) or getattr(self, "is_vlm", False)
        if asks and vision:
            refuse_under_sets("a vision model's forward is OpenRLHF's")
        if asks and vision and _options["batch_invariant"]:
            _check.bad_value("batch_invariant", "False for a vision model, whose forward is OpenRLHF's own", True)
        if vision or not asks:
            return original(
                self, sequences, action_mask, attention_mask, return_output, allgather_logits, return_logprobs,
                ring_attn_group, packed_seq_lens, return_entropy, **mm_inputs,
            )  # fmt: skip
        output, restored = _scored(actor, self, sequences, attention_mask, ring_attn_group, return_entropy)
        if return_entropy:
            output.entropy = restored(output.entropy)[:, :-1]
        logps = restored(output.logps)[:, :-1]
        if action_mask is not None:
            logps = logps[:, -action_mask.shape[1] :] * action_mask.float()
        return (logps, output) if return_output else logps

    actor.Actor.forward = forward


def _scored(
    actor: Any, self: Any, sequences: torch.Tensor, attention_mask: Any, ring_attn_group: Any, entropy: bool
) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]]:
    """The fused output on the rows that the model reads, and what brings its tensors back to (batch, seqlen)."""
    handle = self.__dict__.get("_qempo_fused")
    if handle is None:
        from .hf import fused_forward

        # A DeepSpeed engine has the model as .module. check=False: a forward outside the engine's would miss its hooks.
        model = getattr(self.model, "module", self.model)
        handle = fused_forward(model, temperature=self.temperature, check=False, **_options)
        self.__dict__["_qempo_fused"] = handle
    handle.options["entropy"] = entropy
    if self.packing_samples:
        batch, seqlen = sequences.shape
        rows, positions, labels, pad, indices = actor.unpad_and_slice_tensor(sequences, attention_mask, ring_attn_group)
        output = self.model(rows, attention_mask=None, position_ids=positions, shift_labels=labels)
        return output, lambda x: actor.gather_and_pad_tensor(x, ring_attn_group, pad, indices, batch, seqlen)
    positions = attention_mask.long().cumsum(-1) - 1
    positions.masked_fill_(attention_mask == 0, 1)
    labels = torch.roll(sequences, shifts=-1, dims=1)
    output = self.model(sequences, attention_mask=attention_mask, position_ids=positions, shift_labels=labels)
    return output, lambda x: x


def use_group_loss(
    loss: str, *, embed: Callable[[list[Any]], torch.Tensor] | None = None, **hyperparameters: Any
) -> None:
    """Take the advantages from a group loss: A_i = -S dL/dl_i at the old policy, times the response's tokens.

    Derived: PPO's ratio is 1 in the first step of a rollout, and with ``--actor.loss_agg_mode seq-mean-token-mean``
    OpenRLHF divides each response by its tokens, so that step's gradient is the group loss's own; later steps clip as
    PPO does. A loss with a reference needs ``--algo.kl.use_loss``, which keeps its log-probs, and a tiny
    ``--algo.kl.init_coef``, the weight of the KL term that this adds.

    Args:
        loss: "spl", "qempo", "qempo_kl", "gvpo", "rspo" or "dqo".
        embed: for "dqo": the experiences (sequences, prompts, ...) to (S, d), rows in their order.
        **hyperparameters: of that loss, as in qempo_fast.

    Raises:
        ImportError: OpenRLHF is not installed, or its experience maker is not the one of 0.11.2.
        ValueError: an unknown loss; "dqo" without embed; at the first rollout, loss_agg_mode "token-mean".
    """
    methods = by_name(GROUPS)
    _check.choice("loss", loss, tuple(methods))
    if embed is None and methods[loss].takes("embeddings"):
        _check.bad_value("embed", f"a function of the experiences with loss={loss!r}", None)
    maker = _module(_MAKER)
    original = _checked(maker, "RemoteExperienceMaker.compute_advantages_and_returns")
    original = inspect.unwrap(original)

    @functools.wraps(original)
    def compute(self: Any, experiences: list[Any]) -> list[Any]:
        args = self.strategy.args
        if args.actor.loss_agg_mode == "token-mean":
            _check.bad_value(
                "actor.loss_agg_mode", "'seq-mean-token-mean', as group losses weigh responses", "'token-mean'"
            )
        experiences = original(self, experiences)
        masks = [e.action_mask.to(e.action_log_probs.dtype) for e in experiences]
        indices = torch.tensor([i for e in experiences for i in e.index], dtype=torch.int64, device="cpu")

        def sums(name: str) -> torch.Tensor | None:
            parts = [getattr(e, name) for e in experiences]
            if any(x is None for x in parts):
                return None
            return torch.cat([(x * m).sum(-1) for x, m in zip(parts, masks, strict=True)])

        logps = sums("action_log_probs")
        assert logps is not None
        rewards = torch.cat([e.rewards for e in experiences]).to(logps)
        values = group_advantages(
            loss, indices // args.rollout.n_samples_per_prompt, logps, rewards,
            ref_logps=sums("base_action_log_probs"),
            embeddings=None if embed is None else embed(experiences),
            **hyperparameters,
        )  # fmt: skip
        for e, mask, part in zip(experiences, masks, values.split([len(m) for m in masks]), strict=True):
            e.advantages = part.unsqueeze(-1) * mask.sum(-1, keepdim=True) * mask
            e.returns = e.advantages.clone()
        return experiences

    maker.RemoteExperienceMaker.compute_advantages_and_returns = compute
