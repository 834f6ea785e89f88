"""The committed golden numbers, through the reference and the public losses, in float64 at 1e-12."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qempo_fast import losses as public
from qempo_fast.constraint import target_distribution
from qempo_fast.losses import coefficients, group_advantages
from qempo_fast.reference import contrastive, dqo, family, groups, pairs, risk, tokens

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())
MODULES = (contrastive, dqo, groups, pairs, risk, tokens)
REFERENCE = SimpleNamespace(**{name: value for module in MODULES for name, value in vars(module).items()})
APIS = pytest.mark.parametrize(
    "api", [REFERENCE, "reference", "cpu"], indirect=True, ids=["reference", "public", "public, cpu"]
)


@pytest.fixture
def api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The reference functions, or the public ones on the backend of that name."""
    if not isinstance(request.param, str):
        return request.param
    monkeypatch.setenv("QEMPO_BACKEND", request.param)
    return public


def t(x: Any) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def same(label: str, got: torch.Tensor, want: Any) -> None:
    torch.testing.assert_close(got, t(want), rtol=1e-12, atol=1e-12, msg=lambda m: f"{label}: {m}")


def case(name: str) -> tuple[SimpleNamespace, SimpleNamespace]:
    inputs = {k: t(v) if isinstance(v, list) else v for k, v in GOLDEN[name]["inputs"].items()}
    return SimpleNamespace(**inputs), SimpleNamespace(**GOLDEN[name]["outputs"])


PAIRS: dict[str, Callable[[Any, Any], Callable[..., torch.Tensor]]] = {
    "dpo": lambda api, i: lambda w, x: api.dpo_loss(w, x, i.ref_w, i.ref_l, beta=i.beta),
    "spl_dpo": lambda api, i: lambda w, x: api.spl_pair_loss(w, x, i.ref_w, i.ref_l, alpha=i.alpha, beta=i.beta),
    "hdpo": lambda api, i: lambda w, x: api.hdpo_loss(w, x, i.ref_w, i.ref_l, alpha=i.hdpo_alpha, beta=i.hdpo_beta),
    "qempo_offline": lambda api, i: lambda w, x: api.qempo_pair_loss(w, x, lam=1 / i.alpha),
    "qempo_kl_offline": lambda api, i: (
        lambda w, x: api.qempo_kl_pair_loss(
            w, x, i.ref_w, i.ref_l, lam=1 / (i.alpha - i.beta), mu=i.beta / (i.alpha - i.beta)
        )
    ),
}


@APIS
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, api: Any) -> None:
    i, o = case(name)
    loss, (chosen, rejected) = coefficients(PAIRS[name](api, i), (i.logp_w, i.logp_l))
    same("loss", loss, o.loss)
    same("coef_w", chosen, o.coef_w)
    same("coef_l", rejected, o.coef_l)


ONLINE: dict[str, Callable[[Any, Any, str], Callable[..., torch.Tensor]]] = {
    "qempo_online": lambda api, i, b: lambda x: api.qempo_loss(x, i.reward, lam=1 / i.alpha, group_size=4, baseline=b),
    "qempo_kl_online": lambda api, i, b: (
        lambda x: api.qempo_kl_loss(
            x,
            i.ref,
            i.reward,
            lam=1 / (i.alpha - i.beta),
            mu=i.beta / (i.alpha - i.beta),
            group_size=4,
            baseline=b,
        )
    ),
    "spl_rlhf_online": lambda api, i, b: (
        lambda x: api.spl_loss(x, i.ref, i.reward, alpha=i.alpha, beta=i.beta, group_size=4, baseline=b)
    ),
    "rlhf_kl_online": lambda api, i, b: (
        lambda x: api.spl_loss(x, i.ref, i.reward, alpha=i.alpha, beta=i.beta, group_size=4, baseline=b)
    ),
}


@APIS
@pytest.mark.parametrize("name", ONLINE)
def test_online(name: str, api: Any) -> None:
    i, o = case(name)
    loss, coef = coefficients(ONLINE[name](api, i, "mean"), i.logp)
    same("loss", loss, o.loss)
    same("coef", coef, o.coef)
    loss, coef = coefficients(ONLINE[name](api, i, "loo"), i.logp)
    same("coef_loo", coef, o.coef_loo)
    same("loss_loo", loss, o.loss * 4 / 3)
    same("coef_none", coefficients(ONLINE[name](api, i, "none"), i.logp)[1], [-s / 4 for s in o.shaped])


@APIS
@pytest.mark.parametrize("name", ["gvpo", "qempo_variance", "qempo_kl_variance"])
def test_variance(name: str, api: Any) -> None:
    i, o = case(name)
    if name == "gvpo":
        loss, coef = coefficients(api.gvpo_loss, i.logp, i.ref, i.reward, beta=i.beta, group_size=4)
    else:
        loss, coef = coefficients(api.variance_loss, i.logp, i.ref, i.reward, alpha=i.alpha, beta=i.beta, group_size=4)
    same("loss", loss, o.loss)
    same("coef", coef, o.coef)


