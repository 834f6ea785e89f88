"""The constraint: solved multipliers against golden numbers, KKT, SciPy; dual ascent in a training loop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qempo_fast.constraint import QualityConstraint, solve_qempo, target_distribution
from qempo_fast.losses import coefficients, qempo_kl_loss, spl_loss, spl_pair_loss, variance_loss
from qempo_fast.losses import epa_loss as public_epa_loss

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())
D = torch.float64


def t(x: object) -> torch.Tensor:
    return torch.tensor(x, dtype=D)


def close(got: torch.Tensor, want: torch.Tensor, tol: float = 1e-8) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tol)


def entropy(p: torch.Tensor) -> float:
    return float(-torch.xlogy(p, p).sum())


def kl(p: torch.Tensor, f: torch.Tensor) -> float:
    return float((torch.xlogy(p, p) - p * f).sum())


CASE, OPTIMUM = GOLDEN["closed_form_optimum"]["inputs"], GOLDEN["closed_form_optimum"]["outputs"]
R, F = t(CASE["reward"]), t(CASE["ref"]).log()


def test_golden() -> None:
    lam, mu, probs = solve_qempo(R, min_reward=OPTIMUM["R"])
    assert lam == pytest.approx(OPTIMUM["lambda_qempo"], abs=1e-8)
    assert mu == 0.0
    close(probs, t(OPTIMUM["pi_qempo"]))
    lam, mu, probs = solve_qempo(R, F, min_reward=OPTIMUM["R"], max_kl=OPTIMUM["K_bound"])
    assert lam == pytest.approx(OPTIMUM["lambda_kl"], abs=1e-8)
    assert mu == pytest.approx(OPTIMUM["mu_kl"], abs=1e-8)
    close(probs, t(OPTIMUM["pi_qempo_kl"]))
    assert entropy(probs) == pytest.approx(OPTIMUM["H_qempo_kl"], abs=1e-8)


def test_both_bounds_exactly_at_rlhf_leave_only_rlhf() -> None:
    """The trap: with R and K at KL-RLHF's own values one policy is feasible, and QEMPO-KL gains nothing."""
    lam, mu, probs = solve_qempo(R, F, min_reward=OPTIMUM["R"], max_kl=OPTIMUM["K_rlhf"])
    assert (lam, mu) == (math.inf, math.inf)
    close(probs, t(OPTIMUM["pi_rlhf"]))
    looser = solve_qempo(R, F, min_reward=OPTIMUM["R"], max_kl=OPTIMUM["K_rlhf"] + 1e-3).probs
    assert entropy(looser) > OPTIMUM["H_rlhf"] + 1e-3


def kkt(rewards: torch.Tensor, f: torch.Tensor | None, floor: float, cap: float | None) -> str:
    """Solve, check feasibility, stationarity and complementary slackness; say which constraints bind."""
    lam, mu, p = solve_qempo(rewards, f, min_reward=floor, max_kl=cap)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
    reward = float((p * rewards).sum())
    assert reward >= floor - 1e-9
    assert lam >= 0
    assert abs(lam * (reward - floor)) < 1e-7 * (1 + lam)
    g = torch.zeros_like(rewards) if f is None else torch.log_softmax(f, 0)
    if cap is not None:
        assert kl(p, g) <= cap + 1e-9
        assert abs(mu * (kl(p, g) - cap)) < 1e-7 * (1 + mu)
    # Stationarity: (1 + mu) log p - lam r - mu f is one constant.
    multiplier = (1 + mu) * p.log() - lam * rewards - mu * g
    close(multiplier, multiplier.mean().expand_as(multiplier), 1e-7 * (1 + lam + mu))
    return f"{'R' if lam > 0 else '-'}{'K' if mu > 0 else '-'}"


def test_kkt_over_random_problems() -> None:
    """Convex, so the KKT conditions are the proof; each combination of binding constraints must turn up."""
    rng = torch.Generator().manual_seed(0)
    seen = set()
    for n in (2, 3, 10, 100):
        for _ in range(12):
            rewards = torch.randn(n, dtype=D, generator=rng) * 3
            f = torch.log_softmax(torch.randn(n, dtype=D, generator=rng), 0)
            share = float(torch.rand((), generator=rng))
            floor = float(rewards.min() + share * (rewards.max() - rewards.min()))
            seen.add(kkt(rewards, None, floor, None))
            least = 0.0
            if float((f.exp() * rewards).sum()) < floor:
                with pytest.raises(ValueError, match="max_kl: wanted at least") as error:
                    solve_qempo(rewards, f, min_reward=floor, max_kl=0.0)
                least = float(str(error.value).split("at least ")[1].split(",")[0])
            for extra in (1e-3, 0.1, 1.0):
                seen.add(kkt(rewards, f, floor, least + extra))
    assert seen == {"--", "R-", "-K", "RK"}


