"""The row and column pass over a tile of logits in torch ops: any device, several launches a tile."""

from __future__ import annotations

import torch

from ._head import Draw, RowGrads, Tile, finished
from ._options import Options, TileSizes
from ._ragged import RaggedPass
from ._row_stats import LOWEST, RowStats
from ._tile_pass import TilePass

_Optional = torch.Tensor | None


def _weighted(e: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """e * x where e = exp(...) may be 0 at x = -inf."""
    return e * x.clamp_min(torch.finfo(x.dtype).min)


class TorchPass(TilePass):
    """Same contract as CpuPass; one row of logits after another in torch ops."""

    name = "reference"

    def sizes(
        self, sampled: bool, hidden: torch.Tensor | None = None, wide: bool = False, fixed: bool = False
    ) -> TileSizes:
        return TileSizes(512, 8192) if sampled else TileSizes(2048, 16384)

    def new_columns(self, vocabulary: int, like: RowStats) -> torch.Tensor:
        return like.max.new_full((vocabulary,), -torch.inf)

    def forward(
        self, tile: Tile, stats: RowStats, floor: _Optional, columns: _Optional, v0: int, options: Options
    ) -> None:
        z, bias, inv_temperature, targets = tile
        x = finished(z, bias, inv_temperature, options)
        top = torch.maximum(stats.max, x.amax(-1))
        # Rows without a logit above -inf so far; one of NaN is none of them.
        seen, before = top != -torch.inf, stats.max != -torch.inf
        shift = torch.where(before, (stats.max - top).clamp_min(LOWEST), 0.0)
        k = torch.where(before, (stats.max - top).exp(), 0.0)
        d = torch.where(seen.unsqueeze(-1), x - top.unsqueeze(-1), -torch.inf)
        e = d.exp()
        if stats.sum_z is not None:
            stats.sum_z.copy_(k * (stats.sum_z + stats.sum * shift) + _weighted(e, d).sum(-1))
        if stats.sum_sq is not None:
            stats.sum_sq.copy_(k * k * stats.sum_sq + (e * e).sum(-1))
        stats.sum.copy_(k * stats.sum + e.sum(-1))
        stats.max.copy_(top)
        here = (targets >= v0) & (targets < v0 + x.shape[1])
        mine = x.gather(1, (targets - v0).clamp(0, x.shape[1] - 1).unsqueeze(1)).squeeze(1)
        stats.target.copy_(torch.where(here, mine, stats.target))
        if columns is not None:
            first, second = stats.lse().unbind(1)
            if floor is not None:
                above = floor - first > second
                first, second = torch.where(above, floor, first), torch.where(above, 0.0, second)
            part = columns[v0 : v0 + x.shape[1]]
            torch.maximum(part, (x - first.unsqueeze(-1) - second.unsqueeze(-1)).amax(0), out=part)

    def backward(self, tile: Tile, grads: RowGrads, inverse: _Optional, row_sum: _Optional, options: Options) -> None:
        z, bias, inv_temperature, target = tile
        if inverse is not None:
            z = z[:, : len(inverse)]  # what is behind has a gradient of 0 already
        lse, grad, grad_entropy, entropy = grads.lse, grads.grad, grads.grad_entropy, grads.entropy
        x = finished(z, bias, inv_temperature, options)
        raw = z.to(x.dtype) if bias is None else z.to(x.dtype) + bias
        lp = x - lse[:, :1] - lse[:, 1:]
        p = lp.exp()
        d = -grad.unsqueeze(-1) * p
        here = (target >= 0) & (target < x.shape[1])
        at = target.clamp(0, x.shape[1] - 1).unsqueeze(1)
        lp_t = lp.gather(1, at).squeeze(1)
        d_t = -grad * torch.expm1(lp_t)
        if grad_entropy is not None:
            assert entropy is not None
            d = d - grad_entropy.unsqueeze(-1) * _weighted(p, lp + entropy.unsqueeze(-1))
            d_t = d_t - grad_entropy * _weighted(lp_t.exp(), lp_t + entropy)
        if inverse is not None:
            d = d * inverse
        d.scatter_(1, at, torch.where(here, d_t, d.gather(1, at).squeeze(1)).unsqueeze(1))
        if options.softcap is not None:
            # Not back from x: its rounding times a scale of 1e30 was a gradient of 1e22 where a saturated cap has 0.
            tanh = torch.tanh(raw * options.logit_scale / options.softcap)
            d = d * (1 - tanh * tanh)
        d = d * options.logit_scale
        z.copy_(d if inv_temperature is None else d * inv_temperature.unsqueeze(-1))
        if row_sum is not None:
            torch.sum(z, 1, dtype=row_sum.dtype, out=row_sum)

    def select(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor, float]:
        columns, forced, tau, mean_entropy, seed, rows, first_column = draw
        u = columns.exp()
        if mean_entropy is not None:
            u = u.clamp(max=1.0)
            u = u * (1 - torch.log(u.clamp_min(1e-300 if u.dtype == torch.float64 else 1e-38)) + mean_entropy)
        q = torch.where(forced[0].bool() | ~(u < tau), 1.0, u / tau)
        generator = torch.Generator(columns.device).manual_seed(hash((seed, rows.start, first_column)) % 2**63)
        uniform = torch.rand(q.shape, generator=generator, device=q.device, dtype=torch.float64)
        kept = ((q >= 1) | (uniform < q)).nonzero().squeeze(1)
        # A NaN keeps all of the chunk's columns, as its row's gradient is NaN in all.
        return kept, q[kept].reciprocal(), float(torch.where(columns.isnan(), torch.inf, q).sum())


linear_logps = logps_from_logits = TorchPass
support_logps = RaggedPass
