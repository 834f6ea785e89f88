"""Log-determinants and leave-one-out gains of groups of embeddings under a DPP.

Derivations, conventions and accuracy: docs/dpp.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _backends, _check
from .._operator import apply_of, scalar
from ..reference.dpp import DppForward, DppFunction, DppGains
from . import op
from ._inputs import check_groups

_apply = apply_of(DppFunction)


def dpp_gains(
    embeddings: torch.Tensor,
    *,
    log_quality: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    ridge: float = 1.0,
    normalize: bool = True,
    backend: str | None = None,
) -> DppGains:
    """Diversity that each sample adds to its group: leave-one-out gains, their baselines, log-determinants.

        L = S X X^T S,   S = diag(exp(log_quality / 2)),   X the embeddings, rows scaled to length 1
        M = (L + ridge I)^-1,   logdet = log det(L + ridge I)
        gain_i = log det(L + ridge I) - log det(L_-i + ridge I) = -log M_ii
        baseline_i = mean_{j != i} -log(M_jj - M_ij^2 / M_ii), the mean gain of the others without i

    With unit rows and ridge = 1 each gain lies in [log(1 + 1/k), log 2].

    Args:
        embeddings: (G, k, d), or (M, d) with ``offsets``; float16, bfloat16, float32 or float64. A row of
            zeros counts as the zero vector: its gain is log ridge, its gradient exactly zero.
        log_quality: (G, k) or (M,), any float dtype; None is 0. Values of +-1000 neither overflow nor lose
            digits.
        offsets: (G+1,) int32 or int64, where each ragged group starts and the last ends.
        ridge: above 0; 1 in DQO.
        normalize: whether rows are scaled to length 1.
        backend: name of a backend instead of the default, see :func:`qempo_fast.backends`.

    Returns:
        ``DppGains(logdet, gains, baselines)``: logdet (G,), gains and baselines (G, k) or (M,); float32, or
        float64 for float64 embeddings. logdet and gains are differentiable (once) in embeddings and
        log_quality, baselines are not. A group of one has no others: its baseline is NaN.

    Raises:
        TypeError, ValueError: on wrong types, shapes or offsets, a ridge that is not above 0, an empty group;
            on NaN or infinite values on CPU (elsewhere with QEMPO_CHECK=1; without it that group alone
            becomes NaN).

    Gains: DQO (arXiv:2509.04784), training surrogate, ridge = 1. The one-factorisation form, the baselines
    and the gradients are derived (docs/dpp.md).
    """
    check_groups(embeddings, log_quality, offsets, ridge)
    _check.boolean("normalize", normalize)
    inputs = (embeddings, log_quality, offsets)
    if _check.traced(embeddings):
        name = _backends.choose("dpp", embeddings.device, backend)
        return DppGains(*op.run(*inputs, scalar(ridge), normalize, name))
    run = _backends.kernel("dpp", embeddings.device, backend)
    with _check.own_dtypes(embeddings.device.type):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            return DppGains(*_apply(_in_own_dtypes(run), *inputs, float(ridge), normalize))
        # An autograd function that nobody differentiates costs 10 microseconds.
        result = run(*inputs, float(ridge), normalize)
    return DppGains(result.logdet, result.gains, result.baselines)


def _in_own_dtypes(run: Callable[..., DppForward]) -> Callable[..., DppForward]:
    """Its backward pass too, whatever autocast that is run under: bfloat16's knows no torch.cat of float16."""

    def forward(x: torch.Tensor, *rest: Any) -> DppForward:
        result, kind = run(x, *rest), x.device.type

        def bwd(*given: Any) -> Any:
            with _check.own_dtypes(kind):
                return result.bwd(*given)

        return result._replace(bwd=bwd)

    return forward


def dpp_logdet(
    embeddings: torch.Tensor,
    *,
    log_quality: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    ridge: float = 1.0,
    normalize: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """Log-determinant diversity of each group, ``log det(S X X^T S + ridge I)``.

    Args:
        embeddings: (G, k, d), or (M, d) with ``offsets``; float16, bfloat16, float32 or float64.
        log_quality: (G, k) or (M,), S = diag(exp(log_quality / 2)); None is 0.
        offsets: (G+1,) int32 or int64, where each ragged group starts and the last ends.
        ridge: above 0.
        normalize: whether rows are scaled to length 1.
        backend: name of a backend instead of the default.

    Returns:
        (G,) float32, or float64 for float64 embeddings; differentiable (once) in embeddings and log_quality.

    Raises:
        TypeError, ValueError: as :func:`dpp_gains`.

    DQO (arXiv:2509.04784) with ridge = 1: the diversity term det(L + I). Gradients are derived (docs/dpp.md).
    """
    return dpp_gains(
        embeddings,
        log_quality=log_quality,
        offsets=offsets,
        ridge=ridge,
        normalize=normalize,
        backend=backend,
    ).logdet
