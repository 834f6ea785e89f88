"""The order in which a sampled gradient takes its rows: alike ones share a chunk, and nobody sees it but the clock."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_logps import BACKENDS

import qempo_fast as qf
from qempo_fast import reference
from qempo_fast.logps import _function, _order, cpu
from qempo_fast.logps._options import Options, TileSizes

V, D = 600, 24


def clusters(n: int, kinds: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden whose rows are of so many kinds, in turn; the kind of each row; weight."""
    weight = torch.randn(V, D, dtype=dtype)
    kind = torch.arange(n) % kinds
    hidden = 3 * torch.randn(kinds, D, dtype=dtype)[kind] + 0.1 * torch.randn(n, D, dtype=dtype)
    return hidden, kind, weight


@pytest.mark.parametrize(("n", "rows"), [(64, 16), (65, 16), (100, 48), (17, 16), (1000, 64), (3, 1), (300, 256)])
@pytest.mark.parametrize("some", [False, True], ids=["all rows", "counted ones"])
def test_it_is_a_permutation(n: int, rows: int, some: bool) -> None:
    hidden = clusters(n, 4)[0]
    hidden[n // 2] = math.nan
    hidden[n // 3, 1] = math.inf
    live = torch.arange(0, n, 2) if some else None
    order = _order.by_likeness(hidden, live, rows)
    count = n if live is None else len(live)
    if count <= rows:
        assert order is live
        return
    assert order is not None
    assert torch.equal(order.sort().values, torch.arange(n) if live is None else live)


@pytest.mark.parametrize("kinds", [2, 4, 8])
def test_rows_of_one_kind_come_together(kinds: int) -> None:
    hidden, kind, _ = clusters(64 * kinds, kinds)
    order = _order.by_likeness(hidden, None, 64)
    assert order is not None
    for chunk in kind[order].split(64):
        # Halves need not fall between kinds, but most rows of a chunk are of one.
        assert chunk.bincount().max() >= 48
    assert torch.equal(_order.by_likeness(hidden, None, 64), order)


def gradients(x: tuple[torch.Tensor, ...], targets: torch.Tensor, function: Any, **how: Any) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in x]
    out = function(*leaves, targets, temperature=torch.linspace(0.8, 1.2, len(targets)).to(x[0].dtype), **how)
    coefficients = torch.linspace(-1, 1, len(targets), dtype=torch.float64)
    return [out.logps.detach(), *torch.autograd.grad((out.logps * coefficients).sum(), leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "operator"])
def test_results_lie_where_their_rows_do(backend: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a threshold that keeps practically every column; each row has its own coefficient and temperature."""
    hidden, kind, weight = clusters(1200, 5)
    targets = (kind * 7) % V
    targets[::6] = -100
    step = lambda *leaves: gradients(  # noqa: E731
        leaves, targets, qf.linear_logps, grad="sampled", tau=1e-12, backend=backend
    )
    if compiled:
        monkeypatch.setattr("qempo_fast.logps._call._check.traced", lambda *_: True)
    ours = step(hidden, weight)
    stats = qf.last_stats()
    assert stats is not None
    assert len(stats.kept_columns) > 1
    for one, other in zip(ours, gradients((hidden, weight), targets, reference.linear_logps), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_alike_rows_keep_fewer_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SAMPLED", TileSizes(128, 8192, 64, 2048))
    hidden, kind, weight = clusters(512, 8, torch.float32)

    def share() -> float:
        torch.manual_seed(0)
        gradients((hidden, weight), kind, qf.linear_logps, grad="sampled", tau=2.0**-6)
        stats = qf.last_stats()
        assert stats is not None
        return stats.kept_share

    ordered = share()
    monkeypatch.setattr(_function, "by_likeness", lambda hidden, live, rows: live)
    assert ordered < 0.6 * share()


def test_the_mean_of_draws_is_the_exact_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SAMPLED", TileSizes(32, 8192, 16, 2048))
    hidden, kind, weight = clusters(80, 5)
    targets = kind.where(torch.arange(80) % 7 > 0, -100)
    exact = gradients((hidden, weight), targets, qf.linear_logps, grad="exact")[1:]
    draws = [gradients((hidden, weight), targets, qf.linear_logps, grad="sampled", tau=0.05)[1:] for _ in range(400)]
    for true, some in zip(exact, zip(*draws, strict=True), strict=True):
        stacked = torch.stack(some)
        ratio = (stacked.mean(0) - true).square().sum() / (stacked.var(0).sum() / len(some))
        assert ratio < 2.0, ratio


def test_autocast_leaves_the_order_as_it_is() -> None:
    hidden, _, weight = clusters(600, 3, torch.float32)
    tiles, options = cpu.CpuPass(), Options(1.0, None, False, False, 0.1, 0, None)
    want = _function.arranged(hidden.bfloat16(), len(weight), None, tiles, options)
    with torch.autocast("cpu", torch.bfloat16):
        found = _function.arranged(hidden.bfloat16(), len(weight), None, tiles, options)
    assert want is not None
    assert torch.equal(want, found)
    assert _function.arranged(hidden, len(weight), None, tiles, replace(options, tau=None)) is None
