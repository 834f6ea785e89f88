"""QualityConstraint inside a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

import qempo_fast as qf

from ... import _check

_SETTINGS = ("min_reward", "max_kl", "lr", "kl_lr", "lam_min", "lam_max", "mu_max", "step", "damping", "smoothing")


class QualityConstraintCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Moves a ``QualityConstraint``'s multipliers after each optimiser step of a ``GroupTrainer``.

    The trainer reads lam and mu, or alpha and beta, at each rollout and reports the rollout's rewards (and KL) here.
    Checkpoints hold the multipliers in ``trainer_state.json``; ``train(resume_from_checkpoint=...)`` takes them up.

    Args:
        constraint: a ``qf.QualityConstraint``, or a mapping of its arguments.
    """

    def __init__(self, constraint: qf.QualityConstraint | Mapping[str, Any]) -> None:
        if isinstance(constraint, Mapping):
            constraint = qf.QualityConstraint(**constraint)
        if not isinstance(constraint, qf.QualityConstraint):
            _check.bad_type("constraint", "a QualityConstraint", type(constraint).__name__)
        self.constraint = constraint
        self._seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def observe(self, rewards: torch.Tensor, kl: torch.Tensor | None) -> None:
        """Rewards, and the samples' log-ratios to the reference, of one rollout on all ranks."""
        self._seen.append((rewards, kl))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._seen:
            rewards = torch.cat([rewards for rewards, _ in self._seen])
            ratios = [kl for _, kl in self._seen if kl is not None]
            self.constraint.update(rewards, kl=None if self.constraint.max_kl is None else torch.cat(ratios))
            self._seen = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seen = []
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if state.global_step and saved:
            self.buffers = saved["attributes"]["buffers"]

    @property
    def buffers(self) -> dict[str, Any]:
        """The constraint's state_dict as numbers and lists: multipliers, and what damping remembers."""
        return {name: x.tolist() for name, x in self.constraint.state_dict().items()}

    @buffers.setter
    def buffers(self, saved: Mapping[str, Any]) -> None:
        # In float64: torch's default dtype would round what a checkpoint holds.
        states = {name: torch.tensor(x, dtype=torch.float64, device="cpu") for name, x in saved.items()}
        self.constraint.load_state_dict(states)

    def state(self) -> dict[str, Any]:
        settings = {name: getattr(self.constraint, name) for name in _SETTINGS}
        settings |= {"lam": float(self.constraint.lam), "mu": float(self.constraint.mu)}
        return {"args": {"constraint": settings}, "attributes": {"buffers": self.buffers}}
