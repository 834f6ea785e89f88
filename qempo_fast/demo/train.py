"""The training loop: four methods, one budget, one loop. Copy it: only the loss line knows which method runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.models.llama.modeling_llama import LlamaModel

import qempo_fast as qf

from .model import Rollout, SplitModel
from .task import Answer, Task

# In the order they are trained: GRPO first, because its quality and KL are what the two last are held to.
METHODS = ("grpo", "grpo+dqo", "qempo-kl", "spl")
HELD = ("qempo-kl", "spl")


@dataclass(frozen=True)
class Settings:
    """The budget that all methods share, and each method's own numbers."""

    steps: int = 60
    samples: int = 32  # a step; one optimiser step each
    group_size: int = 16
    learning_rate: float = 2e-5
    clip_norm: float = 1.0
    trained_layers: int = 10
    max_tokens: int = 6
    evaluation_batches: int = 4  # of 100 answers
    dqo_alpha: float = 1.0
    spl_ratio: float = 2.0  # alpha / beta
    quality_margin: float = 0.02  # the floor is GRPO's quality less this
    constraint_lr: float = 1.0
    constraint_kl_lr: float = 0.1


@dataclass(frozen=True)
class Step:
    """What one optimiser step saw."""

    quality: float
    entropy: float  # nats an answer, estimated as -mean log pi(y)
    kl: float  # nats, to the base model
    tokens: float  # mean length
    lam: float | None
    mu: float | None
    seconds: float


@dataclass(frozen=True)
class Batch:
    """What a loss may look at: S answers in groups, as they were just sampled."""

    rollout: Rollout
    answers: list[Answer]
    rewards: torch.Tensor  # (S,)
    scores: qf.SequenceLogps  # of the policy, with its graph
    reference: torch.Tensor  # (S,) log-probs of the base model


def make_constraint(
    method: str, settings: Settings, *, min_reward: float, max_kl: float | None, vocabulary: int
) -> qf.QualityConstraint:
    """The multipliers of QEMPO-KL (reward and KL held; QEMPO where max_kl is None) or SPL (reward held, ratio fixed).

    lam starts at its ceiling, max_tokens * log V, the most nats that an answer can hold: there a right answer outweighs
    any gain of entropy, so quality comes first. Once it passes min_reward, lam falls and the rest buys entropy. Without
    the ceiling lam winds up while the untrained model is far under the floor (from 10 to 130 in 5 steps and to 2000 in
    15), and a run of 60 steps is too short to come down from there.
    """
    most = settings.max_tokens * math.log(vocabulary)
    held = method == "qempo-kl"
    return qf.QualityConstraint(
        min_reward,
        max_kl=max_kl if held else None,
        lr=settings.constraint_lr,
        kl_lr=settings.constraint_kl_lr,
        lam=most,
        lam_max=most,
        # Without max_kl mu stays as it is, and with it alpha / beta = (1 + mu) / mu.
        mu=0.0 if held else 1.0 / (settings.spl_ratio - 1.0),
        step="multiplicative",
    )


def train(
    method: str | Callable[[Batch], torch.Tensor],
    model: SplitModel,
    task: Task,
    settings: Settings,
    constraint: qf.QualityConstraint | None,
    generator: torch.Generator,
    on_step: Callable[[Step], None],
) -> LlamaModel:
    """Train the top layers by one method, or by a loss of your own; on_step is called after each optimiser step."""
    policy = model.new_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    k = settings.group_size
    for _ in range(settings.steps):
        start = time.perf_counter()
        rollout = model.sample(policy, settings.samples, generator)
        answers, rewards = task.judge(rollout)
        scores = model.logps(policy, rollout)
        with torch.no_grad():
            reference = model.logps(model.reference, rollout).logps
        kl = (scores.logps.detach() - reference).mean()

        if callable(method):
            loss = method(Batch(rollout, answers, rewards, scores, reference))
        elif method == "grpo":
            advantages = qf.group_advantages(rewards, group_size=k)
            # One step a rollout, so the policy that sampled is the policy: the ratio is 1 and only its gradient counts.
            old = scores.token_logps.detach()
            loss = qf.grpo_loss(scores.token_logps, old, advantages, rollout.cu_seqlens)
        elif method == "grpo+dqo":
            loss = qf.dqo_loss(scores.logps, rewards, task.embed(answers), alpha=settings.dqo_alpha, group_size=k)
        elif method == "qempo-kl" and constraint is not None:
            lam, mu = float(constraint.lam), float(constraint.mu)
            loss = qf.qempo_kl_loss(scores.logps, reference, rewards, lam=lam, mu=mu, group_size=k)
        elif method == "spl" and constraint is not None:
            alpha, beta = constraint.alpha, constraint.beta
            loss = qf.spl_loss(scores.logps, reference, rewards, alpha=alpha, beta=beta, group_size=k)
        else:
            raise ValueError(f"method: wanted one of {METHODS}, the last two with a constraint, got {method!r}")

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.clip_norm)
        optimizer.step()
        multipliers = (None, None) if constraint is None else (float(constraint.lam), float(constraint.mu))
        if constraint is not None:
            constraint.update(rewards, kl=None if constraint.max_kl is None else kl)
        on_step(
            Step(
                quality=float(rewards.mean()),
                entropy=-float(scores.logps.detach().mean()),
                kl=float(kl),
                tokens=float(scores.lengths.float().mean()),
                lam=multipliers[0],
                mu=multipliers[1],
                seconds=time.perf_counter() - start,
            )
        )
    return policy
