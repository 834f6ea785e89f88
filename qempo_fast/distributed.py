"""Groups and sequences that span ranks, over torch.distributed; docs/distributed.md says which to use when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from . import _check, _collective
from .logps import SequenceLogps, linear_logps, segment_sum

# int64 words of the one all-gather that every gather_groups makes: 16 KiB a rank hold 600 rows of an id, two log-probs
# and a reward. A rank with more sends the rest in a second.
_WORDS = 2048
# What each rank's rows have to share, by argument; before their checksums come the numbers of rows and of words.
_SAME = {"groups": "one dtype", "tensors": "as many, of the same dtypes and widths,"}
_HEADER = 2 + len(_SAME)
# Of a token axis: what the sums over its ranks depend on.
_SAME_TOKENS = {"cu_seqlens": "one length", "entropy": "the same choice", "average": "the same choice"}


class GatheredGroups(NamedTuple):
    """Rows of all ranks by group, (M, ...) each; (G + 1,) offsets and (G,) ids of the groups; (S,) this rank's rows.

    ``x[own]`` takes this rank's part, in its own order, out of anything of M rows: coefficients, advantages.
    """

    tensors: tuple[torch.Tensor, ...]
    offsets: torch.Tensor
    groups: torch.Tensor
    own: torch.Tensor


def gather_groups(
    groups: torch.Tensor, *tensors: torch.Tensor, process_group: ProcessGroup | None = None
) -> GatheredGroups:
    """Whole groups on every rank, from rows that lie on any: scores gathered, so that any group loss takes them.

        g = qf.gather_groups(prompt_ids, logps, ref_logps, rewards)
        loss = qf.spl_loss(*g.tensors, offsets=g.offsets, alpha=..., beta=...)

    The loss is that of one process with all rows, on every rank; its gradient reaches this rank's rows only, exactly.
    Summed over ranks the gradients are those of one process: DDP and FSDP average them, so multiply the loss by the
    world size there. One all-gather of 16 KiB a rank, and one more where a rank's rows take more than that. Without
    torch.distributed it sorts the rows of this process.

    Args:
        groups: (S,) int32 or int64, the group of each row: a prompt's number, the same on all ranks. Any order; S may
            differ between ranks and be 0.
        *tensors: (S, ...) any dtype: log-probs, rewards, embeddings. As many, of the same dtypes and widths, on all
            ranks. Those that require grad keep their graph.
        process_group: the ranks; None for all.

    Returns:
        GatheredGroups(tensors, offsets, groups, own): groups in rising order of id, in a group rank by rank.

    Raises:
        TypeError, ValueError: naming the argument; ranks that disagree on the number, dtypes or widths of tensors.
        RuntimeError: on the other ranks where one rank has refused its arguments.
    """
    distributed = dist.is_available() and dist.is_initialized()
    if distributed or process_group is not None:
        _collective.member("process_group", process_group)
    device = _collective.device_of(process_group, groups, *tensors) if distributed else torch.device("cpu")
    if distributed:
        with _collective.together(process_group, _WORDS, device):
            _check_rows(groups, tensors)
        parts = _all_gather_rows([groups, *tensors], process_group)
    else:
        _check_rows(groups, tensors)
        parts = [[groups, *(x.detach() for x in tensors)]]
    with _check.own_dtypes(groups.device.type):
        ids, *columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    order = torch.argsort(ids, stable=True)
    found, counts = torch.unique_consecutive(ids[order], return_counts=True)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    first = sum(len(part[0]) for part in parts[: dist.get_rank(process_group)]) if distributed else 0
    own = torch.empty_like(order).index_copy_(
        0, order, torch.arange(len(order), device=order.device, dtype=torch.int64)
    )
    own = own[first : first + len(groups)]
    rows = [column[order] for column in columns]
    # The copy connects this rank's rows to their graph.
    pairs = zip(rows, tensors, strict=True)
    with _check.own_dtypes(groups.device.type):
        out = tuple(all_.index_copy(0, own, x) if x.requires_grad else all_ for all_, x in pairs)
    return GatheredGroups(out, offsets, found, own)


def _check_rows(groups: Any, tensors: Sequence[Any]) -> None:
    _check.tensor("groups", groups, dtypes=_check.INTS, ndim=1)
    _check.present("groups", groups)
    for i, x in enumerate(tensors):
        name = f"tensors[{i}]"
        _check.plain(name, x)
        if x.ndim == 0 or len(x) != len(groups):
            _check.bad_value(name, f"{len(groups)} rows, as groups", f"shape {tuple(x.shape)}")
        if x.device != groups.device:
            _check.bad_value(name, f"a tensor on {groups.device}", f"one on {x.device}")


def _width(x: torch.Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()


def _dense(x: torch.Tensor) -> torch.Tensor:
    # Not contiguous(): it keeps the odd strides of a dimension of size 1 or 0, which view() to another dtype refuses.
    return x.clone(memory_format=torch.contiguous_format)


def _all_gather_rows(tensors: list[torch.Tensor], group: ProcessGroup | None) -> list[list[torch.Tensor]]:
    """The rows of each rank, byte for byte, so that every dtype travels in one buffer and none is rounded."""
    rows, width = len(tensors[0]), sum(map(_width, tensors))
    columns = [_dense(x.detach()).reshape(rows, _width(x) // x.element_size()).view(torch.uint8) for x in tensors]
    flat = torch.cat(columns, 1).reshape(-1)
    words = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    layout = {"groups": tensors[0].dtype, "tensors": [(x.dtype, x.shape[1:]) for x in tensors[1:]]}
    numbers = [rows, len(words), *_collective.words(layout)]
    header = torch.tensor(numbers, dtype=torch.int64, device=words.device)
    room = _WORDS - _HEADER
    table = _collective.exchange(torch.cat([header, _filled(words[:room], room)]), group)
    headers = table[:, :_HEADER].tolist()
    _collective.same([h[2:] for h in headers], _SAME)
    gathered = list(table[:, _HEADER:])
    rest = max(h[1] for h in headers) - room
    if rest > 0:
        more = [words.new_empty(rest) for _ in headers]
        dist.all_gather(more, _filled(words[room:], rest), group=group)
        gathered = [torch.cat(pair) for pair in zip(gathered, more, strict=True)]
    flats = [x.view(torch.uint8)[: h[0] * width] for x, h in zip(gathered, headers, strict=True)]
    return [_unpacked(x, h[0], tensors) for x, h in zip(flats, headers, strict=True)]


def _filled(words: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(words, (0, length - len(words)))


def _unpacked(flat: torch.Tensor, rows: int, like: list[torch.Tensor]) -> list[torch.Tensor]:
    columns = flat.reshape(rows, sum(map(_width, like))).split([_width(x) for x in like], 1)
    # Bytes of no width cannot be viewed as another dtype, only made.
    parts = (_dense(c).view(x.dtype) if c.numel() else c.to(x.dtype) for c, x in zip(columns, like, strict=True))
    return [part.reshape(rows, *x.shape[1:]) for part, x in zip(parts, like, strict=True)]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:  # type: ignore[override]
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


def sum_over_ranks(x: torch.Tensor, *, process_group: ProcessGroup | None = None) -> torch.Tensor:
    """Sum of x over ranks, for a loss that every rank then computes alike: the gradient stays as it comes.

    torch's differentiable all-reduce sums the gradient over ranks too, which is world size times too much here.

    Args:
        x: float, of one shape and dtype on all ranks.
        process_group: the ranks; None for all.

    Returns:
        The sum, shaped like x, on every rank; each rank's gradient is that of its own x.

    Raises:
        TypeError, ValueError: x not a float tensor; ranks with another shape or dtype.
        RuntimeError: on the other ranks where one rank has refused its argument.
    """
    _collective.member("process_group", process_group)
    device = _collective.device_of(process_group, x)
    with _collective.together(process_group, 1, device):
        _check.tensor("x", x)
    mine = torch.tensor(_collective.words({"x": (x.dtype, x.shape)}), dtype=torch.int64, device=device)
    _collective.same(_collective.exchange(mine, process_group).tolist(), {"x": "one shape and dtype"})
    return _SumOverRanks.apply(x, process_group)


def sequence_parallel_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    token_group: ProcessGroup | None = None,
    average: bool = False,
    **head: Any,
) -> SequenceLogps:
    """``sequence_logps`` of packed tokens whose axis is split over ranks: sums cross the cuts.

    logps_s = sum over ranks of the sum over this rank's counted tokens of sequence s. Every rank gets the same
    (S,) sums, so each computes the same loss; gradients reach this rank's tokens only (docs/distributed.md).

    Args:
        hidden: (N_r, D), this rank's slice of the token axis, in rank order; N_r may differ between ranks and be 0.
        weight: (V, D), whole on each rank.
        targets: (N_r,), already shifted before the axis was split.
        cu_seqlens: (S + 1,) of the whole axis, from 0 to the sum of N_r; the same on all ranks.
        token_group: the ranks that share the axis; None for all.
        average: divide logps and entropy by the number of counted tokens of all ranks.
        **head: every other keyword of linear_logps.

    Returns:
        SequenceLogps(logps (S,), entropy (S,) or None, lengths (S,), token_logps (N_r,) of this rank).

    Raises:
        TypeError, ValueError: as sequence_logps; ranks with other cu_seqlens.
        RuntimeError: on the other ranks where one rank has refused its arguments.
    """
    _collective.member("token_group", token_group)
    device = _collective.device_of(token_group, hidden, targets)
    with _collective.together(token_group, 2 + len(_SAME_TOKENS), device):
        _check.tensor("hidden", hidden, ndim=2)
        _check.tensor("targets", targets, dtypes=_check.INTS, shape=hidden.shape[:1], device=hidden.device)
        _check.tensor("cu_seqlens", cu_seqlens, dtypes=_check.INTS, ndim=1, device=hidden.device)
    cu_seqlens = cu_seqlens.long()
    asked = {"cu_seqlens": len(cu_seqlens), "entropy": bool(head.get("entropy")), "average": bool(average)}
    mine = torch.tensor([len(hidden), *_collective.words(asked)], dtype=torch.int64, device=device)
    table = _collective.exchange(torch.cat([mine, _collective.checksum(cu_seqlens)]), token_group).tolist()
    _collective.same([row[1:] for row in table], _SAME_TOKENS)
    if len({row[-1] for row in table}) > 1:
        _check.bad_value("cu_seqlens", "those of the whole token axis, the same on every rank", "others among them")
    _check.offsets("cu_seqlens", cu_seqlens, sum(row[0] for row in table))
    start = sum(row[0] for row in table[: dist.get_rank(token_group)])
    own = (cu_seqlens - start).clamp(0, len(hidden))
    try:
        tokens = linear_logps(hidden, weight, targets, **head)
    except Exception:
        # The others wait in the all-reduce below; a NaN length tells them.
        failed = torch.full(
            (3 if head.get("entropy") else 2, len(cu_seqlens)), torch.nan, dtype=torch.float64, device="cpu"
        )
        dist.all_reduce(failed.to(device), group=token_group)
        raise
    counted = (targets != head.get("ignore_index", -100)).double()
    local = [segment_sum(x.double(), own) for x in (tokens.logps, counted, tokens.entropy) if x is not None]
    local = [torch.cat([x, x.new_zeros(1)]) for x in local]  # room for the NaN where S = 0
    total = _SumOverRanks.apply(torch.stack(local), token_group)
    if bool(total[1].isnan().any()):
        raise RuntimeError("token_group: another rank refused its arguments; its own error says which")
    lengths = total[1, :-1].detach()
    scale = lengths.clamp_min(1) if average else 1.0
    logps, *entropy = ((total[i, :-1] / scale).to(tokens.logps.dtype) for i in (0, *range(2, len(total))))
    return SequenceLogps(logps, entropy[0] if entropy else None, lengths.long(), tokens.logps)
