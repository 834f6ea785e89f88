"""The sampled gradient of linear_logps: unbiased, within its error, repeatable; and last_stats, which tells of it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from test_logps import BACKENDS, Case, Inputs, make, peaked, run
from torch.utils.checkpoint import checkpoint

import qempo_fast as qf
from qempo_fast import reference
from qempo_fast.logps import cpu as pass_cpu
from qempo_fast.logps._options import TileSizes


def sampled_mean(x: Inputs, draws: int, **more: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Mean of each gradient over draws, and the squared standard error of that mean, summed over its entries."""
    runs = [run(qf.linear_logps, x, torch.float64, grad="sampled", **more) for _ in range(draws)]
    mean, error = {}, {}
    for name in (k for k in runs[0] if k.startswith("d")):
        stack = torch.stack([r[name] for r in runs])
        mean[name] = stack.mean(0)
        error[name] = stack.var(0).sum() / draws
    return mean, error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", ["plain", "full"])
@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "entropy"])
def test_sampled_is_unbiased(backend: str, head: str, entropy: bool) -> None:
    x = make(
        Case("", 40, 6, 700, head == "full", 20.0 if head == "full" else None, 1.0, 0.9, entropy, 4.0),
        torch.float64,
    )
    exact = run(qf.linear_logps, x, torch.float64, grad="exact", backend=backend)
    mean, error = sampled_mean(x, 200, tau=0.2, backend=backend)
    for name, value in mean.items():
        ratio = ((value - exact[name]).square().sum() / error[name]).item()
        # The expected ratio is 1; a bias of a tenth of one draw's error would make it 3.
        assert 0.4 < ratio < 1.8, f"{name}: squared error over squared standard error {ratio:.2f}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", ["plain", "full"])
def test_blocks_and_tiles_of_the_vocabulary_change_nothing(
    dtype: torch.dtype, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = head == "full"
    x = make(Case("", 200, 6, 900, full, 20.0 if full else None, 1.0, 0.9, full, 10.0), dtype)
    x.hidden[:26] = 0  # the first chunk's rows have more entropy than break-even takes, as long as they stay together
    monkeypatch.setattr(pass_cpu.CpuPass, "ordered", lambda *_: False)
    x.grads[0][60:70] = x.grads[1][60:70] = 0
    results = []
    # Tiles of 150 columns of blocks of 400, each padded to 256: targets of the next tile lie where the padding does.
    for kept, block in ((150, 400), (1000, 0)):
        monkeypatch.setattr(pass_cpu, "SAMPLED", TileSizes(40, 96, 20, kept, block))
        torch.manual_seed(5)
        results.append(run(qf.linear_logps, x, dtype, grad="sampled", tau=1e-2 if full else 1e-3, backend="cpu"))
        stats = qf.last_stats()
        assert stats is not None
        assert stats.exact_chunks == 1
        assert 200 < min(stats.kept_columns) < 700
    for name, value in results[0].items():
        eps = torch.finfo(dtype).eps
        error = (value - results[1][name]).double().norm() / results[1][name].double().norm()
        # In half precision each tile's part of dHidden is rounded on its own.
        assert error < 4 * eps, f"{name}: {error:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_unbiased_where_the_number_kept_straddles_break_even(backend: str) -> None:
    x = make(Case("", 24, 5, 37, spread=1.5), torch.float64)
    exact = run(qf.linear_logps, x, torch.float64, grad="exact", backend=backend)
    taus = torch.linspace(0.15, 0.4, 11).tolist()
    kept = [[run_kept(x, tau, backend) for _ in range(20)] for tau in taus]
    # Some tau has to put the number of columns on either side of break-even by luck, or this tests nothing.
    tau = next(t for t, k in zip(taus, kept, strict=True) if min(k) < 0.8 * 37 < max(k) < 37)
    mean, error = sampled_mean(x, 400, tau=tau, backend=backend)
    for name, value in mean.items():
        ratio = ((value - exact[name]).square().sum() / error[name]).item()
        assert ratio < 2.0, f"{name}: squared error over squared standard error {ratio:.2f}"


def run_kept(x: Inputs, tau: float, backend: str) -> int:
    """Columns kept by one draw."""
    run(qf.linear_logps, x, torch.float64, grad="sampled", tau=tau, backend=backend)
    stats = qf.last_stats()
    assert stats is not None
    return stats.kept_columns[0]


def test_last_stats() -> None:
    x = peaked(n=600, v=3000)
    counted = int((x.targets != -100).sum())
    logps = qf.linear_logps(x.hidden.requires_grad_(), x.weight, x.targets, grad="sampled", tau=0.1).logps
    stats = qf.last_stats()
    assert stats is not None
    kept = kept_columns(logps)
    assert (stats.backend, stats.rows, stats.vocabulary, stats.tau) == ("cpu", counted, 3000, 0.1)
    assert len(kept) == -(-counted // stats.chunk_rows) > 1
    assert stats.kept_columns == tuple(len(k.columns) for k in kept)
    assert stats.exact_chunks == 0
    assert stats.kept_share == pytest.approx(sum(stats.kept_columns) / len(kept) / 3000)
    assert 0 < min(stats.kept_shares) <= max(stats.kept_shares) < 0.8
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ()))
    torch.manual_seed(5)
    compiled = torch.compile(qf.linear_logps, backend="aot_eager", fullgraph=True)
    compiled(x.hidden, x.weight, x.targets, grad="sampled", tau=1e-9)
    flat = qf.last_stats()
    assert flat is not None
    assert flat.seed == seed
    assert flat.exact_chunks == len(flat.kept_columns) == len(kept)
    assert flat.kept_share == 1
    qf.linear_logps(x.hidden, x.weight, x.targets, backend="reference")
    exact = qf.last_stats()
    assert exact is not None
    assert (exact.backend, exact.tau, exact.seed, exact.kept_columns, exact.kept_share) == (
        "reference",
        None,
        None,
        (),
        1,
    )


