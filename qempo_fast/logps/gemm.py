"""a @ w.T by the faster of torch's own GEMMs."""

from __future__ import annotations

import functools

import torch

from .. import _C


@functools.cache
def _onednn_float32() -> bool:
    """Whether float32 GEMMs go to oneDNN rather than to torch.mm (MKL).

    MKL runs at half of oneDNN's rate on AMD: 2048 x 576 x 2048 on 2 threads of a Zen 5 takes 49 ms against 24.
    Chosen by vendor, not by a timing, so that results do not depend on what else the machine was doing.
    """
    return (
        _C.vendor() == "AuthenticAMD"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(a: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """(n, d) by (c, d) to (n, c); out is a hint that a GEMM without an out-variant leaves unused."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() and w.numel() and _onednn_float32():
        return torch.ops.mkldnn._linear_pointwise(a, w, None, "none", [], "")
    return torch.mm(a, w.t(), out=out) if out is not None else torch.mm(a, w.t())
