"""The threshold that a sampled gradient chooses by the error it may add: the estimate against the draws themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_logps import BACKENDS

import qempo_fast as qf
from qempo_fast.logps import _pilots
from qempo_fast.logps._options import ERROR

V, D = 4096, 64


def head(shape: str, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """hidden, weight, targets and keywords, from a uniform softmax to one that is sure."""
    weight, targets = torch.randn(V, D), torch.randint(V, (n,))
    keywords: dict[str, Any] = {}
    hidden = torch.randn(n, D)
    if shape.startswith("spread"):
        hidden *= float(shape.split()[1]) / math.sqrt(D)
    elif shape.startswith("sure"):
        # The target's logit stands so far above the others, whose spread is 1: p from .6 to 1 - 1e-6.
        hidden = hidden / math.sqrt(D) + weight[targets] / D * float(shape.split()[1])
    elif shape == "half of the rows sure":
        hidden *= 3 / math.sqrt(D)
        hidden[::2] += weight[targets[::2]] / D * 20
    elif shape == "rows of many sizes":
        hidden *= 3 / math.sqrt(D)
        weight *= torch.logspace(-1, 0.3, V)[torch.randperm(V), None]
    elif shape == "a mean that all rows share":
        hidden *= 3 / math.sqrt(D)
        weight += 3 * torch.randn(D)
    elif shape == "everything":
        hidden *= 5 / math.sqrt(D)
        keywords = {
            "softcap": 8.0,
            "logit_scale": 0.9,
            "temperature": torch.rand(n) + 0.7,
            "bias": torch.randn(V).to(dtype),
        }
    return hidden.to(dtype), weight.to(dtype), targets, keywords


def draw(
    x: tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], times: int, **more: Any
) -> tuple[float, Any]:
    """Error of dhidden relative to the exact one, root mean square over draws; stats of the last."""
    hidden, weight, targets, keywords = x
    coefficients = torch.sign(torch.randn(len(targets), dtype=torch.float64))

    def gradient(h: torch.Tensor, w: torch.Tensor, **how: Any) -> torch.Tensor:
        h = h.detach().requires_grad_()
        out = qf.linear_logps(h, w, targets, **keywords, **how).logps
        return torch.autograd.grad(out, h, coefficients.to(out.dtype))[0].double()

    exact = gradient(hidden, weight, grad="exact")
    squares = [float((gradient(hidden, weight, **more) - exact).norm() / exact.norm()) ** 2 for _ in range(times)]
    return math.sqrt(sum(squares) / times), qf.last_stats()


SHAPES = [
    *(f"spread {x}" for x in (0.02, 1, 2, 4, 8)),
    *(f"sure {x}" for x in (6, 10, 14, 18, 24)),
    *("half of the rows sure", "rows of many sizes", "a mean that all rows share", "everything"),
]


@pytest.mark.parametrize("n", [48, 700])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_stays_under_its_bound_and_the_estimate_is_true(shape: str, n: int, backend: str) -> None:
    error, stats = draw(head(shape, n, torch.float32), 3, grad="sampled", backend=backend)
    bound = ERROR[torch.float32]
    assert error < 1.1 * bound
    assert stats.error <= _pilots.AIM * bound * 1.001
    assert len(stats.row_errors) >= 16
    if not stats.exact_chunks and stats.kept_share < 0.98:
        # 16 to 21 pilots.
        assert 0.7 < error / stats.error < 1.4, (error, stats.error)
    elif stats.exact_chunks == len(stats.kept_columns):
        assert error < 2e-3  # float32 of rows that are sure


def test_every_row_a_pilot_and_row_sizes_told_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the estimate is the variance itself: of all rows, and of each."""
    monkeypatch.setattr(_pilots, "SIGNS", 256)
    x = head("spread 5", 16, torch.float64)
    hidden, weight, targets, _ = x
    coefficients = torch.sign(torch.randn(16, dtype=torch.float64))

    def gradient(**how: Any) -> torch.Tensor:
        h = hidden.detach().requires_grad_()
        return torch.autograd.grad(qf.linear_logps(h, weight, targets, **how).logps, h, coefficients)[0]

    exact = gradient(grad="exact")
    off = torch.stack([gradient(grad="sampled") - exact for _ in range(200)])
    stats = qf.last_stats()
    assert stats is not None
    assert stats.error is not None
    assert not stats.exact_chunks
    seen = off.square().sum((1, 2)).mean().sqrt() / exact.norm()
    assert abs(float(seen) / stats.error - 1) < 0.06
    rows = off.square().sum(2).mean(0).sqrt() / exact.norm(dim=1)
    torch.testing.assert_close(rows, torch.tensor(stats.row_errors, dtype=torch.float64), rtol=0.25, atol=0)


