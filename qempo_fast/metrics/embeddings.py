"""Diversity of a set of responses, measured on their embeddings."""

from __future__ import annotations

from typing import Any

import torch

from .. import _check
from . import _inputs


def _cosines(embeddings: Any) -> torch.Tensor:
    """(..., n, n) cosines; a zero row resembles itself alone."""
    if isinstance(embeddings, str) or (isinstance(embeddings, (list, tuple)) and str in map(type, embeddings)):
        _check.bad_type("embeddings", "one row of numbers for each response (embed first)", "texts")
    x = _inputs.numbers("embeddings", embeddings)
    if x.ndim < 2 or x.shape[-1] < 1 or x.shape[-2] < 1:
        _check.bad_value("embeddings", "shape (..., n, width) with n and width at least 1", tuple(x.shape))
    unit = torch.nn.functional.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny)
    cosines = unit @ unit.mT
    cosines.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return cosines


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
    return (1 - _cosines(embeddings)).mean((-2, -1))


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
    cosines = _cosines(embeddings)
    weights = torch.linalg.eigvalsh(cosines / cosines.shape[-1]).clamp(min=0.0)
    return torch.special.entr(weights).sum(-1).exp()
