"""One small all-gather that also tells every rank when one of them cannot go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

_READY, _FAILED = 0, 1


def _gather(flag: int, mine: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """(world, 1 + L) int64: each rank's flag and numbers."""
    row = torch.cat([mine.new_full((1,), flag), mine])
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(rows, row, group=group)
    except RuntimeError as error:
        lost = f"rank {dist.get_rank(group)} of {len(rows)} lost another, which ended or stayed silent for the timeout"
        raise RuntimeError(f"process_group: {lost} of init_process_group; its own log says why") from error
    return torch.stack(rows)


def exchange(mine: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """(world, L): the (L,) int64 numbers of every rank; L is the same on all. Raises where a rank has failed."""
    rows = _gather(_READY, mine, group)
    failed = rows[:, 0].nonzero().flatten().tolist()
    if failed:
        ranks = ", ".join(map(str, failed))
        raise RuntimeError(
            f"process_group: rank {ranks} of {len(rows)} refused its arguments; its own error says which"
        )
    return rows[:, 1:]


@contextmanager
def together(group: ProcessGroup | None, length: int, device: torch.device) -> Iterator[None]:
    """Checks made before exchange() of so many numbers: an error raised inside reaches the other ranks there."""
    try:
        yield
    except Exception:
        _gather(_FAILED, torch.zeros(length, dtype=torch.int64, device=device), group)
        raise


def device_of(group: ProcessGroup | None, *tensors: object) -> torch.device:
    """Where the group's collectives take their tensors: that of the first tensor, whatever else is wrong with it."""
    for x in tensors:
        if isinstance(x, torch.Tensor):
            return x.device
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
