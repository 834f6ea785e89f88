"""The backward's work on one tile of logits that a GEMM wrote: their gradient, in place or elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _launch
from ._common import Signature, on_device
from ._launch import cdiv, sizes_of, tuned
from ._softmax import capped, exp, expm1
from .linear_logps_tiles import tile_shape


class Block(NamedTuple):
    """One program's rows and columns, and its warps."""

    n: int
    v: int
    warps: int


# Not measured yet: no GPU has run these. Reasoning in docs/linear_logps_gpu.md.
LAUNCH = {
    "interpreter": Block(16, 64, 1),
    "cuda:80": Block(1, 2048, 4),
    "cuda:90": Block(1, 2048, 4),
    "cuda:100": Block(1, 2048, 4),
    "hip:gfx942": Block(1, 2048, 4),
}
_size = sizes_of(LAUNCH)
_CANDIDATES = [Block(n, v, w) for n, v, w in ((1, 1024, 4), (1, 2048, 4), (1, 4096, 8), (4, 1024, 8), (8, 256, 4))]


@triton.jit(do_not_specialize=["kept"])
def _logps_grad_kernel(
    z_ptr,
    out_ptr,
    bias_ptr,
    inv_t_ptr,
    lse_ptr,
    grad_ptr,
    grad_h_ptr,
    h_ptr,
    inverse_ptr,
    target_ptr,
    live_ptr,
    N,
    C,
    kept,
    stride_zn,
    stride_on,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    half: tl.constexpr = z_ptr.dtype.element_ty.primitive_bitwidth == 16
    acc: tl.constexpr = lse_ptr.dtype.element_ty
    # int64: N * V passes 2**31 at 16k x 152k.
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_V
    c = first + tl.arange(0, BLOCK_V)
    real = n < N
    inside = c < C
    both = real[:, None] & inside[None, :]
    raw = tl.load(z_ptr + n[:, None] * stride_zn + c[None, :], mask=both, other=0.0).to(acc)  # (BLOCK_N, BLOCK_V)
    # Columns from kept on are padding. With C as their number, any and not a multiple of 16, z's loads were of 2 bytes.
    inner = (c < kept)[None, :] if inverse_ptr is not None else inside[None, :]
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c[None, :], mask=inner, other=0.0)
    x = capped(raw, bias, SCALE, SOFTCAP, half)
    slope = tl.full((BLOCK_N, BLOCK_V), SCALE, acc)
    if SOFTCAP is not None:
        slope *= 1.0 - (x / SOFTCAP) * (x / SOFTCAP)
    if inv_t_ptr is not None:
        inv_t = tl.load(inv_t_ptr + n, mask=real, other=1.0)[:, None]
        x *= inv_t
        slope *= inv_t
    away = x - tl.load(lse_ptr + 2 * n, mask=real, other=0.0)[:, None]
    log_sum = tl.load(lse_ptr + 2 * n + 1, mask=real, other=0.0)[:, None]
    # p is e this often.
    part = tl.exp(-log_sum)
    e = exp(away)
    g = tl.load(grad_ptr + n, mask=real, other=0.0)[:, None]
    d = (-g * part) * e
    entropy = tl.zeros((BLOCK_N, BLOCK_V), acc)
    if grad_h_ptr is not None:
        gh = tl.load(grad_h_ptr + n, mask=real, other=0.0)[:, None]
        h = tl.load(h_ptr + n, mask=real, other=0.0)[:, None]
        entropy = tl.where(e > 0, (gh * part) * e * (away + (h - log_sum)), e * 0.0)
        d -= entropy
    if inverse_ptr is not None:
        d *= tl.load(inverse_ptr + c[None, :], mask=inner, other=0.0)
    target = tl.load(target_ptr + n, mask=real, other=-1)
    if tl.max(((target >= first) & (target < first + BLOCK_V)).to(tl.int32), 0) > 0:
        # g (1 - p): expm1 keeps the digits that 1 - p loses as p nears 1. Element by element, because a program that
        # read the row's target first would race with its own store; a third of the instructions, so only in the program
        # that holds the target. That column is always kept: its entry has no inverse.
        d = tl.where(c[None, :] == target[:, None], -g * expm1(away - log_sum) - entropy, d)
    d *= slope
    if inverse_ptr is not None:
        # Not times 0: beside logits of -1000 the padding's exponential is infinite.
        d = tl.where(inner, d, 0.0)
    if live_ptr is not None:
        # Not times 0: such a row may hold anything, NaN too.
        d = tl.where((tl.load(live_ptr + n, mask=real, other=0) != 0)[:, None], d, 0.0)
    tl.store(out_ptr + n[:, None] * stride_on + c[None, :], d.to(out_ptr.dtype.element_ty), mask=both)


