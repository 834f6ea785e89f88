"""columns= and lse= of linear_logps: log-probs of tokens of one's own choice, and the log-sum-exp, with gradients."""

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
from qempo_fast.logps import _support

K = 3


def chosen(x: Inputs, vocabulary: int) -> torch.Tensor:
    """(N, K), among them the target, a token twice, and some that are left out."""
    columns = torch.randint(0, vocabulary, (len(x.targets), K), generator=torch.Generator().manual_seed(7))
    columns[::3, 0] = x.targets[::3]
    columns[1::3, 1] = columns[1::3, 2]
    columns[2::4, 2] = -100
    return columns


def results(
    function: Any, x: Inputs, dtype: torch.dtype, vocabulary: int, frozen: bool = False, **more: Any
) -> dict[str, torch.Tensor]:
    leaves = {"hidden": x.hidden, "weight": x.weight, "bias": x.bias}
    leaves = {k: v.detach().to(dtype) for k, v in leaves.items() if v is not None}
    wanted = {k: v.requires_grad_() for k, v in leaves.items() if k == "hidden" or not frozen}
    keywords = dict(x.keywords)
    if isinstance(keywords["temperature"], torch.Tensor) and dtype == torch.float64:
        keywords["temperature"] = keywords["temperature"].double()
    args = leaves["hidden"], leaves["weight"], x.targets
    how = {"bias": leaves.get("bias"), "columns": chosen(x, vocabulary), "lse": True}
    out = function(*args, **how, **keywords, **more)
    generator = torch.Generator().manual_seed(3)
    named = {name: value for name, value in out._asdict().items() if value is not None and name != "sum_sq"}
    loss = sum(
        (v.double().masked_fill(v == -torch.inf, 0.0) * torch.randn(v.shape, generator=generator).double()).sum()
        for v in named.values()
    )
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return {k: v.detach() for k, v in (named | {f"d{k}": g for k, g in zip(wanted, grads, strict=True)}).items()}


def assert_right(case: Case, dtype: torch.dtype, x: Inputs | None = None, **how: Any) -> None:
    x = make(case, dtype) if x is None else x
    shared = {k: how[k] for k in ("support", "frozen") if k in how}
    truth = results(reference.linear_logps, x, torch.float64, case.v, **shared)
    plain = results(reference.linear_logps, x, dtype, case.v, **shared)
    ours = results(qf.linear_logps, x, dtype, case.v, **how)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert torch.equal(value == -torch.inf, truth[name] == -torch.inf), name
        three = (y.masked_fill(y == -torch.inf, 0.0) for y in (value, plain[name], truth[name]))
        assert_as_good(name, *three, dtype, 32.0 * max(1.0, case.spread), float(not name.startswith("d")))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(case: Case, dtype: torch.dtype, backend: str, frozen: bool) -> None:
    if dtype == torch.float16 and case.spread > 100:
        case = replace(case, spread=100.0)  # float16 ends at 65504
    assert_right(case, dtype, frozen=frozen, backend=backend)