@APIS
def test_dqo(api: Any) -> None:
    i, o = case("dqo")
    for baseline, suffix in (("none", "raw"), ("reward", "reward_loo")):
        loss, coef = coefficients(
            api.dqo_loss, i.logp, i.reward, i.phi_raw[None], alpha=i.alpha, baseline=baseline, group_size=4
        )
        same(f"loss_{suffix}", loss, getattr(o, f"loss_{suffix}"))
        same(f"coef_{suffix}", coef, getattr(o, f"coef_{suffix}"))
    i, o = case("dqo_loo")
    loss, coef = coefficients(api.dqo_loss, i.logp, i.reward, i.phi_raw, alpha=i.alpha, group_size=4)
    same("loss", loss, o.loss)
    same("coef", coef, o.coef)


@APIS
def test_epa(api: Any) -> None:
    i, o = case("epa")
    loss, coefs = coefficients(
        api.epa_loss,
        (t([i.pos]), i.strong[None], i.weak[None]),
        t([i.ref_pos]),
        i.ref_strong[None],
        i.ref_weak[None],
        beta=i.beta,
    )
    same("loss", loss, o.loss)
    for label, got, want in zip(
        ("coef_pos", "coef_strong", "coef_weak"),
        coefs,
        ([o.coef_pos], [o.coef_strong], [o.coef_weak]),
        strict=True,
    ):
        same(label, got, want)


@APIS
@pytest.mark.parametrize("name", ["maxk", "passk"])
def test_rspo(name: str, api: Any) -> None:
    i, o = case(name)
    loss, coef = coefficients(api.rspo_loss, t([-1.0] * i.n), i.reward, k=i.k, group_size=i.n)
    same("coef", coef, o.coef)
    same("coef, PKPO's leave-one-out-minus-one", -coef, o.pkpo_sloo_minus_one)
    same("loss", loss, -sum(o.coef))
    same("weights", i.k * risk.rspo_weights(i.reward, k=i.k, group_size=i.n), o.rspo_weight)


@APIS
def test_poft(api: Any) -> None:
    i, o = case("poft")
    loss, coef = coefficients(api.poft_loss, i.sum_logp, i.length, i.aligned_mean_logp, beta=i.beta, gamma=i.gamma)
    same("loss", loss, o.loss)
    same("coef", coef, o.coef)


@APIS
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_grpo_family(name: str, api: Any) -> None:
    i, o = case(name)
    keep = i.mask.bool()
    lengths = i.mask.sum(1).long()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    scale = "none" if name == "dr_grpo" else "std"
    advantages = group_advantages(i.reward, group_size=3, scale=scale)
    same("advantages", advantages, i.adv.tolist())
    loss, coef = coefficients(
        api.grpo_loss,
        i.logp[keep],
        i.old[keep],
        advantages,
        cu_seqlens,
        ref_token_logps=i.ref[keep],
        kl=i.kl_beta,
        eps_low=i.eps_low,
        eps_high=i.eps_high,
        ratio=i.level,
        normalize={"seq": "sequence", "token": "token", "const": float(i.L_max)}[i.aggregation],
    )
    same("loss", loss, o.loss)
    same("coef", coef, t(o.coef)[keep].tolist())


def test_optima() -> None:
    i, o = case("closed_form_optimum")
    f = i.ref.log()
    rlhf = target_distribution(i.reward, f, alpha=i.rlhf_beta, beta=i.rlhf_beta)
    same("pi_rlhf", rlhf, o.pi_rlhf)
    same("pi_qempo", target_distribution(i.reward, alpha=o.alpha_qempo), o.pi_qempo)
    got = target_distribution(i.reward, f, alpha=o.alpha_kl, beta=o.beta_kl)
    same("pi_qempo_kl", got, o.pi_qempo_kl)
    same(
        "lambda, mu to alpha, beta",
        t(family.AlphaBeta.of_qempo(o.lambda_kl, o.mu_kl)),
        [o.alpha_kl, o.beta_kl],
    )
    i, o = case("optimum_by_descent")
    same("target", target_distribution(i.reward, i.ref.log(), alpha=i.alpha, beta=i.beta), o.target)
    i, o = case("spl_two_outcome")
    # A Bradley-Terry preference p is a reward gap of log(p / (1 - p)).
    rewards = t([i.p, 1 - i.p]).log()
    got = target_distribution(rewards, i.ref.log(), alpha=i.alpha, beta=i.beta)
    same("spl_two_outcome", got[0], o.prob)
