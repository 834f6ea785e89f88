"""Whether stated probabilities match what happens."""

from __future__ import annotations

from typing import Any

import torch

from .. import _check
from . import _inputs


def _pair(probabilities: Any, outcomes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    p = _inputs.numbers("probabilities", probabilities)
    y = _inputs.numbers("outcomes", outcomes).to(p.device)
    _inputs.same_shape("outcomes", y, "probabilities", p)
    _inputs.within("probabilities", p, 0.0, 1.0)
    _inputs.zero_or_one("outcomes", y)
    return p.flatten(), y.flatten()


def brier(probabilities: Any, outcomes: Any) -> float:
    """Brier score of binary forecasts, ``(1/n) sum_i (p_i - y_i)^2``; 0 is best, 0.25 is p = 1/2 throughout.

    Args:
        probabilities: any shape, in [0, 1]; a tensor, an array or lists.
        outcomes: same shape, 0 or 1 (or booleans).

    Returns:
        The mean over all entries.

    Raises:
        TypeError, ValueError: unequal shapes, no entries, values outside these ranges.

    Brier (1950), in the form for two classes that counts one of them.
    """
    p, y = _pair(probabilities, outcomes)
    return float((p - y).square().mean())


def ece(probabilities: Any, outcomes: Any, *, bins: int = 15) -> float:
    """Expected calibration error, ``sum_m (|B_m| / n) |mean outcome of B_m - mean probability of B_m|``.

    B_m holds the entries with a probability in ((m - 1)/bins, m/bins], B_1 also those at 0. An edge is what the
    probabilities' dtype has for m/bins: 0.3 in a float32 tensor, which is 0.30000001, lies on the edge 3/10.

    Args:
        probabilities: confidences, any shape, in [0, 1]; a tensor, an array or lists.
        outcomes: same shape, 0 or 1 (or booleans): whether the answer given with this confidence was right.
        bins: how many bins of equal width.

    Returns:
        A number in [0, 1]; 0 is best.

    Raises:
        TypeError, ValueError: unequal shapes, no entries, values outside these ranges, bins below 1.

    Guo et al. (arXiv:1706.04599, equation 3), with 15 bins as there.
    """
    _check.integer("bins", bins, low=1)
    given = _inputs.read("probabilities", probabilities)
    p, y = _pair(given, outcomes)
    # Inner edges only, and p equal to an edge falls to the bin below it.
    edges = torch.arange(1, bins, dtype=torch.float64, device=p.device) / bins
    if given.is_floating_point():
        edges = edges.to(given.dtype).double()
    which = torch.bucketize(p, edges)
    gap = torch.zeros(bins, dtype=torch.float64, device=p.device).index_add_(0, which, y - p)
    return float(gap.abs().sum() / p.numel())
