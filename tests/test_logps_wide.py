"""logits_dtype=torch.float32: half-precision logits that are not rounded before the softmax, on every path."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import close, join, passed, raises, two_ranks
from ranks import run as run_checks
from test_logps import BACKENDS, CASES, Case, Inputs, make, run
from test_logps_policy import WideProducts
from test_logps_slopes import gradient as frozen
from tolerances import assert_as_good

import qempo_fast as qf
from qempo_fast import reference
from qempo_fast.logps import _gemm as gemm
from qempo_fast.logps import cpu as cpu_pass
from qempo_fast.logps._options import TileSizes

HALF = (torch.bfloat16, torch.float16)
WIDE = {"logits_dtype": torch.float32}
PATHS: dict[str, dict[str, Any]] = {
    "exact": {"grad": "exact"},
    "sampled": {"grad": "sampled", "tau": 1e-4},
    "sampled, threshold chosen": {"grad": "sampled"},
}


def assert_right(x: Inputs, dtype: torch.dtype, spread: float = 1.0, **how: Any) -> None:
    """Against plain torch's float32 logits of the same inputs; log-probs are as exact as float32's."""
    truth = run(reference.linear_logps, x, torch.float64, sum_sq=True)
    plain = run(reference.linear_logps, x, dtype, sum_sq=True, **WIDE)
    ours = run(qf.linear_logps, x, dtype, sum_sq=True, **WIDE, **how)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        kind = dtype if name.startswith("d") else torch.float32
        assert value.dtype == kind
        floor = 16.0 * max(1.0, spread)
        assert_as_good(name, value, plain[name], truth[name], kind, floor, not name.startswith("d"))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_against_float64(case: Case, dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float16 and case.spread > 100:
        case = replace(case, spread=100.0)  # its gradients pass 65504
    assert_right(make(case, dtype), dtype, case.spread, grad="exact", backend=backend)


@pytest.mark.parametrize("budget", ["", "0"], ids=["kept", "again"])
@pytest.mark.parametrize("runs", [True, False], ids=["products of halves", "in float32"])
def test_several_tiles(runs: bool, budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_runs", lambda dtype: runs)
    monkeypatch.setattr(cpu_pass, "EXACT", TileSizes(20, 300))
    monkeypatch.setenv("QEMPO_KEEP_LOGITS", budget)
    assert_right(make(replace(CASES[2], n=70), torch.bfloat16), torch.bfloat16, grad="exact", backend="cpu")


def test_a_gpu_gemm_writes_float32_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_pass, "EXACT", TileSizes(64, 96))
    monkeypatch.setattr(gemm, "_runs", lambda dtype: True)
    monkeypatch.setenv("QEMPO_KEEP_LOGITS", "0")
    x = make(replace(CASES[0], n=60, v=290), torch.bfloat16)
    x.targets[:] = x.targets.clamp(min=0)
    with WideProducts(pytest.MonkeyPatch()) as products:
        run(qf.linear_logps, x, torch.bfloat16, grad="exact", backend="cpu", **WIDE)
        # Logits twice, of a width that the buffer has; dweight of rounded slopes, at once in its own dtype.
        assert products.found == {"mm.dtype_out": 8, "addmm.dtype_out": 4, "mm.out": 4}
        assert_right(x, torch.bfloat16, grad="exact", backend="cpu")


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [True, False], ids=["", "frozen head"])
def test_no_path_rounds_a_logit(how: str, backend: str, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from qempo_fast.logps import reference as torch_pass

    seen = set()
    for module in (cpu_pass.CpuPass, torch_pass.TorchPass):
        for name in ("forward", "backward"):
            plain = getattr(module, name)

            def spy(self: Any, tile: Any, *rest: Any, plain: Any = plain, name: str = name) -> None:
                seen.add((name, tile.z.dtype))
                plain(self, tile, *rest)

            monkeypatch.setattr(module, name, spy)
    x = make(CASES[0], torch.bfloat16)
    weight = x.weight.requires_grad_(trained)
    out = qf.linear_logps(x.hidden.requires_grad_(), weight, x.targets, backend=backend, **PATHS[how], **WIDE)
    out.logps.sum().backward()
    assert seen == {("forward", torch.float32), ("backward", torch.float32)}


def peaked(dtype: torch.dtype) -> Inputs:
    """Nearly all columns have a bias of -40: their bounds are under any threshold, and those of the others above it."""
    x = make(replace(CASES[0], n=60, v=900, bias=True, spread=4.0), dtype)
    assert x.bias is not None
    x.bias[torch.rand(900) < 0.9] = -40.0
    return x


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gathered_tiles(dtype: torch.dtype, backend: str) -> None:
    x = peaked(dtype)
    assert_right(x, dtype, 4.0, grad="sampled", tau=1e-9, backend=backend)
    stats = qf.last_stats()
    assert stats is not None
    assert 0 < stats.kept_share < 0.4


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_head(dtype: torch.dtype, backend: str) -> None:
    x = make(CASES[2], dtype)
    truth = frozen(reference.linear_logps, x, torch.float64)
    plain = frozen(reference.linear_logps, x, dtype, **WIDE)
    assert_as_good("dhidden", frozen(qf.linear_logps, x, dtype, backend=backend, **WIDE), plain, truth, dtype, 16.0)


def test_float32_is_as_it_was() -> None:
    x = make(CASES[2], torch.float32)
    one, other = (run(qf.linear_logps, x, torch.float32, grad="exact", **how) for how in ({}, WIDE))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_autocast() -> None:
    x = make(CASES[1], torch.float32)
    low = replace(x, hidden=x.hidden.bfloat16(), weight=x.weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(qf.linear_logps, x, torch.float32, grad="exact", **WIDE)
        rounded = run(qf.linear_logps, x, torch.float32, grad="exact")
    same = run(qf.linear_logps, low, torch.bfloat16, grad="exact", **WIDE)
    assert not torch.equal(ours["logps"], rounded["logps"])
    for name, value in ours.items():
        assert torch.equal(value, same[name].float()), name


def test_sequences_take_it() -> None:
    x = make(CASES[0], torch.bfloat16)
    cu = torch.tensor([0, 10, 37])
    out = qf.sequence_logps(x.hidden, x.weight, x.targets, cu, **WIDE)
    assert torch.equal(out.token_logps, qf.linear_logps(x.hidden, x.weight, x.targets, **WIDE).logps)


def test_a_sure_row_has_its_digits() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32) * 3, torch.randn(500, 32)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    targets = (hidden.double() @ weight.double().T).argmax(1)
    x = Inputs(hidden, weight, targets, None, {"temperature": 1.0}, (torch.ones(64), torch.ones(64)))
    truth = run(reference.linear_logps, x, torch.float64)
    p = truth["logps"].exp()
    sure = (p > 0.99) & (p < 0.9999)  # beyond, log p itself has no digits in float32
    assert 5 < int(sure.sum()) < 64
    errors = [
        (run(qf.linear_logps, x, torch.bfloat16, grad="exact", **how)["dhidden"].double() - truth["dhidden"])[sure]
        .norm(dim=1)
        .div(truth["dhidden"][sure].norm(dim=1))
        .max()
        for how in (WIDE, {})
    ]
    assert errors[0] < 0.01 < errors[1]


def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = make(replace(CASES[0], n=21, v=101), torch.bfloat16)
    return x.hidden, x.weight, x.targets


def shards_keep_float32_logits(rank: int, world: int) -> None:

    hidden, weight, targets = head()
    mine = slice(0, 40) if rank == 0 else slice(40, 101)
    leaves = [hidden.requires_grad_(), weight[mine].detach().requires_grad_()]
    group = torch.distributed.group.WORLD
    out = qf.linear_logps(*leaves, targets, grad="exact", process_group=group, **WIDE)
    out.logps.sum().backward()
    both = [x.detach().requires_grad_() for x in (hidden, weight)]
    alone = qf.linear_logps(*both, targets, grad="exact", **WIDE)
    alone.logps.sum().backward()
    close("logps", out.logps, alone.logps, 1e-5)
    for leaf, whole, part in zip(leaves, both, (slice(None), mine), strict=True):
        assert leaf.grad is not None
        assert whole.grad is not None
        close("gradient", leaf.grad.float(), whole.grad[part].float(), 2.0**-6 * float(whole.grad.abs().max()))


def a_row_keeps_its_bits_on_shards(rank: int, world: int) -> None:
    hidden, weight, targets = (x.float() if x.is_floating_point() else x for x in head())
    weight = weight[:40] if rank == 0 else weight[40:]
    how = {"process_group": torch.distributed.group.WORLD, "batch_invariant": True}
    whole = qf.linear_logps(hidden, weight, targets, **how).logps
    for index in (torch.tensor([20]), torch.arange(20, 3, -1)):
        assert torch.equal(qf.linear_logps(hidden[index], weight, targets[index], **how).logps, whole[index])


def another_dtype_on_a_rank_is_refused(rank: int, world: int) -> None:
    how = WIDE if rank == 0 else {}
    group = torch.distributed.group.WORLD
    raises(ValueError, "^logits_dtype: wanted", lambda: qf.linear_logps(*head(), process_group=group, **how))


CHECKS = {
    f.__name__: f
    for f in (
        shards_keep_float32_logits,
        a_row_keeps_its_bits_on_shards,
        another_dtype_on_a_rank_is_refused,
    )
}


@pytest.fixture(scope="module")
def ended() -> Any:
    return two_ranks(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_two_shards(name: str, ended: Any) -> None:
    passed(name, ended)


if __name__ == "__main__":
    number, count, _, folder = sys.argv[1:]
    join(int(number), int(count), f"{folder}/store")
    run_checks(CHECKS.items(), int(number), int(count))
