"""The backward's work on one tile of logits that a GEMM wrote: their gradient, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import Signature, on_device
from ._launch import architecture, row, tuned
from ._softmax import capped, expm1
from .linear_logps_tiles import Block, tile_shape

# Not measured yet: no GPU has run these. Reasoning in docs/linear_logps_gpu.md.
LAUNCH = {
    "interpreter": Block(16, 64, 1),
    "cuda:80": Block(1, 2048, 4),
    "cuda:90": Block(1, 2048, 4),
    "cuda:100": Block(1, 2048, 4),
    "hip:gfx942": Block(1, 2048, 4),
}
_CANDIDATES = [Block(n, v, w) for n, v, w in ((1, 1024, 4), (1, 2048, 4), (1, 4096, 8), (4, 1024, 8), (8, 256, 4))]


@triton.jit
def _logps_grad_kernel(
    z_ptr,
    bias_ptr,
    inv_t_ptr,
    lse_ptr,
    grad_ptr,
    grad_h_ptr,
    h_ptr,
    inverse_ptr,
    target_ptr,
    N,
    C,
    stride_zn,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    live = n < N
    inside = c < C
    both = live[:, None] & inside[None, :]
    acc: tl.constexpr = lse_ptr.dtype.element_ty
    at = z_ptr + n[:, None] * stride_zn + c[None, :]
    raw = tl.load(at, mask=both, other=0.0).to(acc)  # (BLOCK_N, BLOCK_V)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=inside, other=0.0)[None, :]
    x = capped(raw, bias, SCALE, SOFTCAP)
    slope = tl.full((BLOCK_N, BLOCK_V), SCALE, acc)
    if SOFTCAP is not None:
        slope *= 1.0 - (x / SOFTCAP) * (x / SOFTCAP)
    if inv_t_ptr is not None:
        inv_t = tl.load(inv_t_ptr + n, mask=live, other=1.0)[:, None]
        x *= inv_t
        slope *= inv_t
    lp = x - tl.load(lse_ptr + n, mask=live, other=0.0)[:, None]
    p = tl.exp(lp)
    g = tl.load(grad_ptr + n, mask=live, other=0.0)[:, None]
    d = -g * p
    # g (1 - p): expm1 keeps the digits that 1 - p loses as p nears 1. Element by element, because a program that
    # read the row's target first would race with its own store.
    d_target = -g * expm1(lp)
    if grad_h_ptr is not None:
        gh = tl.load(grad_h_ptr + n, mask=live, other=0.0)[:, None]
        h = tl.load(h_ptr + n, mask=live, other=0.0)[:, None]
        entropy = tl.where(p > 0, gh * p * (lp + h), p * 0.0)
        d -= entropy
        d_target -= entropy
    if inverse_ptr is not None:
        # The target column is always kept: its entry is exact.
        d *= tl.load(inverse_ptr + c, mask=inside, other=0.0)[None, :]
    target = tl.load(target_ptr + n, mask=live, other=-1)
    d = tl.where(c[None, :] == target[:, None], d_target, d) * slope
    tl.store(at, d.to(z_ptr.dtype.element_ty), mask=both)


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
) -> None:
    """Raw logits to their gradient, in place.

    dz_j = -g p_j - gh p_j (log p_j + H), times inverse_j; at the target g (1 - p) - gh p (log p + H).

    Args:
        z, bias, inv_t, scale, softcap: as rows_fwd has them; z is overwritten.
        lse, grad: (n,) log-sum-exp and gradient of the log-prob.
        grad_h, h: (n,) gradient of the entropy and the entropy, or both None.
        inverse: (c,) factor of each column, or None for 1.
        target: (n,) int64 column of the tile, outside [0, c) where another tile holds it.
    """
    n, c = z.shape

    def run(block: Block, out: torch.Tensor) -> None:
        _logps_grad_kernel[(triton.cdiv(n, block.n), triton.cdiv(c, block.v))](
            *(out, bias, inv_t, lse, grad, grad_h, h, inverse, target, n, c, out.stride(0), scale, softcap),
            BLOCK_N=block.n,
            BLOCK_V=block.v,
            num_warps=block.warps,
        )

    default = row(LAUNCH, architecture(z.device))
    with on_device(z):
        block = tuned(
            *("linear_logps grad", tile_shape(z), z.device, default, _CANDIDATES), lambda b: run(b, z.clone())
        )
        run(block, z)


def _form(z: str, acc: str, full: bool) -> Signature:
    """A plain head or one with everything, at the size of the GPU rows of LAUNCH."""
    block = LAUNCH["cuda:90"]
    optional = ["bias_ptr", "inv_t_ptr", "grad_h_ptr", "h_ptr", "inverse_ptr"]
    head: dict[str, object] = {"SCALE": 0.5, "SOFTCAP": 30.0} if full else {"SCALE": 1.0, "SOFTCAP": None}
    return Signature(
        _logps_grad_kernel,
        {"z_ptr": z, "target_ptr": "*i64", "N": "i32", "C": "i32", "stride_zn": "i64"}
        | dict.fromkeys(["lse_ptr", "grad_ptr", *(optional if full else [])], acc),
        head | ({} if full else dict.fromkeys(optional)) | {"BLOCK_N": block.n, "BLOCK_V": block.v},
        hot=acc == "*fp32",
        num_warps=block.warps,
        aligned=("C", "stride_zn"),
    )


COMPILE = [
    _form("*bf16", "*fp32", False),
    _form("*fp16", "*fp32", False),
    _form("*fp32", "*fp32", True),
    _form("*bf16", "*fp32", True),
    _form("*fp64", "*fp64", True),
]
