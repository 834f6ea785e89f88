"""Determinantal point process (DPP) quantities of groups of embeddings, in plain torch.

The definition that every DPP kernel is tested against. Rows are normalised, multiplied and factorised in
float64 whatever the dtype of the embeddings. Derivations and the accuracy reached: docs/dpp.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .once import once, single

# Elements of embeddings turned into float64 at a time (8 MiB), so that no second copy of all of them exists.
_CHUNK = 2**20
# Largest max_i s_i^2 / ridge at which A is factorised directly: rounding of the Gram matrix then moves a gain
# by 1e-11 at most.
_DIRECT = 1e4
# Gains of dpp_select closer than this are a tie: rounding must not decide between equal rows.
_TIE = 1e-10


class DppGains(NamedTuple):
    """Log-determinant, leave-one-out gains and their leave-one-out baselines of each group."""

    logdet: torch.Tensor
    gains: torch.Tensor
    baselines: torch.Tensor


class Inputs(NamedTuple):
    """Embeddings of equal groups (G, k, d), or (M, d) with offsets (G + 1,); log_quality (G, k) or (M,)."""

    x: torch.Tensor
    log_quality: torch.Tensor | None
    offsets: torch.Tensor | None


Grads = tuple[torch.Tensor | None, torch.Tensor | None]


class DppForward(NamedTuple):
    """What a DPP kernel hands to autograd: results, tensors to keep, the backward pass that takes them.

    bwd takes the gradients of logdet and gains, either may be None for zero, and gives those of x and log_quality.
    """

    logdet: torch.Tensor
    gains: torch.Tensor
    baselines: torch.Tensor
    saved: tuple[torch.Tensor, ...]
    bwd: Callable[[Grads, Inputs, Sequence[torch.Tensor], float, bool], Grads]


class _Factor(NamedTuple):
    """A = D^-1 (L + ridge I) D^-1, D = diag(max(1, s)), T = D^-1 S, by A^-1 = V V^T and V^T T X = Z X."""

    log_d: torch.Tensor  # (G, k)
    t: torch.Tensor  # (G, k)
    v: torch.Tensor  # (G, k, k), rows in the order of the samples
    z: torch.Tensor  # (G, k, k), columns in the order of the samples
    logdet: torch.Tensor  # (G,), of A


def _unit_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in float64 scaled to length 1 and their lengths; a zero row stays zero."""
    x = x.double()
    # Divide by the largest entry first: squares of 1e-200 or 1e200 leave the range.
    top = x.abs().amax(-1, keepdim=True)
    x = x / torch.where(top > 0, top, 1.0)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1.0), (top * length).squeeze(-1)


