"""What the DPP kernels share: rows of a group, products of rows, and k x k algebra in registers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._common import Signature
from ._launch import power_of_2

# Rows of the largest group that the kernels take.
LARGEST = 64
BLOCK_D = 64
_WARPS = {16: 2, 32: 4, 64: 8}
# More than the k x k matrices need: three of them at once fill the registers of fewer.
CAREFUL_WARPS = 8


# Numbers are defaults or local to a kernel: Triton compares each global one at every launch, 0.7 microseconds each.
@triton.jit
def span(offsets_ptr, g, M, k, LARGEST: tl.constexpr = LARGEST):
    """First row and size of group g, cut to [0, M), and whether its offsets are right."""
    zero = tl.zeros((), tl.int64)
    if offsets_ptr is None:
        low = g * k
        size = zero + k
        valid = size > 0
    else:
        begin = tl.load(offsets_ptr + g)
        end = tl.load(offsets_ptr + g + 1)
        low = tl.minimum(tl.maximum(begin, zero), M)
        high = tl.minimum(tl.maximum(end, zero), M)
        size = tl.maximum(high - low, zero)
        valid = (low == begin) & (high == end) & (size > 0) & (size <= LARGEST)
    return low, size, valid


@triton.jit
def kept_in(kept_ptr, offsets_ptr, M, k, LARGEST: tl.constexpr = LARGEST):
    """P, Q, the rows' and the groups' numbers in the slab of qempo_fast/dpp/_gpu.py, and the pitch of P and Q."""
    rows = tl.zeros((), tl.int64) + M
    pitch = rows * 0 + k if offsets_ptr is None else tl.minimum(rows, LARGEST)
    q_ptr = kept_ptr + (rows * pitch + 1) // 2 * 2
    line_ptr = q_ptr + (rows * pitch + 1) // 2 * 2
    return kept_ptr, q_ptr, line_ptr, line_ptr + (3 * rows + 1) // 2 * 2, pitch


@triton.jit
def fill(ptr, first, last, BLOCK: tl.constexpr):
    """NaN into [first, last)."""
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(ptr + at, tl.full((BLOCK,), float("nan"), tl.float32).to(ptr.dtype.element_ty), mask=at < last)


@triton.jit
def fill_orphans(ptr, offsets_ptr, g, G, M, start, size, valid, width, BLOCK: tl.constexpr):
    """NaN into the rows of a wrong group, those before the first group and those behind the last."""
    if not valid:
        fill(ptr, start * width, (start + size) * width, BLOCK)
    zero = tl.zeros((), tl.int64)
    if g == 0:
        fill(ptr, zero, tl.minimum(tl.maximum(tl.load(offsets_ptr), zero), M) * width, BLOCK)
    if g == G - 1:
        fill(ptr, tl.minimum(tl.maximum(tl.load(offsets_ptr + G), zero), M) * width, M * width, BLOCK)


@triton.jit
def rows_of(x_ptr, start, size, d, c, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns c and on of a group's rows, (BLOCK_K, BLOCK_D); 0 outside."""
    i = tl.arange(0, BLOCK_K)
    e = c + tl.arange(0, BLOCK_D)
    at = x_ptr + (start + i)[:, None] * d + e[None, :]
    return tl.load(at, mask=(i[:, None] < size) & (e[None, :] < d), other=0.0)


@triton.jit
def gram(x_ptr, start, size, d, WIDEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    # Products of halves are exact in float32; "ieee" keeps those of float32 from being cut to tf32.
    sums = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    for c in range(0, d, BLOCK_D):
        x = rows_of(x_ptr, start, size, d, c, BLOCK_K, BLOCK_D)
        if WIDEN:
            x = x.to(tl.float32)
        sums = tl.dot(x, tl.trans(x), sums, input_precision="ieee")
    return sums.to(tl.float64)


@triton.jit
def gram_careful(x_ptr, start, size, d, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    j = tl.arange(0, BLOCK_K)
    gram = tl.zeros((BLOCK_K, BLOCK_K), tl.float64)
    for i in range(0, size):
        sums = tl.zeros((BLOCK_K,), tl.float64)
        for c in range(0, d, BLOCK_D):
            x = rows_of(x_ptr, start, size, d, c, BLOCK_K, BLOCK_D).to(tl.float64)
            e = c + tl.arange(0, BLOCK_D)
            row = tl.load(x_ptr + (start + i) * d + e, mask=e < d, other=0.0).to(tl.float64)
            sums += tl.sum(x * row[None, :], 1)
        gram = tl.where(j[None, :] == i, sums[:, None], gram)
    return gram


@triton.jit
def log_scale(log_quality_ptr, at, live, length, NORMALIZE: tl.constexpr):
    """log s_i; minus infinity for a row of zeros, which is the zero vector whatever its quality."""
    log_s = tl.zeros_like(length)
    if log_quality_ptr is not None:
        log_s = tl.load(log_quality_ptr + at, mask=live, other=0.0).to(tl.float64) / 2
    if not NORMALIZE:
        log_s += tl.log(tl.where(live, length, 1.0))
    return tl.where(live & (length == 0), float("-inf"), log_s)


@triton.jit
def of_row(a, p, BLOCK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK)[:, None] == p, a, 0.0), 0)


