"""What the best of k samples reaches, estimated from n >= k."""

from __future__ import annotations

from typing import Any

import torch

from .. import _check
from . import _inputs


def _counts(name: str, x: Any) -> torch.Tensor:
    x = _inputs.numbers(name, x)
    if bool((x != x.round()).any()):
        _check.bad_value(name, "whole numbers", x[x != x.round()].flatten()[0].item())
    return x


def pass_at_k(n: Any, c: Any, k: int) -> torch.Tensor:
    """Unbiased estimate of the probability that one of k samples is right, ``1 - C(n - c, k) / C(n, k)``.

    Args:
        n: samples drawn for each problem; a whole number, or a tensor, an array or lists of them, of any shape.
        c: how many of them were right, 0 to n; a whole number, or the same of n's shape.
        k: from 1 to the smallest n.

    Returns:
        float64 in the shape of n and c, one value for each problem; ``.mean()`` is the benchmark's.

    Raises:
        TypeError, ValueError: not whole numbers, two shapes that differ, c outside [0, n], k outside [1, n].

    Chen et al. (arXiv:2107.03374, equation 1).
    """
    samples, right = _counts("n", n), _counts("c", c)
    _check.integer("k", k, low=1)
    # Not by broadcasting: n (P, 1) and c (P,) would be P x P problems.
    if samples.ndim and right.ndim and samples.shape != right.shape:
        _check.bad_value("c", f"shape {tuple(samples.shape)} as n", tuple(right.shape))
    samples, right = torch.broadcast_tensors(samples, right.to(samples.device))
    if bool((samples < k).any()):
        _check.bad_value("k", f"at most the smallest n, {int(samples.min())}", k)
    if bool(((right < 0) | (right > samples)).any()):
        _check.bad_value("c", "values from 0 to n", right[(right < 0) | (right > samples)].flatten()[0].item())
    # C(n - c, k) / C(n, k) as a product of k ratios: exact 0 where fewer than k are wrong, and no factorials.
    step = torch.arange(k, dtype=torch.float64, device=samples.device)
    wrong = (samples - right)[..., None] - step
    return 1 - (wrong.clamp(min=0.0) / (samples[..., None] - step)).prod(-1)


def max_at_k(rewards: Any, k: int) -> torch.Tensor:
    """Unbiased estimate of the expected best reward of k samples, the mean of the maximum over all k-subsets.

    ``sum_j C(j - 1, k - 1) / C(n, k) r_(j)`` with rewards in ascending order. On rewards 0 and 1 it is
    :func:`pass_at_k`; at k = 1 the mean, at k = n the maximum.

    Args:
        rewards: (n,), or (..., n) for many problems; any real dtype.
        k: from 1 to n.

    Returns:
        float64 of shape (...): a scalar for (n,).

    Raises:
        TypeError, ValueError: not numbers, NaN or infinite values, no rewards, k outside [1, n].

    The set-level estimator of PKPO (arXiv:2505.15201); the same quantity as Max@k of RSPO (arXiv:2508.01174).
    """
    r = _inputs.numbers("rewards", rewards)
    if r.ndim < 1 or r.shape[-1] < 1:
        _check.bad_value("rewards", "shape (..., n) with n at least 1", tuple(r.shape))
    n = r.shape[-1]
    _check.integer("k", k, low=1, high=n)
    # From the largest down: k/n, then each weight is (j - k + 1)/j of the one above it; no binomial
    # overflows.
    j = torch.arange(n - 1, 0, -1, dtype=torch.float64, device=r.device)
    factors = torch.cat([j.new_full((1,), k / n), (j - k + 1).clamp(min=0.0) / j])
    return (r.sort(-1, descending=True).values * factors.cumprod(0)).sum(-1)
