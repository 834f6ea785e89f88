"""logits_dtype=torch.float32 in the Triton kernels: no product is rounded, fused or in tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only")

from test_logps import CASES, Case, make
from test_logps_triton import path, place
from test_logps_wide import WIDE, assert_right, frozen, peaked
from tolerances import assert_as_good

import qempo_fast as qf
from qempo_fast import reference
from qempo_fast.kernels import _launch
from qempo_fast.kernels.linear_logps_grad import tile_bwd
from qempo_fast.logps import _gemm as gemm
from qempo_fast.logps import _slopes
from qempo_fast.logps._policy import POLICIES

__all__ = ["path"]  # a fixture


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[3]], ids=lambda c: c.why)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("runs", [True, False], ids=["slopes rounded", "slopes in float32"])
def test_exact_against_float64(
    case: Case, dtype: torch.dtype, runs: bool, path: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    if path == "fused" and dtype == torch.bfloat16 and _launch.architecture(device) == "interpreter":
        pytest.skip("Triton's interpreter multiplies bfloat16 by its bit patterns")
    monkeypatch.setattr(gemm, "_runs", lambda dtype: runs)
    x = place(make(replace(case, v=min(case.v, 333)), dtype), device)
    assert_right(x, dtype, grad="exact", backend="triton")


@pytest.mark.parametrize("runs", [True, False], ids=["slopes rounded", "slopes in float32"])
def test_gathered_tiles(runs: bool, path: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(gemm, "_runs", lambda dtype: runs)
    assert_right(place(peaked(torch.float16), device), torch.float16, 4.0, grad="sampled", tau=1e-9, backend="triton")
    stats = qf.last_stats()
    assert stats is not None
    assert 0 < stats.kept_share < 0.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_frozen_head(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(_slopes, "ROWS", 24)
    x = place(make(Case("", 50, 8, 150, True, 5.0, 0.7, "tensor", True), dtype), device)
    truth = frozen(reference.linear_logps, x, torch.float64)
    plain = frozen(reference.linear_logps, x, dtype, **WIDE)
    assert_as_good("dhidden", frozen(qf.linear_logps, x, dtype, backend="triton", **WIDE), plain, truth, dtype, 16.0)


def test_slopes_may_be_written_in_another_dtype(device: torch.device) -> None:
    z, targets = torch.randn(5, 70, device=device), torch.arange(5, device=device)
    lse = torch.stack([z.amax(1), (z - z.amax(1, True)).exp().sum(1).log()], 1)
    out = torch.full((5, 72), torch.nan, dtype=torch.float16, device=device)
    rest = (None, None, lse, torch.ones(5, device=device), None, None, None, targets, 1.0, None)
    tile_bwd(z, *rest, out=out[:, :70])
    assert out[:, 70:].isnan().all()
    tile_bwd(z, *rest)
    assert torch.equal(out[:, :70], z.half())


def test_a_tile_of_float32_has_the_bytes_of_another() -> None:
    policy = POLICIES["cuda:90"]
    assert policy.exact(8192, 4).columns * 2 == policy.exact(8192, 2).columns
    half, wide = (policy.sampled(8192, 4096, 2, 128, logit) for logit in (2, 4))
    assert wide == replace(half, columns=half.columns // 2, kept=wide.kept)
    assert wide.kept <= half.kept
