"""Running softmax statistics of each row, and their merge across vocabulary shards."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

# e^LOWEST is 0 in float64 too. A distance to the maximum goes no further where it is a factor: a mask fill of float32's
# least number times the sum of a tile is -inf, and 0 * -inf is NaN.
LOWEST = -1000.0


@dataclass
class RowStats:
    """(N,) each: max z, sum e^(z - max), sum (z - max) e^(z - max), sum e^(2 (z - max)), the target's z."""

    max: torch.Tensor
    sum: torch.Tensor
    sum_z: torch.Tensor | None
    sum_sq: torch.Tensor | None
    target: torch.Tensor

    @classmethod
    def new(cls, n: int, dtype: torch.dtype, device: torch.device, entropy: bool, sum_sq: bool) -> RowStats:
        # One block of memory: two fills, where five vectors would be five launches on a GPU.
        rows = torch.empty(3 + entropy + sum_sq, n, dtype=dtype, device=device)
        rows[:2].fill_(-torch.inf)
        rows[2:].zero_()
        sums = iter(rows[3:])
        return cls(rows[0], rows[2], next(sums) if entropy else None, next(sums) if sum_sq else None, rows[1])

    def rows(self, a: int, b: int) -> RowStats:
        """The same memory, rows a to b."""
        return RowStats(*(None if x is None else x[a:b] for x in self._parts()))  # type: ignore[arg-type]

    def take(self, other: RowStats) -> None:
        """The numbers of other, where they are not in this memory already."""
        if other is not self:
            for mine, its in zip(self._parts(), other._parts(), strict=True):
                if mine is not None and its is not None:
                    mine.copy_(its)

    def _parts(self) -> list[torch.Tensor | None]:
        return [getattr(self, f.name) for f in fields(self)]

    def lse(self) -> torch.Tensor:
        """(N, 2) max z and log sum e^(z - max). Their sum, the log-sum-exp, has no digits left for the second where the
        first is large: under a mask fill of -1e9 it is off by 32, and every difference to a logit with it.
        """
        return torch.stack((self.max, self.sum.log()), 1)

    def logps(self, lse: torch.Tensor) -> torch.Tensor:
        """The target's, from lse()."""
        return (self.target - self.max).sub_(lse[:, 1])

    def entropy(self) -> torch.Tensor | None:
        # H = lse - E[z] = log sum - E[z - max]: no max is left in it.
        return None if self.sum_z is None else self.sum.log() - self.sum_z / self.sum

    def log_sum_sq(self) -> torch.Tensor | None:
        return None if self.sum_sq is None else self.sum_sq.log() - 2 * self.sum.log()

    def merged(self, group: ProcessGroup) -> RowStats:
        """The statistics over all shards, by one all-gather: every rank merges in the same order."""
        mine = torch.stack([x for x in self._parts() if x is not None])
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        shards = [self._like(p) for p in parts]
        top = torch.stack([s.max for s in shards]).amax(0)
        out = RowStats.new(len(top), top.dtype, top.device, self.sum_z is not None, self.sum_sq is not None)
        out.max, out.target = top, torch.stack([s.target for s in shards]).amax(0)
        for s in shards:
            # An empty shard adds nothing, and one whose sum is NaN makes all of it NaN.
            k = torch.where(s.sum == 0, 0.0, (s.max - top).exp())
            shift = (s.max - top).clamp_min(LOWEST)
            out.sum += k * s.sum
            if out.sum_z is not None and s.sum_z is not None:
                out.sum_z += k * (s.sum_z + s.sum * shift)
            if out.sum_sq is not None and s.sum_sq is not None:
                out.sum_sq += k * k * s.sum_sq
        return out

    def _like(self, stacked: torch.Tensor) -> RowStats:
        rows = iter(stacked)
        return RowStats(*(None if x is None else next(rows) for x in self._parts()))  # type: ignore[arg-type]