def frozen(dtype: torch.dtype, trained: bool = False, **more: Any) -> Any:
    hidden, weight, targets, _ = head("spread 8", 512, dtype)
    out = qf.linear_logps(hidden.requires_grad_(), weight.requires_grad_(trained), targets, **more)
    out.logps.sum().backward()
    return qf.last_stats()


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_auto_is_exact(dtype: torch.dtype, trained: bool) -> None:
    stats = frozen(dtype, trained)
    assert stats.tau is None
    assert stats.seed is None
    assert stats.error is None
    assert stats.kept_share == 1


def test_a_threshold_that_is_given_is_taken() -> None:
    for grad in ("auto", "sampled"):
        for trained in (False, True):
            stats = frozen(torch.bfloat16, trained=trained, grad=grad, tau=2.0**-6)
            assert stats.tau == 2.0**-6
            assert stats.error is None


@pytest.mark.parametrize("shape", ["spread 0.02", "spread 2", "spread 8", "sure 10", "sure 18", "everything"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_the_entropy_both_gradients_stay_under_the_bound(shape: str, backend: str) -> None:
    hidden, weight, targets, keywords = head(shape, 700, torch.float32)
    how = {"entropy": True, "backend": backend, **keywords}
    signs = torch.sign(torch.randn(700))

    def gradients(grad: str) -> list[torch.Tensor]:
        h = hidden.detach().requires_grad_()
        out = qf.linear_logps(h, weight, targets, grad=grad, **how)
        # Of one draw both: they are linear in the coefficients.
        return [torch.autograd.grad(x, h, signs, retain_graph=True)[0] for x in (out.logps, out.entropy)]

    exact = gradients("exact")
    draws = [[(a - b).norm() / b.norm() for a, b in zip(gradients("sampled"), exact, strict=True)] for _ in range(3)]
    errors = torch.tensor(draws).square().mean(0).sqrt()
    stats = qf.last_stats()
    assert stats is not None
    assert stats.error is not None
    assert stats.error <= _pilots.AIM * ERROR[torch.float32] * 1.001
    assert errors.max() < 1.1 * ERROR[torch.float32]
    if not stats.exact_chunks and stats.kept_share < 0.98:
        assert 0.7 < errors.max() / stats.error < 1.4, (errors, stats.error)


@pytest.mark.parametrize("n", [8, 1024])
@pytest.mark.parametrize("spread", [0.02, 0.5, 2.0, 6.0])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_auto_is_at_most_twice_plain_torch(n: int, spread: float, trained: bool) -> None:
    """quack's rule, over gradients as wholes; a fresh head is flat."""
    hidden, weight, targets, _ = head(f"spread {spread}", n, torch.bfloat16)
    coefficients = torch.randn(n)

    def gradients(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_(trained)]
        out = function(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        return [g.double() for g in torch.autograd.grad(out, wanted, coefficients.to(out.dtype))]

    def plain(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.cross_entropy(
            (h @ w.t()).to(torch.promote_types(h.dtype, torch.float32)), targets, reduction="none"
        )

    truth = gradients(plain, torch.float64)
    of_plain = gradients(plain, torch.bfloat16)
    ours = gradients(lambda h, w: qf.linear_logps(h, w, targets).logps, torch.bfloat16)
    for t, p, o in zip(truth, of_plain, ours, strict=True):
        assert (o - t).norm() <= 2 * (p - t).norm()


def test_nan_keeps_every_column() -> None:
    hidden, weight, targets, _ = head("spread 8", 600, torch.float32)
    hidden[300, 3] = math.nan
    out = qf.linear_logps(hidden.requires_grad_(), weight, targets, grad="sampled").logps
    stats = qf.last_stats()
    assert stats is not None
    assert stats.exact_chunks == len(stats.kept_columns)
    (gradient,) = torch.autograd.grad(out.sum(), hidden)
    assert gradient[300].isnan().all()
    assert gradient[:300].isfinite().all()


def test_no_rows_and_ignored_rows() -> None:
    hidden, weight, targets, _ = head("spread 8", 600, torch.bfloat16)
    for ignored in (slice(None), slice(0, 590)):
        marked = targets.clone()
        marked[ignored] = -100
        leaf = hidden.detach().requires_grad_()
        qf.linear_logps(leaf, weight, marked).logps.sum().backward()
        assert leaf.grad is not None
        assert (leaf.grad[ignored] == 0).all()
        assert leaf.grad.isfinite().all()


def test_compiled_graph_chooses_too() -> None:
    hidden, weight, targets, _ = head("spread 8", 600, torch.float32)

    def step(h: torch.Tensor) -> torch.Tensor:
        return qf.linear_logps(h, weight, targets, grad="sampled").logps

    exact = torch.autograd.grad(
        qf.linear_logps(hidden.requires_grad_(), weight, targets, grad="exact").logps.sum(), hidden
    )[0]
    out = torch.compile(step, backend="aot_eager", fullgraph=True)(hidden)
    stats = qf.last_stats()
    (gradient,) = torch.autograd.grad(out.sum(), hidden)
    assert stats is not None
    assert stats.error is not None
    assert 0 < float((gradient - exact).norm() / exact.norm()) < 1.1 * ERROR[torch.float32]
