"""How close is close: every tolerance of the suite, in one place."""

from __future__ import annotations

import torch

# A result may be off by twice what plain torch in the same dtype is, plus this many units of rounding of the largest
# true entry: plain torch is exact by luck in some small cases.
FLOOR = 8.0


def assert_as_good(
    name: str,
    out: torch.Tensor,
    plain: torch.Tensor,
    truth: torch.Tensor,
    dtype: torch.dtype,
    floor: float = FLOOR,
    unit: float = 0.0,
) -> None:
    """max|out - truth| <= 2 max|plain - truth| + floor * eps(dtype) * max(max|truth|, unit); truth is float64.

    unit is 1 for logarithms, which round like numbers near 1 when they are near 0.
    """
    assert out.shape == truth.shape, f"{name}: shape {tuple(out.shape)}, wanted {tuple(truth.shape)}"
    if not truth.numel():
        return
    error = (out.double() - truth).abs().max().item()
    allowed = 2 * (plain.double() - truth).abs().max().item()
    allowed += floor * torch.finfo(dtype).eps * max(truth.abs().max().item(), unit)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
