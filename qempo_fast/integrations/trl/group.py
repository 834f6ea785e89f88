"""GRPOTrainer with this library's group losses."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer

import qempo_fast as qf

from ... import _check
from ...reference.family import AlphaBeta
from ..known import known_coefficients
from ..methods import GROUPS, Method, by_name
from .constraint import QualityConstraintCallback
from .kernel import own_logps, seam_rows
from .settings import (
    refuse_no_reference,
    refuse_unknown,
    refuse_unused,
    tell_where_kl_is_qempo,
    tried,
    with_beta,
)

logger = logging.getLogger(__name__)

# "grpo" is TRL's own loss, whichever loss_type names.
GROUP_LOSSES: dict[str, Method | None] = {"grpo": None, **by_name(GROUPS)}

# Settings of TRL's own losses, and of what it does with them.
_UNUSED = (
    *("loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "scale_rewards"),
    *("multi_objective_aggregation", "top_entropy_quantile", "off_policy_mask_threshold", "use_bias_correction_kl"),
    *("mask_truncated_completions", "entropy_coef", "use_adaptive_entropy"),
)
# TRL's own losses whose slope at ratio 1 is the advantage, and of these the means over rows of means over tokens.
_RATIO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")
_ROW_MEANS = ("grpo", "sapo")
# What a model with images takes besides ids and mask, as _get_per_token_logps_and_entropies names it.
_IMAGES = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"),
    *("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)
# What a QualityConstraint sets: the hyperparameters of the two families whose numbers are attributes of it.
_FROM_CONSTRAINT = {
    name: method.numbers for name, method in by_name(GROUPS).items() if method.family in (AlphaBeta, AlphaBeta.of_qempo)
}

Embedder = Callable[[list[str]], torch.Tensor]


class GroupTrainer(GRPOTrainer):  # type: ignore[misc]
    """``GRPOTrainer`` with a choice of group loss.

        trainer = GroupTrainer(model, reward, config, train_dataset=prompts, loss="dqo", embedder=embed)

    Losses, with their ``loss_kwargs`` (``qf.qempo_loss`` and so on say what they mean): "grpo", TRL's own loss with
    whatever ``args.loss_type`` names; "qempo" (lam); "qempo_kl" (lam, mu); "spl" (alpha, beta); "gvpo" (beta);
    "rspo" (k); "dqo" (alpha, beta, baseline). All but "grpo" are losses of sequence log-probs (sums over tokens).
    Their coefficients dloss/dlogp are computed once per rollout, on whole groups gathered from all ranks, and travel
    as one number per row: TRL may shuffle and split the rollout as it likes. ``rewards`` is the weighted sum of the
    reward functions, not scaled. The reference is TRL's reference model, loaded where beta > 0; ``args.beta`` is beta
    unless loss_kwargs has it.

    Args:
        model, reward_funcs, args, **kwargs: as ``trl.GRPOTrainer``, by keyword past args. With a loss other than
            "grpo" each rollout has to serve one optimiser step: num_iterations = 1 and gradient_accumulation_steps a
            multiple of steps_per_generation, as by default. A ``QualityConstraintCallback`` among the callbacks sets
            lam and mu ("qempo_kl"), lam ("qempo") or alpha and beta ("spl").
        loss: name of the loss; "grpo" where it is not given.
        loss_kwargs: its hyperparameters.
        embedder: completions as text, list of S, to embeddings (S, d); "dqo" trains with it, and with any other loss,
            "grpo" too, that is given by name it has the diversity logged.
        fused: score with ``linear_logps`` (see ``use_fused_logps``); False leaves what stands in TRL's seam.
        grad, tau: as ``qf.linear_logps``, for the calls of this trainer. At their defaults an outer ``use_fused_logps``
            counts.

    Logged besides TRL's own metrics: diversity_gain and logdet (with an embedder), lam and mu (with a constraint),
    sequence_entropy and kl (where the loss reads log-probs and reference).

    Raises:
        ValueError, TypeError: an unknown loss; hyperparameters that it does not take or out of range; a setting that it
            does not read; several optimiser steps per rollout; a rollout that splits a group; a completion without
            any reward.
        ImportError: a version of TRL without the fused log-prob kernel.
    """

    model: Any
    args: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *,
        loss: str | None = None,
        loss_kwargs: Mapping[str, Any] | None = None,
        embedder: Embedder | None = None,
        fused: bool = True,
        grad: str = "auto",
        tau: float | None = None,
        **kwargs: Any,
    ) -> None:
        args = GRPOConfig() if args is None else copy.copy(args)
        if loss is None and embedder is not None:
            wanted = "loss= named too: 'dqo' trains with it, any other only logs the diversity"
            _check.bad_value("embedder", wanted, "an embedder alone")
        loss = "grpo" if loss is None else loss
        _check.choice("loss", loss, tuple(GROUP_LOSSES))
        self._loss_name, self._method, self._embedder = loss, GROUP_LOSSES[loss], embedder
        self._seam = (fused, grad, tau)
        self._kwargs = dict(loss_kwargs or {})
        constraint = _constraint(kwargs.get("callbacks"))
        if self._method is None:
            if loss_kwargs or constraint is not None:
                got = "loss_kwargs" if loss_kwargs else "a QualityConstraintCallback"
                _check.bad_value("loss", f"one that takes {got}; 'grpo' has its settings in args", repr(loss))
        else:
            self._prepare_loss(self._method, args, constraint)
        if args.beta:
            wanted = "one loaded from a name or a folder (save_pretrained it first)"
            refuse_no_reference(model, kwargs.get("peft_config"), "model", wanted)
        with self._fused():
            super().__init__(model, reward_funcs, args, **kwargs)

    def _prepare_loss(self, method: Method, args: Any, constraint: qf.QualityConstraint | None) -> None:
        """Check that this loss can run with args, and ask TRL for a reference model where it reads one."""
        refuse_unused(args, _UNUSED, self._loss_name)
        steps, per_rollout = args.gradient_accumulation_steps, args.steps_per_generation
        if args.num_iterations != 1 or steps % per_rollout:
            # The coefficients hold at the policy that sampled.
            wanted = "num_iterations = 1 and gradient_accumulation_steps a multiple of steps_per_generation, so that "
            wanted += f"each rollout serves one optimiser step, with loss={self._loss_name!r}"
            _check.bad_value("args", wanted, f"{args.num_iterations}, {steps} and {per_rollout}")
        if method.takes("embeddings") and self._embedder is None:
            wanted = f"a callable from texts to embeddings (S, d) with loss={self._loss_name!r}"
            _check.bad_value("embedder", wanted, None)
        self._kwargs = with_beta(method, self._kwargs, args.beta or None)  # 0 is where nobody set it
        refuse_unknown(self._loss_name, self._kwargs, method.settings)
        if constraint is not None:
            self._check_constraint(constraint)
        elif "beta" not in self._kwargs and args.beta:
            _check.bad_value("args.beta", f"0 with loss={self._loss_name!r}, which has no beta", args.beta)
        settings = self._settings(constraint)
        size = args.num_generations
        zeros = torch.zeros(size, dtype=torch.float32, device="cpu")
        stand_in = {
            "logps": zeros,
            "ref_logps": zeros,
            "rewards": torch.arange(size, dtype=torch.int64, device="cpu") / size,
            "group_size": size,
        }
        stand_in = method.reads(stand_in | {"embeddings": torch.eye(size, dtype=torch.float32, device="cpu")})
        tried(lambda: method.loss(**stand_in, **settings))
        tell_where_kl_is_qempo(method, settings, constraint)
        _tell_where_sampling_is_cut(args, method.name)
        beta = method.alpha_beta(settings).beta
        reads = beta > 0 or (constraint is not None and constraint.max_kl is not None)
        # TRL scores a reference exactly where args.beta is not 0.
        args.beta = (beta or 1.0) if reads else 0.0

    def _check_constraint(self, constraint: qf.QualityConstraint) -> None:
        loss, names = repr(self._loss_name), _FROM_CONSTRAINT.get(self._loss_name)
        if names is None:
            *others, last = map(repr, _FROM_CONSTRAINT)
            _check.bad_value("loss", f"{', '.join(others)} or {last} with a QualityConstraint", loss)
        for name in set(names) & set(self._kwargs):
            _check.bad_value("loss_kwargs", f"no {name}, since a QualityConstraint sets it", self._kwargs[name])
        if names == ("lam",) and (constraint.max_kl is not None or float(constraint.mu)):
            _check.bad_value("loss", "'qempo_kl' or 'spl' with a constraint that has max_kl or mu", loss)

    def _settings(self, constraint: qf.QualityConstraint | None) -> dict[str, Any]:
        """loss_kwargs with the constraint's multipliers as they are now."""
        if constraint is None:
            return self._kwargs
        return {**self._kwargs, **{n: float(getattr(constraint, n)) for n in _FROM_CONSTRAINT[self._loss_name]}}

    def _fused(self) -> contextlib.AbstractContextManager[Any]:
        return own_logps(*self._seam)

    def _record(self, name: str, value: Any) -> None:
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(float(value))

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rollout = (completions, rewards)
        _check_whole(len(rewards), self._group_size())
        return rewards

    def _group_size(self) -> int:
        size: Any = self.num_generations if self.model.training else self.num_generations_eval
        return size

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self._fused():
            output = super()._generate_and_score_completions(inputs)
            completions, per_function = self._rollout
            size = self._group_size()
            embeddings = self._embed(completions)
            if embeddings is not None and size > 1:
                self._record_diversity(embeddings, size)
            if self._method is not None:
                self._add_coefficients(self._method, output, per_function, embeddings, size)
        return output

    def _embed(self, completions: Sequence[Any]) -> torch.Tensor | None:
        """(S, d) of all ranks."""
        if self._embedder is None:
            return None
        texts = [c if isinstance(c, str) else "\n".join(str(message["content"]) for message in c) for c in completions]
        embeddings = torch.as_tensor(self._embedder(texts), device=self.accelerator.device)
        _check.tensor("embedder(...)", embeddings, shape=(len(texts), -1))
        return self.accelerator.gather(embeddings.detach())

    def _record_diversity(self, embeddings: torch.Tensor, size: int) -> None:
        diversity = qf.dpp_gains(embeddings.float().view(-1, size, embeddings.shape[1]))
        self._record("diversity_gain", diversity.gains.mean())
        self._record("logdet", diversity.logdet.mean())

    def _add_coefficients(
        self,
        method: Method,
        output: dict[str, Any],
        per_function: torch.Tensor,
        embeddings: torch.Tensor | None,
        size: int,
    ) -> None:
        """Give each row its dloss/dlogp, from whole groups of all ranks."""
        if bool(per_function.isnan().all(1).any()):
            _check.bad_value("reward_funcs", "a reward from at least one function for each completion", "none for some")
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(1)
        constraint = _constraint(self.callback_handler.callbacks)
        settings = self._settings(constraint)
        mask = _response_mask(output)
        reference = output.get("ref_per_token_logps")
        ref_logps = None if reference is None else self.accelerator.gather((reference * mask).sum(1))
        if method.alpha_beta(settings).alpha > 0:
            tokens = output.get("old_per_token_logps")
            if tokens is None:
                with torch.no_grad():
                    tokens, *_ = self._token_logps(self.model, output, self.args.per_device_train_batch_size)
            logps = self.accelerator.gather((tokens * mask).sum(1))
            self._record("sequence_entropy", -logps.mean())
            if ref_logps is not None:
                self._record("kl", (logps - ref_logps).mean())
        else:
            logps = torch.zeros_like(rewards)  # the coefficients do not depend on it
        groups = {"ref_logps": ref_logps, "rewards": rewards, "embeddings": embeddings, "group_size": size}
        loss, coefficients = qf.coefficients(method.loss, logps, **method.reads(groups), **settings)
        first = self.accelerator.process_index * len(mask)
        output["coefficients"] = coefficients[first : first + len(mask)]
        # The loss itself is not always linear in the log-probs (GVPO): what is left of it is a constant.
        output["loss_offset"] = loss - (coefficients * logps).sum()
        if constraint is not None and self.model.training:
            self._record("lam", constraint.lam)
            self._record("mu", constraint.mu)
            kl = None if ref_logps is None else logps - ref_logps
            next(_callbacks(self.callback_handler.callbacks)).observe(rewards, kl)

    def _token_logps(self, model: Any, inputs: Mapping[str, Any], batch_size: int | None = None, **kw: Any) -> Any:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        keep = inputs["completion_ids"].shape[1]
        images = {name: inputs[name] for name in _IMAGES if name in inputs}
        return self._get_per_token_logps_and_entropies(model, ids, mask, keep, batch_size, **kw, **images)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        with self._fused():
            if self._method is None:
                with known_coefficients(_of_tokens(self._of_trls_loss(inputs), inputs)):
                    return super()._compute_loss(model, inputs)
            mask = _response_mask(inputs)
            # vLLM's sampler is not quite the policy: TRL's ratio corrects for it, token by token.
            weights = inputs["coefficients"].unsqueeze(1) * mask * inputs.get("importance_sampling_ratio", 1.0)
            with known_coefficients(_of_tokens(weights, inputs)):
                logps, entropy, aux_loss = self._token_logps(
                    model, inputs, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
                )
        weighted = (weights * logps).sum()
        accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
        rollouts = accumulated / self.args.steps_per_generation if self.model.training else 1
        # Ranks are averaged and micro-batches added: the coefficients of all rows make the gradient of one loss.
        loss = weighted * self.accelerator.num_processes / rollouts + inputs["loss_offset"] / accumulated
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulated
        sums = self.accelerator.reduce(torch.stack([(entropy.detach() * mask).sum(), mask.sum()]), reduction="sum")
        self._record("entropy", sums[0] / sums[1].clamp(min=1))
        return loss

    def _of_trls_loss(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """(S, L) dloss/dlogps of TRL's own loss, up to a factor; None where it is not known before the forward.

        Where TRL scores no old policy the policy is the one that sampled, and all ratios are 1: whatever the loss and
        the level of its ratios, a token's coefficient is the advantage, over the tokens of its row where the loss
        averages over rows.
        """
        args = self.args
        plain = self.beta == 0 and self.top_entropy_quantile == 1 and self.off_policy_mask_threshold is None
        plain = plain and not self._entropy_bonus_enabled and (args.delta is None or args.delta > 1)
        if not plain or inputs.get("old_per_token_logps") is not None or self.loss_type not in _RATIO_LOSSES:
            return None
        mask, advantages = _response_mask(inputs), inputs["advantages"]
        if advantages.ndim == 2 and self.importance_sampling_level == "sequence":
            return None  # one ratio for all advantages of a row
        weights = mask * (advantages if advantages.ndim == 2 else advantages.unsqueeze(1))
        return weights / mask.sum(1, keepdim=True).clamp(min=1) if self.loss_type in _ROW_MEANS else weights


def _of_tokens(weights: torch.Tensor | None, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Weights (S, L) of the completions as TRL's seam has its rows; the prompt's are 0."""
    if weights is None:
        return None
    before = inputs["prompt_ids"].shape[1], 0
    counted = torch.nn.functional.pad(inputs["completion_mask"] != 0, before)
    return seam_rows(torch.nn.functional.pad(weights, before), counted)


def _tell_where_sampling_is_cut(args: Any, loss: str) -> None:
    names = ("top_p", "top_k", "min_p")
    given = {name: getattr(args, name) for name in names} | (args.generation_kwargs or {})  # as TRL merges them
    cut = [f"{n}={given[n]}" for n in names if given[n] and (given[n] < 1 if n == "top_p" else given[n] > 0)]
    if cut:
        text = "loss=%r takes samples of the policy that it scores, and %s cuts the tails off: the two policies differ"
        logger.warning(text, loss, ", ".join(cut))


def _callbacks(callbacks: Sequence[Any] | None) -> Any:
    return (c for c in callbacks or () if isinstance(c, QualityConstraintCallback))


def _constraint(callbacks: Sequence[Any] | None) -> qf.QualityConstraint | None:
    callback = next(_callbacks(callbacks), None)
    return None if callback is None else callback.constraint


def _response_mask(inputs: Mapping[str, Any]) -> torch.Tensor:
    """(S, L): 1 at the tokens that the policy wrote; what a tool returned is not."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _check_whole(rows: int, size: int) -> None:
    if rows % size:
        _check.bad_value("batch", f"whole groups of num_generations = {size} rows over all ranks", f"{rows} rows")
