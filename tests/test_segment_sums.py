"""segment_sum and sequence_logps over long segments: one answer from every backend, rounded once."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch

import qempo_fast as qf
from qempo_fast._backends import implementation

LENGTHS = [1, 0, 1000, 16384, 131072]
VALUES = {
    "one value": lambda n: torch.full((n,), -2.3, dtype=torch.float64),
    "log-probs": lambda n: -5 * torch.rand(n, dtype=torch.float64) ** 8,
    "both signs, beside one that is large": lambda n: torch.randn(n, dtype=torch.float64).index_fill_(
        0, torch.tensor(1), 1e4
    ),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


CASES = [(backend, d, v) for backend in ("cpu", "reference") for d in DTYPES for v in VALUES]
if importlib.util.find_spec("triton"):
    CASES += [("triton", d, "log-probs") for d in DTYPES[:2]]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "operator"])
@pytest.mark.parametrize(("backend", "dtype", "values"), CASES, ids=str)
def test_long_segments(
    backend: str, dtype: torch.dtype, values: str, compiled: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setenv("QEMPO_BACKEND", f"segment_sum={backend}")
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    x = VALUES[values](sum(LENGTHS)).to(dtype)
    parts = x.double().split(LENGTHS)
    truth = [math.fsum(p.tolist()) for p in parts]
    leaf, bounds = x.to(device).requires_grad_(), cu.to(device)
    run: Any = qf.segment_sum
    if compiled:
        run = lambda v, c: torch.ops.qempo_fast.segment_sum(v, c, backend)  # noqa: E731
    out = run(leaf, bounds)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == acc
    for got, want, part in zip(out.tolist(), truth, parts, strict=True):
        # Twice plain torch of the wide dtype, and a unit of the result for its own rounding. A float64 sum also has
        # that of each addition, at most an eighth of a unit of float64 in the mean: 4e-12 of the sum of 131,072.
        plain = abs(part.to(acc).sum().item() - want)
        # The C++ kernel adds 512 of them in 8 lanes, and pairs of such sums.
        added = min(len(part), 512) if backend == "cpu" else len(part)
        lost = added / 8 * torch.finfo(torch.float64).eps * part.abs().sum().item()
        assert abs(got - want) <= 2 * plain + torch.finfo(acc).eps * abs(want) + lost, f"{got}, wanted {want}"
    coefficients = torch.arange(1.0, 6.0, dtype=acc)
    (out * coefficients.to(device)).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad.cpu(), coefficients.repeat_interleave(torch.tensor(LENGTHS)).to(dtype))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_infinities_and_nan_stay_in_their_segment(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMPO_BACKEND", f"segment_sum={backend}")
    x = torch.ones(4 * 2000)
    x[100], x[2100], x[2101], x[4100] = -torch.inf, torch.inf, -torch.inf, torch.nan
    out = qf.segment_sum(x, torch.arange(0, 8001, 2000))
    assert out[0] == -torch.inf
    assert out[1:3].isnan().all()
    assert out[3] == 2000


def test_one_answer_from_any_number_of_threads() -> None:
    x, cu = torch.randn(2**17), torch.tensor([0, 5, 5, 70000, 2**17], dtype=torch.int32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            out = qf.segment_sum(leaf, cu)
            found.append((out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]))
    finally:
        torch.set_num_threads(before)
    for got in found[1:]:
        assert all(map(torch.equal, got, found[0]))


@pytest.mark.parametrize("offsets", [[0, 7], [1, 6], [0, 4, 2, 6], [0, 2**62, 6], [-1, 6]], ids=str)
def test_the_kernel_reads_no_offsets_that_do_not_cover(offsets: list[int]) -> None:
    """Nothing has checked them here, as where values may not be read."""
    run = implementation("segment_sum", "cpu")
    with pytest.raises(ValueError, match=r"^cu_seqlens: wanted offsets from 0 to 6 that never fall"):
        run(torch.randn(6), torch.tensor(offsets))


def test_second_derivatives_and_batches_of_gradients() -> None:
    x, cu = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 2, 6])
    out = qf.segment_sum(x, cu)
    (rows,) = torch.autograd.grad(out, x, torch.eye(3, dtype=torch.float64), is_grads_batched=True, retain_graph=True)
    assert rows.tolist() == [[1, 1, 0, 0, 0, 0], [0] * 6, [0, 0, 1, 1, 1, 1]]
    assert torch.autograd.gradgradcheck(lambda v: qf.segment_sum(v, cu).square(), x)


def test_more_ones_than_float32_can_count() -> None:
    n = 2**24 + 4
    assert qf.segment_sum(torch.ones(n), torch.tensor([0, n])).item() == n


def test_a_sequence_of_many_tokens() -> None:
    n = 131072
    hidden, weight = torch.full((n, 1), 1.0), torch.tensor([[0.0], [1.3], [2.2]])
    with torch.no_grad():
        out = qf.sequence_logps(hidden, weight, torch.zeros(n, dtype=torch.int64), torch.tensor([0, n]), entropy=True)
    z = weight[:, 0].double()
    for got, one in (
        (out.logps, torch.log_softmax(z, 0)[0].item()),
        (out.entropy, torch.distributions.Categorical(logits=z).entropy().item()),
    ):
        assert got is not None
        # Each token's own rounding, the same in all, and one of the sum: 2.3e-7 a token, not the 5e-4 of float32 sums.
        assert abs(got.item() / n - one) <= 4 * torch.finfo(torch.float32).eps
