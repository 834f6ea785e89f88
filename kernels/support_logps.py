"""Log-probs over kept sets: products with the tokens that rows keep, and softmax passes over ragged entries.

Entry e is one token of one row; row i has the entries offsets[i] to offsets[i + 1]. With M entries the products read
M rows of the weight, which is their cost: 2 M D bytes in half precision. The two passes over scores read and write M
numbers. No kernel adds to memory that another program adds to: two runs agree bitwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import Signature, on_device
from ._launch import cdiv, sizes_of
from ._softmax import block_stats, capped, exp, expm1, merge


class Block(NamedTuple):
    """Entries and columns of a step of the products, their warps; entries and warps of the passes."""

    entries: int
    columns: int
    warps: int
    scores: int
    scores_warps: int


# Not measured yet. products: 16 rows of 128 bytes in flight for each warp; scores: most sets are smaller than a block.
LAUNCH = {
    "interpreter": Block(64, 64, 1, 64, 1),
    "cuda:80": Block(32, 128, 4, 256, 1),
    "cuda:90": Block(32, 128, 4, 256, 1),
    "cuda:100": Block(32, 128, 4, 256, 1),
    "hip:gfx942": Block(32, 128, 4, 256, 1),
}
_size = sizes_of(LAUNCH)


@triton.jit
def _kept_dots_kernel(
    z_ptr, hidden_ptr, weight_ptr, ids_ptr, rows_ptr, M, D, stride_h, stride_w, BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # A program per block of entries, not per row: sets differ in size by a thousand times.
    acc: tl.constexpr = z_ptr.dtype.element_ty
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    real = e < M
    w_row = weight_ptr + tl.load(ids_ptr + e, mask=real, other=0)[:, None] * stride_w
    h_row = hidden_ptr + tl.load(rows_ptr + e, mask=real, other=0)[:, None] * stride_h
    total = tl.zeros((BLOCK_E, BLOCK_D), acc)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        both = real[:, None] & (d < D)[None, :]
        w = tl.load(w_row + d[None, :], mask=both, other=0.0).to(acc)
        total += w * tl.load(h_row + d[None, :], mask=both, other=0.0).to(acc)
    tl.store(z_ptr + e, tl.sum(total, 1), mask=real)


@triton.jit
def _kept_sums_kernel(
    out_ptr, coef_ptr, x_ptr, index_ptr, order_ptr, offsets_ptr, D, stride_x, BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = out_ptr.dtype.element_ty
    s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(offsets_ptr + s)
    end = tl.load(offsets_ptr + s + 1)
    total = tl.zeros((BLOCK_E, BLOCK_D), acc)
    for first in range(start, end, BLOCK_E):
        k = first + tl.arange(0, BLOCK_E)
        real = k < end
        e = k
        if order_ptr is not None:
            e = tl.load(order_ptr + k, mask=real, other=0)
        row = tl.load(index_ptr + e, mask=real, other=0)
        coef = tl.load(coef_ptr + e, mask=real, other=0.0)
        both = real[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_x + d[None, :], mask=both, other=0.0).to(acc)
        total += coef[:, None] * x
    tl.store(out_ptr + s * D + d, tl.sum(total, 0), mask=d < D)


@triton.jit
def _support_fwd_kernel(
    z_ptr, inv_t_ptr, offsets_ptr, place_ptr, max_ptr, sum_ptr, sum_z_ptr, sum_sq_ptr, target_ptr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = max_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + n)
    end = tl.load(offsets_ptr + n + 1)
    place = start + tl.load(place_ptr + n)
    held = place >= start
    inv_t = 1.0
    if inv_t_ptr is not None:
        inv_t = tl.load(inv_t_ptr + n)
    low = float("-inf")
    peak = tl.full((1,), low, acc)
    total = tl.zeros((1,), acc)
    total_z = tl.zeros((1,), acc)
    total_sq = tl.zeros((1,), acc)
    target = tl.full((1,), low, acc)
    for first in range(start, end, BLOCK):
        e = first + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
        inside = e < end
        x = capped(tl.load(z_ptr + e, mask=inside, other=0.0), None, SCALE, SOFTCAP, False) * inv_t
        x = tl.where(inside, x, low)
        one, one_sum, one_z, one_sq = block_stats(x, sum_z_ptr is not None, sum_sq_ptr is not None)
        peak, total, total_z, total_sq = merge(peak, total, total_z, total_sq, one, one_sum, one_z, one_sq)
        here = tl.sum(tl.where((e == place) & held, x, 0.0), 1)
        found = tl.sum(((e == place) & held & inside).to(tl.int32), 1) > 0
        target = tl.where(found, here, target)
    lane = n + tl.arange(0, 1)
    tl.store(max_ptr + lane, peak)
    tl.store(sum_ptr + lane, total)
    if sum_z_ptr is not None:
        tl.store(sum_z_ptr + lane, total_z)
    if sum_sq_ptr is not None:
        tl.store(sum_sq_ptr + lane, total_sq)
    tl.store(target_ptr + lane, target)


@triton.jit
def _support_bwd_kernel(
    z_ptr, inv_t_ptr, offsets_ptr, place_ptr, lse_ptr, grad_ptr, grad_h_ptr, h_ptr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = lse_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + n)
    end = tl.load(offsets_ptr + n + 1)
    place = start + tl.load(place_ptr + n)
    held = place >= start
    peak = tl.load(lse_ptr + 2 * n)
    log_sum = tl.load(lse_ptr + 2 * n + 1)
    g = tl.load(grad_ptr + n)
    part = tl.exp(-log_sum)
    for first in range(start, end, BLOCK):
        e = first + tl.arange(0, BLOCK)
        inside = e < end
        x = capped(tl.load(z_ptr + e, mask=inside, other=0.0), None, SCALE, SOFTCAP, False)
        slope = tl.full((BLOCK,), SCALE, acc)
        if SOFTCAP is not None:
            slope *= 1.0 - (x / SOFTCAP) * (x / SOFTCAP)
        if inv_t_ptr is not None:
            inv_t = tl.load(inv_t_ptr + n)
            x *= inv_t
            slope *= inv_t
        away = x - peak
        p = exp(away)
        entropy = tl.zeros((BLOCK,), acc)
        if grad_h_ptr is not None:
            gh = tl.load(grad_h_ptr + n)
            h = tl.load(h_ptr + n)
            entropy = tl.where(p > 0, (gh * part) * p * (away + (h - log_sum)), p * 0.0)
        # expm1 keeps the digits that 1 - p loses as p nears 1.
        d = tl.where((e == place) & held, -g * expm1(away - log_sum), (-g * part) * p) - entropy
        tl.store(z_ptr + e, (d * slope).to(acc), mask=inside)


def kept_dots(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, z: torch.Tensor
) -> None:
    """z[e] = hidden[rows[e]] . weight[ids[e]], summed in z's dtype.

    Args:
        hidden: (n, D) and weight: (V, D) of any float dtype, last stride 1.
        ids: (M,) and rows: (M,), int64, in range.
        z: (M,) float32, or float64.
    """
    m, block = len(z), _size(z.device)
    if m:
        with on_device(z):
            _kept_dots_kernel[(cdiv(m, block.entries),)](
                *(z, hidden, weight, ids, rows, m, hidden.shape[1], hidden.stride(0), weight.stride(0)),
                *(block.entries, block.columns),
                num_warps=block.warps,
            )


def kept_sums(
    x: torch.Tensor, coef: torch.Tensor, index: torch.Tensor, order: torch.Tensor | None, offsets: torch.Tensor
) -> torch.Tensor:
    """out_s = sum over k in [offsets_s, offsets_{s + 1}) of coef[e] x[index[e]], e = order[k], or k without an order.

    Args:
        x: (rows, D), last stride 1.
        coef: (M,) float32, or float64.
        index: (M,) int64 rows of x.
        order: (M,) int64 or None.
        offsets: (S + 1,) int64, never falling.

    Returns:
        (S, D) in coef's dtype.
    """
    count, width, block = len(offsets) - 1, x.shape[1], _size(x.device)
    out = torch.empty(count, width, dtype=coef.dtype, device=x.device)
    if count:
        with on_device(x):
            _kept_sums_kernel[(count, cdiv(width, block.columns))](
                *(out, coef, x, index, order, offsets, width, x.stride(0), block.entries, block.columns),
                num_warps=block.warps,
            )
    return out


def support_fwd(
    z: torch.Tensor,
    inv_t: torch.Tensor | None,
    offsets: torch.Tensor,
    places: torch.Tensor,
    stats: list[torch.Tensor | None],
    scale: float,
    softcap: float | None,
) -> None:
    """Statistics of each row's entries: max, sum, sum_z or None, sum_sq or None, target, (n,) each, -inf without one.

    Args:
        z: (M,) raw logits, float32 or float64.
        inv_t: (n,) or None.
        offsets: (n + 1,) int64.
        places: (n,) int64 place of each target among its row's entries, negative where it is not.
        stats: what is written.
        scale, softcap: as linear_logps_tiles has them.
    """
    if len(places):
        block = _size(z.device)
        with on_device(z):
            _support_fwd_kernel[(len(places),)](
                *(z, inv_t, offsets, places, *stats, scale, softcap, block.scores), num_warps=block.scores_warps
            )


def support_bwd(
    z: torch.Tensor,
    inv_t: torch.Tensor | None,
    offsets: torch.Tensor,
    places: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    grad_h: torch.Tensor | None,
    h: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    """Raw logits z to their gradient, in place, as linear_logps_grad.tile_bwd makes that of a tile."""
    if len(places) and len(z):
        block = _size(z.device)
        with on_device(z):
            _support_bwd_kernel[(len(places),)](
                *(z, inv_t, offsets, places, lse, grad, grad_h, h, scale, softcap, block.scores),
                num_warps=block.scores_warps,
            )


_BLOCK = LAUNCH["cuda:90"]
_STATS = ("max_ptr", "sum_ptr", "target_ptr")
_SUMS = ("sum_z_ptr", "sum_sq_ptr", "inv_t_ptr")
_GRADS = ("lse_ptr", "grad_ptr")
_ENTROPY = ("grad_h_ptr", "h_ptr", "inv_t_ptr")


def _scores(acc: str, full: bool) -> list[Signature]:
    """Both passes, of a plain head or of one with all that may be given."""
    head: dict[str, object] = {"SCALE": 0.5, "SOFTCAP": 30.0} if full else {"SCALE": 1.0, "SOFTCAP": None}
    sizes = {"BLOCK": _BLOCK.scores}
    where = {"offsets_ptr": "*i64", "place_ptr": "*i64", "z_ptr": acc}
    out = []
    for kernel, always, optional in (
        (_support_fwd_kernel, _STATS, _SUMS),
        (_support_bwd_kernel, _GRADS, _ENTROPY),
    ):
        types = where | dict.fromkeys([*always, *(optional if full else ())], acc)
        absent = dict.fromkeys(() if full else optional)
        out.append(Signature(kernel, types, head | absent | sizes, hot=acc == "*fp32", num_warps=_BLOCK.scores_warps))
    return out


COMPILE = [
    *(s for acc in ("*fp32", "*fp64") for full in (False, True) for s in _scores(acc, full)),
    *(
        Signature(
            _kept_dots_kernel,
            {"z_ptr": acc, "hidden_ptr": x, "weight_ptr": x, "ids_ptr": "*i64", "rows_ptr": "*i64", "M": "i32"}
            | {"D": "i32", "stride_h": "i64", "stride_w": "i64"},
            {"BLOCK_E": _BLOCK.entries, "BLOCK_D": _BLOCK.columns},
            hot=acc == "*fp32",
            num_warps=_BLOCK.warps,
            aligned=("D", "stride_h", "stride_w"),
        )
        for x, acc in (("*bf16", "*fp32"), ("*fp16", "*fp32"), ("*fp32", "*fp32"), ("*fp64", "*fp64"))
    ),
    *(
        Signature(
            _kept_sums_kernel,
            {"out_ptr": acc, "coef_ptr": acc, "x_ptr": x, "index_ptr": "*i64", "offsets_ptr": "*i64", "D": "i32"}
            | {"stride_x": "i64"}
            | ({"order_ptr": "*i64"} if order else {}),
            {"BLOCK_E": _BLOCK.entries, "BLOCK_D": _BLOCK.columns} | ({} if order else {"order_ptr": None}),
            hot=acc == "*fp32",
            num_warps=_BLOCK.warps,
            aligned=("D", "stride_x"),
        )
        for x, acc, order in (
            *(("*bf16", "*fp32", True), ("*bf16", "*fp32", False), ("*fp16", "*fp32", False)),
            *(("*fp32", "*fp32", True), ("*fp64", "*fp64", False)),
        )
    ),
]
