"""Greedy choice of a diverse subset of each group."""

from __future__ import annotations

import torch

from .. import _backends, _check
from .._operator import scalar
from . import op
from ._inputs import check_groups


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
    check_groups(embeddings, log_quality, offsets, ridge)
    _check.integer("n", n, low=1, high=embeddings.shape[1] if offsets is None else None)
    n = int(n)  # NumPy's are no indices in plain torch
    if _check.traced(embeddings):
        name = _backends.choose("dpp_select", embeddings.device, backend)
        return op.dpp_select(embeddings, n, log_quality, offsets, scalar(ridge), name)
    run = _backends.kernel("dpp_select", embeddings.device, backend)
    return op.select(run, embeddings, n, log_quality, offsets, float(ridge))
