"""QualityConstraint in training: a GRU held at a floor and a cap, and a softmax on which an integral winds up."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from science import D, entropy, kl

import qempo_fast as qf

# ---- a GRU that writes four of six letters; right where the last letter is the first: 216 of 1296 answers, 0.24 of
# the untrained policy's. All answers are enumerated, so reward, KL and entropy are exact.
LETTERS, LENGTH, SAMPLES, GROUP = 6, 4, 64, 16
ANSWERS = torch.cartesian_prod(*[torch.arange(LETTERS)] * LENGTH)
RIGHT = (ANSWERS[:, 0] == ANSWERS[:, -1]).to(D)
FLOOR, CAP = 0.9, 2.0


class Policy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(LETTERS + 1, 24)
        self.gru = torch.nn.GRU(24, 24, batch_first=True)
        self.head = torch.nn.Linear(24, LETTERS, bias=False)
        with torch.no_grad():
            self.head.weight.mul_(4.0)

    def logps(self, answers: torch.Tensor) -> torch.Tensor:
        """Token log-probs, by the fused op."""
        before = torch.nn.functional.pad(answers[:, :-1], (1, 0), value=LETTERS)
        return qf.linear_logps(self.gru(self.embedding(before))[0], self.head.weight, answers).logps

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        token, state, out = torch.full((n, 1), LETTERS), None, []
        for _ in range(LENGTH):
            hidden, state = self.gru(self.embedding(token), state)
            token = torch.multinomial(torch.softmax(self.head(hidden[:, 0]), 1), 1, generator=rng)
            out.append(token)
        return torch.cat(out, 1)

    @torch.no_grad()
    def law(self) -> torch.Tensor:
        return self.logps(ANSWERS).to(D).sum(1)


class Seen(NamedTuple):
    """Exact reward, KL and entropy, every ten steps: (steps / 10,) each."""

    reward: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    reference: torch.Tensor


def train(constraint: qf.QualityConstraint | None, *, seed: int, steps: int = 300) -> Seen:
    """QEMPO-KL under the constraint, or GRPO without one: the same loop, samples and optimiser."""
    torch.manual_seed(seed)
    policy, reference = Policy(), Policy()
    reference.load_state_dict(policy.state_dict())
    rng = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    cu = torch.arange(0, SAMPLES * LENGTH + 1, LENGTH)
    before, rows = reference.law(), []
    for step in range(steps):
        answers = policy.sample(SAMPLES, rng)
        rewards = (answers[:, 0] == answers[:, -1]).float()
        tokens = policy.logps(answers).flatten()
        sums = qf.segment_sum(tokens, cu)
        with torch.no_grad():
            ref = qf.segment_sum(reference.logps(answers).flatten(), cu)
        if constraint is None:
            loss = qf.grpo_loss(tokens, tokens.detach(), qf.group_advantages(rewards, group_size=GROUP), cu)
        else:
            lam, mu = float(constraint.lam), float(constraint.mu)
            loss = qf.qempo_kl_loss(sums, ref, rewards, lam=lam, mu=mu, group_size=GROUP)
            constraint.update(rewards, kl=(sums.detach() - ref).mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            p = policy.law().exp()
            rows.append([float((p * RIGHT).sum()), kl(p, before), entropy(p)])
    return Seen(*torch.tensor(rows, dtype=D).T, before)


def damped() -> qf.QualityConstraint:
    return qf.QualityConstraint(
        FLOOR, max_kl=CAP, step="multiplicative", lr=0.05, kl_lr=0.02, damping=30.0, smoothing=0.9
    )


CONSTRAINTS = {
    "damped": damped,
    # The defaults; this is a problem where an integral alone is slow but does not wind up.
    "defaults": lambda: qf.QualityConstraint(FLOOR, max_kl=CAP),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_gru_is_held_at_its_floor_under_its_cap(name: str, seed: int) -> None:
    constraint = CONSTRAINTS[name]()
    seen = train(constraint, seed=seed)
    # The mean of the last 100 of 300 steps.
    reward, distance, h = (float(x[-10:].mean()) for x in seen[:3])
    assert abs(reward - FLOOR) < 0.07
    assert distance < CAP + 0.1
    best = qf.solve_qempo(RIGHT, seen.reference, min_reward=FLOOR, max_kl=CAP)
    # The most that any policy can have is 5.8 nats; the uniform one, right once in six, has 7.2.
    assert h > entropy(best.probs) - 0.5
    assert float(constraint.lam) == pytest.approx(best.lam, rel=0.6)


def test_grpo_in_the_same_loop_collapses() -> None:
    """The better reward, 1.00, from one answer: the floor buys 5 nats for 0.1 of reward."""
    seen = train(None, seed=0)
    assert float(seen.reward[-10:].mean()) > 0.98
    assert float(seen.entropy[-10:].mean()) < 1.0
    assert float(seen.kl[-10:].mean()) > CAP


def test_damping_keeps_the_kl_from_overshooting() -> None:
    """At equal lr the integral alone passes the cap of 2 by 1.2 nats on its way to the floor; damped, by half of it."""
    integral = qf.QualityConstraint(FLOOR, max_kl=CAP, step="multiplicative", lr=0.05, kl_lr=0.02)
    plain, better = train(integral, seed=0, steps=200), train(damped(), seed=0, steps=200)
    assert float(better.kl.max()) - CAP < 0.6 * (float(plain.kl.max()) - CAP)
    # The first 100 steps nearer the floor, the second 100 with more entropy at the same reward, 0.89.
    assert float(better.reward[:10].mean()) > float(plain.reward[:10].mean()) + 0.03
    assert abs(float(better.reward[10:].mean() - plain.reward[10:].mean())) < 0.02
    assert float(better.entropy[10:].mean()) > float(plain.entropy[10:].mean()) + 0.15


# ---- a softmax over 500 answers, 100 of them right, that starts at reward 0.62 and 2.8 nats.


class Held(NamedTuple):
    """Exact reward and entropy after each step, and lam: (steps,) each."""

    reward: torch.Tensor
    entropy: torch.Tensor
    lam: torch.Tensor


def hold(constraint: qf.QualityConstraint, *, seed: int, steps: int = 600, samples: int = 32) -> Held:
    """QEMPO by Adam 0.05 on groups of 16, with R and lam from the constraint."""
    rng = torch.Generator().manual_seed(seed)
    theta = 2.75 * torch.randn(500, dtype=D, generator=rng)
    theta[:100] += 1.9
    right = (torch.arange(500) < 100).to(D)
    theta.requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.05)
    rows = []
    for _ in range(steps):
        logps = torch.log_softmax(theta, 0)
        p = logps.detach().exp()
        rows.append([float((p * right).sum()), entropy(p), float(constraint.lam)])
        y = torch.multinomial(p, samples, replacement=True, generator=rng)
        loss = qf.qempo_loss(logps[y], right[y], lam=float(constraint.lam), group_size=16)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        constraint.update(right[y])
    return Held(*torch.tensor(rows, dtype=D).T)


def test_damping_stops_the_wind_up() -> None:
    """Four seeds, multiplicative 0.1: the integral's lam passes its answer, 4.3, threefold and reward overshoots."""
    runs = {
        damping: [
            hold(qf.QualityConstraint(0.95, step="multiplicative", lr=0.1, damping=damping, smoothing=0.9), seed=seed)
            for seed in range(4)
        ]
        for damping in (0.0, 30.0)
    }

    def mean(damping: float, what: Callable[[Held], torch.Tensor]) -> float:
        return sum(float(what(run)) for run in runs[damping]) / 4

    def late_error(run: Held) -> torch.Tensor:
        return (run.reward[300:] - 0.95).square().mean().sqrt()

    assert mean(0.0, late_error) > 0.02
    assert mean(30.0, late_error) < 0.7 * mean(0.0, late_error)
    assert mean(30.0, lambda run: run.lam.max()) < 0.85 * mean(0.0, lambda run: run.lam.max())
    # Less of the entropy is lost on the way, and the floor is reached sooner.
    assert mean(30.0, lambda run: run.entropy[300:].mean()) > mean(0.0, lambda run: run.entropy[300:].mean()) + 0.2
    assert mean(30.0, lambda run: run.reward[50]) > mean(0.0, lambda run: run.reward[50]) + 0.05
