"""Stored groups of k responses with rewards, trained on DPOTrainer's rails."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig

import qempo_fast as qf

from ... import _check
from ..methods import METHODS
from .preference import _UNUSED, ScoreTrainer
from .settings import refuse_unknown, refuse_unused, tell_where_kl_is_qempo, tried, with_beta

logger = logging.getLogger(__name__)

# Stored responses are not samples of the policy: only the family's squared form, qf.variance_loss, is right for them.
OFFLINE_LOSSES = {method.name: method for method in METHODS if method.stored}
_COLUMNS = {"prompt", "responses", "rewards"}


class OfflineGroupTrainer(ScoreTrainer):
    """Train on stored groups: one row of the dataset is a prompt, its responses and their rewards.

        trainer = OfflineGroupTrainer(model, args=config, train_dataset=groups, loss="gvpo")

    The dataset has the columns "prompt" (text), "responses" (two or more texts; their number may differ) and "rewards"
    (as many numbers). The loss is the squared form of the (alpha, beta) family, ``qf.variance_loss``, whose optimum
    does not depend on who wrote the responses; the policy-gradient forms need samples of the policy (``GroupTrainer``).
    Losses: "gvpo" (beta), "spl" (alpha, beta), "qempo" (lam; no reference model is loaded), "qempo_kl" (lam, mu).

    Args:
        model, ref_model, args, **kwargs: as ``trl.DPOTrainer``; ``per_device_train_batch_size`` counts groups. A batch
            never splits a group. ``args.beta`` is beta unless loss_kwargs has it.
        loss, loss_kwargs, fused, grad, tau: as ``PreferenceTrainer``.

    Raises:
        ValueError, TypeError: as ``PreferenceTrainer``; a dataset without these columns, a group of fewer than two
            responses or with another number of rewards.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *,
        loss: str = "gvpo",
        loss_kwargs: Mapping[str, Any] | None = None,
        fused: bool = True,
        grad: str = "auto",
        tau: float | None = None,
        **kwargs: Any,
    ) -> None:
        args = DPOConfig() if args is None else copy.copy(args)
        _check.choice("loss", loss, tuple(OFFLINE_LOSSES))
        refuse_unused(args, (*_UNUSED, "precompute_ref_log_probs"), loss)
        method = OFFLINE_LOSSES[loss]
        kw = with_beta(method, loss_kwargs, args.beta)
        refuse_unknown(loss, kw, method.numbers)
        for name in {"alpha", "lam"} & set(kw):
            _check.positive(name, kw[name])
        self._alpha_beta = tried(lambda: method.alpha_beta(kw))
        tell_where_kl_is_qempo(method, kw)
        stand_in = torch.zeros(2, dtype=torch.float32, device="cpu")
        qf.variance_loss(stand_in, stand_in, stand_in, group_size=2, **self._alpha_beta._asdict())
        logps: dict[str, Any] = {"fused": fused, "grad": grad, "tau": tau}
        super().__init__(model, ref_model, args, reference=self._alpha_beta.beta > 0, **logps, **kwargs)
        if kwargs.get("data_collator") is None:
            self.data_collator = GroupCollator(self._tokenizer.pad_token_id, args.max_length)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Any:
        columns = set(next(iter(dataset)))
        if {"prompt_ids", "response_ids", "rewards"} <= columns:
            return dataset
        if not columns >= _COLUMNS:
            wanted = "the columns prompt, responses and rewards"
            _check.bad_value(f"{dataset_name}_dataset", wanted, ", ".join(sorted(columns)))
        if columns > _COLUMNS:
            text = "%s_dataset: read are prompt, responses and rewards, not %s; no log-probs of the sampler are needed"
            logger.warning(text, dataset_name, ", ".join(sorted(columns - _COLUMNS)))
        eos = self._tokenizer.eos_token

        def tokenize(row: dict[str, Any]) -> dict[str, Any]:
            texts, rewards = row["responses"], row["rewards"]
            if len(texts) < 2 or len(rewards) != len(texts):
                wanted = "two or more responses and as many rewards in each row"
                _check.bad_value(f"{dataset_name}_dataset", wanted, f"{len(texts)} and {len(rewards)}")
            whole = [text if text.endswith(eos) else text + eos for text in texts]
            # Apart from the prompt: its tokens do not depend on the response, and the response starts where it ends.
            ids = processing_class(whole, add_special_tokens=False)["input_ids"]
            return {"prompt_ids": processing_class(row["prompt"])["input_ids"], "response_ids": ids}

        return dataset.map(tokenize)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["prompt_ids", "response_ids", "rewards"]

    def _loss(self, logps: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        refs = self._reference_logps(inputs) if self._reference else None
        alpha, beta = self._alpha_beta
        rewards = inputs["rewards"]
        loss = qf.variance_loss(logps, refs, rewards, alpha=alpha, beta=beta, offsets=inputs["offsets"])
        self._record("reward", rewards)
        self._record("logps", logps)
        if refs is not None:
            self._record("logps/ref", refs)
        return loss


@dataclass
class GroupCollator:
    """Rows of all responses of all prompts, group by group, with offsets (G + 1,) and rewards (S,)."""

    pad_token_id: int
    max_length: int | None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows, masks, rewards, offsets = [], [], [], [0]
        for example in examples:
            prompt = example["prompt_ids"]
            for ids in example["response_ids"]:
                rows.append(torch.tensor((prompt + ids)[: self.max_length], dtype=torch.int64, device="cpu"))
                masks.append(
                    torch.tensor(
                        ([0] * len(prompt) + [1] * len(ids))[: self.max_length], dtype=torch.int64, device="cpu"
                    )
                )
            rewards += example["rewards"]
            offsets.append(len(rows))
        attention = [torch.ones_like(row) for row in rows]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence(attention, batch_first=True),
            "completion_mask": pad_sequence(masks, batch_first=True),
            "rewards": torch.tensor(rewards, dtype=torch.float32, device="cpu"),
            "offsets": torch.tensor(offsets, dtype=torch.int64, device="cpu"),
        }
