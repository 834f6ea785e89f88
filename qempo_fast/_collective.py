"""One small all-gather that also tells every rank when one of them cannot go on."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from . import _check

_READY, _FAILED = 0, 1


def member(name: str, group: Any) -> None:
    """Refuse by name what no collective can run on; None is the group of all ranks."""
    # new_group() gives a number to the ranks that it leaves out.
    outside = isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER
    if not outside and group is not None and not isinstance(group, ProcessGroup):
        _check.bad_type(name, "a torch.distributed.ProcessGroup (mesh.get_group()) or None", type(group).__name__)
    if not (dist.is_available() and dist.is_initialized()):
        _check.bad_value(name, "torch.distributed.init_process_group before the call", "no process group")
    if outside or dist.get_rank(group) < 0:
        _check.bad_value(name, "a group that this rank is in", "one that it is not in")


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


def checksum(x: torch.Tensor) -> torch.Tensor:
    """(1,) int64 that a change or an exchange of entries changes; it wraps around."""
    bits = x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int64).long()
    return (bits * torch.arange(1, 2 * len(x) + 1, 2, dtype=torch.int64, device=x.device)).sum().reshape(1)


def words(settings: Mapping[str, object]) -> list[int]:
    """One number for each setting, to be exchanged; another setting, another number."""
    return [zlib.crc32(repr(x).encode()) for x in settings.values()]


def same(table: list[list[int]], wanted: Mapping[str, str]) -> None:
    """Raise, on all ranks alike, naming the first argument whose number on some rank is not that of rank 0.

    table: (world, at least one number for each argument); wanted: of each argument, what has to be the same.
    """
    for column, (name, what) in enumerate(wanted.items()):
        odd = [str(rank) for rank, row in enumerate(table) if row[column] != table[0][column]]
        if odd:
            _check.bad_value(name, f"{what} on every rank", f"another on rank {', '.join(odd)} than on rank 0")


def device_of(group: ProcessGroup | None, *tensors: object) -> torch.device:
    """Where the group's collectives take their tensors: that of the first tensor, whatever else is wrong with it."""
    for x in tensors:
        if isinstance(x, torch.Tensor) and not x.is_meta:
            return x.device
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
