"""linear_logps and sequence_logps: every backend against the float64 reference, forward and each gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tolerances import assert_as_good

import qempo_fast as qf
from qempo_fast import _C, reference
from qempo_fast.logps import _options

BACKENDS = ["cpu", "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """Sizes and head of one call; why says what the case is there for."""

    why: str
    n: int
    d: int
    v: int
    bias: bool = False
    softcap: float | None = None
    scale: float = 1.0
    temperature: float | str = 1.0
    entropy: bool = False
    spread: float = 1.0  # of the logits


CASES = [
    Case("odd everything, plain head", 37, 19, 1003),
    Case("entropy gradient", 37, 19, 1003, entropy=True),
    Case("all of the head at once", 37, 19, 1003, True, 5.0, 0.7, 0.8, True),
    Case("per-token temperature", 33, 8, 257, temperature="tensor", entropy=True),
    Case("several row chunks and tiles, ragged ends", 2100, 4, 2077, entropy=True),
    Case("one row, V under one vector", 1, 3, 5, entropy=True),
    Case("one column: log p = 0", 4, 3, 1, entropy=True),
    Case("Gemma cap, saturated", 16, 8, 300, softcap=30.0, spread=40.0),
    Case("large logits: exp overflows unless shifted", 16, 8, 300, entropy=True, spread=300.0),
]


@dataclass
class Inputs:
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    bias: torch.Tensor | None
    keywords: dict[str, Any]
    grads: tuple[torch.Tensor, torch.Tensor]


def make(case: Case, dtype: torch.dtype) -> Inputs:
    hidden = torch.randn(case.n, case.d, dtype=torch.float64) * case.spread / math.sqrt(case.d)
    weight = torch.randn(case.v, case.d, dtype=torch.float64)
    targets = torch.randint(0, case.v, (case.n,))
    if case.n > 4:
        targets[::5] = -100
    keywords: dict[str, Any] = {"logit_scale": case.scale, "softcap": case.softcap, "entropy": case.entropy}
    keywords["temperature"] = torch.rand(case.n) + 0.5 if case.temperature == "tensor" else case.temperature
    bias = torch.randn(case.v).to(dtype) if case.bias else None
    grads = torch.randn(case.n, dtype=torch.float64), torch.randn(case.n, dtype=torch.float64)
    return Inputs(hidden.to(dtype), weight.to(dtype), targets, bias, keywords, grads)


def run(function: Any, x: Inputs, dtype: torch.dtype, **more: Any) -> dict[str, torch.Tensor]:
    """Outputs and gradients of function at the inputs cast to dtype."""
    leaves = {"hidden": x.hidden, "weight": x.weight, "bias": x.bias}
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in leaves.items() if v is not None}
    keywords = dict(x.keywords)
    if isinstance(keywords["temperature"], torch.Tensor) and dtype == torch.float64:
        keywords["temperature"] = keywords["temperature"].double()
    out = function(leaves["hidden"], leaves["weight"], x.targets, bias=leaves.get("bias"), **keywords, **more)
    loss = (out.logps.double() * x.grads[0]).sum()
    results = {"logps": out.logps}
    if out.entropy is not None:
        loss = loss + (out.entropy.double() * x.grads[1]).sum()
        results["entropy"] = out.entropy
    if out.sum_sq is not None:
        results["sum_sq"] = out.sum_sq
    loss.backward()
    results |= {f"d{k}": v.grad for k, v in leaves.items() if v.grad is not None}
    return {k: v.detach() for k, v in results.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_against_float64(case: Case, dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float16 and case.spread > 100:
        case = replace(case, spread=100.0)  # float16 ends at 65504, and its GEMM gradients pass that
    x = make(case, dtype)
    truth = run(reference.linear_logps, x, torch.float64, sum_sq=True)
    plain = run(reference.linear_logps, x, dtype, sum_sq=True)
    ours = run(qf.linear_logps, x, dtype, sum_sq=True, grad="exact", backend=backend)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        # A softmax entry's relative error is that of z - lse, eps times the size of the logits; in float64 plain torch
        # is the truth itself and shows none of it.
        assert_as_good(
            name,
            value,
            plain[name],
            truth[name],
            dtype,
            16.0 * max(1.0, case.spread),
            not name.startswith("d"),
        )


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_each_instruction_set(isa: str, dtype: torch.dtype) -> None:
    before = _C.isa()
    x = make(CASES[2], dtype)
    truth = run(reference.linear_logps, x, torch.float64, sum_sq=True)
    plain = run(reference.linear_logps, x, dtype, sum_sq=True)
    try:
        _C.use_isa(isa)
        ours = run(qf.linear_logps, x, dtype, sum_sq=True, grad="exact", backend="cpu")
    finally:
        _C.use_isa(before)
    for name, value in ours.items():
        assert_as_good(name, value, plain[name], truth[name], dtype)


def test_reference_by_hand() -> None:
    # Logits log 1, log 2, log 5 over log 8: probabilities 1/8, 2/8, 5/8.
    hidden = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64).log()
    out = reference.linear_logps(hidden, weight, torch.tensor([2]), entropy=True, sum_sq=True)
    p = [1 / 8, 2 / 8, 5 / 8]
    assert out.logps.item() == pytest.approx(math.log(5 / 8), abs=1e-15)
    assert out.entropy is not None
    assert out.sum_sq is not None
    assert out.entropy.item() == pytest.approx(-sum(q * math.log(q) for q in p), abs=1e-15)
    assert out.sum_sq.item() == pytest.approx(math.log(sum(q * q for q in p)), abs=1e-15)


@pytest.mark.parametrize("function", [reference.linear_logps, qf.linear_logps], ids=["reference", "public"])
def test_gradcheck(function: Any) -> None:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    targets = torch.tensor([0, 6, -100, 3, 2])

    def call(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = function(hidden, weight, targets, bias=bias, softcap=3.0, logit_scale=0.8, temperature=0.7, entropy=True)
        return out.logps, out.entropy

    assert torch.autograd.gradcheck(call, (leaf(5, 4), leaf(7, 4), leaf(7)))


def peaked(dtype: torch.dtype = torch.float64, n: int = 40, d: int = 6, v: int = 700) -> Inputs:
    """Rows of low entropy, so that most columns are dropped."""
    return make(Case("peaked", n, d, v, spread=4.0), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kept_logits_give_the_recomputed_gradient(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = make(replace(CASES[2], n=2100, v=4099), dtype)
    x.grads[0][500:540] = x.grads[1][500:540] = 0  # rows that the backward leaves out
    again = run(qf.linear_logps, x, dtype, grad="exact", backend=backend)
    size = 1680 * 4099 * dtype.itemsize / 2**20  # four rows in five are counted
    # All, all but a tile, and less than a tile.
    for budget, wanted in ((size + 0.01, True), (size - 0.01, backend == "cpu"), (0.01, False)):
        monkeypatch.setenv("QEMPO_KEEP_LOGITS", str(budget))
        kept = run(qf.linear_logps, x, dtype, grad="exact", backend=backend)
        stats = qf.last_stats()
        assert stats is not None
        assert stats.kept_logits == wanted
        assert all(torch.equal(kept[k], again[k]) for k in again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_kept_up_to_the_size_of_the_weight(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def room(rows: int, weight: torch.Tensor, free: int) -> int:
        monkeypatch.setattr(_options, "_free", lambda device: free)
        return _options.logits_budget(rows, weight)

    weight = torch.empty(4096, 64)
    assert room(8, weight, 0) == weight.nbytes // 8  # few rows fit whatever is free
    assert room(999, weight, 10**12) == weight.nbytes
    assert room(999, weight, 16 * 500_000) == 500_000
    assert room(999, weight, 1) == weight.nbytes // 8
    monkeypatch.delenv("QEMPO_KEEP_LOGITS", raising=False)
    x = make(replace(CASES[0], n=3000, d=16, v=4099), torch.float32)  # 3 blocks of rows, 16 bytes of logits for 1 of W
    kept = run(qf.linear_logps, x, torch.float32, backend=backend)
    monkeypatch.setenv("QEMPO_KEEP_LOGITS", "0")
    again = run(qf.linear_logps, x, torch.float32, backend=backend)
    assert all(torch.equal(kept[k], again[k]) for k in again)


def test_kept_logits_serve_one_backward_and_then_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMPO_KEEP_LOGITS", "1")
    hidden, weight = torch.randn(30, 4, requires_grad=True), torch.randn(70, 4, requires_grad=True)
    logps = qf.linear_logps(hidden, weight, torch.arange(30)).logps
    stats = qf.last_stats()
    assert stats is not None
    assert stats.kept_logits
    first = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(logps.sum(), (hidden, weight))
    assert all(map(torch.equal, first, second))
    with torch.no_grad():
        qf.linear_logps(hidden, weight, torch.arange(30))
    stats = qf.last_stats()
    assert stats is not None
    assert not stats.kept_logits


@pytest.mark.parametrize("value", ["-1", "many", "nan", "inf"])
def test_bad_logits_budget(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMPO_KEEP_LOGITS", value)
    with pytest.raises(ValueError, match="QEMPO_KEEP_LOGITS: wanted MiB"):
        qf.linear_logps(torch.randn(3, 2, requires_grad=True), torch.randn(5, 2), torch.arange(3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["exact", "sampled"])
def test_rows_without_coefficient_are_dropped(backend: str, grad: str) -> None:
    x = peaked(n=64)
    x.grads[0][10:50] = 0
    exact = run(qf.linear_logps, x, torch.float64, grad="exact")
    one = run(qf.linear_logps, x, torch.float64, grad=grad, tau=None if grad == "exact" else 1e-9, backend=backend)
    assert (one["dhidden"][10:50] == 0).all()
    for name in ("dhidden", "dweight"):
        torch.testing.assert_close(one[name], exact[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["exact", "sampled"])
@pytest.mark.parametrize("n", [0, 6], ids=["no rows", "all masked"])
def test_nothing_counted_gives_zero_with_the_graph_connected(backend: str, grad: str, n: int) -> None:
    hidden = torch.randn(n, 4, requires_grad=True)
    weight = torch.randn(9, 4, requires_grad=True)
    out = qf.linear_logps(hidden, weight, torch.full((n,), -100), entropy=True, sum_sq=True, grad=grad, backend=backend)
    assert out.logps.shape == (n,)
    assert out.entropy is not None
    assert all((x == 0).all() for x in out)
    (out.logps.sum() + out.entropy.sum()).backward()
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()
    assert weight.grad is not None
    assert (weight.grad == 0).all()


def test_only_the_gradients_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x = peaked(torch.float32)
    hidden = x.hidden.clone().requires_grad_()
    frozen = qf.linear_logps(hidden, x.weight, x.targets).logps
    frozen.sum().backward()
    assert hidden.grad is not None
    weight = x.weight.clone().requires_grad_()
    qf.linear_logps(x.hidden, weight, x.targets).logps.sum().backward()
    assert weight.grad is not None
    assert x.hidden.grad is None
    with torch.no_grad():
        assert qf.linear_logps(hidden, weight, x.targets).logps.grad_fn is None


def test_a_frozen_head_costs_no_weight_gradient() -> None:
    from qempo_fast.logps import _backward as backward
    from qempo_fast.logps import _forward as chunked
    from qempo_fast.logps import _gemm as gemm

    shapes = []
    original = chunked.linear

    def spy(a: torch.Tensor, w: torch.Tensor, *more: Any) -> torch.Tensor:
        shapes.append((a.shape[0], w.shape[0]))
        return original(a, w, *more)

    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(11, 4)
    with pytest.MonkeyPatch.context() as patch:
        for module in (chunked, backward, gemm):
            patch.setattr(module, "linear", spy)
        qf.linear_logps(hidden, weight, torch.arange(5)).logps.sum().backward()
    # logits forward, logits again, dHidden; no (V, D) product
    assert shapes == [(5, 11), (5, 11), (5, 4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_strides_and_untouched_inputs(backend: str) -> None:
    hidden = torch.randn(4, 6, 3).transpose(0, 1)  # (6, 4, 3), not contiguous
    weight = torch.randn(5, 11).t()[:, :3]  # (11, 3), columns of a transpose
    targets = torch.randint(0, 11, (4, 6)).t()
    copies = [x.clone() for x in (hidden, weight, targets)]
    out = qf.linear_logps(hidden, weight, targets, entropy=True, backend=backend)
    wanted = reference.linear_logps(hidden, weight, targets, entropy=True)
    assert out.logps.shape == (6, 4)
    torch.testing.assert_close(out.logps, wanted.logps)
    torch.testing.assert_close(out.entropy, wanted.entropy)
    for now, before in zip((hidden, weight, targets), copies, strict=True):
        assert torch.equal(now, before)


def test_tied_weight_gets_both_gradients() -> None:
    table = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    tokens, targets = torch.tensor([1, 5, 2]), torch.tensor([5, 2, 7])
    qf.linear_logps(torch.tanh(table[tokens]), table, targets).logps.sum().backward()
    ours, table.grad = table.grad, None
    reference.linear_logps(torch.tanh(table[tokens]), table, targets).logps.sum().backward()
    torch.testing.assert_close(ours, table.grad, rtol=0, atol=1e-12)


def test_bitwise_repeatable_and_independent_of_threads() -> None:
    x = make(CASES[4], torch.float32)
    threads = torch.get_num_threads()
    one = run(qf.linear_logps, x, torch.float32, grad="exact", backend="cpu")
    again = run(qf.linear_logps, x, torch.float32, grad="exact", backend="cpu")
    assert all(torch.equal(one[k], again[k]) for k in one)
    try:
        torch.set_num_threads(2)
        two = run(qf.linear_logps, x, torch.float32, grad="sampled", tau=0.01, backend="cpu")
        torch.set_num_threads(1)
        torch.manual_seed(0)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(two["logps"], one["logps"], rtol=0, atol=1e-5)


def test_autocast_runs_the_head_in_the_autocast_dtype() -> None:
    x = peaked(torch.float32)
    hidden = x.hidden.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = qf.linear_logps(hidden, x.weight, x.targets, grad="exact").logps
    wanted = qf.linear_logps(x.hidden.bfloat16(), x.weight.bfloat16(), x.targets, grad="exact").logps
    assert out.dtype == torch.float32
    assert torch.equal(out, wanted)
    out.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


def test_nan_hidden_poisons_its_own_row_only() -> None:
    hidden, weight = torch.randn(4, 3), torch.randn(7, 3)
    hidden[2, 1] = torch.nan
    for backend in BACKENDS:
        logps = qf.linear_logps(hidden, weight, torch.arange(4), backend=backend).logps
        assert logps.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_bias(backend: str) -> None:
    hidden, weight, targets = torch.randn(4, 3), torch.randn(7, 3), torch.arange(4)
    bias = torch.randn(7, 2)[:, 0]
    wanted = reference.linear_logps(hidden, weight, targets, bias=bias)
    torch.testing.assert_close(qf.linear_logps(hidden, weight, targets, bias=bias, backend=backend).logps, wanted.logps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unchecked_bad_targets_become_nan_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = torch.randn(5, 3), torch.randn(7, 3), torch.tensor([0, 9, -100, -3, 6])
    good = qf.linear_logps(hidden, weight, torch.tensor([0, 0, -100, 0, 6])).logps
    # A GPU without QEMPO_CHECK=1 does not read values.
    monkeypatch.setattr("qempo_fast._check.readable", lambda x: False)
    for logps in (
        qf.linear_logps(hidden, weight, targets, backend=backend).logps,
        qf.logps_from_logits(hidden @ weight.T, targets, backend="reference").logps,
    ):
        assert logps.isnan().tolist() == [False, True, False, True, False]
        torch.testing.assert_close(logps[[0, 2, 4]], good[[0, 2, 4]])


def test_sequence_logps_is_the_segment_sum() -> None:
    hidden, weight = torch.randn(10, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    targets = torch.randint(0, 7, (10,))
    targets[[0, 4, 5, 6]] = -100
    cu = torch.tensor([0, 3, 3, 7, 10], dtype=torch.int32)
    for average in (False, True):
        ours = qf.sequence_logps(hidden, weight, targets, cu, average=average, entropy=True)
        wanted = reference.sequence_logps(hidden, weight, targets, cu, average=average, entropy=True)
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert ours.lengths.tolist() == [2, 0, 1, 3]
    assert ours.lengths.dtype == torch.int64
    assert ours.logps[1] == 0
    by_hand = torch.stack([ours.token_logps[a:b].sum() for a, b in [(0, 3), (3, 3), (3, 7), (7, 10)]])
    torch.testing.assert_close(ours.logps * ours.lengths, by_hand, rtol=0, atol=1e-12)


def test_no_sequences() -> None:
    hidden = torch.randn(0, 3, requires_grad=True)
    out = qf.sequence_logps(
        hidden, torch.randn(7, 3), torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    )
    assert out.logps.shape == (0,)
    out.logps.sum().backward()
    assert hidden.grad is not None
