"""Triton kernels of log-probs over kept sets against the float64 reference, on the GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only")

from test_logps import Case
from test_logps_support import CASES, compare

from qempo_fast.kernels.support_logps import kept_sums
from qempo_fast.logps import _support

# The interpreter's blocks are 64 entries, and as many columns.
SMALL = [(Case("ragged sizes, one over a block", 30, 70, 97), 0.6), *CASES[1:]]


@pytest.mark.parametrize(("case", "share"), SMALL, ids=lambda x: getattr(x, "why", ""))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products(
    case: Case, share: float, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_support, "WAY", "products")
    compare(case, share, dtype, device, backend="triton")


@pytest.mark.parametrize("way", [None, "union", "vocabulary"])
def test_by_gemms(way: str | None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_support, "WAY", way)
    compare(*CASES[1], torch.float32, device, backend="triton")


def test_sums_of_segments(device: torch.device) -> None:
    """Empty segments, one under and one over a block of entries, and a width that ends within a block of columns."""
    x, coef = torch.randn(9, 70, dtype=torch.float64), torch.randn(60, dtype=torch.float64)
    index, order, offsets = torch.randint(9, (60,)), torch.randperm(60), torch.tensor([0, 0, 15, 15, 58, 60])
    rows = coef[order, None] * x[index[order]]
    wanted = torch.stack([part.sum(0) for part in rows.split(offsets.diff().tolist())])
    out = kept_sums(*(t.to(device) for t in (x, coef, index, order, offsets)))
    torch.testing.assert_close(out.cpu(), wanted)
