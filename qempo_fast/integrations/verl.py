"""verl: importing this module registers group losses and puts linear_logps in verl's fused log-prob slots.

    VERL_USE_EXTERNAL_MODULES=qempo_fast.integrations.verl         # every process that imports verl imports this too
    actor_rollout_ref.model.external_lib=qempo_fast.integrations.verl      # or: the workers only

docs/integrations/verl.md has the settings. Tested against verl 0.9.1 on CPU; not yet run in a training job on GPUs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .. import _check
from . import missing, scoring
from .known import scored
from .methods import group_advantages

try:
    import verl.utils.experimental.torch_functional as _torch_slot
    import verl.utils.kernel.linear_cross_entropy as _triton_slot
    from verl.trainer.ppo import core_algos
except ModuleNotFoundError as error:
    raise missing(error, "verl") from error

# verl hands the whole batch, log-probs included, to the estimator of this name only.
SLOT = "gdpo"
POLICY_LOSS = "qempo_sequence"
EMBEDDING = "qempo_embedding"

# Of both slots: what use_fused_logps was last called with.
_options: dict[str, Any] = {}

# What this module takes the place of, and what that must accept: checked at import, so that an upgrade fails loudly.
_HOOKS: tuple[tuple[Any, str, tuple[str, ...]], ...] = (
    (core_algos, "register_policy_loss", ("name",)),
    (core_algos, "compute_gdpo_outcome_advantage", ("token_level_rewards", "response_mask", "index", "batch")),
    (core_algos, "agg_loss", ("loss_mat", "loss_mask", "loss_agg_mode")),
    (_triton_slot.LinearCrossEntropy, "forward", ("hidden", "weight", "labels", "temperature", "reduction")),
    (_torch_slot.FusedLinearForPPO, "forward", ("hidden_states", "vocab_weights", "input_ids", "temperature")),
)  # fmt: skip


def check_hooks() -> None:
    """Raise ImportError unless verl still has every hook, with the arguments this module gives or takes."""
    for owner, name, wanted in _HOOKS:
        found = inspect.signature(getattr(owner, name)).parameters if hasattr(owner, name) else None
        if found is None or not set(wanted) <= set(found):
            got = "no such name" if found is None else f"arguments {list(found)}"
            raise ImportError(f"verl: wanted {owner.__name__}.{name}{wanted} as verl 0.9.1 has it, got {got}")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's Triton slot by ``linear_logps``: flat log-probs and entropies of (..., D) hidden states.

    Args:
        hidden: (..., D); weight: (V, D), or this rank's rows with dist_process_group; labels: (...), 1-D or 2-D.
        temperature: a number, a tensor of one, or one for each label.
        reduction: "none"; verl asks for no other.
        dist_process_group: the ranks that hold the vocabulary's shards.

    Returns:
        log-probs (num_tokens,) and entropies (num_tokens,), float32.

    Raises:
        TypeError, ValueError: as linear_logps; another reduction.
    """
    _check.choice("reduction", str(reduction).lower(), ("none",))
    if isinstance(temperature, torch.Tensor):
        temperature = float(temperature) if temperature.numel() == 1 else temperature.reshape(-1)
    out = scored(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature=temperature, entropy=True,
        process_group=dist_process_group, **_options,
    )  # fmt: skip
    assert out.entropy is not None
    return out.logps, out.entropy


def _fused_linear_for_ppo(
    self: Any,
    hidden_states: torch.Tensor,
    vocab_weights: torch.Tensor,
    input_ids: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    logps, entropy = linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)
    return logps.reshape(input_ids.shape), entropy.reshape(input_ids.shape)


