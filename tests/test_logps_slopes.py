"""A head that is not trained: dhidden is made in the forward, and the backward multiplies it by coefficients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_logps import BACKENDS, CASES, DTYPES, Case, Inputs, make
from tolerances import assert_as_good

import qempo_fast as qf
from qempo_fast import reference
from qempo_fast.logps import _function, _slopes
from qempo_fast.logps import cpu as cpu_pass
from qempo_fast.logps._options import TileSizes


def gradient(function: Any, x: Inputs, dtype: torch.dtype, entropy: bool = False, **more: Any) -> torch.Tensor:
    """dhidden, the head frozen; of the log-probs alone unless entropy."""
    hidden = x.hidden.detach().to(dtype).requires_grad_()
    bias = None if x.bias is None else x.bias.to(dtype)
    keywords = dict(x.keywords)
    if isinstance(keywords["temperature"], torch.Tensor) and dtype == torch.float64:
        keywords["temperature"] = keywords["temperature"].double()
    out = function(hidden, x.weight.to(dtype), x.targets, bias=bias, **keywords, **more)
    loss = (out.logps.double() * x.grads[0]).sum()
    if entropy:
        loss = loss + (out.entropy.double() * x.grads[1]).sum()
    return torch.autograd.grad(loss, hidden)[0]


def assert_right(x: Inputs, dtype: torch.dtype, spread: float = 1.0, **how: Any) -> None:
    truth = gradient(reference.linear_logps, x, torch.float64)
    plain = gradient(reference.linear_logps, x, dtype)
    assert_as_good("dhidden", gradient(qf.linear_logps, x, dtype, **how), plain, truth, dtype, 16.0 * max(1.0, spread))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(case: Case, dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float16 and case.spread > 100:
        case = replace(case, spread=100.0)  # float16 ends at 65504
    assert_right(make(case, dtype), dtype, case.spread, backend=backend)


@pytest.mark.parametrize("budget", ["", "0", "0.05"], ids=["free memory", "no logits kept", "a few"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_blocks_of_rows_and_logits_that_do_not_fit(backend: str, budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_slopes, "ROWS", 96)
    monkeypatch.setattr(cpu_pass, "EXACT", TileSizes(40, 128))
    monkeypatch.setenv("QEMPO_KEEP_LOGITS", budget)
    x = make(Case("", 517, 8, 601, bias=True, temperature="tensor"), torch.float32)
    assert_right(x, torch.float32, backend=backend)
    stats = qf.last_stats()
    assert stats is not None
    assert stats.rows == int((x.targets >= 0).sum())


def driven(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, ...]]:
    """What each pass of the driver's backward is for."""
    seen: list[tuple[bool, ...]] = []
    plain = _function.driver_backward
    monkeypatch.setattr(_function, "driver_backward", lambda *a: (seen.append(a[5]), plain(*a))[1])
    return seen


