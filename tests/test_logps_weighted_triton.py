"""weighted_logps by the Triton kernels: on a GPU, or in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only")

from test_logps import Case, make, peaked
from test_logps_triton import place
from test_logps_weighted import gradients
from tolerances import assert_as_good

import qempo_fast as qf
from qempo_fast import reference
from qempo_fast.logps import _weighted
from qempo_fast.logps._options import ERROR


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_known_weights_against_float64(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(_weighted, "SUMMED", 24)
    x = place(make(Case("", 50, 8, 150, True, 5.0, 0.7, "tensor", True), dtype), device)
    truth, plain, ours = (
        gradients(function, x, kind, **how)
        for function, kind, how in (
            (reference.weighted_logps, torch.float64, {}),
            (reference.weighted_logps, dtype, {}),
            (qf.weighted_logps, dtype, {"backend": "triton"}),
        )
    )
    for name, value in ours.items():
        assert_as_good(name, value, plain[name], truth[name], dtype, 32.0, not name.startswith("d"))


def test_sampled_known_weights_are_unbiased(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setitem(ERROR, torch.float32, 0.1)
    x = place(peaked(torch.float32, n=60, v=200), device)
    exact = gradients(qf.weighted_logps, x, torch.float32)
    draws = [gradients(qf.weighted_logps, x, torch.float32, grad="sampled", backend="triton") for _ in range(6)]
    stats = qf.last_stats()
    assert stats is not None
    assert 0.02 < stats.kept_share < 0.95
    for name in ("dhidden", "dweight"):
        values = torch.stack([d[name].double() for d in draws])
        assert 0 < (values.mean(0) - exact[name]).square().sum() < 3 * values.var(0).sum() / 6, name
