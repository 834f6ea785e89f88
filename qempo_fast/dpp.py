"""Log-determinants, leave-one-out gains and greedy selection of groups of embeddings under a DPP.

Derivations, conventions and accuracy: docs/dpp.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _backends, _check, _dpp_cpu, _dpp_gpu, _dpp_op
from .reference import dpp as _reference
from .reference.dpp import DppGains

_dpp_gpu.register()
_backends.register("dpp", "cpu", _dpp_cpu.dpp_fwd)
_backends.register("dpp", "reference", _reference.dpp_fwd)
_backends.register("dpp_select", "cpu", _dpp_cpu.dpp_select)
_backends.register("dpp_select", "reference", _reference.dpp_select)


def _kernel(op: str, device: torch.device, backend: str | None) -> Callable[..., Any]:
    return _backends.default(op, device)[1] if backend is None else _backends.kernel(op, device, backend)


def _check_groups(embeddings: Any, log_quality: Any, offsets: Any, ridge: Any) -> None:
    _check.tensor("embeddings", embeddings)
    if embeddings.ndim != (3 if offsets is None else 2):
        wanted = "(groups, k, width), or (rows, width) with offsets"
        _check.bad_value(
            "embeddings",
            wanted,
            f"{tuple(embeddings.shape)} {'without' if offsets is None else 'with'} offsets",
        )
    if embeddings.shape[-1] < 1:
        _check.bad_value("embeddings", "a width of at least 1", tuple(embeddings.shape))
    if offsets is None and embeddings.shape[1] < 1:
        _check.bad_value("embeddings", "groups of at least one row", tuple(embeddings.shape))
    _check.positive("ridge", ridge)
    if log_quality is not None:
        _check.tensor("log_quality", log_quality, shape=embeddings.shape[:-1], device=embeddings.device)
    _dpp_op.check_values(embeddings, log_quality, offsets)


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

    ``L = S X X^T S`` with ``S = diag(exp(log_quality / 2))`` and X the embeddings, rows scaled to length 1;
    ``M = (L + ridge I)^-1``;
    ``logdet = log det(L + ridge I)``;
    ``gain_i = logdet(L + ridge I) - logdet(L_-i + ridge I) = -log M_ii``;
    ``baseline_i = mean_{j != i} -log(M_jj - M_ij^2 / M_ii)``, the mean gain of the others without i.
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
    _check_groups(embeddings, log_quality, offsets, ridge)
    if not isinstance(normalize, bool):
        _check.bad_type("normalize", "a bool", type(normalize).__name__)
    inputs = (embeddings, log_quality, offsets, float(ridge), normalize)
    if torch.compiler.is_compiling():
        return DppGains(*_dpp_op.dpp_fwd(*inputs, _backends.choose("dpp", embeddings.device, backend)))
    return DppGains(*_reference.DppFunction.apply(_kernel("dpp", embeddings.device, backend), *inputs))


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


def dpp_select(
    embeddings: torch.Tensor,
    n: int,
    *,
    log_quality: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    ridge: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Choose a diverse subset of n samples from each group, greedily.

    Step by step the sample of largest gain ``log det(L_(Y + i) + ridge I) - log det(L_Y + ridge I)`` joins
    the chosen set Y (greedy maximum a posteriori inference of the DPP), L as in :func:`dpp_gains`; gains
    within 1e-10 are a tie, which the lowest index wins.

    Args:
        embeddings: (G, k, d), or (M, d) with ``offsets``; float16, bfloat16, float32 or float64.
        n: how many, from 1 to the size of the smallest group.
        log_quality: (G, k) or (M,); None is 0.
        offsets: (G+1,) int32 or int64, where each ragged group starts and the last ends.
        ridge: above 0.
        backend: name of a backend instead of the default.

    Returns:
        (G, n) int64, positions within each group in the order of choice.

    Raises:
        TypeError, ValueError: as :func:`dpp_gains`, and for n outside its range.

    Fast greedy MAP inference by incremental Cholesky factorisation: arXiv:1709.05135, algorithm 1.
    """
    _check_groups(embeddings, log_quality, offsets, ridge)
    _check.integer("n", n, low=1, high=embeddings.shape[1] if offsets is None else None)
    if torch.compiler.is_compiling():
        name = _backends.choose("dpp_select", embeddings.device, backend)
        return _dpp_op.dpp_select(embeddings, n, log_quality, offsets, float(ridge), name)
    run = _kernel("dpp_select", embeddings.device, backend)
    return _dpp_op.select(run, embeddings, n, log_quality, offsets, float(ridge))