def use_fused_logps(
    *,
    grad: str = "auto",
    tau: float | None = None,
    logits_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> None:
    """Put linear_logps in both slots of ``actor_rollout_ref.model.use_fused_kernels=True``; importing this does it.

    Args:
        grad, tau, logits_dtype, batch_invariant: as ``qf.linear_logps``, for both slots. A model's dtype is known in
            its first step only: float32 logits of float64 hidden states raise there.

    Raises:
        ImportError: verl lacks a hook.
        TypeError, ValueError: an argument.
    """
    _options.update(scoring(grad, tau, logits_dtype, batch_invariant))
    check_hooks()
    _triton_slot.linear_cross_entropy = linear_cross_entropy
    _torch_slot.FusedLinearForPPO.forward = _fused_linear_for_ppo


def group_estimator(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Any,
    config: Any = None,
    non_tensor_batch: Mapping[str, Any] | None = None,
    batch: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's "gdpo" estimator where ``algorithm.qempo_fast.loss`` is unset, else a group loss's advantages.

        A_i = -S dL/dl_i at the old policy's log-probs, the same for all tokens of response i

    Derived: with policy_loss.loss_mode=qempo_sequence the first step's gradient is the group loss's own.

    Args:
        token_level_rewards, response_mask: (S, T). The reward of a response is the sum over its tokens.
        index: (S,) group ids (verl's uid).
        config: verl's algorithm section; its qempo_fast entry names the loss and its hyperparameters.
        non_tensor_batch: for loss=dqo, "qempo_embedding", (S, d), as a reward function returns it.
        batch: old_log_probs (S, T), and ref_log_prob for losses that have a reference.

    Returns:
        (advantages, returns), (S, T) both, 0 outside the mask.

    Raises:
        TypeError, ValueError: an unknown loss or hyperparameter; what the loss needs and the batch lacks.
    """
    settings = None if config is None else config.get("qempo_fast", None)
    if settings is None:
        data = {"config": config, "non_tensor_batch": non_tensor_batch, "batch": batch}
        return core_algos.compute_gdpo_outcome_advantage(
            token_level_rewards=token_level_rewards, response_mask=response_mask, index=index, **data, **kwargs
        )
    hyperparameters = {str(key): value for key, value in dict(settings).items()}
    loss = hyperparameters.pop("loss", None)
    mask = response_mask.to(token_level_rewards.dtype)

    def total(name: str) -> torch.Tensor | None:
        return (batch[name] * mask).sum(-1) if batch is not None and name in batch.keys() else None  # noqa: SIM118

    logps = total("old_log_probs")
    if logps is None:
        _check.bad_value("batch", "old_log_probs, which group losses start from", "none")
    rows = (non_tensor_batch or {}).get(EMBEDDING)
    ids = torch.as_tensor(np.unique(np.asarray(index), return_inverse=True)[1].reshape(-1), device=mask.device)
    values = group_advantages(
        loss, ids, logps, (token_level_rewards * mask).sum(-1), ref_logps=total("ref_log_prob"),
        embeddings=None if rows is None else torch.as_tensor(np.stack(list(rows)), device=mask.device).float(),
        **hyperparameters,
    )  # fmt: skip
    advantages = values.to(mask.dtype).unsqueeze(-1) * mask
    return advantages, advantages


def sequence_policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """verl policy loss "qempo_sequence": L = -mean_i sum_t A_it log p_it, the gradient of the group loss itself.

    Sums over tokens and means over sequences whatever loss_agg_mode says, as group losses are defined; neither ratio
    nor clip, so it is meant for one optimiser step a rollout (ppo_mini_batch_size the whole batch).

    Args:
        old_log_prob, log_prob, advantages, response_mask: (S, T).
        config: verl's actor config; its global_batch_info makes the mean independent of the data-parallel size.
        rollout_is_weights: (S, T) or None, multiplies each token's term.

    Returns:
        The loss, and metrics: "actor/ppo_kl", the mean of old - new log-probs.
    """
    terms = -advantages * log_prob
    if rollout_is_weights is not None:
        terms = terms * rollout_is_weights
    info = {} if config is None else dict(config.global_batch_info)
    loss = core_algos.agg_loss(
        loss_mat=terms, loss_mask=response_mask, loss_agg_mode="seq-mean-token-sum", **info
    )  # fmt: skip
    mask = response_mask.to(log_prob.dtype)
    kl = ((old_log_prob - log_prob.detach()) * mask).sum() / mask.sum().clamp_min(1)
    return loss, {"actor/ppo_kl": kl.item()}


def register() -> None:
    """Enter the estimator and the policy loss in verl's registries; importing this module does it."""
    check_hooks()
    # verl's own "gdpo" stays what this name means without algorithm.qempo_fast.
    core_algos.ADV_ESTIMATOR_REGISTRY[SLOT] = group_estimator
    core_algos.register_policy_loss(POLICY_LOSS)(sequence_policy_loss)


register()
use_fused_logps()