def _chunks(x: torch.Tensor) -> int:
    return max(1, _CHUNK // max(1, x.shape[1] * x.shape[2]))


def _gram(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines (G, k, k) and lengths (G, k) of rows x (G, k, d), in float64."""
    grams, lengths = [], []
    for part in x.split(_chunks(x)):
        unit, length = _unit_rows(part)
        grams.append(unit @ unit.mT)
        lengths.append(length)
    gram, length = torch.cat(grams), torch.cat(lengths)
    # Exactly 1, or 0 for a zero row; a NaN row stays NaN.
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(torch.where(length > 0, 1.0, torch.where(length == 0, 0.0, torch.nan)))
    return gram, length


def _log_scale(length: torch.Tensor, log_quality: torch.Tensor | None, normalize: bool) -> torch.Tensor:
    """log s_i with L_ij = s_i s_j cos_ij; minus infinity for a zero row."""
    log_s = torch.zeros_like(length) if log_quality is None else log_quality.double() / 2
    if not normalize:
        log_s = log_s + length.log()
    return torch.where(length == 0, -torch.inf, log_s)


def _floor(gram: torch.Tensor) -> float:
    """Squared sine (and weight) that rounding of the Gram matrix leaves between dependent rows."""
    return 8 * gram.shape[-1] * torch.finfo(gram.dtype).eps


def _direct(gram: torch.Tensor, log_d: torch.Tensor, t: torch.Tensor, ridge: float) -> _Factor:
    """Cholesky factorisation of A."""
    a = t[..., :, None] * gram * t[..., None, :] + torch.diag_embed(ridge * torch.exp(-2 * log_d))
    lower = torch.linalg.cholesky_ex(a).L
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    logdet = 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return _Factor(log_d, t, inverse.mT, inverse * t[..., None, :], logdet)


def _pivoted(gram: torch.Tensor, log_s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order of elimination (G, k), largest s^2 v first, and F (G, k, k) with gram = F F^T in that order.

    v is the squared sine between a row and those before it. Rows with v below the rounding of gram depend on
    the others: they come last, with zero columns in the triangular F.
    """
    groups, k, _ = gram.shape
    floor = _floor(gram)
    rest, left = gram.clone(), torch.ones(groups, k, dtype=torch.bool, device=gram.device)
    factor, order = torch.zeros_like(gram), torch.empty(groups, k, dtype=torch.int64, device=gram.device)
    each = torch.arange(groups, device=gram.device, dtype=torch.int64)
    for step in range(k):
        v = rest.diagonal(dim1=-2, dim2=-1)
        # NaN is not below the floor, so that it spreads to the results.
        live = left & ~(v <= floor)
        score = torch.where(live, 2 * log_s + v.clamp(min=floor).log(), -torch.inf)
        some = live.any(-1)
        pivot = torch.where(some, score.argmax(-1), left.to(torch.int8).argmax(-1))
        order[:, step] = pivot
        root = v[each, pivot].clamp(min=floor).sqrt()
        column = torch.where(left & some[:, None], rest[each, :, pivot] / root[:, None], 0.0)
        factor[..., step] = column
        rest = rest - column[:, :, None] * column[:, None, :]
        left[each, pivot] = False
    return order, factor.gather(1, order[..., None].expand_as(factor))


def _square_root(
    gram: torch.Tensor, log_s: torch.Tensor, log_d: torch.Tensor, t: torch.Tensor, ridge: float
) -> _Factor:
    """QR of B^T with A = B B^T, B = [T F, sqrt(ridge) D^-1]: A itself would round D^-2 = e^-1000 away."""
    k = gram.shape[-1]
    order, factor = _pivoted(gram, log_s)
    eye = torch.eye(k, dtype=gram.dtype, device=gram.device)
    log_s, log_d_p, t_p = (a.gather(1, order) for a in (log_s, log_d, t))
    root = factor.diagonal(dim1=-2, dim2=-1)
    independent = ~(root == 0)[..., None]
    # Rows with s^2 v > ridge are taken out of the others by hand, weights W = F_other F_heavy^-1 in the
    # embeddings' space: what is left of an equal row is then exactly its ridge, e^-1000 of the row, and not
    # rounding.
    heavy = (independent.squeeze(-1) & (2 * (log_s + root.log()) > math.log(ridge)))[:, None, :]
    square = torch.where(heavy.mT, factor, eye)
    weights = torch.linalg.solve_triangular(
        square, torch.where(heavy & ~heavy.mT, factor, 0.0), upper=False, left=False
    )
    weights = torch.where((heavy & ~heavy.mT) & ~(weights.abs() <= _floor(gram)), weights, 0.0)
    left = torch.where(heavy & ~heavy.mT, 0.0, factor)
    ratio = torch.where(weights == 0, 0.0, torch.exp(log_s[..., :, None] - log_s[..., None, :]))
    ridges = math.sqrt(ridge) * torch.exp(-log_d_p)[..., None] * (eye - weights * ratio)
    q, r = torch.linalg.qr(torch.cat([t_p[..., None] * left, ridges], -1).mT)
    v = torch.linalg.solve_triangular(r, eye.expand_as(r), upper=True)
    v = v - (weights * t_p[..., :, None] / torch.where(heavy, t_p[..., None, :], 1.0)).mT @ v
    # V^T T F = Q_F^T, so Z = Q_F^T F_P^-1 on the independent rows P and 0 on the others: no entry exceeds the
    # range.
    square = torch.where(independent, factor, eye)
    z = torch.linalg.solve_triangular(square, torch.where(independent, q[:, :k], 0.0).mT, upper=False, left=False)
    back = order.argsort(-1)[..., None].expand_as(v)
    logdet = 2 * r.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    return _Factor(log_d, t, v.gather(1, back), z.mT.gather(1, back).mT, logdet)


def _factorise(gram: torch.Tensor, log_s: torch.Tensor, ridge: float) -> _Factor:
    log_d = log_s.clamp(min=0.0)
    t = torch.exp(log_s - log_d)
    if log_s.numel() == 0 or float(2 * log_s.max()) <= math.log(_DIRECT * ridge):
        return _direct(gram, log_d, t, ridge)
    return _square_root(gram, log_s, log_d, t, ridge)


def _unit_inverse_rows(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of V scaled to length 1 and the logarithms of their lengths; the lengths reach e^500."""
    top = v.abs().amax(-1, keepdim=True)
    length = torch.linalg.vector_norm(v / top, dim=-1, keepdim=True)
    return v / top / length, (top.log() + length.log()).squeeze(-1)


def _baselines(gains: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """mean_{j != i} of g_j - log(1 - P_ij^2), P_ij = M_ij / sqrt(M_ii M_jj) = u_i . u_j; NaN where k = 1."""
    k = gains.shape[-1]
    p = u @ u.mT
    # 1 - |p| = |u_i -+ u_j|^2 / 2 keeps its digits near 0, as the rows of two equal samples of high quality
    # need.
    sign = torch.where(p < 0, -1.0, 1.0)
    distance = torch.zeros_like(p)
    for column in u.unbind(-1):
        distance = torch.hypot(distance, column[:, :, None] - sign * column[:, None, :])
    log_rest = 2 * distance.log() - math.log(2) + torch.log1p(p.abs())
    without = gains[:, None, :] - log_rest
    same = torch.eye(k, dtype=torch.bool, device=u.device)
    return torch.where(same, 0.0, without).sum(-1) / (k - 1 if k > 1 else math.nan)


def _fwd(x: torch.Tensor, log_quality: torch.Tensor | None, ridge: float, normalize: bool) -> tuple[torch.Tensor, ...]:
    """logdet, gains, baselines, and t, V, Z to keep, of equal groups x (G, k, d)."""
    gram, length = _gram(x)
    factor = _factorise(gram, _log_scale(length, log_quality, normalize), ridge)
    u, log_length = _unit_inverse_rows(factor.v)
    logdet = 2 * factor.log_d.sum(-1) + factor.logdet
    gains = 2 * (factor.log_d - log_length)
    return logdet, gains, _baselines(gains, u), factor.t, factor.v, factor.z


def _bwd(
    grad_logdet: torch.Tensor | None,
    grad_gains: torch.Tensor | None,
    x: torch.Tensor,
    kept: Sequence[torch.Tensor],
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients with respect to x (G, k, d) and log_quality (G, k)."""
    t, v, z = kept
    inner = torch.zeros_like(z)
    if grad_gains is not None:
        u, _ = _unit_inverse_rows(v)
        inner = (u.mT @ (grad_gains.double()[..., None] * u)) @ z
    if grad_logdet is not None:
        inner = inner + grad_logdet.double()[:, None, None] * z
    w = 2 * t[..., None] * (v @ inner)
    grads, qualities = [], []
    step = _chunks(x)
    for part, w_part in zip(x.split(step), w.split(step), strict=True):
        unit, length = _unit_rows(part)
        grad = w_part @ unit
        radial = (grad * unit).sum(-1, keepdim=True)
        if normalize:
            grad = grad - radial * unit
        length = length[..., None]
        # A zero row is the zero vector whatever its neighbourhood: gradient exactly 0.
        grads.append(torch.where(length == 0, 0.0, grad / torch.where(length == 0, 1.0, length)).to(x.dtype))
        qualities.append(radial.squeeze(-1) / 2)
    return torch.cat(grads), torch.cat(qualities)


def _buckets(offsets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Groups of each size and their rows (groups, k)."""
    offsets = offsets.long()
    sizes = offsets.diff()
    for k in sizes.unique().tolist():
        if k > 0:
            groups = (sizes == k).nonzero().squeeze(-1)
            yield groups, offsets[groups, None] + torch.arange(k, device=offsets.device, dtype=torch.int64)


def dpp_fwd(
    x: torch.Tensor,
    log_quality: torch.Tensor | None,
    offsets: torch.Tensor | None,
    ridge: float,
    normalize: bool,
) -> DppForward:
    """Forward pass in plain torch of equal groups (G, k, d), or of (M, d) with offsets (G+1,)."""
    out = torch.float64 if x.dtype == torch.float64 else torch.float32
    if offsets is None:
        logdet, gains, baselines, *kept = _fwd(x, log_quality, ridge, normalize)
        return DppForward(logdet.to(out), gains.to(out), baselines.to(out), tuple(kept), dpp_bwd)
    logdet = x.new_zeros(offsets.numel() - 1, dtype=out)
    gains, baselines = x.new_zeros(x.shape[0], dtype=out), x.new_zeros(x.shape[0], dtype=out)
    saved: list[torch.Tensor] = []
    for groups, rows in _buckets(offsets):
        part = _fwd(x[rows], None if log_quality is None else log_quality[rows], ridge, normalize)
        logdet[groups], gains[rows], baselines[rows] = (p.to(out) for p in part[:3])
        saved += [rows, groups, *part[3:]]
    return DppForward(logdet, gains, baselines, tuple(saved), dpp_bwd)


def dpp_bwd(grads: Grads, inputs: Inputs, saved: Sequence[torch.Tensor], ridge: float, normalize: bool) -> Grads:
    """Gradients by x and log_quality from those of logdet and gains and what dpp_fwd kept; None comes in for zero."""
    (grad_logdet, grad_gains), (x, log_quality, offsets) = grads, inputs
    dtype = None if log_quality is None else log_quality.dtype
    if offsets is None:
        grad, quality = _bwd(grad_logdet, grad_gains, x, saved, normalize)
        return grad, None if dtype is None else quality.to(dtype)
    grad, quality = torch.zeros_like(x), x.new_zeros(x.shape[0], dtype=dtype or x.dtype)
    for i in range(0, len(saved), 5):
        rows, groups, *kept = saved[i : i + 5]
        of_logdet = None if grad_logdet is None else grad_logdet[groups]
        of_gains = None if grad_gains is None else grad_gains[rows]
        grad[rows], part = _bwd(of_logdet, of_gains, x[rows], kept, normalize)
        quality[rows] = part.to(quality.dtype)
    return grad, None if dtype is None else quality


class DppFunction(torch.autograd.Function):
    """A kernel's forward and backward pass; log-determinants and gains come from one pass each way."""

    @staticmethod
    def forward(ctx: Any, fwd: Any, x: Any, log_quality: Any, offsets: Any, ridge: float, normalize: bool) -> Any:
        result = fwd(x, log_quality, offsets, ridge, normalize)
        ctx.save_for_backward(x, log_quality, offsets, *result.saved)
        ctx.bwd, ctx.settings = result.bwd, (ridge, normalize)
        ctx.mark_non_differentiable(result.baselines)
        # An output that no loss used has the gradient None, and no launch fills zeros for it.
        ctx.set_materialize_grads(False)
        return result.logdet, result.gains, result.baselines

    @staticmethod
    def backward(ctx: Any, grad_logdet: Any, grad_gains: Any, _: Any) -> Any:
        if grad_logdet is None and grad_gains is None:
            return (None,) * 6
        single(grad_logdet, grad_gains)
        # A graph of the gradients is asked for by create_graph alone; no_grad and the marks cost 4 microseconds.
        if not torch.is_grad_enabled():
            return None, *_needed(ctx, grad_logdet, grad_gains), None, None, None
        with torch.no_grad():
            grads = _needed(ctx, grad_logdet, grad_gains)
        inputs = (grad_logdet, grad_gains, *ctx.saved_tensors[:2])
        return None, *once("dpp_gains", grads, inputs), None, None, None


def _needed(ctx: Any, grad_logdet: Any, grad_gains: Any) -> Grads:
    x, log_quality, offsets, *saved = ctx.saved_tensors
    inputs = Inputs(x, log_quality, offsets)
    grad_x, grad_quality = ctx.bwd((grad_logdet, grad_gains), inputs, saved, *ctx.settings)
    _, need_x, need_quality, *_ = ctx.needs_input_grad
    return grad_x if need_x else None, grad_quality if need_quality else None


def dpp_gains(
    embeddings: torch.Tensor,
    *,
    log_quality: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    ridge: float = 1.0,
    normalize: bool = True,
) -> DppGains:
    """Definition of :func:`qempo_fast.dpp_gains`, without checks."""
    return DppGains(*DppFunction.apply(dpp_fwd, embeddings, log_quality, offsets, ridge, normalize))


def dpp_logdet(
    embeddings: torch.Tensor,
    *,
    log_quality: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    ridge: float = 1.0,
    normalize: bool = True,
) -> torch.Tensor:
    """Definition of :func:`qempo_fast.dpp_logdet`, without checks."""
    return dpp_gains(embeddings, log_quality=log_quality, offsets=offsets, ridge=ridge, normalize=normalize).logdet


def _select(x: torch.Tensor, n: int, log_quality: torch.Tensor | None, ridge: float) -> torch.Tensor:
    """Greedy choice of n rows from each of equal groups x (G, k, d)."""
    rest, length = _gram(x)
    log_s = _log_scale(length, log_quality, True)
    groups, k, _ = rest.shape
    floor = _floor(rest)
    log_ridge = torch.tensor(math.log(ridge), dtype=rest.dtype, device=x.device)
    each, picks = (
        torch.arange(groups, device=x.device, dtype=torch.int64),
        torch.empty(groups, n, dtype=torch.int64, device=x.device),
    )
    taken = torch.zeros(groups, k, dtype=torch.bool, device=x.device)
    for step in range(n):
        v = rest.diagonal(dim1=-2, dim2=-1)
        signal = torch.where(v <= floor, -torch.inf, 2 * log_s + v.clamp(min=floor).log())
        gain = torch.where(taken, -torch.inf, torch.logaddexp(log_ridge, signal))
        best = gain.amax(-1, keepdim=True)
        pick = (gain >= best - _TIE).to(torch.int8).argmax(-1)
        picks[:, step] = pick
        taken[each, pick] = True
        # Cholesky step of L + ridge I in units of s: c_ij -= c_ip c_pj s_p^2 / (ridge + s_p^2 v_p), below 1 /
        # v_p. Not exp(2 log s - gain): rounding of a gain near 500 would leave a repetition 1e-13 of itself.
        weight = 1 / (v[each, pick] + torch.exp(log_ridge - 2 * log_s[each, pick]))
        weight = torch.where(v[each, pick] <= floor, 0.0, weight)
        column = rest[each, :, pick]
        rest = rest - weight[:, None, None] * column[:, :, None] * column[:, None, :]
    # Values that were not checked: no position, rather than a wrong one.
    broken = ~(length.isfinite() & (log_s < torch.inf)).all(-1, keepdim=True)
    return picks.masked_fill_(broken | (n > k), -1)


def dpp_select(
    embeddings: torch.Tensor,
    n: int,
    *,
    log_quality: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    ridge: float = 1.0,
) -> torch.Tensor:
    """Definition of :func:`qempo_fast.dpp_select`, without checks."""
    if offsets is None:
        return _select(embeddings.detach(), n, log_quality, ridge)
    picks = torch.empty(offsets.numel() - 1, n, dtype=torch.int64, device=embeddings.device)
    for groups, rows in _buckets(offsets):
        picks[groups] = _select(embeddings.detach()[rows], n, None if log_quality is None else log_quality[rows], ridge)
    return picks
