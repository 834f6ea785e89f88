"""weighted_logps and weighted_sequence_logps: known weights, gradients made in the forward."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Check, Ended, close, join, passed, raises, run, two_ranks
from test_logps import BACKENDS, CASES, DTYPES, Case, Inputs, make, peaked
from tolerances import assert_as_good

import qempo_fast as qf
from qempo_fast import reference
from qempo_fast.logps import _weighted
from qempo_fast.logps import cpu as cpu_pass
from qempo_fast.logps._options import ERROR, TileSizes


def weights(x: Inputs) -> torch.Tensor:
    """Of every third row none."""
    coef = x.grads[0] / 100
    return torch.where(torch.arange(len(coef), device=coef.device) % 3 == 1, 0.0, coef)


def gradients(
    function: Any, x: Inputs, dtype: torch.dtype, scale: float = 1.0, frozen: bool = False, **more: Any
) -> dict[str, torch.Tensor]:
    leaves = {"hidden": x.hidden, "weight": x.weight, "bias": x.bias}
    leaves = {k: v.detach().to(dtype) for k, v in leaves.items() if v is not None}
    wanted = {k: v.requires_grad_() for k, v in leaves.items() if k == "hidden" or not frozen}
    keywords = dict(x.keywords)
    entropy = keywords.pop("entropy")
    if isinstance(keywords["temperature"], torch.Tensor) and dtype == torch.float64:
        keywords["temperature"] = keywords["temperature"].double()
    more |= {"coef_entropy": x.grads[1] / 100} if entropy else {}
    args = leaves["hidden"], leaves["weight"], x.targets, weights(x)
    out = function(*args, bias=leaves.get("bias"), **keywords, **more)
    (out.loss * scale).backward()
    results = {"loss": out.loss, "logps": out.logps, "entropy": out.entropy}
    results |= {f"d{k}": v.grad for k, v in wanted.items()}
    return {k: v.detach() for k, v in results.items() if v is not None}


def assert_right(x: Inputs, dtype: torch.dtype, spread: float = 1.0, frozen: bool = False, **how: Any) -> None:
    truth = gradients(reference.weighted_logps, x, torch.float64, frozen=frozen)
    plain = gradients(reference.weighted_logps, x, dtype, frozen=frozen)
    ours = gradients(qf.weighted_logps, x, dtype, frozen=frozen, **how)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        of_sums = name in ("loss", "logps", "entropy")
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        assert value.dtype == (acc if of_sums else dtype)
        assert_as_good(name, value, plain[name], truth[name], dtype, 32.0 * max(1.0, spread), float(of_sums))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(case: Case, dtype: torch.dtype, backend: str, frozen: bool) -> None:
    if dtype == torch.float16 and case.spread > 100:
        case = replace(case, spread=100.0)  # float16 ends at 65504
    assert_right(make(case, dtype), dtype, case.spread, frozen, backend=backend)


@pytest.mark.parametrize("budget", ["", "0", "0.05"], ids=["free memory", "no logits kept", "a few"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_blocks_add_up(backend: str, dtype: torch.dtype, budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_weighted, "SUMMED", 96)
    monkeypatch.setattr(cpu_pass, "EXACT", TileSizes(40, 128))
    monkeypatch.setenv("QEMPO_KEEP_LOGITS", budget)
    x = make(Case("", 517, 8, 601, bias=True, temperature="tensor", entropy=True), dtype)
    assert_right(x, dtype, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_in_float32(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_weighted, "SUMMED", 96)
    x = make(Case("", 300, 8, 601, bias=True, entropy=True), dtype)
    truth = gradients(reference.weighted_logps, x, torch.float64)
    plain = gradients(reference.weighted_logps, x, dtype, logits_dtype=torch.float32)
    ours = gradients(qf.weighted_logps, x, dtype, logits_dtype=torch.float32, backend=backend)
    for name, value in ours.items():
        of_sums = name in ("loss", "logps", "entropy")
        assert_as_good(name, value, plain[name], truth[name], torch.float32 if of_sums else dtype, 32.0, float(of_sums))


def test_by_hand() -> None:
    """Two tokens of equal logits: p = 1/2, log p = -log 2, H = log 2; dlogp/dz = (1/2, -1/2), dH/dz = 0."""
    hidden = torch.tensor([[1.0], [3.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[2.0], [2.0]], dtype=torch.float64, requires_grad=True)
    out = qf.weighted_logps(hidden, weight, torch.tensor([0, 1]), torch.tensor([4.0, -1.0]), coef_entropy=torch.ones(2))
    log2 = torch.tensor(2.0, dtype=torch.float64).log()
    torch.testing.assert_close(out.loss, -4 * log2 + log2 + 2 * log2)
    out.loss.backward()
    # dz = 4 (1/2, -1/2) of the row 1 and -1 (-1/2, 1/2) of the row 3.
    torch.testing.assert_close(weight.grad, torch.tensor([[2.0 + 1.5], [-2.0 - 1.5]], dtype=torch.float64))
    torch.testing.assert_close(hidden.grad, torch.zeros(2, 1, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    x = make(Case("", 7, 3, 11, True, 5.0, 0.7, 0.8), torch.float64)

    def loss(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, c: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return qf.weighted_logps(h, w, x.targets, c, coef_entropy=e, bias=b, softcap=5.0, backend=backend).loss

    assert x.bias is not None
    leaves = (x.hidden, x.weight, x.bias, x.grads[0] / 100, x.grads[1])
    assert torch.autograd.gradcheck(loss, [y.requires_grad_() for y in leaves])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_its_gradient_is_that_of_the_loss_whose_coefficients_it_has(dtype: torch.dtype) -> None:
    x, rewards = make(Case("", 40, 8, 300), dtype), torch.randn(40)
    hidden, weight = (y.requires_grad_() for y in (x.hidden, x.weight))
    cu = torch.tensor([0, 5, 11, 20, 40])
    sums = qf.sequence_logps(hidden, weight, x.targets, cu).logps
    loss = qf.qempo_loss(sums, rewards[:4], lam=2.0, group_size=2)
    wanted = torch.autograd.grad(loss, (hidden, weight))
    _, coef = qf.coefficients(qf.qempo_loss, sums, rewards[:4], lam=2.0, group_size=2)
    out = qf.weighted_sequence_logps(hidden, weight, x.targets, cu, coef)
    assert torch.equal(out.logps, sums)
    for ours, true in zip(torch.autograd.grad(out.loss, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequences(dtype: torch.dtype, average: bool) -> None:
    x, cu = make(Case("", 40, 8, 300), dtype), torch.tensor([0, 0, 1, 11, 20, 40], dtype=torch.int32)
    coef, of_entropy = torch.randn(5), torch.randn(5)
    x.targets[:1] = -100  # a sequence of which no token is counted
    both = []
    for function, kind in ((qf, dtype), (reference, dtype), (reference, torch.float64)):
        leaves = [y.detach().to(kind).requires_grad_() for y in (x.hidden, x.weight)]
        args = *leaves, x.targets, cu, coef
        out = function.weighted_sequence_logps(*args, coef_entropy=of_entropy, average=average)
        both.append([out.loss, out.logps, out.entropy, out.token_logps, *torch.autograd.grad(out.loss, leaves)])
        assert out.lengths.tolist() == [
            0,
            0,
            *(int((x.targets[a:b] >= 0).sum()) for a, b in ((1, 11), (11, 20), (20, 40))),
        ]
        assert not any(y.requires_grad for y in (out.logps, out.entropy, out.token_logps))
    for name, *three in zip(("loss", "logps", "entropy", "tokens", "dhidden", "dweight"), *both, strict=True):
        assert_as_good(name, *(y.detach() for y in three), dtype, 16.0, 1.0)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-10], ids=["loss scale", "accumulation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coefficients_that_half_precision_would_lose(dtype: torch.dtype, scale: float) -> None:
    x = make(Case("", 60, 8, 300), dtype)
    small = replace(x, grads=(x.grads[0] / scale, x.grads[1]))
    truth = gradients(reference.weighted_logps, small, torch.float64, scale)
    ours = gradients(qf.weighted_logps, small, dtype, scale)
    for name in ("dhidden", "dweight"):
        error = (ours[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < 4 * torch.finfo(dtype).eps, (name, error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["exact", "sampled"])
def test_rows_without_a_coefficient_add_nothing_whatever_they_hold(backend: str, grad: str) -> None:
    x = peaked()
    coef = torch.randn(40)
    coef[[2, 6]] = 0.0
    x.hidden[2], x.targets[3] = torch.nan, -100
    coef[3] = torch.nan
    hidden, weight = (y.requires_grad_() for y in (x.hidden, x.weight))
    out = qf.weighted_logps(hidden, weight, x.targets, coef, grad=grad, backend=backend)
    assert out.loss.isfinite()
    assert out.logps[2].isnan()
    assert out.logps[6] < 0
    dh, dw = torch.autograd.grad(out.loss, (hidden, weight))
    assert (dh[[2, 3, 6]] == 0).all()
    assert dh.isfinite().all()
    assert dw.isfinite().all()
    if grad == "exact":
        whole = qf.reference.weighted_logps(x.hidden.detach().nan_to_num(0.0), x.weight.detach(), x.targets, coef)
        torch.testing.assert_close(out.loss, whole.loss)


@pytest.mark.parametrize("grad", ["exact", "sampled"])
@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_weigh_gives_zeros(n: int, grad: str, dtype: torch.dtype) -> None:
    hidden, weight = (
        torch.randn(n, 4, dtype=dtype, requires_grad=True),
        torch.randn(9, 4, dtype=dtype, requires_grad=True),
    )
    out = qf.weighted_logps(hidden, weight, torch.arange(n), torch.zeros(n), grad=grad)
    assert out.loss == 0
    for g in torch.autograd.grad(out.loss, (hidden, weight)):
        assert (g == 0).all()


def test_rows_without_a_coefficient_cost_their_forward_alone() -> None:
    seen: list[int] = []
    plain = cpu_pass.CpuPass.backward

    def backward(self: Any, tile: Any, *rest: Any) -> None:
        seen.append(len(tile.z))
        plain(self, tile, *rest)

    x = make(Case("", 300, 8, 601), torch.float32)
    with mock.patch.object(cpu_pass.CpuPass, "backward", backward):
        gradients(qf.weighted_logps, x, torch.float32)
        assert set(seen) == {int(((weights(x) != 0) & (x.targets >= 0)).sum())}
        seen.clear()
        with torch.no_grad():
            qf.weighted_logps(x.hidden, x.weight, x.targets, weights(x))
    assert not seen


def test_graphs_that_are_kept_and_that_are_not() -> None:
    x = make(Case("", 40, 8, 100), torch.float32)
    hidden, weight = (y.requires_grad_() for y in (x.hidden, x.weight))
    loss = qf.weighted_logps(hidden, weight, x.targets, weights(x)).loss
    one, two, three = (torch.autograd.grad(k * loss, (hidden, weight), retain_graph=True) for k in (1, 1, 2))
    last = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=False)
    for a, b, c, d in zip(one, two, three, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, 2 * a)
        torch.testing.assert_close(d, 3 * a)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    # The first backward's gradients are the caller's: a step on them leaves a kept graph's alone.
    loss = qf.weighted_logps(hidden, weight, x.targets, weights(x)).loss
    loss.backward(retain_graph=True)
    hidden.grad.zero_()
    weight.grad.zero_()
    loss.backward()
    torch.testing.assert_close(weight.grad, one[1])


def test_differentiable_once() -> None:
    x = make(Case("", 6, 3, 10), torch.float64)
    hidden = x.hidden.requires_grad_()
    loss = qf.weighted_logps(hidden, x.weight, x.targets, weights(x)).loss
    (g,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^weighted_logps: differentiable once"):
        g.square().sum().backward()


def test_the_other_results_have_no_graph() -> None:
    x = make(Case("", 6, 3, 10), torch.float32)
    out = qf.weighted_logps(x.hidden.requires_grad_(), x.weight, x.targets, weights(x), entropy=True)
    assert out.loss.requires_grad
    assert not out.logps.requires_grad
    assert not out.entropy.requires_grad


@pytest.mark.parametrize("tau", [0.02, None], ids=["tau", "chosen"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sampled_is_unbiased(
    backend: str, dtype: torch.dtype, entropy: bool, tau: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_weighted, "ROWS", 48)
    monkeypatch.setattr(cpu_pass, "SAMPLED", TileSizes(64, 256, 16, 64, 256))
    monkeypatch.setitem(ERROR, dtype, 0.1)  # of so few columns a usual error keeps all
    x = peaked(dtype, n=100)
    x = replace(x, grads=(torch.randn(100).double(), torch.randn(100).double()))
    x.keywords["entropy"] = entropy
    exact = gradients(qf.weighted_logps, x, dtype, grad="exact")
    draws = [gradients(qf.weighted_logps, x, dtype, grad="sampled", tau=tau, backend=backend) for _ in range(100)]
    stats = qf.last_stats()
    assert stats is not None
    assert 0.02 < stats.kept_share < 0.9
    for name in ("dhidden", "dweight"):
        values = torch.stack([d[name].double() for d in draws])
        error = (values.mean(0) - exact[name].double()).square().sum()
        # Rounding of each draw, in float16, is no sampling error: it stays in the mean.
        rounding = (8 * torch.finfo(dtype).eps * exact[name].double().norm()).square()
        assert error < 2.5 * values.var(0).sum() / 100 + rounding, name
        assert values.var(0).sum() > 0
    if tau is None:
        relative = (
            torch.stack([(d["dhidden"] - exact["dhidden"]).double().norm() for d in draws]).square().mean().sqrt()
        )
        relative /= exact["dhidden"].double().norm()
        assert stats.error is not None
        assert relative < 0.13, (float(relative), stats.error)


def test_a_row_has_its_say_as_its_coefficient_weighs_it() -> None:
    """One row that is unsure of everything asks for few columns where its coefficient is small."""
    weight, targets = torch.randn(2000, 16), torch.arange(32)
    hidden = 3 * weight[targets]
    hidden[1] = 0.0
    shares = []
    for small in (1.0, 1e-3):
        coef = torch.ones(32)
        coef[1] = small
        qf.weighted_logps(hidden.requires_grad_(), weight, targets, coef, grad="sampled", tau=1e-4)
        stats = qf.last_stats()
        assert stats is not None
        shares.append(stats.kept_share)
    assert shares[1] < shares[0] / 2, shares


def test_sampled_makes_kept_logits_no_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x = peaked(torch.float32, n=64)
    hidden = x.hidden.requires_grad_()
    with mock.patch("qempo_fast.logps._backward.linear", side_effect=AssertionError("a GEMM for logits again")):
        qf.weighted_logps(hidden, x.weight, x.targets, torch.randn(64), grad="sampled", tau=0.02).loss.backward()
    stats = qf.last_stats()
    assert stats is not None
    assert not stats.exact_chunks


# --- shards of the vocabulary, on two ranks


def _step(group: Any, rows: slice, seed: int = 0, **how: Any) -> list[torch.Tensor]:
    torch.manual_seed(5)
    x = peaked(n=60)
    x = replace(x, bias=torch.randn(700, dtype=torch.float64))
    assert x.bias is not None
    leaves = [y.clone().requires_grad_() for y in (x.hidden, x.weight[rows], x.bias[rows])]
    coef, of_entropy = torch.linspace(-1, 1, 60), torch.linspace(0, 0.1, 60)
    torch.manual_seed(seed)
    args = leaves[0], leaves[1], x.targets, coef
    out = qf.weighted_logps(*args, coef_entropy=of_entropy, bias=leaves[2], process_group=group, **how)
    return [*out, *torch.autograd.grad(out.loss, leaves)]  # type: ignore[list-item]


def _shard(rank: int) -> slice:
    return slice(0, 290) if rank == 0 else slice(290, 700)


def exact_shards(rank: int, world: int) -> None:
    for budget in ("", "0.1"):
        with mock.patch.dict(os.environ, QEMPO_KEEP_LOGITS=budget):
            whole = _step(None, slice(None))
            part = _step(dist.group.WORLD, _shard(rank))
        true = [*whole[:4], whole[4][_shard(rank)], whole[5][_shard(rank)]]
        for name, value, wanted in zip(("loss", "logps", "entropy", "dh", "dw", "db"), part, true, strict=True):
            close(name, value, wanted)


def sampled_shards(rank: int, world: int) -> None:
    whole = _step(None, slice(None))
    draws = [_step(dist.group.WORLD, _shard(rank), i, grad="sampled", tau=0.05) for i in range(60)]
    for at, rows in ((3, slice(None)), (4, _shard(rank))):
        values = torch.stack([d[at] for d in draws])
        assert 0 < (values.mean(0) - whole[at][rows]).square().sum() < 2.5 * values.var(0).sum() / 60


def other_coefficients(rank: int, world: int) -> None:
    x = peaked(n=6)
    words = "targets: .*other targets, temperatures, coefficients, columns or support"
    args = x.hidden, x.weight, x.targets, torch.ones(6) * (rank + 1)
    raises(ValueError, words, lambda: qf.weighted_logps(*args, process_group=dist.group.WORLD))


CHECKS: dict[str, Check] = {f.__name__: f for f in (exact_shards, sampled_shards, other_coefficients)}


@pytest.fixture(scope="module")
def ended() -> list[Ended]:
    return two_ranks(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name: str, ended: list[Ended]) -> None:
    passed(name, ended)


# --- graphs


def _compiled(**how: Any) -> Callable[..., torch.Tensor]:
    def step(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return qf.weighted_logps(h, w, t, c, **how).loss

    return step


@pytest.mark.parametrize(
    "how", [{}, {"coef_entropy": torch.randn(40), "softcap": 5.0}, {"grad": "sampled", "tau": 0.05}]
)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_graph_gives_the_same(how: dict[str, Any], frozen: bool, dtype: torch.dtype) -> None:
    x = peaked(dtype)
    hidden, weight = x.hidden.requires_grad_(), x.weight.requires_grad_(not frozen)
    leaves = [y for y in (hidden, weight) if y.requires_grad]
    torch._dynamo.reset()
    step, coef = _compiled(**how), torch.randn(40)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        loss = function(hidden, weight, x.targets, coef)
        results.append([loss, *torch.autograd.grad(2 * loss, leaves)])
    assert all(map(torch.equal, *results))


def test_under_func_grad() -> None:
    x = peaked()
    coef = torch.randn(40)
    found = torch.func.grad(_compiled(), argnums=(0, 1))(x.hidden, x.weight, x.targets, coef)
    hidden, weight = (y.clone().requires_grad_() for y in (x.hidden, x.weight))
    wanted = torch.autograd.grad(_compiled()(hidden, weight, x.targets, coef), (hidden, weight))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


if __name__ == "__main__":
    number, count, _, folder = sys.argv[1:]
    join(int(number), int(count), f"{folder}/store")
    run(CHECKS.items(), int(number), int(count))
