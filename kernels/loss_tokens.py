"""The GRPO family: a surrogate of importance ratios over sequences of tokens, with its coefficients, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import Signature
from ._launch import cdiv, processors
from ._loss import exponential, number, spans, total, uncovered
from ._loss_launch import LAUNCH, bits, block_of, flat, launch, scalar, tile

# Each is a function of its name below, which the kernel calls: the loss of a ratio rho = e^x, and its derivative by x.
SURROGATES = ("clip",)


@triton.jit
def _clip(x, rho, a, floor, ceiling):
    """-min(rho A, clip(rho) A)."""
    clipped = tl.where(a > 0, rho > ceiling, rho < floor) | (a == 0)
    bounded = tl.where(rho < floor, floor, tl.where(rho > ceiling, ceiling, rho))
    # The slope is 0 where clipped, and NaN for an advantage that is not finite, which no one has checked on a GPU.
    return -a * tl.where(clipped, bounded, rho), tl.where(clipped, a - a, -a * rho)


@triton.jit
def _k3(d):
    """e^d - d - 1, the estimate of a KL, and its derivative by d, e^d - 1."""
    # Below 1/2 both cancel: d^2 / 2 (1 + d/3 (1 + d/4 (...))), the first term left out under half a unit of rounding.
    last: tl.constexpr = 17 if d.dtype == tl.float64 else 10
    p = tl.full(d.shape, 1.0, d.dtype)
    for i in tl.static_range(last - 2):
        p = 1.0 + p * d * (1.0 / (last - i))
    near = 0.5 * d * d * p
    small = tl.abs(d) < 0.5
    slope = tl.where(small, d + near, exponential(d) - 1.0)
    # At infinity, infinity less infinity; the slope is infinite long before.
    return tl.where(small, near, slope - tl.minimum(d, 1e4)), slope


@triton.jit(do_not_specialize=["N", "S", "parts", "kl", "eps_low", "eps_high", "limit"])
def _token_loss_kernel(
    logps_ptr,
    old_ptr,
    ref_ptr,
    advantages_ptr,
    cu_ptr,
    coef_ptr,
    out_ptr,
    room_ptr,
    N: tl.int64,
    S: tl.int64,
    parts: tl.int64,
    kl: tl.int64,
    eps_low: tl.int64,
    eps_high: tl.int64,
    limit: tl.int64,
    SEQUENCE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SURROGATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = logps_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    s = (pid // parts) * ROWS + tl.arange(0, ROWS)
    low, size, wrong = spans(cu_ptr, s, S, N, 0)
    longest = tl.max(size, 0)
    column = tl.arange(0, COLUMNS)[None, :]
    a = tl.load(advantages_ptr + s, mask=s < S, other=0.0)[:, None]
    # Settings within the dtype's numbers: an infinite bound would leave an infinite ratio to an advantage of 0, and a
    # weight of 0 or infinity make NaN of an infinite penalty or of none.
    tiny: tl.constexpr = 5e-324 if dtype == tl.float64 else 1.4e-45
    huge: tl.constexpr = 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234e38
    floor = (1.0 - number(eps_low)).to(dtype)
    ceiling = tl.minimum(1.0 + number(eps_high), huge).to(dtype)
    # An empty sequence has no token to divide.
    length = tl.maximum(size, 1).to(tl.float64)
    share = tl.full((ROWS,), 1.0, tl.float64)
    if NORMALIZE == "sequence":
        share /= length * S
    elif NORMALIZE == "token":
        share /= N
    else:
        share /= number(limit) * S
    share += tl.where(wrong, float("nan"), 0.0)
    mean = tl.zeros((ROWS,), tl.float64)
    if SEQUENCE:
        for first in range(0, longest, COLUMNS):
            at = low[:, None] + first + column
            live = first + column < size[:, None]
            own = tl.load(logps_ptr + at, mask=live, other=0.0).to(tl.float64)
            mean += tl.sum(own - tl.load(old_ptr + at, mask=live, other=0.0).to(tl.float64), 1)
        mean /= length
    loss = tl.zeros((ROWS,), tl.float64)
    # Several programs may share a sequence, each with every parts-th block of it.
    for first in range((pid % parts) * COLUMNS, longest, parts * COLUMNS):
        at = low[:, None] + first + column
        live = first + column < size[:, None]
        own = tl.load(logps_ptr + at, mask=live, other=0.0)
        if SEQUENCE:
            x = mean.to(dtype)[:, None] + tl.zeros((ROWS, COLUMNS), dtype)
        else:
            x = own - tl.load(old_ptr + at, mask=live, other=0.0)
        rho = exponential(x)
        if SURROGATE == "clip":
            value, slope = _clip(x, rho, a, floor, ceiling)
        if ref_ptr is not None:
            d = tl.load(ref_ptr + at, mask=live, other=0.0) - own
            penalty, m = _k3(d)
            weight = tl.minimum(tl.maximum(number(kl), tiny), huge).to(dtype)
            value += weight * penalty
            slope -= weight * m
        loss += tl.sum(tl.where(live, value.to(tl.float64), 0.0), 1)
        tl.store(coef_ptr + at, (slope.to(tl.float64) * share[:, None]).to(dtype), mask=live)
    sums = tl.sum(loss * share, 0)
    if pid == 0:
        sums += uncovered(coef_ptr, cu_ptr, S, N, COLUMNS)
    total(sums, room_ptr, out_ptr)


def token_loss_fwd(
    token_logps, old_token_logps, advantages, cu_seqlens, *, ref_token_logps=None,
    kl=0.0, eps_low=0.2, eps_high=0.2, ratio="token", normalize="sequence", surrogate="clip",
) -> tuple[torch.Tensor, tuple[torch.Tensor]]:  # fmt: skip
    """Sum over tokens of norm_it (surrogate(rho, A) + kl (e^d - d - 1)), d = ref - l, and its derivative.

    Args:
        token_logps, old_token_logps: (N,) contiguous, float32 or float64.
        advantages: (S,), like them.
        cu_seqlens: (S + 1,) int32 or int64, from 0 to N; a sequence may be empty. A wrong one makes the loss and
            its own coefficients NaN.
        ref_token_logps: (N,), like them; None, or kl = 0, leaves the KL term out.
        kl, eps_low, eps_high: as in qempo_fast.grpo_loss.
        ratio: "token" or "sequence".
        normalize: "sequence", "token" or T_max.
        surrogate: one of SURROGATES.

    Returns:
        The loss, a scalar, and its derivative by token_logps, (N,).
    """
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate: wanted {' or '.join(map(repr, SURROGATES))}, got {surrogate!r}")
    n, count = token_logps.shape[0], cu_seqlens.shape[0] - 1
    if n == 0 or count == 0:
        return token_logps.new_zeros(()), (torch.full_like(token_logps, float("nan")),)
    coef, out = torch.empty_like(token_logps), scalar(token_logps)
    elements, warps = block_of(token_logps.device)
    rows, columns = tile(n, count, elements)
    programs = cdiv(count, rows)
    # The mean of a sequence is one program's work; else a few long sequences are cut until the machine is full.
    full = 4 * processors(token_logps.device) // programs
    parts = 1 if ratio == "sequence" else max(1, min(cdiv(n, count * columns), full))
    programs *= parts
    limit = 0.0 if isinstance(normalize, str) else normalize
    launch(
        _token_loss_kernel,
        programs,
        (
            token_logps,
            old_token_logps,
            flat(ref_token_logps) if kl else None,
            advantages,
            cu_seqlens,
        ),
        (coef, out),
        (n, count, parts, bits(kl), bits(eps_low), bits(eps_high), bits(limit)),
        (ratio == "sequence", "number" if limit else normalize, surrogate, rows, columns),
        warps,
    )
    return out, (coef,)


def _signature(
    real: str, cu: str, length: int, kl: bool, sequence: bool, normalize: str, surrogate: str = "clip"
) -> Signature:
    elements, warps = LAUNCH["cuda:90"]
    rows, columns = tile(2**20, 2**20 // length, elements)
    pointers = ["logps_ptr", "old_ptr", "advantages_ptr", "coef_ptr", "out_ptr", *(["ref_ptr"] if kl else [])]
    types = dict.fromkeys(pointers, real) | {"cu_ptr": cu, "room_ptr": "*i64"}
    types |= dict.fromkeys(("N", "S", "parts", "kl", "eps_low", "eps_high", "limit"), "i64")
    constants = {"SEQUENCE": sequence, "NORMALIZE": normalize, "SURROGATE": surrogate, "ROWS": rows, "COLUMNS": columns}
    constants |= {} if kl else {"ref_ptr": None}
    return Signature(_token_loss_kernel, types, constants, hot=True, num_warps=warps)


COMPILE = [
    _signature("*fp32", "*i32", 1024, True, False, "sequence"),
    _signature("*fp32", "*i64", 1024, False, False, "token"),
    _signature("*fp32", "*i64", 1024, False, True, "sequence"),
    _signature("*fp32", "*i64", 64, True, False, "number"),
    _signature("*fp64", "*i64", 1024, True, False, "number"),
]
