"""dlogps/dhidden in the forward, for a head that is not trained: the backward is then one multiplication a row.

The gradient of hidden's row i is g_i dlogps_i/dhidden_i, and all but the coefficient g_i is known once the row's logits
are. A block of rows at a time keeps all of its logits until then: 4NDV for a step, as plain torch, where logits that
are computed again in the backward make it 6NDV.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import stats as latest
from ._backward import exact_rows
from ._forward import forward as driver_forward
from ._head import HeadTensors, Logits, RowGrads
from ._options import Options, accumulator, logits_budget
from ._policy import even
from ._row_stats import RowStats
from ._tile_pass import TilePass

# A GEMM of more rows is no faster, and its logits take more memory.
ROWS = 1024
# float16 ends at 6e-8, and parts of a gradient that is scaled by its row's size lie under it; it begins at 65504.
HEADROOM = 256.0


class Slopes(NamedTuple):
    """dlogps_i/dhidden_i = size_i values_i; values (N, D), of which the largest parts are about a row of the weight."""

    values: torch.Tensor
    size: torch.Tensor

    def times(self, grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(N, D) in dtype. A row without a coefficient is 0 whatever it holds."""
        coefficient = (grad * self.size).unsqueeze(1)
        out = (self.values * coefficient).to(dtype)
        return out.masked_fill_((grad == 0).unsqueeze(1), 0.0)


def slopes_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the values: float16's own would lose the small ones of a softmax cap."""
    return torch.float32 if dtype == torch.float16 else dtype


def forward(tiles: TilePass, head: HeadTensors, options: Options) -> tuple[RowStats, Slopes]:
    """Row statistics, as _forward.forward gives them, and the slopes of every row."""
    (n, depth), (dtype, device) = head.hidden.shape, (head.hidden.dtype, head.hidden.device)
    acc, vocabulary = accumulator(dtype), len(head.weight)
    stats = RowStats.new(n, acc, device, options.entropy, options.sum_sq)
    kind = options.logits_dtype(head.hidden)
    budget = logits_budget(min(n, ROWS), head.weight, kind)
    rows = _block(n, budget // (vocabulary * kind.itemsize))
    values = torch.empty(n, depth, dtype=slopes_dtype(dtype), device=device)
    size = torch.empty(n, dtype=acc, device=device)
    for a in range(0, n, rows):
        b = min(a + rows, n)
        block, part, logits = head.rows(slice(a, b)), stats.rows(a, b), Logits(budget)
        driver_forward(tiles, block, options, 0, logits, part)
        lse = part.lse()
        size[a:b] = _sizes(block, part.logps(lse), options)
        grads = RowGrads(lse, 1 / size[a:b], None, None)
        dh, *_ = exact_rows(tiles, block, grads, options, logits)
        assert dh is not None
        values[a:b] = dh
    latest.record(tiles.name, n, vocabulary, options, rows, [], False, None)
    return stats, Slopes(values, size)


def _block(n: int, fit: int) -> int:
    """Rows of each block, about alike, at most ROWS and as many as fit; ROWS where that is few, and none are kept."""
    return even(n, ROWS if fit < max(1, min(n, 64)) else min(ROWS, fit), 1)


def _sizes(head: HeadTensors, logps: torch.Tensor, options: Options) -> torch.Tensor:
    """(N,) 1 - p of the target times what z is scaled by, at least an ulp: a sure row's slopes keep their digits."""
    size = torch.expm1(logps).neg_().clamp_(min=torch.finfo(logps.dtype).eps / 2) * options.logit_scale
    size = size if head.inv_temperature is None else size * head.inv_temperature
    return size / HEADROOM if head.hidden.dtype == torch.float16 else size