@pytest.mark.parametrize("grad", ["auto", "exact"])
def test_the_backward_has_no_gemm(grad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, x = driven(monkeypatch), make(Case("", 40, 8, 100), torch.float32)
    gradient(qf.linear_logps, x, torch.float32, grad=grad)
    assert not seen
    gradient(qf.linear_logps, x, torch.float32, grad="sampled")
    assert seen == [(True, False, False)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_of_the_entropy_goes_over_the_logits_again(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, x = driven(monkeypatch), make(Case("", 40, 8, 100, entropy=True), dtype)
    truth = gradient(reference.linear_logps, x, torch.float64, entropy=True)
    plain = gradient(reference.linear_logps, x, dtype, entropy=True)
    assert_as_good("dhidden", gradient(qf.linear_logps, x, dtype, entropy=True), plain, truth, dtype, 16.0)
    assert seen == [(True, False, False)]
    assert_right(x, dtype)  # the entropy is asked for, and nobody differentiates it
    assert len(seen) == 1


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_head_that_is_trained_in_part_takes_the_other_way(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, x = driven(monkeypatch), make(Case("", 40, 8, 100, bias=True), torch.float32)
    assert x.bias is not None
    leaves = {"hidden": x.hidden, "weight": x.weight, "bias": x.bias}
    for name in ("hidden", what):
        leaves[name].requires_grad_()
    qf.linear_logps(leaves["hidden"], leaves["weight"], x.targets, bias=leaves["bias"]).logps.sum().backward()
    assert seen == [(True, what == "weight", what == "bias")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("margin", [2.0, 8.0, 20.0, 200.0])
def test_each_row_that_is_sure_has_its_digits(margin: float, backend: str, dtype: torch.dtype) -> None:
    """Row by row: beside one that is not sure, an error in a sure row shows in no norm over all of them."""
    n, d, v = 24, 8, 60
    hidden, weight = torch.randn(n, d, dtype=torch.float64), torch.randn(v, d, dtype=torch.float64)
    hidden *= margin * torch.rand(n, 1, dtype=torch.float64)
    targets = (hidden @ weight.T).argmax(1)
    x = Inputs(hidden.to(dtype), weight.to(dtype), targets, None, {"temperature": 1.0}, (torch.rand(n) + 0.5,) * 2)
    truth = gradient(reference.linear_logps, x, torch.float64)
    ours, plain = (
        gradient(f, x, dtype, **how).double()
        for f, how in ((qf.linear_logps, {"backend": backend}), (reference.linear_logps, {}))
    )
    off, allowed = (ours - truth).norm(dim=1), 2 * (plain - truth).norm(dim=1)
    # A part below an ulp of 1 is lost in log p itself, whoever computes it.
    floor = 16 * torch.finfo(dtype).eps * truth.norm(dim=1) + torch.finfo(torch.float32).eps * weight.norm(dim=1).max()
    assert (off <= allowed + floor).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_coefficient_are_zero_whatever_they_hold(backend: str) -> None:
    hidden, weight, targets = torch.randn(9, 4), torch.randn(30, 4), torch.arange(9)
    hidden[2], targets[3] = torch.nan, -100
    hidden.requires_grad_()
    out = qf.linear_logps(hidden, weight, targets, backend=backend).logps
    coefficients = torch.ones(9)
    coefficients[[2, 5]] = 0.0
    (d,) = torch.autograd.grad(out, hidden, coefficients, retain_graph=True)
    assert (d[[2, 3, 5]] == 0).all()
    assert d[[0, 1, 4, 6, 7, 8]].isfinite().all()
    coefficients[2] = 1.0
    (d,) = torch.autograd.grad(out, hidden, coefficients)
    assert d[2].isnan().all()


def test_two_backwards_of_one_graph() -> None:
    x = make(Case("", 40, 8, 100), torch.float32)
    hidden = x.hidden.requires_grad_()
    out = qf.linear_logps(hidden, x.weight, x.targets).logps
    one, two, three = (torch.autograd.grad(out, hidden, k * torch.ones(40), retain_graph=True)[0] for k in (1, 1, 2))
    assert torch.equal(one, two)
    assert torch.equal(three, 2 * one)
    # and it is the same as the one of a head that is trained, up to rounding
    weight = x.weight.clone().requires_grad_()
    (other,) = torch.autograd.grad(qf.linear_logps(hidden, weight, x.targets).logps.sum(), hidden)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiled_as_eager(dtype: torch.dtype) -> None:
    x = make(Case("", 40, 8, 100, bias=True, entropy=True), dtype)

    def step(hidden: torch.Tensor) -> torch.Tensor:
        out = qf.linear_logps(hidden, x.weight, x.targets, bias=x.bias, entropy=True)
        return (out.logps * x.grads[0]).sum() + out.entropy.detach().sum()

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden = x.hidden.detach().requires_grad_()
        function(hidden).backward()
        found.append(hidden.grad)
    assert torch.equal(*found)


def test_functional_gradients() -> None:
    x = make(Case("", 40, 8, 100), torch.float64)
    f = lambda h: (qf.linear_logps(h, x.weight, x.targets).logps * x.grads[0]).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(f)(x.hidden), gradient(reference.linear_logps, x, torch.float64))


def test_no_gradient_no_second_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_function, "slopes_forward", lambda *a: pytest.fail("slopes without a gradient"))
    x = make(Case("", 40, 8, 100), torch.float32)
    qf.linear_logps(x.hidden, x.weight, x.targets)
    with torch.no_grad():
        qf.linear_logps(x.hidden.requires_grad_(), x.weight, x.targets)
