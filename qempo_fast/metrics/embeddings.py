"""Diversity of a set of responses, measured on their embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import _check
from . import _inputs


def _unit_rows(embeddings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., n, width) rows of length 1 or 0, and how many are 0: a zero row resembles itself alone."""
    if isinstance(embeddings, str) or (isinstance(embeddings, (list, tuple)) and str in map(type, embeddings)):
        _check.bad_type("embeddings", "one row of numbers for each response (embed first)", "texts")
    x = _inputs.numbers("embeddings", embeddings)
    if x.ndim < 2 or x.shape[-1] < 1 or x.shape[-2] < 1:
        _check.bad_value("embeddings", "shape (..., n, width) with n and width at least 1", tuple(x.shape))
    # By its largest entry first: the squares of 1e200 and of 1e-200 leave float64.
    largest = x.abs().amax(-1, keepdim=True)
    zero = largest == 0
    x = torch.where(zero, 0.0, x / torch.where(zero, 1.0, largest))
    return torch.nn.functional.normalize(x, dim=-1, eps=1.0), zero.sum((-2, -1), dtype=x.dtype)


def embedding_cosine(embeddings: Any) -> torch.Tensor:
    """Mean pairwise cosine distance, ``(1/n^2) sum_ij (1 - cos(x_i, x_j))``, the n pairs i = j included.

    Args:
        embeddings: (n, d), or (..., n, d) for many sets; any real dtype.

    Returns:
        float64 of shape (...): a scalar for (n, d). 0 where all rows point the same way, 1 - 1/n where they
        are orthogonal. A zero row has cosine 0 with the others.

    Raises:
        TypeError, ValueError: not numbers, fewer than 2 dimensions, an empty set, NaN or infinite values.

    The diversity measure of SPL (arXiv:2511.08594), with n = 16 there.
    """
    x, zeros = _unit_rows(embeddings)
    n = x.shape[-2]
    # The m rows that are not zero: n^2 pairs would need n^2 numbers, and 1 - cos loses what is below 1e-16.
    m = n - zeros
    centre = x.sum(-2, keepdim=True) / m.clamp(min=1)[..., None, None]
    spread = (x - centre).square().sum(-1) * (x != 0).any(-1)
    return (m * spread.sum(-1) + (n * n - m * m - zeros)) / (n * n)


def vendi(embeddings: Any) -> torch.Tensor:
    """Vendi score, the effective number of different responses, ``exp(-sum_i w_i log w_i)``.

    w are the eigenvalues of K / n, K_ij = cos(x_i, x_j).

    Args:
        embeddings: (n, d), or (..., n, d) for many sets; any real dtype.

    Returns:
        float64 of shape (...): 1 where all rows point the same way, n where they are orthogonal.

    Raises:
        TypeError, ValueError: not numbers, fewer than 2 dimensions, an empty set, NaN or infinite values.

    Friedman and Dieng (arXiv:2210.02410), order q = 1, with the cosine kernel.
    """
    x, zeros = _unit_rows(embeddings)
    n, width = x.shape[-2:]
    # X X^T and X^T X share the eigenvalues that are not 0: the smaller is taken, without the zero rows in either.
    gram = x @ x.mT if n <= width else x.mT @ x
    weights = torch.linalg.eigvalsh(gram / n).clamp(min=0.0)
    return (torch.special.entr(weights).sum(-1) + zeros * (math.log(n) / n)).exp()