@triton.jit
def of_column(a, p, BLOCK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK)[None, :] == p, a, 0.0), 1)


@triton.jit
def diagonal(a, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.sum(tl.where(i[:, None] == i[None, :], a, 0.0), 1)


@triton.jit
def sweep(a, size, BLOCK: tl.constexpr):
    """-A^-1 by sweeping each diagonal entry, and the pivots, which are the squares of Cholesky's diagonal."""
    i = tl.arange(0, BLOCK)
    pivots = tl.full((BLOCK,), 1.0, tl.float64)
    for p in range(0, size):
        row = of_row(a, p, BLOCK)
        column = of_column(a, p, BLOCK)
        pivot = tl.sum(tl.where(i == p, row, 0.0), 0)
        inverse = 1.0 / pivot
        is_row = i[:, None] == p
        is_column = i[None, :] == p
        left = column[:, None] * inverse
        rest = tl.where(is_column, left, a - left * row[None, :])
        a = tl.where(is_row, tl.where(is_column, -inverse, row[None, :] * inverse), rest)
        pivots = tl.where(i == p, pivot, pivots)
    return a, pivots


@triton.jit
def dependence_floor(size):
    """Squared sine, and weight, that rounding leaves between dependent rows: 8 k eps of float64."""
    return 8 * 2.220446049250313e-16 * size.to(tl.float64)


@triton.jit
def keep_rows(line_ptr, at, live, factor, ridge_m, length):
    tl.store(line_ptr + 3 * at, factor, mask=live)
    tl.store(line_ptr + 3 * at + 1, ridge_m, mask=live)
    tl.store(line_ptr + 3 * at + 2, length, mask=live)


@triton.jit
def store_square(ptr, start, size, pitch, a, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = ptr + (start + i)[:, None] * pitch + i[None, :]
    tl.store(at, a, mask=(i[:, None] < size) & (i[None, :] < size))


@triton.jit
def load_square(ptr, start, size, pitch, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = ptr + (start + i)[:, None] * pitch + i[None, :]
    return tl.load(at, mask=(i[:, None] < size) & (i[None, :] < size), other=0.0)


@triton.jit
def store_results(logdet_ptr, gains_ptr, baselines_ptr, g, at, live, size, logdet, gains, baselines):
    tl.store(logdet_ptr + g, logdet.to(tl.float32))
    tl.store(gains_ptr + at, gains.to(tl.float32), mask=live)
    # A group of one has no others.
    baselines = tl.where(size > 1, baselines / tl.maximum(size - 1, 1).to(tl.float64), float("nan"))
    tl.store(baselines_ptr + at, baselines.to(tl.float32), mask=live)


@triton.jit
def outer_sum(left, right, size, BLOCK: tl.constexpr):
    """left^T right over the first `size` rows, in float64, which tl.dot does not have everywhere."""
    sums = tl.zeros((BLOCK, BLOCK), tl.float64)
    for c in range(0, size):
        sums += of_row(left, c, BLOCK)[:, None] * of_row(right, c, BLOCK)[None, :]
    return sums


class Share(NamedTuple):
    """Constants of one launch: of the direct path's kernels, and of the careful one's."""

    direct: dict[str, Any]
    careful: dict[str, Any]


def _share(low: int, high: int, block: int, rest: bool) -> Share:
    sizes = {"LOW": low, "HIGH": high, "BLOCK_K": block, "BLOCK_D": BLOCK_D}
    return Share({**sizes, "REST": rest, "num_warps": _WARPS[block]}, {**sizes, "num_warps": CAREFUL_WARPS})


@functools.cache
def shares(k: int, small: bool) -> tuple[Share, ...]:
    """One launch for equal groups of k rows; for ragged ones, k = 0, one for the small, one for the large.

    `small`: there are at most 16 rows in all, so that no group is large.
    """
    if k:
        return (_share(1, LARGEST, max(16, power_of_2(k)), False),)
    return (_share(1, 16, 16, small),) + (() if small else (_share(17, LARGEST, 64, True),))


def signature(kernel: Any, x: str, k: int, ragged: bool, without: tuple[str, ...] = (), **options: Any) -> Signature:
    """The launch of one kernel on embeddings of Triton type x, normalised, with all tensors but those named."""
    share = shares(0 if ragged else k, False)[-1].direct
    pointers = {"x_ptr": x, "offsets_ptr": "*i64", "picks_ptr": "*i64", "grad_x_ptr": x, "kept_ptr": "*fp64"}
    scalars = {"ridge": "fp64", "G": "i64", "M": "i64"}
    constants = {"NORMALIZE": True, "WIDEN": False, **share}
    options = {"num_warps": constants.pop("num_warps"), **options}
    constants |= dict.fromkeys(without if ragged else (*without, "offsets_ptr"))
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name.endswith("_ptr"):
            types[name] = pointers.get(name, "*fp32")
        else:
            types[name] = scalars.get(name, "i32")
    return Signature(
        kernel,
        types,
        {n: v for n, v in constants.items() if n in kernel.arg_names},
        aligned=("d",),
        **options,
    )
