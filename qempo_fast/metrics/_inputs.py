"""Turning what users pass to the metrics into float64 tensors."""

from __future__ import annotations

from typing import Any

import torch

from .. import _check

_WANTED = "numbers: a tensor, an array or lists of equal length"


def read(name: str, x: Any) -> torch.Tensor:
    """Tensor of a tensor, an array, a number or nested lists: in the dtype it has, float64 for Python's numbers."""
    if isinstance(x, torch.Tensor):
        _check.plain(name, x)
    else:
        try:
            x = _from_host(name, x)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            _check.bad_type(name, _WANTED, type(x).__name__)
    if x.is_complex():
        _check.bad_type(name, "real numbers", x.dtype)
    _check.present(name, x)
    return x.detach()


def _from_host(name: str, x: Any) -> torch.Tensor:
    # Rows from an encoder, one by one.
    if isinstance(x, (list, tuple)) and x and all(getattr(row, "ndim", 0) for row in x):
        return torch.stack([read(name, row) for row in x])
    if hasattr(x, "__array_interface__"):
        # A copy: torch takes neither falling strides nor another byte order, and warns of memory that is read-only.
        return torch.as_tensor(x.astype(x.dtype.newbyteorder("="), order="C"), device="cpu")
    # Not by torch's default dtype, whose 0.3 is 0.30000001, nor on its default device.
    return torch.as_tensor(x, dtype=torch.float64, device="cpu")


def numbers(name: str, x: Any) -> torch.Tensor:
    """Finite float64 tensor of a tensor, an array, a number or nested lists."""
    x = _check.double(read(name, x))
    # A metric is read by people and returns to the host anyway: checked on every device.
    if not bool(torch.isfinite(x).all()):
        _check.bad_value(name, "finite values", f"{int((~torch.isfinite(x)).sum())} NaN or infinite")
    return x


def within(name: str, x: torch.Tensor, low: float, high: float) -> None:
    if x.numel() and (float(x.min()) < low or float(x.max()) > high):
        _check.bad_value(name, f"values in [{low:g}, {high:g}]", f"{float(x.min()):g} to {float(x.max()):g}")


def zero_or_one(name: str, x: torch.Tensor) -> None:
    if bool(((x != 0) & (x != 1)).any()):
        _check.bad_value(name, "values 0 or 1", x[(x != 0) & (x != 1)].flatten()[0].item())


def same_shape(name: str, x: torch.Tensor, other: str, like: torch.Tensor) -> None:
    if x.shape != like.shape:
        _check.bad_value(name, f"shape {tuple(like.shape)} as {other}", tuple(x.shape))
    if x.numel() == 0:
        _check.bad_value(name, "at least one value", "none")
