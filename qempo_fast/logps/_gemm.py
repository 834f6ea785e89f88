"""GEMMs by the faster of torch's own, and those whose sum is kept in float32."""

from __future__ import annotations

import functools

import torch

from .. import _C

_HALF = (torch.float16, torch.bfloat16)
# mm and addmm of half precision into float32 came with torch 2.8, for CUDA only. An early addmm refused a float32 sum
# ("self and mat2 must have the same dtype"); torch 2.11 is the oldest seen without that check.
_WIDENS = "dtype_out" in torch.ops.aten.addmm.overloads() and torch.version.hip is None
_ADDS = _WIDENS and tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)


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


def widens(a: torch.Tensor) -> bool:
    """Whether a half-precision GEMM of a can write float32, or add to it, without rounding on the way."""
    return _WIDENS and a.is_cuda and a.dtype in _HALF


def _apart(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its rows or columns overlap: of such a view oneDNN can "not construct a memory descriptor"."""
    (n, d), (row, column) = x.shape, x.stride()
    return x if (column == 1 and row >= d) or (row == 1 and column >= n) else x.contiguous()


@functools.cache
def _runs(dtype: torch.dtype) -> bool:
    """Whether this processor has GEMMs of a half-precision dtype: as torch asks before it hands one to oneDNN."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return bool(getattr(torch.ops.mkldnn, name, lambda: True)())


def _in_float32(a: torch.Tensor) -> bool:
    """Whether a GEMM of half precision is to run on float32 copies of its tiles.

    On a processor with AVX2 alone torch's own made 3 to 8 GFLOP/s in bfloat16, where float32 makes 72.
    """
    return a.dtype in _HALF and a.device.type == "cpu" and not _runs(a.dtype)


def factor_dtype(like: torch.Tensor) -> torch.dtype:
    """Of a factor that is made for a GEMM with like: float32 where it would be widened again."""
    return torch.float32 if _in_float32(like) else like.dtype


def _alike(a: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a and w in one dtype: what factor_dtype made float32 meets a copy of the other."""
    return (a, w) if a.dtype == w.dtype else (a.float(), w.float())


def _wide(a: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """linear() of half precision that is summed and written in float32."""
    if not widens(a):
        return linear(a.float(), w.float(), out)
    more = {} if out is None else {"out": out}
    return torch.mm(a, w.t(), out_dtype=torch.float32, **more)


def linear(a: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None, wide: bool = False) -> torch.Tensor:
    """(n, d) by (c, d) to (n, c), wide: in float32; out is a hint that a GEMM without an out-variant leaves unused.

    Where out is in another dtype than the factors it is written.
    """
    if wide and a.dtype in _HALF:
        return _wide(a, w, out)
    a, w = _alike(a, w)
    if out is not None and out.dtype != a.dtype:
        return out.copy_(linear(a, w))
    if _in_float32(a):
        product = linear(a.float(), w.float())
        return product.to(a.dtype) if out is None else out.copy_(product)
    if a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() and w.numel() and _onednn_float32():
        return torch.ops.mkldnn._linear_pointwise(_apart(a), _apart(w), None, "none", [], "")
    return torch.mm(a, w.t(), out=out) if out is not None else torch.mm(a, w.t())


# Rows of a GEMM of fixed(), on a GPU and elsewhere: there 64 rows ran at 0.72 of the rate of 1024, 128 at 0.84.
_TALL, _ROWS = 512, 128
# Bytes that a row of factors and products is a multiple of: in MKL a row's sums depended on where it starts (D = 577).
_LINE = 64


def _filled(x: torch.Tensor, rows: int) -> torch.Tensor:
    """A copy with zeros up to a multiple of so many rows, and of _LINE in each."""
    (n, d), whole = x.shape, _LINE // x.element_size()
    out = x.new_zeros(n + -n % rows, d + -d % whole)
    out[:n, :d] = x
    return out


def fixed(a: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None, wide: bool = False) -> torch.Tensor:
    """linear() by GEMMs of one number of rows: what a row comes to depends on no other row and on no number of them.

    That a row's place among them does not matter either is what docs/linear_logps.md measures; no library promises it.
    """
    n, c, kind = len(a), len(w), torch.float32 if wide and a.dtype in _HALF else a.dtype
    a, w = _alike(a, w)
    if _in_float32(a) or (kind != a.dtype and not widens(a)):
        a, w = a.float(), w.float()  # here, not for each GEMM again
    rows = _TALL if a.is_cuda else _ROWS
    tall, whole = _filled(a, rows), _LINE // a.element_size()
    if c % whole or tall.shape[1] != w.shape[1]:
        w = _filled(w, whole)
    z = torch.empty(n, c, dtype=kind, device=a.device) if out is None else out
    for i in range(0, n, rows):
        z[i : i + rows] = linear(tall[i : i + rows], w, None, wide)[: n - i, :c]
    return z


def product(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """a @ w.T to be summed: in float32 where the GEMM can, else in a's dtype."""
    a, w = _alike(a, w)
    return _wide(a, w, None) if _in_float32(a) or widens(a) else linear(a, w)


def add_product(total: torch.Tensor, a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """total += a @ w.T, total at least as wide as a; inside the GEMM on a GPU, where that saves a pass and a buffer."""
    a, w = _alike(a, w)
    if widens(a) and total.dtype == torch.float32:
        # torch 2.11 cannot trace this form, and no op lets it be traced.
        return torch.addmm(total, a, w.t(), out_dtype=torch.float32, out=total) if _ADDS else total.add_(product(a, w))
    if _in_float32(a):
        a, w = a.float(), w.float()
    if a.is_cuda and a.dtype == total.dtype:
        return total.addmm_(a, w.t())
    return total.add_(linear(a, w))