@pytest.mark.parametrize("way", _support.WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_way_to_make_products(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_support, "WAY", way)
    assert_right(Case("", 70, 8, 203, True, 5.0, 0.7, 0.8, True), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_over_kept_sets(backend: str, dtype: torch.dtype) -> None:
    """A column outside of its row's set has probability 0."""
    case = Case("", 40, 8, 57, True, entropy=True)
    x = make(case, dtype)
    mask = torch.rand(40, 57) < 0.5
    mask[torch.arange(40), x.targets.clamp(min=0)] = True
    assert_right(case, dtype, x, support=qf.Support.from_mask(mask), backend=backend)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_what_was_not_asked_for_is_not_there(columns: bool, lse: bool) -> None:
    x = make(CASES[1], torch.float32)
    more: dict[str, Any] = {"columns": chosen(x, 1003)} if columns else {}
    out = qf.linear_logps(x.hidden, x.weight, x.targets, entropy=True, lse=lse, **more)
    assert len(out) == (7 if columns or lse else 3)
    assert isinstance(out, qf.TokenScores if columns or lse else qf.TokenLogps)
    if columns or lse:
        assert (out.lse is not None, out.columns is not None) == (lse, columns)


def test_by_hand() -> None:
    """Logits log 1, log 2, log 5: lse = log 8, log-probs of tokens 2 and 0 are log 5/8 and log 1/8."""
    hidden = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64).log()
    for function in (qf.linear_logps, reference.linear_logps):
        out = function(hidden, weight, torch.tensor([1]), columns=torch.tensor([[2, 0]]), lse=True)
        assert out.lse.exp().item() == pytest.approx(8)
        assert out.columns.exp().flatten().tolist() == pytest.approx([5 / 8, 1 / 8])


@pytest.mark.parametrize("function", [reference.linear_logps, qf.linear_logps], ids=["reference", "public"])
def test_gradcheck(function: Any) -> None:
    x = make(Case("", 6, 3, 9, True), torch.float64)
    columns = chosen(x, 9)

    def outputs(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = function(h, w, x.targets, bias=b, columns=columns, lse=True, softcap=3.0, temperature=0.7)
        return out.columns, out.lse

    assert x.bias is not None
    assert torch.autograd.gradcheck(outputs, [y.requires_grad_() for y in (x.hidden, x.weight, x.bias)])


def test_all_columns_are_a_distribution() -> None:
    x = make(Case("", 7, 4, 11), torch.float64)
    out = qf.linear_logps(x.hidden, x.weight, x.targets, columns=torch.arange(11).expand(7, 11))
    counted = x.targets != -100
    torch.testing.assert_close(out.columns[counted].exp().sum(1), torch.ones(5, dtype=torch.float64))
    assert torch.equal(out.columns[counted].gather(1, x.targets[counted, None])[:, 0], out.logps[counted])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_gradient_are_zero_whatever_they_hold(backend: str) -> None:
    hidden, weight, targets = torch.randn(9, 4), torch.randn(30, 4, requires_grad=True), torch.arange(9)
    hidden[2], hidden[3], targets[3] = torch.nan, torch.nan, -100
    hidden.requires_grad_()
    out = qf.linear_logps(hidden, weight, targets, columns=torch.zeros(9, 2).long(), lse=True, backend=backend)
    assert out.columns[2].isnan().all()
    assert (out.columns[3] == 0).all()
    assert out.lse[3] == 0
    keep = torch.arange(9) != 2
    (out.columns[keep].sum() + out.lse[keep].sum()).backward()
    assert (hidden.grad[[2, 3]] == 0).all()
    assert weight.grad.isfinite().all()


def test_a_masked_target_leaves_the_others_finite() -> None:
    bias = torch.zeros(5, requires_grad=True)
    with torch.no_grad():
        bias[1] = -torch.inf
    out = qf.linear_logps(
        torch.ones(1, 2), torch.ones(5, 2), torch.tensor([1]), bias=bias, columns=torch.tensor([[0, 1]]), lse=True
    )
    assert out.logps.item() == -torch.inf
    assert out.columns[0, 0].item() == pytest.approx(-1.3862944)
    assert out.columns[0, 1].item() == -torch.inf
    assert out.lse.isfinite()
    # z_t and log p_t are infinite, their difference is not: p of the others is 1/4.
    out.lse.sum().backward()
    torch.testing.assert_close(bias.grad, torch.tensor([0.25, 0.0, 0.25, 0.25, 0.25]))


@pytest.mark.parametrize("more", [{}, {"grad": "sampled", "tau": 0.9}, {"softcap": 5.0, "logits_dtype": torch.float32}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sets", [False, True])
def test_one_graph_gives_the_same(more: dict[str, Any], dtype: torch.dtype, sets: bool) -> None:
    if sets and "grad" in more:
        pytest.skip("kept sets are not sampled")
    torch._dynamo.reset()
    x = make(Case("", 40, 8, 57, True), dtype)
    leaves = [y.requires_grad_() for y in (x.hidden, x.weight, x.bias) if y is not None]
    columns, support = chosen(x, 57), qf.Support.from_mask(torch.ones(40, 57, dtype=torch.bool))

    def step(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        kept = {"support": support} if sets else {}
        out = qf.linear_logps(h, w, x.targets, bias=b, columns=c, lse=True, **more, **kept)
        return out.columns.square().sum() + out.lse.sum() + out.logps.sum()

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        loss = function(*leaves, columns)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-4 if dtype == torch.float32 else 0.2
        )


def test_under_func_transforms() -> None:
    x = make(Case("", 9, 4, 13), torch.float64)
    columns = chosen(x, 13)

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = qf.linear_logps(h, w, x.targets, columns=columns, lse=True)
        return out.columns.sum() + out.lse.square().sum() + out.logps.sum()

    hidden, weight = (y.clone().requires_grad_() for y in (x.hidden, x.weight))
    wanted = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    found, value = torch.func.grad_and_value(loss, argnums=(0, 1))(x.hidden, x.weight)
    pulled = torch.func.vjp(loss, x.hidden, x.weight)[1](torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(value, loss(x.hidden, x.weight))
    for a, b, c in zip(found, pulled, wanted, strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


def test_a_column_past_the_vocabulary_raises_where_the_graph_runs() -> None:
    hidden, weight, targets = torch.randn(4, 2), torch.randn(7, 2), torch.arange(4)

    def picked(h: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return qf.linear_logps(h, weight, targets, columns=columns).columns.sum()

    for past in (7, -1):
        columns = torch.full((4, 2), past)
        for call in (torch.func.grad(picked), torch.compile(picked, fullgraph=True, backend="aot_eager")):
            with pytest.raises(ValueError, match=rf"^columns: wanted tokens in \[0, 7\).*got {past}"):
                call(hidden, columns)


# --- shards of the vocabulary, on two ranks


def _step(group: Any, rows: slice, kept: bool, columns: torch.Tensor | None = None) -> list[torch.Tensor]:
    torch.manual_seed(5)
    x = make(Case("", 40, 4, 101, True), torch.float64)
    assert x.bias is not None
    mask = torch.rand(40, 101) < 0.5
    mask[torch.arange(40), x.targets.clamp(min=0)] = True
    leaves = [y.clone().requires_grad_() for y in (x.hidden, x.weight[rows], x.bias[rows])]
    how = {"columns": chosen(x, 101) if columns is None else columns, "lse": True, "temperature": 0.8}
    how |= {"support": qf.Support.from_mask(mask)} if kept else {}
    out = qf.linear_logps(leaves[0], leaves[1], x.targets, bias=leaves[2], process_group=group, **how)
    columns = out.columns.masked_fill(out.columns == -torch.inf, 0.0)
    loss = out.logps.sum() + out.lse.square().sum() + columns.square().sum()
    return [out.logps, out.lse, columns, *torch.autograd.grad(loss, leaves)]


def shards(rank: int, world: int) -> None:
    mine = slice(0, 33) if rank == 0 else slice(33, 101)
    for kept in (False, True):
        whole, part = _step(None, slice(None), kept), _step(dist.group.WORLD, mine, kept)
        true = [*whole[:4], whole[4][mine], whole[5][mine]]
        for name, value, wanted in zip(("logps", "lse", "columns", "dh", "dw", "db"), part, true, strict=True):
            close(name, value.detach(), wanted.detach())


def others(rank: int, world: int) -> None:
    columns = torch.full((40, 2), rank)
    words = "targets: .*other targets, temperatures, coefficients, columns or support"
    raises(ValueError, words, lambda: _step(dist.group.WORLD, slice(None), False, columns))


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
