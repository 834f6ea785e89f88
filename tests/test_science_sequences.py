"""Responses of several tokens: SPL's temperature is of sequences, which none of tokens gives; and their entropy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from science import D, close, every_group

import qempo_fast as qf

# Tokens: stop, a, b; at most two. Seven responses of one or two tokens, and the state each token is drawn in:
# 0 at the start, 1 after a, 2 after b.
RESPONSES = [[0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]
TOKENS = torch.tensor([token for y in RESPONSES for token in y])
STATES = torch.tensor([state for y in RESPONSES for state in [0, *y][: len(y)]])
CU = torch.tensor([0, 1, 3, 5, 7, 9, 11, 13])
_RNG = torch.Generator().manual_seed(5)
REWARDS, REF_LOGITS = 0.6 * torch.randn(7, dtype=D, generator=_RNG), torch.randn(3, 3, dtype=D, generator=_RNG)


def sequence_logps(logits: torch.Tensor) -> torch.Tensor:
    """(7,) log-probs of the responses under a policy with one row of logits a state, by the public sum over tokens."""
    return qf.segment_sum(torch.log_softmax(logits, 1)[STATES, TOKENS], CU)


REF = sequence_logps(REF_LOGITS)


def conditionals(logps: torch.Tensor) -> torch.Tensor:
    """(3, 3) next-token log-probs of any distribution over the responses: token-level logits that give it back."""
    p = logps.exp()
    rows = [[p[0], p[1:4].sum(), p[4:7].sum()], [*p[1:4]], [*p[4:7]]]
    return torch.log_softmax(torch.tensor(rows, dtype=D).log(), 1)


def descend(coefficients: Callable[[torch.Tensor], torch.Tensor], *, rate: float, steps: int) -> torch.Tensor:
    """Log-probs after gradient descent in the logits; coefficients(log-probs) is dloss/dlogps, expected."""
    logits = REF_LOGITS.clone().requires_grad_()
    for _ in range(steps):
        logps = sequence_logps(logits)
        (grad,) = torch.autograd.grad((coefficients(logps.detach()) * logps).sum(), logits)
        with torch.no_grad():
            logits -= rate * grad
        if float(grad.abs().max()) < 1e-11:
            break
    return sequence_logps(logits).detach()


def expected(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logps: torch.Tensor, k: int) -> torch.Tensor:
    """(7,) coefficients of the responses, over all groups of k of the policy's own."""
    every = every_group(7, k)
    coef = qf.coefficients(lambda x: loss(x, every.flatten()), logps[every].flatten())[1].reshape(-1, k) * len(every)
    weight = logps[every].sum(1).exp()[:, None]
    return torch.zeros(7, dtype=D).index_add(0, every.flatten(), (weight * coef).flatten())