def tile_bwd(
    z: torch.Tensor,
    bias: torch.Tensor | None,
    inv_t: torch.Tensor | None,
    lse: torch.Tensor,
    grad: torch.Tensor,
    grad_h: torch.Tensor | None,
    h: torch.Tensor | None,
    inverse: torch.Tensor | None,
    target: torch.Tensor,
    scale: float,
    softcap: float | None,
    *,
    live: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> None:
    """Gradient with respect to raw logits.

    dz_j = (grad (1[j = target] - p_j) - grad_h p_j (log p_j + h)) slope_j, times inverse_j where j is not the target.

    Args:
        z: (n, c) raw logits, last stride 1.
        bias, inv_t, scale, softcap: as linear_logps_tiles has them.
        lse: (n, 2) contiguous, the log-sum-exp in two parts, max z and log sum e^(z - max).
        grad: (n,) gradient of the log-prob.
        grad_h, h: (n,) gradient of the entropy and the entropy, or both None.
        inverse: (k,) factor of each of the first k columns, as bias has; the others are padding and get 0. None: 1 for
            all c.
        target: (n,) int64 column of the tile, outside [0, c) or in the padding where another tile holds it.
        live: (n,) bool, False where the gradient is 0 whatever z holds; None: nowhere.
        out: (n, c) for the gradient, of any float dtype, last stride 1; None: z is overwritten.
    """
    n, c = z.shape
    kept = c if inverse is None else inverse.shape[0]

    def run(block: Block, to: torch.Tensor) -> None:
        _logps_grad_kernel[(cdiv(n, block.n), cdiv(c, block.v))](
            *(z, to, bias, inv_t, lse, grad, grad_h, h, inverse, target, live, n, c, kept),
            *(z.stride(0), to.stride(0), scale, softcap, block.n, block.v),
            num_warps=block.warps,
        )

    block = _size(z.device)
    with on_device(z):
        if _launch.AUTOTUNE:
            scratch = torch.empty_like(z)
            block = tuned("linear_logps grad", tile_shape(z), z.device, block, _CANDIDATES, lambda b: run(b, scratch))
        run(block, z if out is None else out)


_OPTIONAL = ("bias_ptr", "inv_t_ptr", "grad_h_ptr", "h_ptr", "inverse_ptr")


def _form(z: str, acc: str, given: Sequence[str] = (), live: bool = False, out: str = "") -> Signature:
    """A plain head or, with all that may be given, one with everything, at the size of the GPU rows of LAUNCH."""
    block, full = LAUNCH["cuda:90"], tuple(given) == _OPTIONAL
    head: dict[str, object] = {"SCALE": 0.5, "SOFTCAP": 30.0} if full else {"SCALE": 1.0, "SOFTCAP": None}
    return Signature(
        _logps_grad_kernel,
        {"z_ptr": z, "out_ptr": out or z, "target_ptr": "*i64"}
        | {"N": "i32", "C": "i32", "kept": "i32", "stride_zn": "i64", "stride_on": "i64"}
        | ({"live_ptr": "*i1"} if live else {})
        | dict.fromkeys(["lse_ptr", "grad_ptr", *given], acc),
        head
        | dict.fromkeys([*(n for n in _OPTIONAL if n not in given), *([] if live else ["live_ptr"])])
        | {"BLOCK_N": block.n, "BLOCK_V": block.v},
        hot=acc == "*fp32",
        num_warps=block.warps,
        aligned=("C", "stride_zn", "stride_on"),
    )


COMPILE = [
    _form("*bf16", "*fp32"),
    _form("*bf16", "*fp32", live=True),
    _form("*bf16", "*fp32", ("inverse_ptr",)),
    _form("*fp16", "*fp32"),
    _form("*fp32", "*fp32", out="*bf16"),
    _form("*fp32", "*fp32", ("inverse_ptr",), out="*bf16"),
    _form("*fp32", "*fp32", _OPTIONAL),
    _form("*bf16", "*fp32", _OPTIONAL),
    _form("*fp64", "*fp64", _OPTIONAL),
]
