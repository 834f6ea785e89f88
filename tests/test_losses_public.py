"""What the public losses promise beyond golden numbers: identities, layouts, dtypes, gradients, edges."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch

import qempo_fast.losses as qf
from qempo_fast import _backends, _check

D = torch.float64
B, S, K, N = 6, 12, 4, 20
OFFSETS = torch.tensor([0, 2, 7, 12])
CU = torch.tensor([0, 5, 5, 13, 20])


def close(got: torch.Tensor, want: torch.Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def data(dtype: torch.dtype = D, device: torch.device | None = None) -> dict[str, torch.Tensor]:
    """Inputs of every loss, drawn on the CPU; with those that no gradient concerns, offsets among them."""
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, dtype=D, generator=g) + shift).to(dtype)

    tensors = {name: draw(B, scale=3, shift=-20) for name in ("w", "x", "fw", "fx")}
    tensors |= {name: draw(B, 2, scale=3, shift=-20) for name in ("s", "fs")}
    tensors |= {name: draw(B, 3, scale=3, shift=-20) for name in ("v", "fv")}
    tensors |= {
        "l": draw(S, scale=3, shift=-20),
        "f": draw(S, scale=3, shift=-20),
        "r": draw(S),
        "e": draw(S, 5),
    }
    tensors["tl"] = draw(N, scale=0.3, shift=-2)
    tensors |= {
        "told": tensors["tl"] + draw(N, scale=0.2),
        "tref": tensors["tl"] + draw(N, scale=0.2),
        "adv": draw(4),
    }
    tensors |= {"lengths": torch.tensor([3, 9, 1, 4, 7, 2]), "aligned": draw(B, 2, shift=-2)}
    return {name: x.to(device) for name, x in (tensors | {"offsets": OFFSETS, "cu": CU}).items()}


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMPO_BACKEND", request.param)


Call = Callable[[dict[str, torch.Tensor]], torch.Tensor]


class Loss(NamedTuple):
    """A call, the inputs that get a gradient, those that do not, and the backends that torch.compile can trace."""

    call: Call
    policy: str
    fixed: str
    traced: tuple[str, ...] = ("cpu", "reference")


LOSSES = {
    "dpo": Loss(lambda d: qf.dpo_loss(d["w"], d["x"], d["fw"], d["fx"], label_smoothing=0.1), "w x", "fw fx"),
    "spl_pair": Loss(lambda d: qf.spl_pair_loss(d["w"], d["x"], d["fw"], d["fx"], alpha=0.3), "w x", "fw fx"),
    "hdpo": Loss(lambda d: qf.hdpo_loss(d["w"], d["x"], d["fw"], d["fx"], alpha=1.2), "w x", "fw fx"),
    "qempo_pair": Loss(lambda d: qf.qempo_pair_loss(d["w"], d["x"], lam=4.0), "w x", ""),
    "qempo_kl_pair": Loss(
        lambda d: qf.qempo_kl_pair_loss(d["w"], d["x"], d["fw"], d["fx"], lam=4.0, mu=0.5),
        "w x",
        "fw fx",
    ),
    "epa": Loss(lambda d: qf.epa_loss(d["w"], d["s"], d["v"], d["fw"], d["fs"], d["fv"]), "w s v", "fw fs fv"),
    "poft": Loss(lambda d: qf.poft_loss(d["w"], d["lengths"], d["aligned"]), "w", "aligned"),
    "spl": Loss(lambda d: qf.spl_loss(d["l"], d["f"], d["r"], group_size=K, alpha=0.3, beta=0.1), "l", "f r"),
    "qempo": Loss(lambda d: qf.qempo_loss(d["l"], d["r"], lam=4.0, offsets=d["offsets"]), "l", "r"),
    "qempo_kl": Loss(
        lambda d: qf.qempo_kl_loss(d["l"], d["f"], d["r"], lam=4.0, mu=0.5, group_size=K),
        "l",
        "f r",
    ),
    "gvpo": Loss(lambda d: qf.gvpo_loss(d["l"], d["f"], d["r"], offsets=d["offsets"]), "l", "f r"),
    "variance": Loss(
        lambda d: qf.variance_loss(d["l"], d["f"], d["r"], alpha=0.3, beta=0.1, group_size=K),
        "l",
        "f r",
    ),
    # Plain torch pads ragged groups to a width that depends on the offsets' values, and then cannot be traced.
    "rspo": Loss(lambda d: qf.rspo_loss(d["l"], d["r"], k=2, offsets=d["offsets"]), "l", "r", traced=("cpu",)),
    "dqo": Loss(
        lambda d: qf.dqo_loss(d["l"], d["r"], d["e"], ref_logps=d["f"], beta=0.1, group_size=K),
        "l",
        "r e f",
    ),
    "grpo": Loss(
        lambda d: qf.grpo_loss(d["tl"], d["told"], d["adv"], d["cu"], ref_token_logps=d["tref"], kl=0.1),
        "tl",
        "told adv tref",
    ),
    "gspo": Loss(
        lambda d: qf.grpo_loss(d["tl"], d["told"], d["adv"], d["cu"].int(), ratio="sequence", normalize=7.0),
        "tl",
        "told adv",
    ),
    "policy_gradient": Loss(lambda d: qf.policy_gradient_loss(d["l"], d["r"]), "l", "r"),
}
ALL = pytest.mark.parametrize("name", LOSSES)


@ALL
def test_only_the_policy_gets_a_gradient_and_no_input_changes(name: str) -> None:
    call, policy, fixed, _ = LOSSES[name]
    given = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in data().items()}
    loss = call(given)
    assert loss.shape == ()
    assert loss.dtype == D
    loss.backward()
    for key in policy.split():
        grad = given[key].grad
        assert grad is not None, key
        assert grad.isfinite().all(), key
        assert (grad != 0).any(), key
    for key in fixed.split():
        assert given[key].grad is None, key
    for key, want in data().items():
        assert torch.equal(given[key].detach(), want), key


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """A float32 loss from any smaller dtype, near the float64 truth on the same numbers."""
    call, policy, *_ = LOSSES[name]
    low = data(dtype)
    keys = policy.split()
    low |= {k: low[k].requires_grad_() for k in keys}
    loss = call(low)
    assert loss.dtype == torch.float32
    loss.backward()
    exact = {k: v.detach().to(D) if v.is_floating_point() else v for k, v in low.items()}
    exact |= {k: exact[k].requires_grad_() for k in keys}
    want = call(exact)
    want.backward()
    close(loss.to(D), want, 2e-5)
    for key in keys:
        grad = low[key].grad
        assert grad is not None
        assert grad.dtype == dtype
        truth = exact[key].grad
        # Half precision rounds the gradient once, on the way out: 2^-8 or 2^-11 of it.
        torch.testing.assert_close(grad.to(D), truth, rtol=max(1e-5, torch.finfo(dtype).eps), atol=2e-6)


@ALL
def test_non_contiguous_inputs(name: str) -> None:
    call = LOSSES[name].call
    strided = {k: torch.stack([v, v + 1], -1)[..., 0] for k, v in data().items()}
    assert not strided["l"].is_contiguous()
    assert torch.equal(call(strided), call(data()))


RAGGED: dict[str, Callable[..., torch.Tensor]] = {
    "spl": lambda d, **g: qf.spl_loss(d["l"], d["f"], d["r"], alpha=0.3, beta=0.1, **g),
    "spl, mean": lambda d, **g: qf.spl_loss(d["l"], d["f"], d["r"], alpha=0.3, beta=0.1, baseline="mean", **g),
    "qempo, none": lambda d, **g: qf.qempo_loss(d["l"], d["r"], lam=3.0, baseline="none", **g),
    "rspo": lambda d, **g: qf.rspo_loss(d["l"], d["r"], k=2, **g),
    "rspo, k = 1": lambda d, **g: qf.rspo_loss(d["l"], d["r"], k=1, **g),
    "dqo": lambda d, **g: qf.dqo_loss(d["l"], d["r"], d["e"], **g),
    "dqo, reward": lambda d, **g: qf.dqo_loss(d["l"], d["r"], d["e"], baseline="reward", **g),
    "variance": lambda d, **g: qf.variance_loss(d["l"], d["f"], d["r"], alpha=0.3, beta=0.1, **g),
}


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
def test_ragged_is_a_loop_over_groups(name: str, offsets_dtype: torch.dtype) -> None:
    call, d = RAGGED[name], data()
    offsets = OFFSETS.to(offsets_dtype)
    got, coef = qf.coefficients(lambda x: call(d | {"l": x}, offsets=offsets), d["l"])
    bounds = OFFSETS.tolist()
    total, parts = torch.zeros((), dtype=D), []
    for low, high in pairwise(bounds):
        one = {k: d[k][low:high] for k in ("l", "f", "r", "e")}
        # Mean over samples, but over groups for the variance loss.
        weight = 1 / 3 if name == "variance" else (high - low) / S
        loss, part = qf.coefficients(
            lambda x, one=one, size=high - low: call(one | {"l": x}, group_size=size), one["l"]
        )
        total = total + weight * loss
        parts.append(weight * part)
    close(got, total)
    close(coef, torch.cat(parts))


def test_equal_groups_by_offsets_or_size() -> None:
    d, even = data(), torch.tensor([0, 4, 8, 12])
    for call in RAGGED.values():
        close(call(d, offsets=even), call(d, group_size=4))
    close(qf.group_advantages(d["r"], offsets=even), qf.group_advantages(d["r"], group_size=4))
    close(
        qf.dqo_loss(d["l"], d["r"], d["e"].reshape(3, 4, 5)),
        qf.dqo_loss(d["l"], d["r"], d["e"], group_size=4),
    )


def test_members_of_the_family() -> None:
    d = data()
    w, x, fw, fx, lp, f, r = (d[k] for k in ("w", "x", "fw", "fx", "l", "f", "r"))
    dpo = qf.dpo_loss(w, x, fw, fx, beta=0.2)
    close(qf.spl_pair_loss(w, x, fw, fx, alpha=0.2, beta=0.2), dpo)
    close(qf.hdpo_loss(w, x, fw, fx, alpha=1.0, beta=0.2), dpo)
    close(qf.hdpo_loss(w, x, fw, fx, alpha=1.5, beta=0.2), qf.spl_pair_loss(w, x, fw, fx, alpha=0.3, beta=0.2))
    nothing = w.new_zeros(B, 0)
    close(qf.epa_loss(w, x[:, None], nothing, fw, fx[:, None], nothing, beta=0.2), dpo)
    qempo = qf.qempo_pair_loss(w, x, lam=5.0)
    close(qf.qempo_kl_pair_loss(w, x, None, None, lam=5.0, mu=0.0), qempo)
    close(qf.spl_pair_loss(w, x, None, None, alpha=0.2, beta=0.0), qempo)
    # lambda = 1 / (alpha - beta), mu = beta / (alpha - beta)
    kl = qf.qempo_kl_pair_loss(w, x, fw, fx, lam=10.0, mu=2.0)
    close(kl, qf.spl_pair_loss(w, x, fw, fx, alpha=0.3, beta=0.2))

    g: dict[str, Any] = {"group_size": K}
    close(qf.qempo_kl_loss(lp, f, r, lam=10.0, mu=2.0, **g), qf.spl_loss(lp, f, r, alpha=0.3, beta=0.2, **g))
    close(qf.qempo_kl_loss(lp, f, r, lam=5.0, mu=0.0, **g), qf.qempo_loss(lp, r, lam=5.0, **g))
    # mu to infinity at a held lambda / mu = 1 / beta is KL-RLHF, alpha = beta.
    limit = qf.qempo_kl_loss(lp, f, r, lam=5e9, mu=1e9, **g)
    close(limit, qf.spl_loss(lp, f, r, alpha=0.2, beta=0.2, **g), 1e-7)
    close(qf.variance_loss(lp, f, r, alpha=0.2, beta=0.2, **g), qf.gvpo_loss(lp, f, r, beta=0.2, **g))


def test_loo_mean_and_variance_share_their_coefficients() -> None:
    d = data()
    args: tuple[Any, ...] = (d["l"], d["f"], d["r"])
    kw: dict[str, Any] = {"alpha": 0.3, "beta": 0.1, "group_size": K}
    loo = qf.coefficients(qf.spl_loss, *args, **kw)[1]
    mean = qf.coefficients(qf.spl_loss, *args, **kw, baseline="mean")[1]
    close(loo, mean * K / (K - 1))
    close(mean.sum(), torch.zeros((), dtype=D))
    variance = qf.coefficients(qf.variance_loss, *args, **kw)[1]
    close(loo, variance / 0.3)
    close(variance.reshape(-1, K).sum(1), torch.zeros(S // K, dtype=D))
    attached = ((0.3 * d["l"] - 0.1 * d["f"] - d["r"]).reshape(-1, K)).requires_grad_()
    centred = attached - attached.mean(1, keepdim=True).detach()
    (centred.square().sum(1) / (2 * (K - 1))).mean().backward()
    assert attached.grad is not None
    close(variance, 0.3 * attached.grad.flatten())


def test_epa_coefficients_sum_to_zero() -> None:
    d = data()
    _, coefs = qf.coefficients(qf.epa_loss, (d["w"], d["s"], d["v"]), d["fw"], d["fs"], d["fv"])
    close(coefs[0] + coefs[1].sum(1) + coefs[2].sum(1), torch.zeros(B, dtype=D))


def test_passk_closed_form() -> None:
    """w_i = r_i C(n - c, k - 1) / C(n - 1, k - 1) on 0/1 rewards."""
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0], dtype=D)
    _, coef = qf.coefficients(qf.rspo_loss, torch.zeros(8, dtype=D), rewards, k=3, group_size=8)
    close(coef, -3 / 8 * rewards * 10 / 21)


def test_rspo_at_k_1_is_the_mean_reward() -> None:
    d = data()
    _, coef = qf.coefficients(qf.rspo_loss, d["l"], d["r"], k=1, group_size=K, baseline="none")
    close(coef, -d["r"] / S)
    _, coef = qf.coefficients(qf.rspo_loss, d["l"], d["r"], k=1, group_size=K)
    close(coef, -qf.group_advantages(d["r"], group_size=K, scale="none", baseline="loo") / S)


def test_invariances() -> None:
    d = data()
    order = torch.cat([torch.randperm(K) + K * i for i in range(S // K)])
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=D))[0]
    shifted = d | {"r": d["r"] + 3.0, "e": 2.5 * d["e"] @ rotation}
    permuted = {k: v[order] if k in ("l", "f", "r", "e") else v for k, v in d.items()}
    centred = [RAGGED[k] for k in ("spl", "spl, mean", "rspo", "dqo", "dqo, reward", "variance")]
    for call in centred:

        def coefs(given: dict[str, torch.Tensor], call: Any = call) -> torch.Tensor:
            return qf.coefficients(lambda x: call(given | {"l": x}, group_size=K), given["l"])[1]

        close(coefs(shifted), coefs(d), 1e-10)
        close(coefs(permuted), coefs(d)[order])
    # A constant added to every log-prob of pi_ref, an unnormalised reference, changes no centred form.
    close(RAGGED["variance"](d | {"f": d["f"] + 9.0}, group_size=K), RAGGED["variance"](d, group_size=K))


@pytest.mark.parametrize("name", ["dpo", "spl_pair", "hdpo", "qempo_pair", "qempo_kl_pair", "epa", "poft"])
def test_reductions(name: str) -> None:
    d = data()
    calls: dict[str, Callable[..., torch.Tensor]] = {
        "dpo": lambda **k: qf.dpo_loss(d["w"], d["x"], d["fw"], d["fx"], **k),
        "spl_pair": lambda **k: qf.spl_pair_loss(d["w"], d["x"], d["fw"], d["fx"], alpha=0.3, **k),
        "hdpo": lambda **k: qf.hdpo_loss(d["w"], d["x"], d["fw"], d["fx"], alpha=1.2, **k),
        "qempo_pair": lambda **k: qf.qempo_pair_loss(d["w"], d["x"], lam=4.0, **k),
        "qempo_kl_pair": lambda **k: qf.qempo_kl_pair_loss(d["w"], d["x"], d["fw"], d["fx"], lam=4.0, mu=0.5, **k),
        "epa": lambda **k: qf.epa_loss(d["w"], d["s"], d["v"], d["fw"], d["fs"], d["fv"], **k),
        "poft": lambda **k: qf.poft_loss(d["w"], d["lengths"], d["aligned"], **k),
    }
    each = calls[name](reduction="none")
    assert each.shape == (B,)
    close(calls[name](), each.mean())
    close(calls[name](reduction="sum"), each.sum())


def test_empty_inputs_keep_the_graph() -> None:
    zero = torch.zeros(0, requires_grad=True)
    fixed, none = torch.zeros(0), torch.zeros(0, 2)
    offsets = torch.tensor([0])
    groups: list[dict[str, Any]] = [{"group_size": 4}, {"offsets": offsets}]
    calls = [
        lambda: qf.dpo_loss(zero, zero, fixed, fixed),
        lambda: qf.epa_loss(zero, none, none, fixed, none, none),
    ]
    calls += [lambda: qf.poft_loss(zero, fixed, none)]
    for g in groups:
        calls += [
            lambda g=g: qf.spl_loss(zero, fixed, fixed, alpha=0.1, beta=0.1, **g),
            lambda g=g: qf.variance_loss(zero, fixed, fixed, alpha=0.1, beta=0.1, **g),
            lambda g=g: qf.rspo_loss(zero, fixed, k=2, **g),
            lambda g=g: qf.dqo_loss(zero, fixed, torch.zeros(0, 5), **g),
        ]
    calls += [
        lambda: qf.grpo_loss(zero, fixed, torch.zeros(2), torch.tensor([0, 0, 0]), ratio="sequence"),
        lambda: qf.grpo_loss(zero, fixed, torch.zeros(0), offsets, normalize="token"),
        lambda: qf.grpo_loss(zero, fixed, torch.zeros(0), offsets, normalize=5),
    ]
    for call in calls:
        loss = call()
        assert loss.item() == 0.0
        (grad,) = torch.autograd.grad(loss, zero)
        assert grad.shape == (0,)
    assert qf.group_advantages(fixed, group_size=4).shape == (0,)


def test_groups_of_one_work_without_a_baseline() -> None:
    d = data()
    loss, coef = qf.coefficients(qf.qempo_loss, d["l"], d["r"], lam=2.0, group_size=1, baseline="none")
    close(coef, -(d["r"] - d["l"] / 2.0) / S)
    assert loss.isfinite()
    _, coef = qf.coefficients(qf.dqo_loss, d["l"], d["r"], d["e"], group_size=1, baseline="none")
    # A unit row alone: log det(1 + 1).
    close(coef, -(d["r"] + torch.log(torch.tensor(2.0, dtype=D))) / S)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("normalize", ["sequence", "token", 7.0])
def test_empty_sequences_contribute_zero(ratio: str, normalize: str | float) -> None:
    d = data()
    kw: dict[str, Any] = {"ratio": ratio, "normalize": normalize, "ref_token_logps": d["tref"], "kl": 0.1}
    loss, coef = qf.coefficients(qf.grpo_loss, d["tl"], d["told"], d["adv"], CU, **kw)
    assert loss.isfinite()
    assert coef.isfinite().all()
    other = d["adv"] + torch.tensor([0.0, 100.0, 0.0, 0.0], dtype=D)
    again, same = qf.coefficients(qf.grpo_loss, d["tl"], d["told"], other, CU, **kw)
    close(again, loss)
    close(same, coef)
    # The mean over sequences counts the empty one: dropping it scales by 4 / 3.
    keep = torch.tensor([0, 2, 3])
    dropped, _ = qf.coefficients(qf.grpo_loss, d["tl"], d["told"], d["adv"][keep], torch.tensor([0, 5, 13, 20]), **kw)
    close(dropped, loss * (1.0 if normalize == "token" else 4 / 3))


def test_constant_rewards_give_zero_advantages() -> None:
    for scale in ("std", "none"):
        got = qf.group_advantages(torch.full((6,), 0.1), group_size=3, scale=scale)
        assert got.abs().max() < 1e-3


def test_coefficients_reproduce_the_gradient_row_by_row() -> None:
    """coef computed once weighs rows in any order: the sum of coef_i l_i has the group loss's gradient."""
    d = data()
    theta = torch.randn(3, dtype=D, requires_grad=True)
    features = torch.randn(S, 3, dtype=D)
    logps = -(features @ theta).square()
    qf.spl_loss(logps, d["f"], d["r"], alpha=0.3, beta=0.1, group_size=K).backward()
    want, theta.grad = theta.grad, None
    with torch.no_grad():
        loss, coef = qf.coefficients(qf.spl_loss, logps, d["f"], d["r"], alpha=0.3, beta=0.1, group_size=K)
    assert not loss.requires_grad
    assert not coef.requires_grad
    for rows in torch.randperm(S).split(5):
        (coef[rows] * -(features[rows] @ theta).square()).sum().backward()
    assert theta.grad is not None
    assert want is not None
    close(theta.grad, want)