def spl(alpha: float, beta: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda x, y: qf.spl_loss(x, REF[y], REWARDS[y], alpha=alpha, beta=beta, group_size=2)


def sequence_tempered(logps: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.log_softmax(logps / temperature, 0)


def token_tempered(logps: torch.Tensor, temperature: float) -> torch.Tensor:
    return sequence_logps(conditionals(logps) / temperature)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Total variation."""
    return 0.5 * float((a.exp() - b.exp()).abs().sum())


# alpha / beta = 2 of the SPL paper's range; and 0.5, the sharper side.
@pytest.mark.parametrize(("alpha", "beta"), [(1.2, 0.6), (0.6, 1.2)])
def test_the_temperature_is_of_sequences(alpha: float, beta: float) -> None:
    dpo = torch.log_softmax(REF + REWARDS / beta, 0)
    want = sequence_tempered(dpo, alpha / beta)
    online = descend(lambda lp: expected(spl(alpha, beta), lp, 2), rate=3 / alpha, steps=8000)
    close(online.exp(), want.exp(), 1e-9)

    w, x = torch.cartesian_prod(torch.arange(7), torch.arange(7)).T
    preference = torch.sigmoid(REWARDS[w] - REWARDS[x])

    def by_pairs(logps: torch.Tensor) -> torch.Tensor:
        _, (cw, cx) = qf.coefficients(
            lambda a, b: (
                preference * qf.spl_pair_loss(a, b, REF[w], REF[x], alpha=alpha, beta=beta, reduction="none")
            ).mean(),
            (logps[w], logps[x]),
        )
        return torch.zeros(7, dtype=D).index_add(0, w, cw).index_add(0, x, cx)

    close(descend(by_pairs, rate=8 / alpha**2, steps=4000).exp(), want.exp(), 1e-8)

    # A token-level temperature, the same or any other from 0.1 to 10, gives something else.
    assert distance(token_tempered(dpo, alpha / beta), want) > 0.02
    best = min(distance(token_tempered(dpo, 10 ** (i / 200)), want) for i in range(-200, 201))
    assert best > 0.01
    # Not because the tempering is wrong: at 1 both give the policy back.
    close(token_tempered(dpo, 1.0).exp(), dpo.exp(), 1e-12)


def test_where_the_two_temperatures_agree() -> None:
    """Where the second token's law does not depend on the first, and all responses are as long, the two are one."""
    rows = torch.log_softmax(REF_LOGITS[1], 0).expand(3, 3)
    both = (rows[0, 1:, None] + rows[1]).flatten()
    fixed = torch.log_softmax(both, 0)
    tempered = torch.log_softmax(fixed / 1.7, 0)
    first = torch.log_softmax(torch.log_softmax(rows[0, 1:], 0) / 1.7, 0)
    close((first[:, None] + torch.log_softmax(rows[1] / 1.7, 0)).flatten().exp(), tempered.exp(), 1e-12)


@pytest.mark.parametrize("baseline", ["loo", "none"])
def test_the_shaped_reward_holds_the_whole_entropy_gradient(baseline: str) -> None:
    """S_i = -l_i alone gives grad H exactly; adding sum_t H_t to a loss gives only its first term."""
    logits = REF_LOGITS.clone().requires_grad_()
    logps = sequence_logps(logits)
    (want,) = torch.autograd.grad(-(logps.exp() * logps).sum(), logits)

    zero = torch.zeros(7, dtype=D)
    coef = expected(
        lambda x, y: qf.spl_loss(x, None, zero[y], alpha=1.0, beta=0.0, baseline=baseline, group_size=2),
        logps.detach(),
        2,
    )
    (got,) = torch.autograd.grad((coef * sequence_logps(logits)).sum(), logits)
    close(-got, want, 1e-14)

    token_law = torch.log_softmax(logits, 1)
    token_entropy = -(token_law.exp() * token_law).sum(1)
    naive_value = (logps.detach().exp() * qf.segment_sum(token_entropy[STATES], CU)).sum()
    close(naive_value, -(logps.exp() * logps).sum(), 1e-14)
    (naive,) = torch.autograd.grad(naive_value, logits)
    # In value the two are one number; in gradient the naive one is off by a fifth and more.
    assert float((naive - want).norm() / want.norm()) > 0.2
    # States after the first token: only their own entropy matters, and there the two agree.
    close(naive[1:], want[1:], 1e-14)


def grpo(normalize: str | float) -> torch.Tensor:
    """(7 responses' tokens,) expected coefficients of the on-policy GRPO loss over all groups of two, unscaled."""
    logps = sequence_logps(REF_LOGITS)
    token_logps = torch.log_softmax(REF_LOGITS, 1)[STATES, TOKENS]
    total, lengths = torch.zeros(len(TOKENS), dtype=D), CU.diff()
    for pair in every_group(7, 2):
        rows = torch.cat([torch.arange(int(CU[i]), int(CU[i + 1])) for i in pair])
        cu = torch.nn.functional.pad(lengths[pair].cumsum(0), (1, 0))
        advantages = qf.group_advantages(REWARDS[pair], group_size=2, scale="none", baseline="loo")
        token = token_logps[rows]
        coef = qf.coefficients(qf.grpo_loss, token, token, advantages, cu, normalize=normalize)[1]
        total.index_add_(0, rows, logps[pair].sum().exp() * coef)
    return total


def test_grpo_on_policy_by_length() -> None:
    """Over a constant length the loss is E[r]'s gradient; over each response's own, a short one counts for more."""
    p = sequence_logps(REF_LOGITS).exp()
    advantage = p * (REWARDS - (p * REWARDS).sum())
    lengths = CU.diff()
    close(grpo(5.0), -(advantage / 5).repeat_interleave(lengths), 1e-14)
    close(grpo("sequence"), -(advantage / lengths).repeat_interleave(lengths), 1e-14)
