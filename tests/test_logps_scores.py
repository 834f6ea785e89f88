"""top1, mean_logits and label_smoothing of linear_logps."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Check, Ended, close, join, passed, raises, run, two_ranks
from test_logps import BACKENDS, CASES, DTYPES, Case, Inputs, make
from tolerances import assert_as_good

import qempo_fast as qf
from qempo_fast import reference

MORE = {"top1": True, "mean_logits": True, "label_smoothing": 0.3}


def results(function: Any, x: Inputs, dtype: torch.dtype, frozen: bool, **more: Any) -> dict[str, torch.Tensor]:
    leaves = {"hidden": x.hidden, "weight": x.weight, "bias": x.bias}
    leaves = {k: v.detach().to(dtype) for k, v in leaves.items() if v is not None}
    wanted = {k: v.requires_grad_() for k, v in leaves.items() if k == "hidden" or not frozen}
    keywords = {k: v for k, v in x.keywords.items() if k != "softcap"}
    if isinstance(keywords["temperature"], torch.Tensor) and dtype == torch.float64:
        keywords["temperature"] = keywords["temperature"].double()
    how = {"bias": leaves.get("bias"), **MORE, **keywords, **more}
    out = function(leaves["hidden"], leaves["weight"], x.targets, **how)
    weights = torch.randn(2, *x.targets.shape, generator=torch.Generator().manual_seed(3)).double()
    loss = (out.logps.double() * weights[0] + out.mean_logits.double() * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(wanted.values()))
    named = {"logps": out.logps.detach(), "mean_logits": out.mean_logits.detach(), "top1": out.top1}
    return named | {f"d{k}": g for k, g in zip(wanted, grads, strict=True)}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(case: Case, dtype: torch.dtype, backend: str, frozen: bool) -> None:
    if dtype == torch.float16 and case.spread > 100:
        case = replace(case, spread=100.0)  # float16 ends at 65504
    x = make(case, dtype)
    truth = results(reference.linear_logps, x, torch.float64, frozen)
    plain = results(reference.linear_logps, x, dtype, frozen)
    ours = results(qf.linear_logps, x, dtype, frozen, backend=backend)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        if name == "top1":
            # Of float32 logits no two are equal here; of half precision's some are, and count.
            assert not (truth[name] & ~value & ~plain[name]).any()
            assert (value == truth[name]).float().mean() > (0.9 if value.numel() > 20 else 0.5)
            continue
        three = (y.double() for y in (value, plain[name], truth[name]))
        assert_as_good(name, *three, dtype, 32.0 * max(1.0, case.spread), float(not name.startswith("d")))


def test_by_hand() -> None:
    """Logits log 1, log 2, log 5: their mean is log(10) / 3, log 8 their log-sum-exp; the last is the largest."""
    hidden = torch.ones(3, 1, dtype=torch.float64)
    weight = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64).log()
    mean, lse = torch.tensor(10.0).log().item() / 3, torch.tensor(8.0).log().item()
    for function in (qf.linear_logps, reference.linear_logps):
        out = function(hidden, weight, torch.tensor([2, 1, -100]), **MORE)
        assert out.top1.tolist() == [True, False, False]
        assert out.mean_logits.tolist() == pytest.approx([mean, mean, 0.0])
        smooth = [0.7 * (weight[t].item() - lse) + 0.3 * (mean - lse) for t in (2, 1)]
        assert out.logps.tolist() == pytest.approx([*smooth, 0.0])


@pytest.mark.parametrize("function", [reference.linear_logps, qf.linear_logps], ids=["reference", "public"])
def test_gradcheck(function: Any) -> None:
    x = make(Case("", 6, 3, 9, True), torch.float64)

    def outputs(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = function(h, w, x.targets, bias=b, temperature=0.7, logit_scale=0.5, entropy=True, **MORE)
        return out.logps, out.entropy, out.mean_logits

    assert x.bias is not None
    assert torch.autograd.gradcheck(outputs, [y.requires_grad_() for y in (x.hidden, x.weight, x.bias)])


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_smoothing_is_that_of_cross_entropy(smoothing: float) -> None:
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (20,)).index_fill(0, torch.tensor([3]), -100)
    cu_seqlens = torch.tensor([0, 12, 20])
    loss = -qf.sequence_logps(hidden, weight, targets, cu_seqlens, label_smoothing=smoothing).logps.sum()
    plain = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(loss, plain)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_was_not_asked_for_is_not_there() -> None:
    hidden, weight, targets = torch.randn(4, 2), torch.randn(5, 2), torch.tensor([0, 1, 2, 3])
    assert isinstance(qf.linear_logps(hidden, weight, targets, label_smoothing=0.1), qf.TokenLogps)
    for name in ("top1", "mean_logits"):
        out = qf.linear_logps(hidden, weight, targets, **{name: True})
        assert [k for k, v in out._asdict().items() if v is not None] == ["logps", name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_likeliest_token_is_found_and_equal_ones_are(backend: str, dtype: torch.dtype) -> None:
    # Small integers, whose products have no rounding that the columns' places could change.
    weight = torch.randint(-2, 3, (300, 16)).to(dtype)
    weight[[4, 7, 200]] = torch.tensor([[3.0, -3] * 8, [3.0, 3] * 8, [3.0, 3] * 8], dtype=dtype)
    hidden = weight[[7, 7, 200, 4, 4]]
    targets = torch.tensor([7, 200, 7, 4, 5])
    for more in ({}, {"support": qf.Support.from_mask(torch.ones(5, 300, dtype=torch.bool))}):
        out = qf.linear_logps(hidden, weight, targets, top1=True, backend=backend, **more)
        assert out.top1.tolist() == [True, True, True, True, False]


def test_the_likeliest_of_a_set() -> None:
    hidden, weight = torch.ones(2, 1), torch.tensor([[1.0], [2.0], [5.0]])
    support = qf.Support.from_lists([[0, 1], [1, 2]])
    assert qf.linear_logps(hidden, weight, torch.tensor([1, 1]), top1=True, support=support).top1.tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_top1_goes_with_batch_invariance(backend: str) -> None:
    if backend == "reference":
        pytest.skip("it refuses batch_invariant")
    hidden, weight, targets = torch.randn(9, 4), torch.randn(30, 4), torch.arange(9)
    how: dict[str, Any] = {"top1": True, "backend": backend}
    loose, fixed = (qf.linear_logps(hidden, weight, targets, batch_invariant=b, **how) for b in (False, True))
    assert torch.equal(loose.top1, fixed.top1)


def test_ignored_rows_are_zero_whatever_they_hold() -> None:
    hidden, weight = torch.randn(6, 4), torch.randn(30, 4, requires_grad=True)
    targets = torch.tensor([1, 2, -100, 4, 5, 6])
    hidden[2] = torch.nan
    hidden.requires_grad_()
    out = qf.linear_logps(hidden, weight, targets, **MORE)
    assert [out.logps[2], out.mean_logits[2], out.top1[2]] == [0, 0, False]
    for g in torch.autograd.grad(out.logps.sum() + out.mean_logits.sum(), (hidden, weight)):
        assert g.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_graph_gives_the_same(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    x = make(Case("", 40, 8, 57, True), dtype)
    leaves = [y.requires_grad_() for y in (x.hidden, x.weight, x.bias) if y is not None]

    def step(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = qf.linear_logps(h, w, x.targets, bias=b, **MORE)
        return out.logps.sum() + out.mean_logits.square().sum(), out.top1

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss, top1 = function(*leaves)
        found.append([loss, top1, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=torch.finfo(dtype).eps / 2)


def test_autocast_rounds_no_mean() -> None:
    hidden, weight = torch.randn(8, 64), torch.randn(100, 64) + 4
    plain = qf.reference.linear_logps(hidden.bfloat16().double(), weight.bfloat16().double(), torch.arange(8), **MORE)
    with torch.autocast("cpu", torch.bfloat16):
        out = qf.linear_logps(hidden, weight, torch.arange(8), mean_logits=True)
    torch.testing.assert_close(out.mean_logits.double(), plain.mean_logits, rtol=1e-5, atol=1e-4)


# --- shards of the vocabulary, on two ranks


def _step(group: Any, rows: slice, **more: Any) -> list[torch.Tensor]:
    torch.manual_seed(5)
    x = make(Case("", 40, 4, 101, True), torch.float64)
    assert x.bias is not None
    leaves = [y.clone().requires_grad_() for y in (x.hidden, x.weight[rows], x.bias[rows])]
    how = {**MORE, "temperature": 0.8, **more}
    out = qf.linear_logps(leaves[0], leaves[1], x.targets, bias=leaves[2], process_group=group, **how)
    loss = out.logps.sum() + out.mean_logits.square().sum()
    return [out.logps, out.mean_logits, out.top1.double(), *torch.autograd.grad(loss, leaves)]


def shards(rank: int, world: int) -> None:
    mine = slice(0, 33) if rank == 0 else slice(33, 101)
    whole, part = _step(None, slice(None)), _step(dist.group.WORLD, mine)
    true = [*whole[:4], whole[4][mine], whole[5][mine]]
    for name, value, wanted in zip(("logps", "mean_logits", "top1", "dh", "dw", "db"), part, true, strict=True):
        close(name, value.detach(), wanted.detach())


def others(rank: int, world: int) -> None:
    for what in ({"label_smoothing": 0.1 * rank}, {"mean_logits": rank == 1, "label_smoothing": 0.0, "lse": True}):
        raises(ValueError, f"{next(iter(what))}: ", lambda what=what: _step(dist.group.WORLD, slice(None), **what))


CHECKS: dict[str, Check] = {f.__name__: f for f in (shards, others)}


@pytest.fixture(scope="module")
def ended() -> list[Ended]:
    return two_ranks(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name: str, ended: list[Ended]) -> None:
    passed(name, ended)


if __name__ == "__main__":
    number, count, _, folder = sys.argv[1:]
    join(int(number), int(count), f"{folder}/store")
    run(CHECKS.items(), int(number), int(count))
