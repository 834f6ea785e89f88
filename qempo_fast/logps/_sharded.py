"""Vocabulary-parallel heads: what a DTensor weight means, and where this rank's columns lie."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed import ProcessGroup

from .. import _check, _collective

# Numbers in the one all-gather of each call: columns, rows, checksums of targets and temperatures.
_HEADER = 4


def _is_dtensor(x: Any) -> bool:
    # torch.distributed.tensor takes 0.5 s to import: only where one is there already.
    return isinstance(x, torch.Tensor) and hasattr(x, "full_tensor")


def local_head(weight: Any, bias: Any, group: ProcessGroup | None) -> tuple[Any, Any, ProcessGroup | None]:
    """Plain weight and bias and the group whose vocabulary shards they are; gradients go back as DTensors."""
    if not _is_dtensor(weight):
        _check.plain("bias", bias)
        return weight, bias, group
    from torch.distributed.tensor import Shard

    if group is not None:
        _check.bad_value("process_group", "None with a DTensor weight, whose mesh says it", type(group).__name__)
    placements = tuple(weight.placements)
    if all(p.is_replicate() for p in placements):
        mesh_group = None
    elif len(placements) == 1 and type(placements[0]) is Shard and placements[0].dim == 0:
        mesh_group = weight.device_mesh.get_group()
    else:
        wanted = "a DTensor placed Shard(0) on a mesh of one dimension, or Replicate() on any"
        out = "weight.redistribute(mesh, [Shard(0)]) or weight.full_tensor() gives one that works"
        _check.bad_value("weight", f"{wanted} ({out})", placements)
    if _is_dtensor(bias):
        if bias.device_mesh != weight.device_mesh or tuple(bias.placements) != placements:
            _check.bad_value("bias", f"the mesh and placements of weight, {placements}", tuple(bias.placements))
        bias = bias.to_local()
    return weight.to_local(), bias, mesh_group


def checked_together(group: ProcessGroup | None, *tensors: Any) -> AbstractContextManager[None]:
    """Around the checks that come before shard_range: one rank's bad argument ends the call on all of them."""
    # Tracing keeps collectives out of the graph.
    if group is None or torch.compiler.is_compiling():
        return nullcontext()
    return _collective.together(group, _HEADER, _collective.device_of(group, *tensors))


def shard_range(
    vocabulary: int, targets: torch.Tensor, inv_temperature: torch.Tensor | None, group: ProcessGroup | None
) -> tuple[int, int]:
    """(first column of this rank, columns of all ranks); shards lie in rank order and may be uneven."""
    if group is None:
        return 0, vocabulary
    sizes = torch.tensor([vocabulary, len(targets)], dtype=torch.int64, device=targets.device)
    sums = [_checksum(x) if x is not None else sizes.new_zeros(1) for x in (targets, inv_temperature)]
    table = _collective.exchange(torch.cat([sizes, *sums]), group).cpu()
    # A head that FSDP2 has sharded is a Shard(0) DTensor as well, but there each rank has tokens of its own.
    if not bool((table[:, 1:] == table[0, 1:]).all()):
        rows = table[:, 1].tolist()
        got = f"rows {rows}" if len(set(rows)) > 1 else "other targets or temperatures"
        wanted = "the same tokens on every rank of a vocabulary-parallel head (an FSDP head: call inside the forward of"
        _check.bad_value("targets", f"{wanted} the module that owns it, or pass weight.full_tensor())", got)
    counts = table[:, 0].tolist()
    return sum(counts[: torch.distributed.get_rank(group)]), sum(counts)


def _checksum(x: torch.Tensor) -> torch.Tensor:
    """(1,) int64 that a change or an exchange of entries changes; it wraps around."""
    bits = x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int64).long()
    return (bits * torch.arange(1, 2 * len(x) + 1, 2, device=x.device)).sum().reshape(1)
