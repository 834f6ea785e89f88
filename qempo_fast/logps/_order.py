"""Rows whose softmax is alike go into one chunk: together they keep fewer columns for the same error of the draw.

SmolLM2's head on text, 256 rows a chunk: f = .092 becomes .059 at an error of 2^-7 and .212 becomes .139 at 2^-9
(bench/studies/chunk_order.py, which has the other orders that were tried).
"""

from __future__ import annotations

import torch

from ._gemm import linear
from ._head import signs

# Random signs' products with hidden, which take its place: rows that are near each other stay so.
SKETCH = 64


def by_likeness(hidden: torch.Tensor, live: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """live, or all rows where it is None, so that chunks of so many have rows that are alike; as it is of one chunk.

    Halved at the median along the first principal direction of each part, down to chunks. Every part of a level at
    once, and nothing is read back: on a GPU each would be some launches, and a stall.
    """
    n = len(hidden) if live is None else len(live)
    halvings = (-(-n // rows) - 1).bit_length()
    if n <= rows:
        return live
    sketch = linear(hidden, signs(SKETCH, hidden))
    sketch = (sketch if live is None else sketch[live]).float()
    # Slots past the rows stay behind them at each level, so the chunks come out full but for the last.
    x = torch.nn.functional.pad(sketch.nan_to_num(0.0, 0.0, 0.0), (0, 0, 0, (rows << halvings) - n))
    order = torch.arange(len(x), device=x.device, dtype=torch.int64)
    for level in range(halvings):
        parts = 1 << level
        place = _along(x.view(parts, -1, SKETCH), (order < n).view(parts, -1)).argsort(dim=1, stable=True)
        place += torch.arange(0, len(x), len(x) // parts, device=x.device, dtype=torch.int64)[:, None]
        order, x = order[place.flatten()], x[place.flatten()]
    order = order[:n]
    return order if live is None else live[order]


def _along(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(parts, m) where each row of x (parts, m, d) lies along its part's first principal direction; inf if not real."""
    there = real.unsqueeze(2).to(x.dtype)
    x = (x - (x * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_(min=1.0)) * there
    power = x.mT @ x
    for _ in range(2):
        power = power / power.abs().amax((1, 2), keepdim=True).clamp_(min=1e-30)
        power = power @ power
        power = power @ power
    # Of its 16th power every row is nearly a multiple of the direction; that of the largest diagonal is not rounding.
    best = power.diagonal(dim1=1, dim2=2).argmax(1)
    direction = power.gather(1, best.view(-1, 1, 1).expand(-1, 1, power.shape[2]))
    return (x @ direction.mT).squeeze(2).nan_to_num_(0.0).masked_fill_(~real, torch.inf)
