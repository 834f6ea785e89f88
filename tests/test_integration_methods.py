"""The table of methods: no public loss forgotten, and every row runs on what the trainers give it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import qempo_fast as qf
from qempo_fast.integrations.methods import GROUPS, METHODS, PAIRS, Method, by_name, group_advantages

# Public losses that no trainer offers by name, and why.
NOT_METHODS = {
    "grpo_loss": "a loss of tokens: 'grpo' of a trainer is the framework's own",
    "poft_loss": "needs log-probs of aligned models, which no trainer's data has",
    "policy_gradient_loss": "takes advantages of the caller's own, where a trainer makes them",
    "variance_loss": "what a method with stored=True becomes, under its own name",
}
# A value in range for every hyperparameter without a default.
GIVEN = {"alpha": 0.2, "beta": 0.1, "k": 2, "lam": 5.0, "mu": 1.0}
S = 4


def tensors(data: str) -> dict[str, Any]:
    x, f = torch.randn(2, 3, S, generator=torch.Generator().manual_seed(0)).sub(2.0)
    if data == PAIRS:
        pytest.importorskip("trl", reason="what pairs are given is TRL's trainer's")
        from qempo_fast.integrations.trl.preference import by_role

        return by_role(x, f)
    rewards, embeddings = torch.arange(S) / S, torch.eye(S)
    return {"logps": x[0], "ref_logps": f[0], "rewards": rewards, "embeddings": embeddings, "group_size": S}


def required(method: Method) -> dict[str, Any]:
    parameters = inspect.signature(method.loss).parameters.values()
    return {p.name: GIVEN[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}


def test_every_public_loss_is_a_method_or_says_why_not() -> None:
    public = {name for name in qf.__all__ if name.endswith("_loss")}
    rows = {method.loss.__name__ for method in METHODS}
    forgotten = sorted(public - rows - set(NOT_METHODS))
    assert not forgotten, f"neither in integrations/methods.py nor in NOT_METHODS here: {', '.join(forgotten)}"
    assert not rows & set(NOT_METHODS)
    assert set(NOT_METHODS) <= public


def test_a_name_is_one_row_of_its_data() -> None:
    assert {method.data for method in METHODS} == {PAIRS, GROUPS}
    assert len(by_name(PAIRS)) + len(by_name(GROUPS)) == len(METHODS)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.data}-{m.name}")
def test_a_row_runs_on_what_the_trainers_give_it(method: Method) -> None:
    value = method.loss(**method.reads(tensors(method.data)), **required(method))
    assert value.ndim == 0
    assert bool(value.isfinite())
    assert method.numbers or not method.stored, "only a member of the (alpha, beta) family has a squared form"


@pytest.mark.parametrize(
    ("data", "name", "given", "alpha", "beta"),
    [
        (PAIRS, "dpo", {}, 0.1, 0.1),  # the loss's own default
        (PAIRS, "hdpo", {"alpha": 0.2}, 0.02, 0.1),
        (PAIRS, "qempo", {"lam": 5.0, "label_smoothing": 0.1}, 0.2, 0.0),
        (GROUPS, "spl", {"alpha": 0.2, "beta": 0.3}, 0.2, 0.3),
        (GROUPS, "qempo_kl", {"lam": 5.0, "mu": 1.0}, 0.4, 0.2),
        (GROUPS, "rspo", {"k": 2}, 0.0, 0.0),
        (GROUPS, "dqo", {"alpha": 0.5}, 0.0, 0.0),  # its alpha weighs the diversity, not the entropy
        (GROUPS, "dqo", {"alpha": 0.5, "beta": 0.1}, 0.1, 0.1),
    ],
)
def test_alpha_and_beta_of_the_hyperparameters(
    data: str, name: str, given: dict[str, float], alpha: float, beta: float
) -> None:
    assert by_name(data)[name].alpha_beta(given) == pytest.approx((alpha, beta))


def test_what_a_loss_lacks_raises_by_name() -> None:
    spl = by_name(GROUPS)["spl"]
    with pytest.raises(TypeError, match="alpha"):
        spl.alpha_beta({"beta": 0.1})
    ids, x = torch.zeros(S), torch.zeros(S)
    with pytest.raises(ValueError, match=r"^loss: wanted 'qempo' or .* got 'sppo'"):
        group_advantages("sppo", ids, x, x)
    with pytest.raises(ValueError, match=r"^embeddings: wanted one row for each response with loss='dqo'"):
        group_advantages("dqo", ids, x, x)


def test_advantages_are_those_of_groups_that_lie_scattered() -> None:
    g = torch.Generator().manual_seed(1)
    x, f, r = torch.randn(3, 5, generator=g)
    ids = torch.tensor([7, 2, 7, 2, 7])
    advantages = group_advantages("spl", ids, x, r, ref_logps=f, alpha=0.2, beta=0.1)
    order = torch.tensor([1, 3, 0, 2, 4])
    leaf = x.clone().requires_grad_()
    offsets = torch.tensor([0, 2, 5])
    qf.spl_loss(leaf[order], f[order], r[order], alpha=0.2, beta=0.1, offsets=offsets).backward()
    torch.testing.assert_close(advantages, -5 * leaf.grad)
