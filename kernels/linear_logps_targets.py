"""The logit of each row's target before any GEMM has run, and the marks of columns that are targets: one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import Signature, on_device
from ._softmax import capped

# A row of 4096 in half precision: 16 bytes a load of each of 128 threads, four times.
_BLOCK, _WARPS = 1024, 4


@triton.jit
def _logps_targets_kernel(
    h_ptr,
    w_ptr,
    bias_ptr,
    inv_t_ptr,
    target_ptr,
    floor_ptr,
    forced_ptr,
    D,
    V,
    chunk,
    stride_hn,
    stride_wv,
    stride_wd,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + n)
    here = (target >= 0) & (target < V)
    acc: tl.constexpr = floor_ptr.dtype.element_ty
    # Another shard's target: a row of its own memory is read all the same, and dropped.
    at = tl.where(here, target, 0)
    parts = tl.zeros((BLOCK,), acc)
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK)
        inside = d < D
        h = tl.load(h_ptr + n * stride_hn + d, mask=inside, other=0.0).to(acc)
        w = tl.load(w_ptr + at * stride_wv + d.to(tl.int64) * stride_wd, mask=inside, other=0.0).to(acc)
        parts += h * w
    z = tl.sum(parts, 0)[None]
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + at)[None]
    half: tl.constexpr = h_ptr.dtype.element_ty.primitive_bitwidth == 16
    z = capped(z, bias, SCALE, SOFTCAP, half)
    if inv_t_ptr is not None:
        z *= tl.load(inv_t_ptr + n)
    one = tl.arange(0, 1)
    tl.store(floor_ptr + n + one, tl.where(here, z, float("-inf")))
    # Rows of one target store the same 1.
    tl.store(forced_ptr + (n // chunk) * V + at, 1, mask=here)


def target_scores(h, w, bias, inv_t, targets, floor, forced, chunk, scale, softcap) -> None:
    """Write the logit of each row's target, -inf where it is outside of w, and mark the targets of each chunk of rows.

    Args:
        h: (n, D), last stride 1.
        w: (V, D) of the same dtype, any strides.
        bias, inv_t: (V,) and (n,) in the dtype of floor, or None.
        targets: (n,) int64.
        floor: (n,) float32 or float64.
        forced: (ceil(n / chunk), V) uint8 of zeros, contiguous.
        chunk: rows that share a row of forced.
        scale, softcap: of the head.
    """
    n, depth = h.shape
    with on_device(h):
        _logps_targets_kernel[(n,)](
            *(h, w, bias, inv_t, targets, floor, forced, depth, w.shape[0], chunk),
            *(h.stride(0), w.stride(0), w.stride(1), scale, softcap),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )


def _form(kind: str, acc: str, full: bool) -> Signature:
    optional = ["bias_ptr", "inv_t_ptr"]
    head: dict[str, object] = {"SCALE": 0.5, "SOFTCAP": 30.0} if full else {"SCALE": 1.0, "SOFTCAP": None}
    return Signature(
        _logps_targets_kernel,
        {"h_ptr": kind, "w_ptr": kind, "target_ptr": "*i64", "floor_ptr": acc, "forced_ptr": "*u8"}
        | dict.fromkeys(["D", "V", "chunk", "stride_hn", "stride_wv"], "i32")
        | dict.fromkeys(optional if full else [], acc),
        head | ({} if full else dict.fromkeys(optional)) | {"stride_wd": 1, "BLOCK": _BLOCK},
        num_warps=_WARPS,
        aligned=("D", "chunk", "stride_hn", "stride_wv"),
    )


COMPILE = [
    _form("*bf16", "*fp32", False),
    _form("*fp16", "*fp32", True),
    _form("*fp32", "*fp32", True),
    _form("*fp64", "*fp64", True),
]
