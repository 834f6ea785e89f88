"""DPOTrainer with this library's pair losses."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from trl import DPOConfig, DPOTrainer

from ... import _check
from ..methods import PAIRS, by_name
from .constraint import QualityConstraintCallback
from .kernel import own_logps
from .settings import (
    refuse_no_reference,
    refuse_unknown,
    refuse_unused,
    tell_where_kl_is_qempo,
    tried,
    with_beta,
)

PAIR_LOSSES = by_name(PAIRS)
_ROLES: dict[str, Any] = {"chosen": 0, "rejected": 1, "positive": 0, "strong": slice(1, 2), "weak": slice(2, None)}
_UNUSED = (
    *("loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef"),
    *("label_smoothing", "use_weighting", "discopop_tau"),
)
# What collators add for the loss alone; the rest of a batch, images too, goes to the model.
_OURS = ("ref_chosen_logps", "ref_rejected_logps", "rewards", "offsets")


class Scores(NamedTuple):
    """(S,) sums of response log-probs, (S, L) token entropies and their mask, the router's loss or None."""

    logps: torch.Tensor
    entropy: torch.Tensor
    mask: torch.Tensor
    aux_loss: torch.Tensor | None


class ScoreTrainer(DPOTrainer):  # type: ignore[misc]
    """DPOTrainer whose loss is one of sequence log-probs; subclasses say which, in ``_loss``.

    Where the loss reads no reference (beta = 0) no reference model is loaded.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any,
        args: DPOConfig,
        *,
        reference: bool,
        fused: bool,
        grad: str,
        tau: float | None,
        **kwargs: Any,
    ) -> None:
        if any(isinstance(c, QualityConstraintCallback) for c in kwargs.get("callbacks") or ()):
            _check.bad_value(
                "callbacks", "no QualityConstraintCallback: stored answers do not follow the policy", "one"
            )
        self._reference, self._seam = reference, (fused, grad, tau)
        if not reference:
            # The one way to have DPOTrainer load no reference; _precompute_ref_logps below then computes nothing.
            args.precompute_ref_log_probs, ref_model = True, None
        elif ref_model is None and not args.precompute_ref_log_probs:
            wanted = "one, or a model loaded from a name or a folder"
            refuse_no_reference(model, kwargs.get("peft_config"), "ref_model", wanted)
        with self._fused():  # a TRL without the seam raises here, before a model is loaded
            super().__init__(model, ref_model, args, **kwargs)

    def _fused(self) -> contextlib.AbstractContextManager[Any]:
        return own_logps(*self._seam)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self._reference:
            return dataset
        with self._fused():
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def _loss(self, logps: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        raise NotImplementedError

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> torch.Tensor:
        if return_outputs:
            _check.bad_value("compute_metrics", "None: this trainer has no logits to give it", "one")
        with self._fused():
            scores = self._scores(model, inputs)
            loss = self._loss(scores.logps, inputs)
        if scores.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * scores.aux_loss
            self._record("aux_loss", scores.aux_loss)
        tokens = scores.mask.sum().clamp(min=1)
        self._record("entropy", (scores.entropy.detach() * scores.mask).sum() / tokens)
        if self.model.training:
            seen = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += seen // self._tp_size
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def _model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name not in _OURS}

    def _scores(self, model: Any, inputs: Mapping[str, Any]) -> Scores:
        given = self._model_inputs(inputs)
        mask = given.pop("completion_mask")
        labels = given["input_ids"].masked_fill(mask == 0, -100)
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        out = model(**given, labels=labels, use_cache=False, fused_lm_head=True)
        shifted = mask[:, 1:]
        length = shifted.shape[1]  # prompt-learning PEFT lengthens rows on the left
        aux_loss = out.aux_loss if self.aux_loss_enabled else None
        return Scores(out.log_probs[:, -length:].sum(1), out.entropy[:, -length:], shifted, aux_loss)

    def _reference_logps(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """(S,) of the reference model, or of the model with its adapters off."""
        model = self.model if self.ref_model is None else self.ref_model
        return torch.cat(self.compute_ref_log_probs(model, self._model_inputs(inputs)))

    def _record(self, name: str, value: torch.Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(self.accelerator.gather_for_metrics(value.detach().float()).mean().item())


class PreferenceTrainer(ScoreTrainer):
    """``DPOTrainer`` with a choice of pair loss.

        trainer = PreferenceTrainer(model, args=config, train_dataset=pairs, loss="spl", loss_kwargs={"alpha": 0.2})

    Losses, with their ``loss_kwargs`` (``qf.spl_pair_loss`` and so on say what they mean): "dpo"; "spl" (alpha);
    "hdpo" (alpha); "qempo" (lam; no reference model is loaded); "qempo_kl" (lam, mu); "epa" (n_weak: weak negatives
    for each prompt, taken from the chosen responses of the next prompts in the batch and scored under this prompt).
    ``beta`` is ``args.beta`` unless loss_kwargs has it; all take label_smoothing but "epa".

    Args:
        model, ref_model, args, **kwargs: as ``trl.DPOTrainer``. Settings of TRL's own losses (loss_type, ld_alpha,
            f_divergence_type, label_smoothing, use_weighting, ...) have to stay at their defaults.
        loss: name of the loss.
        loss_kwargs: its hyperparameters.
        fused: score with ``linear_logps`` (see ``use_fused_logps``); False leaves what stands in TRL's seam.
        grad, tau: as ``qf.linear_logps``, for the calls of this trainer. At their defaults an outer ``use_fused_logps``
            counts.

    Raises:
        ValueError, TypeError: an unknown loss; hyperparameters that it does not take or out of range; a setting that it
            does not read; a batch too small for n_weak.
        ImportError: a version of TRL without the fused log-prob kernel.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *,
        loss: str = "dpo",
        loss_kwargs: Mapping[str, Any] | None = None,
        fused: bool = True,
        grad: str = "auto",
        tau: float | None = None,
        **kwargs: Any,
    ) -> None:
        args = DPOConfig() if args is None else copy.copy(args)
        _check.choice("loss", loss, tuple(PAIR_LOSSES))
        refuse_unused(args, _UNUSED, loss)
        self._method = PAIR_LOSSES[loss]
        self._kwargs = with_beta(self._method, loss_kwargs, args.beta)
        self._n_weak = n_weak = self._kwargs.pop("n_weak", None) if self._method.takes("weak") else 0
        _check.integer("loss_kwargs: n_weak", n_weak, low=0)
        refuse_unknown(
            loss, self._kwargs, (*self._method.settings, *(("n_weak",) if self._method.takes("weak") else ()))
        )
        stand_in = torch.zeros(2 + n_weak, 1, dtype=torch.float32, device="cpu")
        tried(lambda: self._value(stand_in, stand_in))
        tell_where_kl_is_qempo(self._method, self._kwargs)
        self._alpha_beta = self._method.alpha_beta(self._kwargs)
        if n_weak:
            _check_weak(args, n_weak)
            args.dataloader_drop_last = True  # a last batch that is too small has no n_weak other prompts
        logps: dict[str, Any] = {"fused": fused, "grad": grad, "tau": tau}
        super().__init__(model, ref_model, args, reference=self._alpha_beta.beta > 0, **logps, **kwargs)
        if n_weak:
            if not hasattr(self.data_collator, "pad_token_id"):
                _check.bad_value("data_collator", "TRL's DataCollatorForPreference with n_weak", self.data_collator)
            self.data_collator = WithWeakNegatives(self.data_collator, n_weak)

    def _value(self, rows: torch.Tensor, refs: torch.Tensor | None) -> torch.Tensor:
        return self._method.loss(**self._method.reads(by_role(rows, refs)), **self._kwargs)

    def _loss(self, logps: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        rows = logps.view(2 + self._n_weak, -1)
        refs: Any = None
        if self._reference and self.precompute_ref_logps:
            refs = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        elif self._reference:
            refs = self._reference_logps(inputs).view_as(rows)
        loss = self._value(rows, refs)
        alpha, beta = self._alpha_beta
        rewards = alpha * rows[:2].detach() - (0.0 if refs is None else beta * refs[:2])
        margins = rewards[0] - rewards[1]
        for name, value in (("chosen", rewards[0]), ("rejected", rewards[1]), ("margins", margins)):
            self._record(f"rewards/{name}", value)
        self._record("rewards/accuracies", (margins > 0).float())
        self._record("logps/chosen", rows[0])
        self._record("logps/rejected", rows[1])
        return loss


def by_role(logps: torch.Tensor, refs: torch.Tensor | None) -> dict[str, Any]:
    """(2 + n_weak, B) rows chosen, rejected, weak negatives, by the names that the pair losses have for them."""
    given = {"": logps, "ref_": refs}
    return {f"{of}{role}": x if x is None else x.t()[:, at] for of, x in given.items() for role, at in _ROLES.items()}


def _check_weak(args: DPOConfig, n_weak: int) -> None:
    sizes = {"per_device_train_batch_size": args.per_device_train_batch_size}
    if args.eval_strategy != "no":
        sizes["per_device_eval_batch_size"] = args.per_device_eval_batch_size
    for name, size in sizes.items():
        if size <= n_weak:
            _check.bad_value(f"args.{name}", f"more than n_weak = {n_weak} prompts", size)
    if args.precompute_ref_log_probs:
        _check.bad_value("args.precompute_ref_log_probs", "False: weak negatives depend on the batch", True)


@dataclass
class WithWeakNegatives:
    """A collator of pairs whose batches go on with n_weak rows for each prompt: the next prompts' chosen responses."""

    base: Any
    n_weak: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        n = len(examples)
        if n <= self.n_weak:
            _check.bad_value("batch", f"more than n_weak = {self.n_weak} prompts", n)
        weak = []
        for step in range(1, self.n_weak + 1):
            for i, example in enumerate(examples):
                ids = examples[(i + step) % n]["chosen_ids"]
                weak.append({"prompt_ids": example["prompt_ids"], "chosen_ids": ids, "rejected_ids": ids})
        pairs, others = self.base(examples), self.base(weak)
        length = max(pairs["input_ids"].shape[1], others["input_ids"].shape[1])
        batch = {}
        for name, value in (("input_ids", self.base.pad_token_id), ("attention_mask", 0), ("completion_mask", 0)):
            rows = (pairs[name], others[name][: len(weak)])
            batch[name] = torch.cat([pad(x, (0, length - x.shape[1]), value=value) for x in rows])
        return batch
