"""Forward of the head in one launch: a GEMM whose tiles of logits go into an online softmax and are never stored.

A program takes a block of rows and a range of the vocabulary; ranges make few rows fill the machine, and a second small
launch merges them. Compare linear_logps_tiles, where the GEMM is the vendor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qempo_fast._door import aligned

from . import _launch
from ._common import Signature, on_device
from ._launch import architecture, cdiv, processors, sizes_of, tuned
from ._softmax import block_stats, bound_of, capped, merge, nan_max
from .linear_logps_merge import Stats, merge_splits, new_parts, store_part

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None


class Block(NamedTuple):
    """One program's rows, columns and depth, its warps, pipeline stages, programs a processor, and whether loads and
    products get warps of their own, where they can."""

    n: int
    v: int
    d: int
    warps: int
    stages: int
    programs: int
    specialize: bool = False


class Sizes(NamedTuple):
    """Launch sizes in half precision: up to FEW rows (W's bytes are the cost), above, with a softcap; in float32."""

    few: Any
    many: Any
    capped: Any
    float32: Any


FEW = 64
# Triton 3.9 is the oldest tried.
_SPECIALIZES = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
_CUDA = Sizes(
    few=Block(64, 64, 64, 4, 4, 2),
    many=Block(128, 128, 64, 8, 3, 1),
    # tanh needs registers: 128 x 128 spills.
    capped=Block(128, 64, 64, 8, 3, 1),
    float32=Block(64, 64, 16, 8, 3, 2),
)
_AMD = Sizes(*(b._replace(stages=2) for b in _CUDA))
# Not measured yet: no GPU has run these. Reasoning in docs/linear_logps_gpu.md.
LAUNCH = {
    "interpreter": Sizes(*[Block(16, 32, 16, 1, 1, 2)] * 4),
    "cuda:80": _CUDA,
    "cuda:90": _CUDA,
    "cuda:100": _CUDA,
    "hip:gfx942": _AMD,
}
_sizes = sizes_of(LAUNCH)
# On Hopper Triton 3.6 makes 255 registers and no spill of a plain head, 960 bytes with entropy, bias and bounds; 3.9
# spills 24 bytes of the plain one, 136 through descriptors.
_PLAIN_ONLY = Block(128, 256, 64, 8, 4, 1)
_CANDIDATES = Sizes(
    few=[Block(n, v, d, 4, 4, 2) for n, v, d in ((16, 64, 128), (32, 64, 64), (64, 64, 64), (64, 64, 128))],
    many=[
        *(Block(n, v, 64, 8, s, 1) for n, v, s in ((128, 128, 3), (128, 128, 4), (64, 128, 3), (64, 256, 3))),
        _PLAIN_ONLY,
    ],
    capped=[Block(n, v, 64, 8, s, 1) for n, v, s in ((128, 64, 3), (128, 64, 4), (64, 128, 3))],
    float32=[Block(n, v, d, 8, 3, 2) for n, v, d in ((32, 64, 16), (64, 64, 16), (64, 64, 32))],
)


@triton.jit
def _tile(
    tile,
    n,
    inv_t,
    target,
    peak,
    total,
    total_z,
    total_sq,
    target_z,
    x_ptr,
    w_ptr,
    bias_ptr,
    floor_ptr,
    columns_ptr,
    N,
    D,
    V,
    stride_xn,
    stride_wv,
    stride_wd,
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The running statistics with one tile of logits added to them."""
    block = tl.program_id(0).to(tl.int64)
    live = n < N
    kind: tl.constexpr = x_ptr.dtype if DESCRIPTORS else x_ptr.dtype.element_ty
    c = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = c < V
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for k in range(0, D, BLOCK_D):
        if DESCRIPTORS:
            # The copy engine fills what lies outside with zeros.
            x = x_ptr.load([tl.program_id(0) * BLOCK_N, k])  # (BLOCK_N, BLOCK_D)
            w = w_ptr.load([tile * BLOCK_V, k]).T  # (BLOCK_D, BLOCK_V)
        else:
            d = k + tl.arange(0, BLOCK_D)
            # Rows and columns past the end read the last one instead of being masked: their logits are dropped
            # below. int64: V * D passes 2**31 at 256k x 16k, of a transposed weight d * stride_wd does.
            x_at = x_ptr + tl.minimum(n, N - 1)[:, None] * stride_xn + d[None, :]
            w_at = w_ptr + tl.minimum(c, V - 1).to(tl.int64)[None, :] * stride_wv + d.to(tl.int64)[:, None] * stride_wd
            if EVEN_D:
                x = tl.load(x_at)
                w = tl.load(w_at)
            else:
                x = tl.load(x_at, mask=(d < D)[None, :], other=0.0)
                w = tl.load(w_at, mask=(d < D)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=inside, other=0.0)[None, :]
    # Rounded as the backward's GEMM rounds them: where p is near 1 its gradient is p - 1, and an lse of unrounded
    # logits under a rounded logit of 20 would make that 0.06 in bfloat16.
    # WIDE: it writes float32.
    raw = acc if WIDE else acc.to(kind).to(tl.float32)
    half: tl.constexpr = kind.primitive_bitwidth == 16 and not WIDE
    z = capped(raw, bias, SCALE, SOFTCAP, half, not SPECIALIZE) * inv_t[:, None]
    z = tl.where(inside[None, :], z, float("-inf"))
    hit = c[None, :] == target[:, None]
    here = (target >= tile * BLOCK_V) & (target < tile * BLOCK_V + BLOCK_V)
    target_z = tl.where(here, tl.sum(tl.where(hit, z, 0.0), 1), target_z)
    b_peak, b_total, b_total_z, b_total_sq = block_stats(z, ENTROPY, SUM_SQ, not SPECIALIZE)
    peak, total, total_z, total_sq = merge(
        peak, total, total_z, total_sq, b_peak, b_total, b_total_z, b_total_sq, not SPECIALIZE
    )
    if columns_ptr is not None:
        # Log-sum-exp of this range so far, at most the row's own: a looser bound keeps more and biases nothing.
        bound = bound_of(peak, total, tl.load(floor_ptr + n, mask=live, other=0.0))
        u = tl.where(live[:, None], z - bound[:, None], float("-inf"))
        tl.store(columns_ptr + block * V + c, tl.reduce(u, 0, nan_max), mask=inside)
    return peak, total, total_z, total_sq, target_z


@triton.jit
def _linear_logps_fused_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    inv_t_ptr,
    target_ptr,
    floor_ptr,
    parts_ptr,
    columns_ptr,
    N,
    D,
    V,
    stride_xn,
    stride_wv,
    stride_wd,
    split_tiles,
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Row blocks vary fastest: the programs that run together share one range of W through the cache.
    block = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < N
    inv_t = tl.full((BLOCK_N,), 1.0, tl.float32)
    if inv_t_ptr is not None:
        inv_t = tl.load(inv_t_ptr + n, mask=live, other=1.0)
    target = tl.load(target_ptr + n, mask=live, other=-1)
    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    total_z = tl.zeros((BLOCK_N,), tl.float32)
    total_sq = tl.zeros((BLOCK_N,), tl.float32)
    target_z = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    first = split * split_tiles
    end = tl.minimum(first + split_tiles, tl.cdiv(V, BLOCK_V))
    if SPECIALIZE:
        # Loads, products and the softmax go to warps of their own. Before Triton 3.3 there is no such keyword.
        for tile in tl.range(first, end, warp_specialize=True):
            peak, total, total_z, total_sq, target_z = _tile(
                tile, n, inv_t, target, peak, total, total_z, total_sq, target_z,
                x_ptr, w_ptr, bias_ptr, floor_ptr, columns_ptr, N, D, V, stride_xn, stride_wv, stride_wd,
                ENTROPY, SUM_SQ, SCALE, SOFTCAP, WIDE, EVEN_D, DESCRIPTORS, SPECIALIZE, BLOCK_N, BLOCK_V, BLOCK_D,
            )  # fmt: skip
    else:
        for tile in range(first, end):
            peak, total, total_z, total_sq, target_z = _tile(
                tile, n, inv_t, target, peak, total, total_z, total_sq, target_z,
                x_ptr, w_ptr, bias_ptr, floor_ptr, columns_ptr, N, D, V, stride_xn, stride_wv, stride_wd,
                ENTROPY, SUM_SQ, SCALE, SOFTCAP, WIDE, EVEN_D, DESCRIPTORS, SPECIALIZE, BLOCK_N, BLOCK_V, BLOCK_D,
            )  # fmt: skip
    store_part(parts_ptr, n, live, N, split, peak, total, total_z, total_sq, target_z, ENTROPY, SUM_SQ)


def _suit_copy_engine(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether the device has the copy engine, of capability 9.0 and newer, and it can read x and w."""
    arch = architecture(x.device)
    engine = arch == "interpreter" or (arch.startswith("cuda:") and int(arch[5:]) >= 90)
    if TensorDescriptor is None or not engine:
        return False
    # It reads whole rows that start at multiples of 16 bytes.
    return not any(t.stride(1) != 1 or t.stride(0) * t.element_size() % 16 or not aligned(t, 16) for t in (x, w))


def _descriptors(x: torch.Tensor, w: torch.Tensor, block: Block) -> tuple[Any, Any] | None:
    """x and w for the copy engine, or None where they do not suit it."""
    if not _suit_copy_engine(x, w):
        return None
    return TensorDescriptor.from_tensor(x, [block.n, block.d]), TensorDescriptor.from_tensor(w, [block.v, block.d])


def _specializes(x: torch.Tensor, w: torch.Tensor, block: Block) -> bool:
    """Whether the compiler gives the copy engine's loads warps of their own; docs/linear_logps_gpu.md has what it does
    on Hopper with other blocks.
    """
    arch = architecture(x.device)
    hopper = arch == "cuda:90" and x.dtype != torch.float32 and (block.n, block.warps) == (64, 4)
    return _SPECIALIZES and (hopper or arch.startswith("cuda:10")) and _suit_copy_engine(x, w)


def _candidates(size: str, x: torch.Tensor, w: torch.Tensor, plain: bool) -> list[Block]:
    """The blocks to time, each once more with warps of its own for loads where that can be.

    plain: no bias, no bounds and no optional sums.
    """
    all_: list[Block] = getattr(_CANDIDATES, size)
    blocks = [b for b in all_ if plain or b != _PLAIN_ONLY]
    able = [b for b in blocks if _specializes(x, w, b)]
    # Triton gives such a program all registers of a processor.
    return blocks + [b._replace(specialize=True, programs=1) for b in able]


def fused_fwd(x, w, bias, inv_t, targets, stats, floor, columns, scale, softcap, wide=False) -> None:
    """Statistics of each row over all of w's columns, and the column bounds where wanted.

    Args:
        x: (n, D) contiguous; float16, bfloat16 or float32.
        w: (V, D) of the same dtype, any strides.
        bias, inv_t: (V,) and (n,) float32, or None.
        targets: (n,) int64; a value outside [0, V) is in another shard.
        stats: five (n,) float32 vectors, as linear_logps_tiles has them, updated in place.
        floor: (n,) float32, a lower bound of the final log-sum-exp; with columns.
        columns: (parts, V) float32 for the log bounds, or None.
        scale, softcap: of the head.
        wide: logits of half precision keep their float32 sums.
    """
    n, depth = x.shape
    vocabulary = w.shape[0]

    def run(block: Block, out: Stats, bounds: torch.Tensor | None) -> None:
        blocks, tiles = cdiv(n, block.n), cdiv(vocabulary, block.v)
        splits = max(1, min(tiles, block.programs * processors(x.device) // blocks))
        per_split = cdiv(tiles, splits)
        splits = cdiv(tiles, per_split)
        parts = new_parts(out, n, splits)
        best = bounds if bounds is None or blocks == 1 else bounds.new_empty((blocks, vocabulary))
        descriptors = _descriptors(x, w, block)
        _linear_logps_fused_kernel[(blocks, splits)](
            *(descriptors or (x, w)),
            *(bias, inv_t, targets, floor, parts, best, n, depth, vocabulary),
            *(x.stride(0), w.stride(0), w.stride(1), per_split, out[2] is not None, out[3] is not None),
            *(scale, softcap, wide, depth % block.d == 0, descriptors is not None),
            *(block.specialize and _specializes(x, w, block), block.n, block.v, block.d),
            num_warps=block.warps,
            num_stages=block.stages,
        )
        merge_splits(parts, out)
        if bounds is None or best is None:
            return
        if best is not bounds:
            torch.amax(best, 0, out=bounds[0])
        if len(bounds) > 1:
            bounds[1:].fill_(-torch.inf)

    half = "few" if n <= FEW else "capped" if softcap is not None else "many"
    size = "float32" if x.dtype == torch.float32 else half
    block: Block = getattr(_sizes(x.device), size)
    with on_device(x):
        if _launch.AUTOTUNE:
            shape = f"{n} x {depth} x {vocabulary} {str(x.dtype).removeprefix('torch.')}"
            plain = not any(t is not None for t in (bias, columns, stats[2], stats[3]))
            block = tuned(
                *(f"linear_logps fused {size}", shape, x.device, block),
                _candidates(size, x, w, plain),
                lambda b: run(b, [None if s is None else s.clone() for s in stats], columns),
            )
        run(block, stats, columns)


def _signature(
    arch: str,
    size: str,
    dtype: str,
    full: bool,
    even: bool,
    descriptors: bool = False,
    specialize: bool = False,
    candidate: Block | None = None,
    wide: bool = False,
) -> Signature:
    """The committed block of an architecture, or a candidate that no row has."""
    block: Block = candidate or getattr(LAUNCH[arch], size)
    optional = ["bias_ptr", "inv_t_ptr", "columns_ptr", "floor_ptr"]

    def pointers(names: Sequence[str]) -> dict[str, str]:
        return dict.fromkeys(names, "*fp32")

    def matrix(rows: int) -> str:
        return f"tensordesc<{dtype[1:]}[{rows},{block.d}]>" if descriptors else dtype

    return Signature(
        _linear_logps_fused_kernel,
        {"x_ptr": matrix(block.n), "w_ptr": matrix(block.v), "target_ptr": "*i64", "N": "i32", "D": "i32", "V": "i32"}
        | {"stride_xn": "i32", "stride_wv": "i32", "split_tiles": "i32"}
        | pointers(["parts_ptr", *(optional if full else [])]),
        {
            "stride_wd": 1,
            "ENTROPY": full,
            "SUM_SQ": full,
            "SCALE": 0.5 if full else 1.0,
            "SOFTCAP": 30.0 if full else None,
        }
        | ({} if full else dict.fromkeys(optional, None))
        | {"WIDE": wide, "EVEN_D": even, "DESCRIPTORS": descriptors, "SPECIALIZE": specialize}
        | {"BLOCK_N": block.n, "BLOCK_V": block.v, "BLOCK_D": block.d},
        hot=candidate is None,
        num_warps=block.warps,
        num_stages=block.stages,
        aligned=("D", "V", "stride_xn", "stride_wv"),
        # "cuda:90", or "cuda:10" for cuda:103 too.
        targets=(arch[:7],) if specialize else ("cuda:9", "cuda:1") if descriptors or candidate else ("cuda", "hip"),
    )


COMPILE = [
    _signature("cuda:90", "few", "*bf16", False, True),
    _signature("cuda:90", "few", "*fp16", True, False),
    _signature("cuda:90", "many", "*bf16", False, True),
    _signature("cuda:90", "capped", "*bf16", True, False),
    _signature("cuda:90", "few", "*bf16", False, True, wide=True),
    _signature("cuda:90", "capped", "*bf16", True, False, wide=True),
    _signature("cuda:90", "float32", "*fp32", True, False),
    _signature("cuda:90", "many", "*bf16", False, True, candidate=_PLAIN_ONLY),
]
if TensorDescriptor is not None:
    COMPILE += [
        _signature("cuda:90", "few", "*bf16", False, True, True),
        _signature("cuda:90", "many", "*bf16", False, True, True),
        _signature("cuda:90", "capped", "*bf16", True, False, True),
        _signature("cuda:90", "float32", "*fp32", True, False, True),
    ]
if _SPECIALIZES:
    COMPILE += [
        _signature("cuda:90", "few", "*bf16", False, True, True, True),
        _signature("cuda:90", "few", "*fp16", True, False, True, True),
        _signature("cuda:100", "few", "*bf16", False, True, True, True),
        _signature("cuda:100", "few", "*fp16", True, False, True, True),
        _signature("cuda:100", "many", "*bf16", False, True, True, True),
        _signature("cuda:100", "capped", "*bf16", True, False, True, True),
        _signature("cuda:100", "float32", "*fp32", True, False, True, True),
    ]