@pytest.mark.parametrize("cap", [None, 0.4, 0.3])
def test_against_scipy(cap: float | None) -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is in the dev extra")
    floor = 0.9
    constraints = [
        {"type": "eq", "fun": lambda p: p.sum() - 1.0},
        {"type": "ineq", "fun": lambda p: p @ R.numpy() - floor},
    ]
    if cap is not None:
        constraints.append({"type": "ineq", "fun": lambda p: cap - kl(torch.tensor(p), F)})
    found = optimize.minimize(
        lambda p: -entropy(torch.tensor(p)),
        F.exp().numpy(),
        method="SLSQP",
        bounds=[(1e-12, 1.0)] * 5,
        constraints=constraints,
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    probs = solve_qempo(R, F, min_reward=floor, max_kl=cap).probs
    close(probs, torch.tensor(found.x), 1e-5)
    assert entropy(probs) == pytest.approx(-found.fun, abs=1e-8)


def test_slack_and_degenerate_bounds() -> None:
    uniform = torch.full((5,), 0.2, dtype=D)
    for f, cap in ((None, None), (F, 10.0)):
        solution = solve_qempo(R, f, min_reward=float(R.mean()) - 0.1, max_kl=cap)
        assert solution[:2] == (0.0, 0.0)
        close(solution.probs, uniform, 1e-15)
    # 0.1 three times over: its mean rounds below 0.1, which must not look infeasible.
    constant = solve_qempo(t([0.1, 0.1, 0.1]), min_reward=0.1)
    assert constant[:2] == (0.0, 0.0)
    assert solve_qempo(t([2.0]), min_reward=2.0).probs.tolist() == [1.0]
    # Without a floor to meet, a cap of 0 leaves the reference itself.
    lam, mu, probs = solve_qempo(R, F + 3.0, min_reward=-10.0, max_kl=0.0)
    assert (lam, mu) == (0.0, math.inf)
    close(probs, F.exp())


def test_the_largest_reward_is_a_limit() -> None:
    rewards = t([1.0, 0.0, 1.0, 0.5])
    lam, mu, probs = solve_qempo(rewards, min_reward=1.0)
    assert (lam, mu) == (math.inf, 0.0)
    assert probs.tolist() == [0.5, 0.0, 0.5, 0.0]
    near = solve_qempo(rewards, min_reward=1.0 - 1e-9)
    assert 1.0 - float((near.probs * rewards).sum()) == pytest.approx(1e-9, rel=1e-4)
    assert 20 < near.lam < 100
    f = t([0.5, 0.2, 0.1, 0.2]).log()
    least = -math.log(0.6)
    assert solve_qempo(rewards, f, min_reward=1.0, max_kl=least).probs.tolist() == pytest.approx([5 / 6, 0, 1 / 6, 0])
    middle = solve_qempo(rewards, f, min_reward=1.0, max_kl=least + 0.1)
    assert middle.lam == math.inf
    assert kl(middle.probs, f) == pytest.approx(least + 0.1, abs=1e-9)
    with pytest.raises(ValueError, match=r"min_reward: wanted at most 1\.0, the largest reward, got 1\.01"):
        solve_qempo(rewards, min_reward=1.01)
    with pytest.raises(ValueError, match=r"max_kl: wanted at least 0\.5108"):
        solve_qempo(rewards, f, min_reward=1.0, max_kl=0.5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scale_of_the_rewards(scale: float) -> None:
    solution = solve_qempo(R * scale + 7 * scale, F, min_reward=0.9 * scale + 7 * scale, max_kl=0.4)
    want = solve_qempo(R, F, min_reward=0.9, max_kl=0.4)
    assert solution.lam * scale == pytest.approx(want.lam, rel=1e-6)
    assert solution.mu == pytest.approx(want.mu, rel=1e-6)
    close(solution.probs, want.probs)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_extreme_scales(scale: float, shift: float) -> None:
    """lam scales with 1 / rewards and nothing else moves; a shift costs digits of the rewards, not of the answer."""
    solution = solve_qempo((R + shift) * scale, F, min_reward=(0.9 + shift) * scale, max_kl=0.4)
    want = solve_qempo(R, F, min_reward=0.9, max_kl=0.4)
    assert solution.lam * scale == pytest.approx(want.lam, rel=1e-9)
    assert solution.mu == pytest.approx(want.mu, rel=1e-9)
    close(solution.probs, want.probs, 1e-10)


@pytest.mark.parametrize("n", [2, 5, 50])
@pytest.mark.parametrize("ties", [False, True])
def test_bounds_taken_from_a_policy_are_feasible(n: int, ties: bool) -> None:
    """R and K are "set to match the values achieved by the RLHF solution": a sharp one's mean reward, summed in
    float64, may lie a rounding above every reward, and its KL a rounding under 0. Neither is infeasible.
    """
    rng = torch.Generator().manual_seed(n)
    above = 0
    for i in range(100):
        scale = 10.0 ** (i % 17 - 8)
        rewards = torch.randn(n, dtype=D, generator=rng)
        rewards = (rewards.round() if ties else rewards) * scale
        f = torch.log_softmax(3 * torch.randn(n, dtype=D, generator=rng), 0)
        p = torch.softmax(f + rewards / (scale * 10.0 ** (i % 4 - 3)), 0)
        floor, cap = float((p * rewards).sum()), kl(p, f)
        above += floor > float(rewards.max())
        for limit in (None, cap, cap + 0.1):
            got = solve_qempo(rewards, f, min_reward=floor, max_kl=limit).probs
            assert float((got * rewards).sum()) >= floor - 1e-9 * scale
            assert entropy(got) >= entropy(p) - 1e-7
            assert limit is None or kl(got, f) <= limit + 1e-8
    assert above > 0 or not ties
    reference = solve_qempo(R, F, min_reward=-10.0, max_kl=-1e-17)
    close(reference.probs, F.exp())


def test_all_rewards_equal() -> None:
    for value in (0.0, 1e-8, -3.0, 1e8):
        rewards = torch.full((5,), value, dtype=D)
        assert solve_qempo(rewards, min_reward=value)[:2] == (0.0, 0.0)
        close(solve_qempo(rewards, min_reward=value - 1.0).probs, torch.full((5,), 0.2, dtype=D), 1e-15)
        lam, mu, probs = solve_qempo(rewards, F, min_reward=value, max_kl=0.1)
        assert lam == 0.0
        assert mu > 0.0
        assert kl(probs, F) == pytest.approx(0.1, abs=1e-10)


def test_inputs_unmodified_and_dtype() -> None:
    rewards = R.float().requires_grad_()
    probs = solve_qempo(rewards, min_reward=0.9).probs
    assert probs.dtype == D
    assert not probs.requires_grad
    assert torch.equal(rewards.detach(), R.float())


def test_target_distribution() -> None:
    p = target_distribution(R, F, alpha=0.8, beta=0.3)
    log_odds = (R[0] - R[1] + 0.3 * (F[0] - F[1])) / 0.8
    assert float((p[0] / p[1]).log()) == pytest.approx(float(log_odds), abs=1e-14)
    batch = target_distribution(torch.stack([R, 2 * R]), torch.stack([F, F + 5]), alpha=0.8, beta=0.3)
    close(batch[0], p, 1e-15)
    close(batch[1], target_distribution(2 * R, F, alpha=0.8, beta=0.3), 1e-15)
    never = target_distribution(R, t([0.0, -math.inf, 0.0, 0.0, 0.0]), alpha=1.0, beta=0.5)
    assert float(never[1]) == 0.0
    assert target_distribution(R.half(), alpha=1.0).dtype == torch.float32


def test_additive_step() -> None:
    c = QualityConstraint(0.9, max_kl=0.5, lr=0.1, kl_lr=0.2, lam=2.0, mu=0.3)
    assert c.update(torch.tensor([0.5, 0.7]), kl=1.0) is c
    assert float(c.lam) == pytest.approx(2.0 + 0.1 * 0.3)
    assert float(c.mu) == pytest.approx(0.3 + 0.2 * 0.5)
    assert c.alpha == pytest.approx(1.4 / 2.03)
    assert c.beta == pytest.approx(0.4 / 2.03)
    for _ in range(100):
        c.update(50.0, kl=torch.tensor(-5.0))
    assert float(c.lam) == pytest.approx(c.lam_min)
    assert float(c.mu) == 0.0
    assert math.isfinite(c.alpha)


def test_multiplicative_step() -> None:
    c = QualityConstraint(0.9, max_kl=0.5, lr=0.5, lam=2.0, mu=0.3, step="multiplicative")
    c.update(0.6, kl=1.0)
    assert float(c.lam) == pytest.approx(2.0 * math.exp(0.15))
    assert float(c.mu) == pytest.approx(1.3 * math.exp(0.25) - 1)
    c.update(-1e9, kl=1e9)
    assert (float(c.lam), float(c.mu)) == (c.lam_max, c.mu_max)
    # mu = 0 is reached and left again.
    c.mu.zero_()
    c.update(0.9, kl=0.0)
    assert float(c.mu) == 0.0
    c.update(0.9, kl=0.6)
    assert float(c.mu) > 0.0


@pytest.mark.parametrize("step", ["additive", "multiplicative"])
def test_damped_step_by_hand(step: str) -> None:
    """Gaps 0.3 then 0.1: the integral takes each once, the smoothed gap acts beside it and is not kept."""
    c = QualityConstraint(0.9, lr=0.1, lam=2.0, damping=5.0, smoothing=0.75, step=step)
    c.update(0.6)
    c.update(0.8)
    integral, smooth = 0.1 * (0.3 + 0.1), 0.75 * 0.3 + 0.25 * 0.1
    beside = 0.1 * 5.0 * smooth
    want = 2.0 + integral + beside if step == "additive" else 2.0 * math.exp(integral + beside)
    assert float(c.lam) == pytest.approx(want, rel=1e-6)
    # At the floor the proportional part fades and the integral stays.
    for _ in range(100):
        c.update(0.9)
    assert float(c.lam) == pytest.approx(2.0 + integral if step == "additive" else 2.0 * math.exp(integral), rel=1e-5)


def test_damping_of_mu_and_its_bounds() -> None:
    c = QualityConstraint(0.9, max_kl=0.5, lr=0.1, kl_lr=0.2, mu=0.3, damping=2.0, step="multiplicative")
    c.update(0.9, kl=1.0)
    assert float(c.mu) == pytest.approx(1.3 * math.exp(0.2 * 0.5 * 3.0) - 1.0, rel=1e-6)
    assert float(c.lam) == pytest.approx(1.0)
    c.update(-1e9, kl=1e9)
    assert (float(c.lam), float(c.mu)) == (c.lam_max, c.mu_max)
    # The integral is held inside the same bounds, so one step back is enough to leave them.
    c.update(1e9, kl=-1e9)
    assert float(c.lam) == pytest.approx(c.lam_min)
    assert float(c.mu) == 0.0


def test_a_damped_state_is_saved_and_keeps_its_dtype() -> None:
    def new() -> QualityConstraint:
        return QualityConstraint(0.9, max_kl=1.0, lam=20.0, damping=10.0, smoothing=0.9)

    one, two = new(), new()
    one.update(0.5, kl=1.5)
    two.load_state_dict(one.state_dict())
    assert sorted(one.state_dict()) == ["gap", "integral", "lam", "mu"]
    two = torch.nn.ModuleDict({"constraint": two}).to(torch.bfloat16)["constraint"]
    for c in (one, two):
        c.update(0.7, kl=0.9)
    for name, buffer in one.named_buffers():
        assert torch.equal(buffer, getattr(two, name)), name
        assert getattr(two, name).dtype == torch.float64


def test_a_refused_update_changes_nothing() -> None:
    c = QualityConstraint(0.9, max_kl=1.0, damping=10.0)
    c.update(0.5, kl=1.5)
    before = {k: v.clone() for k, v in c.state_dict().items()}
    with pytest.raises(ValueError, match="kl: wanted finite"):
        c.update(0.1, kl=torch.tensor([0.1, math.nan]))
    assert all(torch.equal(v, before[k]) for k, v in c.state_dict().items())


def test_state_dict_and_dtype() -> None:
    c = QualityConstraint(0.9, lam=20.0)
    c.update(0.5)
    other = QualityConstraint(0.9)
    other.load_state_dict(c.state_dict())
    assert sorted(c.state_dict()) == ["lam", "mu"]
    assert torch.equal(other.lam, c.lam)
    model = torch.nn.ModuleDict({"constraint": c}).to(torch.bfloat16)
    assert model["constraint"].lam.dtype == torch.float64
    assert torch.equal(model["constraint"].lam, other.lam)


def policy_step(theta: torch.Tensor, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], lr: float) -> None:
    """theta <- theta - lr E[grad loss], over every on-policy pair of the five responses."""
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    logps = torch.log_softmax(theta, 0)
    coef = coefficients(lambda x: loss(x, pairs.flatten()), logps[pairs].flatten())[1] * len(pairs)
    weight = logps[pairs].sum(1).exp()[:, None] * coef.reshape(-1, 2)
    per_response = torch.zeros(5, dtype=D).index_add(0, pairs.flatten(), weight.flatten())
    theta -= lr * (per_response - per_response.sum() * logps.exp())


@pytest.mark.parametrize(("step", "damping"), [("additive", 0.0), ("multiplicative", 0.0), ("multiplicative", 30.0)])
def test_dual_ascent_reaches_the_solution(step: str, damping: float) -> None:
    """A tabular policy trained by the public online loss, with the multipliers learnt beside it."""
    want = solve_qempo(R, F, min_reward=0.9, max_kl=0.4)
    c = QualityConstraint(0.9, max_kl=0.4, lr=0.1 if damping else 0.5, lam=1.0, step=step, damping=damping)
    theta = F.clone()
    for _ in range(4000):
        policy_step(
            theta,
            lambda x, y: qempo_kl_loss(x, F[y], R[y], lam=float(c.lam), mu=float(c.mu), group_size=2),
            1.0,
        )
        p = torch.softmax(theta, 0)
        c.update((p * R).sum(), kl=kl(p, F))
    close(torch.softmax(theta, 0), want.probs, 1e-4)
    assert float(c.lam) == pytest.approx(want.lam, rel=1e-2)
    assert float(c.mu) == pytest.approx(want.mu, rel=1e-2)


DESCENT = GOLDEN["optimum_by_descent"]
ALPHA, BETA, TARGET = DESCENT["inputs"]["alpha"], DESCENT["inputs"]["beta"], t(DESCENT["outputs"]["target"])


def minimise(loss: Callable[[torch.Tensor], torch.Tensor], n: int = 5) -> torch.Tensor:
    z = torch.zeros(n, dtype=D, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [z], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = loss(torch.log_softmax(z, 0))
        value.backward()
        return value

    optimiser.step(closure)
    return torch.softmax(z.detach(), 0)


def test_descent_by_pairs() -> None:
    w, x = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    preference = torch.sigmoid(R[w] - R[x])
    fitted = minimise(
        lambda lp: (
            preference * spl_pair_loss(lp[w], lp[x], F[w], F[x], alpha=ALPHA, beta=BETA, reduction="none")
        ).mean()
    )
    close(fitted, TARGET, 1e-6)


@pytest.mark.parametrize("counts", [[1, 1, 1, 1, 1], [3, 1, 4, 1, 2]])
def test_descent_by_variance_from_any_sampler(counts: list[int]) -> None:
    y = torch.repeat_interleave(torch.arange(5), torch.tensor(counts))
    fitted = minimise(lambda lp: variance_loss(lp[y], F[y], R[y], alpha=ALPHA, beta=BETA, group_size=len(y)))
    close(fitted, TARGET, 1e-6)


def test_descent_online() -> None:
    theta = torch.zeros(5, dtype=D)
    for _ in range(1500):
        policy_step(theta, lambda x, y: spl_loss(x, F[y], R[y], alpha=ALPHA, beta=BETA, group_size=2), 1.0)
    close(torch.softmax(theta, 0), TARGET, 1e-6)


def test_epa_population_optimum() -> None:
    """Positives from p, two negatives from q: the implicit reward becomes log(p / q) + const."""
    case = GOLDEN["epa_population_optimum"]
    p, q = t(case["inputs"]["p"]), t(case["inputs"]["q"])
    a, b, c = torch.cartesian_prod(*[torch.arange(4)] * 3).T
    zero, none = torch.zeros(64, dtype=D), torch.zeros(64, 0, dtype=D)

    def loss(lp: torch.Tensor) -> torch.Tensor:
        negatives = torch.stack([lp[b], lp[c]], 1)
        each = public_epa_loss(
            lp[a], negatives, none, zero, torch.zeros_like(negatives), none, beta=0.5, reduction="none"
        )
        return (p[a] * q[b] * q[c] * each).sum()

    implicit = 0.5 * minimise(loss, 4).log()
    close(implicit - implicit.mean(), t(case["outputs"]["log_p_over_q_centred"]), 1e-6)
