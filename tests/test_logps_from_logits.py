"""logps_from_logits and segment_sum against the float64 reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tolerances import assert_as_good

import qempo_fast as qf
from qempo_fast import reference

BACKENDS = ["cpu", "reference"]
# (rows, vocabulary): one vector and a bit; under one vector; several rows a thread; one column.
SIZES = [(3, 67), (1, 5), (40, 1031), (2, 1)]


def run(function: Any, logits: torch.Tensor, targets: torch.Tensor, **keywords: Any) -> dict[str, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    out = function(leaf, targets, entropy=True, **keywords)
    grads = torch.linspace(-1, 2, targets.numel(), dtype=torch.float64, device=targets.device).reshape(targets.shape)
    ((out.logps.double() * grads).sum() + (out.entropy.double() * grads.flip(0)).sum()).backward()
    assert leaf.grad is not None
    return {"logps": out.logps.detach(), "entropy": out.entropy.detach(), "dlogits": leaf.grad}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, "tensor"])
def test_against_float64(size: tuple[int, int], dtype: torch.dtype, backend: str, temperature: Any) -> None:
    n, v = size
    logits = (torch.randn(n, v) * 3).to(dtype)
    targets = torch.randint(0, v, (n,))
    targets[n // 2 :: 7] = -100
    t = torch.rand(n, dtype=torch.float64) + 0.5 if temperature == "tensor" else temperature
    low = t.float() if isinstance(t, torch.Tensor) and dtype != torch.float64 else t
    truth = run(reference.logps_from_logits, logits.double(), targets, temperature=t)
    plain = run(reference.logps_from_logits, logits, targets, temperature=low)
    ours = run(qf.logps_from_logits, logits, targets, temperature=low, backend=backend)
    for name, value in ours.items():
        assert_as_good(name, value, plain[name], truth[name], dtype, 16.0, not name.startswith("d"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_logits(backend: str) -> None:
    logits = torch.randn(4, 40, dtype=torch.float64)
    logits[:, 3:30] = -torch.inf
    logits[1, 0] = -torch.inf
    targets = torch.tensor([0, 2, 35, -100])
    truth = run(reference.logps_from_logits, logits, targets)
    ours = run(qf.logps_from_logits, logits, targets, backend=backend)
    for name, value in ours.items():
        assert value.isfinite().all(), name
        torch.testing.assert_close(value, truth[name], rtol=0, atol=1e-13)
    assert (ours["dlogits"][:, 3:30] == 0).all()
    # Taking the masked columns away changes nothing.
    keep = [*range(3), *range(30, 40)]
    small = run(qf.logps_from_logits, logits[:, keep], torch.tensor([0, 2, 8, -100]), backend=backend)
    torch.testing.assert_close(small["logps"], ours["logps"], rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_shapes_and_untouched_inputs(backend: str) -> None:
    logits = torch.randn(50, 3, 4).permute(2, 1, 0)  # (4, 3, 50), vocabulary not the fast axis
    targets = torch.randint(0, 50, (4, 3))
    before = logits.clone()
    ours = run(qf.logps_from_logits, logits, targets, backend=backend)
    truth = run(reference.logps_from_logits, logits.double(), targets)
    assert ours["logps"].shape == (4, 3)
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), truth[name], rtol=0, atol=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    logits = torch.randn(0, 9, requires_grad=True)
    out = qf.logps_from_logits(logits, torch.zeros(0, dtype=torch.int64), backend=backend)
    out.logps.sum().backward()
    assert out.logps.shape == (0,)
    assert logits.grad is not None


def test_ignored_row_of_nan_leaves_no_trace() -> None:
    logits = torch.randn(2, 5)
    logits[1] = torch.nan
    ours = run(qf.logps_from_logits, logits, torch.tensor([3, -100]))
    assert all(x.isfinite().all() for x in ours.values())
    assert (ours["dlogits"][1] == 0).all()


@pytest.mark.parametrize("function", [reference.logps_from_logits, qf.logps_from_logits], ids=["reference", "public"])
def test_gradcheck(function: Any) -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, -100, 3, 2])
    assert torch.autograd.gradcheck(lambda z: function(z, targets, temperature=0.7, entropy=True)[:2], logits)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_segment_sum(dtype: torch.dtype, index: torch.dtype) -> None:
    values = torch.randn(1000).to(dtype).requires_grad_()
    cu = torch.tensor([0, 0, 1, 400, 400, 1000, 1000], dtype=index)
    out = qf.segment_sum(values, cu)
    wanted = torch.stack([values.detach().double()[a:b].sum() for a, b in itertools.pairwise(cu.tolist())])
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Half precision is summed in float32: the error is float32's, not the input's.
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-5)
    (out * torch.arange(6, dtype=out.dtype)).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad.double(), torch.arange(6.0).double().repeat_interleave((cu[1:] - cu[:-1]).long()))


def test_segment_sum_of_nothing() -> None:
    values = torch.zeros(0, requires_grad=True)
    for segments in (1, 4):
        out = qf.segment_sum(values, torch.zeros(segments, dtype=torch.int64))
        assert out.tolist() == [0.0] * (segments - 1)
        out.sum().backward()
    assert values.grad is not None