def test_coefficients_in_inference_mode() -> None:
    with torch.inference_mode():
        d = data()
        loss, coef = qf.coefficients(qf.gvpo_loss, d["l"], d["f"], d["r"], group_size=K)
        pair, (a, b) = qf.coefficients(qf.dpo_loss, (d["w"], d["x"]), ref_chosen=d["fw"], ref_rejected=d["fx"])
    want, truth = qf.coefficients(qf.gvpo_loss, data()["l"], data()["f"], data()["r"], group_size=K)
    close(loss, want)
    close(coef, truth)
    close(a, -b)
    assert pair.isfinite()


def test_backend_registration() -> None:
    ops = ("pair_loss", "group_loss", "variance_loss", "epa_loss", "poft_loss", "rspo_loss", "token_loss")
    for op in (*ops, "group_advantages"):
        for backend in ("reference", "cpu"):
            assert _backends.choose(op, torch.device("cpu"), backend) == backend
        assert _backends.default(op, torch.device("cpu"))[0] == os.environ["QEMPO_BACKEND"]


def test_the_default_backend_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv("QEMPO_BACKEND")
    assert _backends.default("pair_loss", cpu)[0] == "cpu"
    monkeypatch.setenv("QEMPO_BACKEND", "pair_loss=reference")
    assert _backends.default("pair_loss", cpu)[0] == "reference"
    assert _backends.default("group_loss", cpu)[0] == "cpu"


@pytest.mark.parametrize("kept", [True, False], ids=["by the dictionary under os.environ", "by os.environ"])
def test_the_environment_is_read_at_each_call(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set, changed and taken away while the process runs, by a test or by a notebook."""
    if not kept:
        monkeypatch.setattr(_check, "_ENVIRONMENT", None)
    assert _check._ENVIRONMENT is not None or not kept
    for value in ("1", "0", None):
        if value is None:
            monkeypatch.delenv("QEMPO_CHECK")
        else:
            monkeypatch.setenv("QEMPO_CHECK", value)
        assert _check.environment("QEMPO_CHECK") == value
    logps, rewards = data()["l"], data()["r"]
    chosen = []
    for backend in ("reference", "cpu", "reference"):
        monkeypatch.setenv("QEMPO_BACKEND", backend)
        qf.qempo_loss(logps, rewards, lam=4.0, group_size=K)
        chosen.append(_backends.default("group_loss", logps.device)[0])
    assert chosen == ["reference", "cpu", "reference"]
    monkeypatch.setenv("QEMPO_BACKEND", "nothing")
    with pytest.raises(ValueError, match="QEMPO_BACKEND"):
        qf.qempo_loss(logps, rewards, lam=4.0, group_size=K)