def test_last_stats_belong_to_the_thread() -> None:
    qf.linear_logps(torch.randn(3, 2), torch.randn(5, 2), torch.arange(3))
    found = []
    thread = threading.Thread(target=lambda: found.append(qf.last_stats()))
    thread.start()
    thread.join()
    assert found == [None]
    assert qf.last_stats() is not None


def kept_columns(logps: torch.Tensor) -> list[Any]:
    """What each row chunk kept, from the op's node of the graph; empty where the gradient is exact."""
    node: Any = logps.grad_fn
    while not hasattr(node, "kept"):
        node = node.next_functions[0][0]
    return node.kept


def kept_share(logps: torch.Tensor, vocabulary: int) -> float:
    counts = [vocabulary if k.columns is None else len(k.columns) for k in kept_columns(logps)]
    return sum(counts) / (len(counts) * vocabulary)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampled_error_falls_with_tau(backend: str) -> None:
    x = peaked(n=200, v=2000)
    exact = run(qf.linear_logps, x, torch.float64, grad="exact")
    errors, shares = [], []
    for tau in (2.0**-2, 2.0**-5, 2.0**-8):
        one = run(qf.linear_logps, x, torch.float64, grad="sampled", tau=tau, backend=backend)
        errors.append(((one["dhidden"] - exact["dhidden"]).norm() / exact["dhidden"].norm()).item())
        hidden = x.hidden.clone().requires_grad_()
        shares.append(kept_share(qf.linear_logps(hidden, x.weight, x.targets, grad="sampled", tau=tau).logps, 2000))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0
    assert errors[2] < 0.02
    assert shares[0] < shares[1] < shares[2] < 0.8


def test_sampled_forward_is_exact() -> None:
    x = peaked()
    exact = run(qf.linear_logps, x, torch.float64, grad="exact")
    assert torch.equal(run(qf.linear_logps, x, torch.float64, grad="sampled", tau=0.5)["logps"], exact["logps"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_rows_fall_back_to_exact(backend: str) -> None:
    x = make(Case("flat", 16, 4, 300, spread=0.01), torch.float64)
    exact = run(qf.linear_logps, x, torch.float64, grad="exact", backend=backend)
    one = run(qf.linear_logps, x, torch.float64, grad="sampled", tau=1e-3, backend=backend)
    assert torch.equal(one["dhidden"], exact["dhidden"]) or torch.allclose(
        one["dhidden"], exact["dhidden"], rtol=0, atol=1e-14
    )


def test_sampled_repeats_under_manual_seed_and_checkpointing() -> None:
    x = peaked()

    def grads(checkpointed: bool) -> torch.Tensor:
        torch.manual_seed(7)
        hidden, weight = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()

        def logps(h: torch.Tensor) -> torch.Tensor:
            return qf.linear_logps(h * 1.0, weight, x.targets, grad="sampled", tau=0.2).logps

        out = checkpoint(logps, hidden, use_reentrant=False) if checkpointed else logps(hidden)
        torch.rand(3)  # the generator has moved on by the time the backward recomputes
        out.sum().backward()
        return torch.cat([hidden.grad.flatten(), weight.grad.flatten()])

    first = grads(False)
    assert torch.equal(first, grads(False))
    assert torch.equal(first, grads(True))
    torch.manual_seed(8)
    other = run(qf.linear_logps, x, torch.float64, grad="sampled", tau=0.2)
    assert not torch.equal(other["dhidden"].flatten(), first[: x.hidden.numel()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_columns_that_only_rows_without_a_coefficient_kept_get_no_gradient(dtype: torch.dtype, backend: str) -> None:
    # A group of equal rewards has advantage 0: chunks of nothing else drop out, here all but the last, then all.
    x = peaked(dtype, n=700, v=2000)
    for live in (slice(660, None), slice(0)):
        coefficients = torch.zeros(700)
        coefficients[live] = 1.0
        grads = []
        for mode in ("exact", "sampled"):
            weight = x.weight.detach().requires_grad_()
            more = {"tau": 0.05} if mode == "sampled" else {}
            out = qf.linear_logps(x.hidden, weight, x.targets, grad=mode, backend=backend, **more)
            (out.logps * coefficients).sum().backward()
            assert weight.grad is not None
            grads.append(weight.grad.double())
        exact, sampled = grads
        assert (sampled - exact).norm() <= 0.3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_chosen_threshold_costs_no_more_than_the_rounding_of_half_precision(dtype: torch.dtype) -> None:
    x = make(Case("peaked", 600, 32, 4000, spread=4.0), dtype)
    truth = run(reference.linear_logps, x, torch.float64)
    plain = run(reference.linear_logps, x, dtype)
    ours = run(qf.linear_logps, x, dtype, grad="sampled")
    for name in ("dhidden", "dweight"):
        scale = truth[name].norm()
        error, rounding = ((r[name].double() - truth[name]).norm() / scale for r in (ours, plain))
        assert error <= 1.5 * rounding, f"{name}: {error:.2e} against plain torch's {rounding:.2e}"
