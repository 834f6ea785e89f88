"""Vocabulary-parallel heads: what a DTensor weight means, and where this rank's columns lie."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed import ProcessGroup

from .. import _check, _collective
from ._options import Options, Wanted

# What has to be the same on every rank besides the tokens, by argument: other collectives would follow, or a loss that
# is not that of one process.
_SAME = {
    "hidden": "one dtype and width, and requires_grad alike",
    "bias": "its part of the bias, or None",
    "logit_scale": "the same number",
    "softcap": "the same number or None",
    "ignore_index": "the same number",
    "entropy": "the same choice",
    "sum_sq": "the same choice",
    "label_smoothing": "the same number",
    "lse": "the same choice, and of columns",
    "mean_logits": "the same choice",
    "grad": "sampled without tau on every rank or on none",
    "logits_dtype": "the same choice",
    "batch_invariant": "the same choice",
}
_NOTHING = Wanted()
# Numbers in the one all-gather of each call: columns, rows, _SAME, checksums of targets and what else has rows.
_HEADER = 7 + len(_SAME)


# The gradient of full_tensor() alone is cut to this rank's rows, and the tokens of other ranks never reach it.
_WHOLE = 'weight.full_tensor(grad_placements=[Partial("avg")])'


def _is_dtensor(x: Any) -> bool:
    # torch.distributed.tensor takes 0.5 s to import: only where one is there already.
    return isinstance(x, torch.Tensor) and hasattr(x, "full_tensor")


def local_head(weight: Any, bias: Any, group: ProcessGroup | None) -> tuple[Any, Any, ProcessGroup | None]:
    """Plain weight and bias and the group whose vocabulary shards they are; gradients go back as DTensors."""
    if group is not None and not torch.compiler.is_compiling():
        _collective.member("process_group", group)
    if not _is_dtensor(weight):
        return weight, bias, group  # a bias that is one is refused with the other arguments
    with checked_together(group, weight):
        if group is not None:
            _check.bad_value("process_group", "None with a DTensor weight, whose mesh says it", type(group).__name__)
    mesh_group = _mesh_group(weight)
    if _is_dtensor(bias):
        with checked_together(mesh_group, weight):
            if bias.device_mesh != weight.device_mesh or tuple(bias.placements) != tuple(weight.placements):
                wanted = f"the mesh and placements of weight, {tuple(weight.placements)}"
                _check.bad_value("bias", wanted, tuple(bias.placements))
        bias = bias.to_local()
    return weight.to_local(), bias, mesh_group


def _mesh_group(weight: Any) -> ProcessGroup | None:
    """The ranks whose vocabulary shards a DTensor weight is placed on; None where each has all of it."""
    from torch.distributed.tensor import Shard

    placements = tuple(weight.placements)
    if all(p.is_replicate() for p in placements):
        return None
    if len(placements) == 1 and type(placements[0]) is Shard and placements[0].dim == 0:
        group: ProcessGroup = weight.device_mesh.get_group()
        return group
    wanted = "a DTensor placed Shard(0) on a mesh of one dimension, or Replicate() on any"
    out = f"weight.redistribute(mesh, [Shard(0)]) or {_WHOLE} gives one that works"
    _check.bad_value("weight", f"{wanted} ({out})", placements)


def checked_together(group: ProcessGroup | None, *tensors: Any) -> AbstractContextManager[None]:
    """Around the checks that come before shard_range: one rank's bad argument ends the call on all of them."""
    # Tracing keeps collectives out of the graph.
    if group is None or torch.compiler.is_compiling():
        return nullcontext()
    return _collective.together(group, _HEADER, _collective.device_of(group, *tensors))


def shard_range(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    ignore_index: int,
    options: Options,
    coefficients: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    more: Wanted = _NOTHING,
) -> tuple[int, int]:
    """(first column of this rank, columns of all ranks); shards lie in rank order and may be uneven."""
    vocabulary, group = weight.shape[0], options.group
    if group is None:
        return 0, vocabulary
    # Where one rank alone wanted hidden's gradient it would wait in backward() for the others.
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    settings = (
        *((hidden.dtype, hidden.shape[1], wanted), bias is None, options.logit_scale, options.softcap),
        *(int(ignore_index), options.entropy, options.sum_sq, float(more.label_smoothing), more.products, more.mean),
        *(options.error, options.wide, options.fixed),
    )
    numbers = [vocabulary, len(targets), *_collective.words(dict(zip(_SAME, settings, strict=True)))]
    mine = torch.tensor(numbers, dtype=torch.int64, device=targets.device)
    rows_of = (targets, inv_temperature, *coefficients, None if more.columns is None else more.columns.flatten())
    sums = [_collective.checksum(x) if x is not None else mine.new_zeros(1) for x in rows_of]
    table = _collective.exchange(torch.cat([mine, *sums]), group).tolist()
    _collective.same([row[2:] for row in table], _SAME)
    # A head that FSDP2 has sharded is a Shard(0) DTensor as well, but there each rank has tokens of its own.
    tokens = [(row[1], *row[-5:]) for row in table]
    if any(row != tokens[0] for row in tokens):
        rows = [row[0] for row in tokens]
        got = f"rows {rows}" if len(set(rows)) > 1 else "other targets, temperatures, coefficients, columns or support"
        same = "the same tokens on every rank of a vocabulary-parallel head (an FSDP head: call inside the forward of"
        _check.bad_value("targets", f"{same} the module that owns it, or pass {_WHOLE})", got)
    counts = [row[0] for row in table]
    return sum(counts[: torch.distributed.get_rank(group)]), sum(counts)
