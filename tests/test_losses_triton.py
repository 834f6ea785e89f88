"""Triton kernels of the losses against the float64 reference, on the GPU or in the interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only")

import test_losses_public as public
from losses_triton_cases import CASES, EMPTY, RAGGED, TYPICAL, Case, draw, groups, offsets, risk, tokens
from tolerances import assert_as_good

import qempo_fast as qf
from qempo_fast import _backends
from qempo_fast._backends import OPS
from qempo_fast.kernels import _loss_launch
from qempo_fast.kernels.loss_groups import group_loss_fwd, variance_loss_fwd
from qempo_fast.kernels.loss_pairs import pair_loss_fwd
from qempo_fast.kernels.loss_risk import rspo_loss_fwd
from qempo_fast.kernels.loss_tokens import token_loss_fwd

# Triton's interpreter computes both sides of a `where`, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def cast(x: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().clone().to(device, dtype) if x.is_floating_point() else x.to(device)


def reference(op: str, given: list[Any], settings: dict[str, Any], dtype: torch.dtype) -> list[torch.Tensor]:
    """Value and gradients of the plain torch loss at the given numbers, computed on the CPU in dtype."""
    cpu = torch.device("cpu")
    args = [cast(x, cpu, dtype) for x in given]
    policy = [x.requires_grad_() for x in args[: OPS[op].policy]]
    loss = _backends.kernel(op, cpu, "reference")(*args, **{k: cast(x, cpu, dtype) for k, x in settings.items()})
    return [loss.detach(), *torch.autograd.grad(loss.sum(), policy)]


def size_of_terms(coefs: list[torch.Tensor], given: list[Any]) -> float:
    return sum(float((c.double() * x.cpu()).abs().sum()) for c, x in zip(coefs, given, strict=False))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0)) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.why}")
def test_against_float64_and_plain_torch(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    given, settings = case.make()
    given = [cast(x, device, dtype) for x in given]
    settings = {k: cast(x, device, dtype) for k, x in settings.items()}
    before = [x.clone() for x in (*given, *settings.values()) if isinstance(x, torch.Tensor)]
    truth = reference(case.op, given, settings, torch.float64)
    plain = reference(case.op, given, settings, dtype)
    if dtype == torch.float64 and case.hard:
        pytest.skip("the reference's own float64 is no better")
    run = _backends.kernel(case.op, device, "triton")
    value, coefs = run(*given, **settings)
    assert len(coefs) == OPS[case.op].policy
    # The terms of a centred group cancel, so float64's truth is only as good as they are large.
    terms = size_of_terms(truth[1:], given) if dtype == torch.float64 else 0.0
    for name, ours, other, true in zip(("value", "d0", "d1", "d2"), (value, *coefs), plain, truth, strict=False):
        assert ours.dtype == dtype
        # Infinity is right where the truth is out of range: losses unclipped at a ratio of e^1000.
        finite = true.isfinite()
        assert torch.equal(ours.cpu().double()[~finite], true[~finite])
        unit = terms if name == "value" else 0.0
        assert_as_good(name, ours.cpu()[finite], other[finite], true[finite], dtype, unit=unit)
    again, coefs_again = run(*given, **settings)
    assert all(map(same, (value, *coefs), (again, *coefs_again)))
    after = [x for x in (*given, *settings.values()) if isinstance(x, torch.Tensor)]
    assert all(map(same, before, after))


def test_the_cases_reach_what_they_are_there_for() -> None:
    """Tokens are clipped on both sides and not, and RSPO's rewards do tie."""
    (new, old, advantages, cu), _ = tokens(EMPTY)()
    ratio, a = (new - old).exp(), advantages.repeat_interleave(cu.diff())
    for hit in ((a > 0) & (ratio > 1.2), (a < 0) & (ratio < 0.8), (a > 0) & (ratio < 1.2), (a < 0) & (ratio > 0.8)):
        assert hit.sum() > 3
    (_, rewards), _ = next(c for c in CASES if "ties" in c.why).make()
    assert set(rewards.tolist()) == {0.0, 1.0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's launches")
@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_each_op_is_one_launch(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launches, run = [], GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *a, **k: (launches.append(1), run(self, *a, **k)))
    given, settings = [case for case in CASES if case.op == op][1].make()
    _backends.kernel(op, device, "triton")(*given, **settings)
    assert launches == [1]


EMPTIES = {
    "pair_loss": ([(0,)] * 4, {"alpha": 1.0, "beta": 0.0}),
    "group_loss": ([(0,)] * 3, {"alpha": 1.0, "beta": 0.0, "group_size": 4}),
    "variance_loss": ([(0,)] * 3, {"alpha": 1.0, "beta": 0.0, "offsets": offsets()}),
    "epa_loss": ([(0,), (0, 2), (0, 0)] * 2, {}),
    "poft_loss": ([(0,), (0,), (0, 3)], {"reduction": "none"}),
    "rspo_loss": ([(0,)] * 2, {"k": 2, "group_size": 4}),
    "token_loss": ([(0,), (0,), (2,), offsets(0, 0)], {}),
}


@pytest.mark.parametrize("op", EMPTIES)
def test_nothing_gives_zero(op: str, device: torch.device) -> None:
    shapes, settings = EMPTIES[op]
    given = [torch.ones(x, device=device) if isinstance(x, tuple) else x.to(device) for x in shapes]
    value, coefs = _backends.kernel(op, device, "triton")(*given, **settings)
    assert value.tolist() == ([] if settings.get("reduction") == "none" else 0.0)
    assert [c.shape for c in coefs] == [x.shape for x in given[: OPS[op].policy]]


@pytest.mark.parametrize("name", public.LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_public_losses(name: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each public loss and its gradients, through the table of backends, as the reference gives them."""
    call, policy, *_ = public.LOSSES[name]
    results = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("QEMPO_BACKEND", backend)
        assert _backends.choose("group_loss", device) == backend
        given = public.data(dtype, device)
        for key in policy.split():
            given[key].requires_grad_()
        loss = call(given)
        # An incoming gradient that is not 1.
        (3 * loss).backward()
        results.append((loss.detach(), *(given[key].grad for key in policy.split())))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_public_losses_of_nothing_keep_the_graph(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMPO_BACKEND", "triton")
    logps = torch.zeros(0, device=device, requires_grad=True)
    qf.qempo_loss(logps, torch.zeros(0, device=device), lam=1.0, group_size=2).backward()
    assert logps.grad is not None
    assert logps.grad.shape == (0,)


def test_strided_keywords(device: torch.device) -> None:
    """Positional arguments come contiguous; offsets, bonus and the reference's log-probs may not."""
    for op, make in (
        ("group_loss", groups(RAGGED, extra=True)),
        ("variance_loss", groups(RAGGED)),
        ("rspo_loss", risk(RAGGED, k=2)),
        ("token_loss", tokens(EMPTY, 0.1)),
    ):
        given, settings = make()
        given = [cast(x, device, torch.float64) for x in given]
        settings = {name: cast(x, device, torch.float64) for name, x in settings.items()}
        strided = {n: torch.stack([x, x], 1)[:, 0] if isinstance(x, torch.Tensor) else x for n, x in settings.items()}
        assert any(isinstance(x, torch.Tensor) and not x.is_contiguous() for x in strided.values())
        run = _backends.kernel(op, device, "triton")
        (want, (coef,)), (got, (other,)) = run(*given, **settings), run(*given, **strided)
        assert torch.equal(want, got), op
        assert torch.equal(coef, other), op


def test_sums_over_programs_one_after_the_other(device: torch.device) -> None:
    """The last program to arrive adds up and sets the counter back: launches of any grid may follow one another."""
    sizes = (1300, 70, 1300, 5000, 600)
    drawn = {n: [draw(n).float().to(device) for _ in range(2)] for n in sizes}
    settings = {"alpha": 1.0, "beta": 0.0, "reduction": "sum"}
    values = [pair_loss_fwd(*drawn[n], None, None, **settings)[0] for n in sizes]
    assert _loss_launch._HELD
    assert all(int(room[0]) == 0 for room in _loss_launch._HELD.values())
    for n, value in zip(sizes, values, strict=True):
        truth = torch.nn.functional.softplus(drawn[n][1].double() - drawn[n][0].double()).sum()
        assert float(value) == pytest.approx(float(truth), rel=1e-6)
    assert torch.equal(values[0], values[2])


def test_a_room_for_each_captured_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured launches never share; where the pool is not there yet or is used up, the zeros are the launch's own."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(_loss_launch, "_FREE", {})
    assert _loss_launch._captured(4, cpu).tolist() == [0] * 4
    assert not _loss_launch._FREE
    pool = torch.zeros(12, dtype=torch.int64)
    _loss_launch._FREE[cpu] = pool
    rooms = [_loss_launch._captured(4, cpu) for _ in range(5)]
    assert [room.tolist() for room in rooms] == [[0] * 4] * 5
    places = [room.data_ptr() for room in rooms]
    assert places[:3] == [pool.data_ptr() + 32 * i for i in range(3)]
    assert len({*places, pool.data_ptr()}) == 5
    # What graphs go on using is held.
    assert _loss_launch._FREE[cpu].untyped_storage().data_ptr() == pool.data_ptr()


def test_the_room_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of one stream share it, another stream has its own, and a larger launch gets a larger one."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(_loss_launch, "_HELD", {})
    first = _loss_launch._room(7, -1, 0, cpu)
    assert _loss_launch._room(1023, -1, 0, cpu) is first
    assert _loss_launch._room(7, -1, 1, cpu) is not first
    larger = _loss_launch._room(1024, -1, 0, cpu)
    assert larger.numel() == 2048
    assert _loss_launch._room(7, -1, 0, cpu) is larger
    assert not bool(larger.any())


def test_a_room_is_whole_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a multiple of 16 bytes in the pool, or Triton would compile one more form inside a capture."""
    cpu, taken = torch.device("cpu"), []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(_loss_launch, "_captured", lambda size, device: taken.append(size))
    for programs in (2, 3, 4, 5):
        _loss_launch._room(programs, 0, 0, cpu)
    assert taken == [4, 4, 6, 6]


@pytest.mark.parametrize("op", [group_loss_fwd, variance_loss_fwd, rspo_loss_fwd], ids=lambda op: op.__name__)
@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_spoils_its_own_group(op: Any, reward: float, device: torch.device) -> None:
    """On a GPU no one looks at rewards unless asked."""
    cu = offsets(3, 5, 4, 20, 6).to(device)
    logps, rewards = draw(38).float().to(device), draw(38).float().to(device)
    settings = {"k": 2} if op is rspo_loss_fwd else {"alpha": 0.3, "beta": 0.0}
    args = (logps,) if op is rspo_loss_fwd else (logps, None)
    _, (clean,) = op(*args, rewards, offsets=cu, **settings)
    rewards[9] = reward
    value, (coef,) = op(*args, rewards, offsets=cu, **settings)
    assert not bool(value.isfinite())
    own = torch.arange(38, device=device) // 4 == 2
    assert torch.equal(coef[~own], clean[~own])
    assert not bool(coef[own].isfinite().any())


@pytest.mark.parametrize("op", [op for op, row in OPS.items() if row.policy])
def test_a_log_prob_that_is_nan_shows(op: str, device: torch.device) -> None:
    """No maximum on the way may lose it: the loss is NaN, and so are the coefficients that depend on it."""
    given, settings = TYPICAL[op].make()
    given = [cast(x, device, torch.float32) for x in given]
    settings = {name: cast(x, device, torch.float32) for name, x in settings.items()}
    given[0][3] = math.nan
    value, coefs = _backends.kernel(op, device, "triton")(*given, **settings)
    assert bool(value.isnan())
    if op != "rspo_loss":
        assert bool(coefs[0][3].isnan())


WRONG = {
    "falls": ([0, 4, 3, 6], [3]),
    "ends early": ([0, 2, 4], [4, 5]),
    "starts late": ([2, 4, 6], [0, 1]),
    "past the end": ([0, 3, 9], [3, 4, 5]),
    "far outside": ([0, 3, 2**40], [3, 4, 5]),
    "negative": ([-(2**40), 2, 6], [0, 1]),
    "none": ([0], [0, 1, 2, 3, 4, 5]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_offsets(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unchecked on a GPU: the loss and every row that no right group holds become NaN."""
    # Fresh memory is NaN in these tests: a row that no one wrote must show.
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, 7.0))
    starts, wrong = WRONG[name]
    cu = torch.tensor(starts, device=device)
    logps, rewards = -torch.arange(6.0, device=device) - 1, torch.arange(6.0, device=device) ** 2
    calls = {
        "group": lambda: group_loss_fwd(logps, None, rewards, alpha=0.1, beta=0.0, offsets=cu),
        "variance": lambda: variance_loss_fwd(logps, None, rewards, alpha=0.1, beta=0.0, offsets=cu),
        "rspo": lambda: rspo_loss_fwd(logps, rewards, k=2, offsets=cu),
        "tokens": lambda: token_loss_fwd(logps, logps + 0.1, rewards[: len(starts) - 1] + 1, cu),
    }
    for op, call in calls.items():
        value, (coef,) = call()
        assert bool(value.isnan()) or starts == [0], op
        for i, c in enumerate(coef.tolist()):
            # Of groups that overlap, a row in both has no right answer.
            assert c != 7
            assert math.isnan(c) if i in wrong and name != "falls" else not math.isnan(c) or i in wrong, (op, i)


def test_rspo_leaves_groups_beyond_its_registers_to_plain_torch(device: torch.device) -> None:
    run = _backends.kernel("rspo_loss", device, "triton")
    logps, rewards = draw(1100).to(device), draw(1100).to(device)
    for layout in ({"group_size": 1100}, {"offsets": offsets(1060, 40).to(device)}):
        truth = reference("rspo_loss", [logps, rewards], {"k": 7, **layout}, torch.float64)
        if device.type != "cpu" and "offsets" in layout:
            continue  # sizes are not read there
        value, (coef,) = run(logps, rewards, k=7, **layout)
        terms = size_of_terms(truth[1:], [logps])
        assert_as_good("value", value.cpu(), truth[0], truth[0], torch.float64, unit=terms)
        assert_as_good("coef", coef.cpu(), truth[1], truth[1], torch.float64)


def test_rspo_of_unread_sizes(device: torch.device) -> None:
    """Where sizes are not read, a group of more than 1024 or of fewer than k becomes NaN, alone."""
    # Many small groups: the tile is narrow, and the large group comes where wide ones are taken.
    n = 1075 + 4 * 60
    cu = offsets(5, 1060, 2, 8, *[4] * 60).to(device)
    logps, rewards = draw(n).to(device), draw(n).to(device)
    value, (coef,) = rspo_loss_fwd(logps, rewards, k=3, offsets=cu)
    assert bool(value.isnan())
    assert bool(coef[5:1067].isnan().all())
    for part in (slice(0, 5), slice(1067, 1075)):
        size = part.stop - part.start
        _, (alone,) = rspo_loss_fwd(logps[part], rewards[part], k=3, group_size=size)
        torch.testing.assert_close(coef[part] * n, alone * size, rtol=1e-14, atol=0)


def test_a_group_of_one_has_no_baseline(device: torch.device) -> None:
    """The public loss refuses it; unchecked, its coefficient is NaN and no other."""
    cu, x = offsets(1, 3).to(device), draw(4).to(device)
    for fwd in (group_loss_fwd, variance_loss_fwd):
        _, (coef,) = fwd(x, None, x, alpha=1.0, beta=0.0, offsets=cu)
        assert coef.isnan().tolist() == [True, False, False, False]


def test_advantages_that_are_not_finite(device: torch.device) -> None:
    """A clipped token of such a sequence is NaN too, not the plausible 0."""
    cu, old = offsets(2, 2).to(device), torch.zeros(4, device=device)
    for bad in (math.nan, math.inf, -math.inf):
        advantages = torch.tensor([bad, 1.0], device=device)
        _, (coef,) = token_loss_fwd(old + torch.tensor([1.0, -1.0, 0.0, 0.0], device=device), old, advantages, cu)
        assert not bool(coef[:2].isfinite().any())
        assert coef[2:].tolist() == [-0.25, -0.25]
