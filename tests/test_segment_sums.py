"""segment_sum and sequence_logps over long segments: one answer from every backend, rounded once."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch

import qempo_fast as qf

LENGTHS = [1, 0, 1000, 16384, 131072]
VALUES = {
    "one value": lambda n: torch.full((n,), -2.3, dtype=torch.float64),
    "log-probs": lambda n: -5 * torch.rand(n, dtype=torch.float64) ** 8,
    "both signs, beside one that is large": lambda n: torch.randn(n, dtype=torch.float64).index_fill_(
        0, torch.tensor(1), 1e4
    ),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


CASES = [("reference", d, v) for d in DTYPES for v in VALUES]
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
        lost = len(part) / 8 * torch.finfo(torch.float64).eps * part.abs().sum().item()
        assert abs(got - want) <= 2 * plain + torch.finfo(acc).eps * abs(want) + lost, f"{got}, wanted {want}"
    coefficients = torch.arange(1.0, 6.0, dtype=acc)
    (out * coefficients.to(device)).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad.cpu(), coefficients.repeat_interleave(torch.tensor(LENGTHS)).to(dtype))


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
