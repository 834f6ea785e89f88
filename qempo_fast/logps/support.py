"""The tokens that a sampler could have drawn at each position, as top-p, top-k or min-p left them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from .. import _check
from .._door import dense

# Entries of a block of logits that from_logits sorts at once: 64 MiB in float32, four times over.
_ENTRIES = 2**24


class Support(NamedTuple):
    """Kept token ids of each of N positions; position i's set is ids[offsets[i] : offsets[i + 1]], in any order.

    linear_logps, sequence_logps and logps_from_logits take one as support= and normalise over it. They check there,
    on CPU or under QEMPO_CHECK=1, that offsets run from 0 to M and never fall, that ids lie in [0, V) and that no set
    names a token twice, which would count it twice.

    Args:
        ids: (M,) int64 or int32.
        offsets: (N + 1,) int64 or int32, on the device of ids.
    """

    ids: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> Support:
        """Of (..., V) bool, True where a token is kept; N is the product of the other sizes."""
        _check.tensor("mask", mask, dtypes=(torch.bool,))
        if mask.ndim < 1 or mask.shape[-1] == 0:
            _check.bad_value("mask", "shape (..., V) with V > 0", tuple(mask.shape))
        mask = mask.reshape(-1, mask.shape[-1])
        ids = mask.flatten().nonzero().squeeze(1).remainder_(mask.shape[1])
        return cls(ids, _offsets(mask.sum(1)))

    @classmethod
    def from_lists(cls, lists: Iterable[Sequence[int]]) -> Support:
        """Of a list of token ids for each position, on the CPU."""
        if not hasattr(lists, "__iter__"):
            _check.bad_type("lists", "a list of ints for each position", type(lists).__name__)
        rows = [_row("lists", row) for row in lists]
        flat = torch.tensor([i for row in rows for i in row], dtype=torch.int64, device="cpu")
        ends = [0, *accumulate(map(len, rows))]
        return cls(flat, torch.tensor(ends, dtype=torch.int64, device="cpu"))

    @classmethod
    def from_vllm(cls, mask: Any) -> Support:
        """Of the sampling_mask of one completion by vLLM (--return-sampling-mask), one set for each generated token.

        Read are vLLM's SamplingMask, with flat token_ids and their offsets (None for one position) or, as later
        versions have it, nested token_ids, and the nested lists of its HTTP answers. cat() joins several completions.
        """
        if mask is None:
            _check.bad_value("mask", "a completion's sampling_mask (vllm serve --return-sampling-mask)", None)
        if not hasattr(mask, "offsets"):
            return cls.from_lists(getattr(mask, "token_ids", mask))
        ids = torch.as_tensor(mask.token_ids, device="cpu").reshape(-1)
        ends = [0, len(ids)] if mask.offsets is None else mask.offsets
        offsets = torch.as_tensor(ends, device="cpu").to(torch.int64)
        ids = ids.to(torch.int64) if not len(ids) else ids
        _check.tensor("mask.token_ids", ids, dtypes=_check.INTS)
        _check.offsets("mask.offsets", offsets, len(ids))
        return cls(ids.to(torch.int64), offsets)

    @classmethod
    def from_logits(
        cls,
        logits: torch.Tensor,
        top_p: float = 1.0,
        top_k: int | None = 0,
        min_p: float = 0.0,
        temperature: float = 1.0,
    ) -> Support:
        """The sets that vLLM's sampler keeps of these logits, by its rule and in its order.

        In float32: logits / temperature; min_p masks p_j < min_p max p; top_k masks z_j below the k-th largest, so that
        ties with it stay; top_p sorts by z and masks the least likely tokens whose summed softmax is at most 1 - top_p,
        never the last. Which of several equal logits at that end stays is the order of torch.sort.

        Args:
            logits: (..., V) of any float dtype; -inf masks a token.
            top_p: in (0, 1]; 1 keeps all.
            top_k: 0 or None keeps all.
            min_p: in [0, 1]; 0 keeps all.
            temperature: a positive number.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        _check.tensor("logits", logits)
        if logits.ndim < 1 or logits.shape[-1] == 0:
            _check.bad_value("logits", "shape (..., V) with V > 0", tuple(logits.shape))
        _check.number("top_p", top_p, low=0.0, high=1.0, open_low=True)
        _check.integer("top_k", top_k or 0, low=0)
        _check.number("min_p", min_p, low=0.0, high=1.0)
        _check.positive("temperature", temperature)
        rows = logits.detach().reshape(-1, logits.shape[-1])
        step = max(1, _ENTRIES // rows.shape[1])
        parts = [cls.from_mask(_kept(part.float(), top_p, top_k or 0, min_p, temperature)) for part in rows.split(step)]
        return cls.cat(parts) if len(rows) else cls.from_mask(rows > 0)

    @classmethod
    def cat(cls, parts: Iterable[Support]) -> Support:
        """The positions of all parts, one part after another."""
        some = list(parts)
        if not some:
            _check.bad_value("parts", "at least one Support", "none")
        lengths = [_lengths(s.offsets) for s in some]
        return cls(torch.cat([s.ids for s in some]), _offsets(torch.cat(lengths)))

    def rows(self, index: slice | torch.Tensor) -> Support:
        """The sets of some positions: a slice, (n,) integers, or (N,) bool."""
        positions = torch.arange(len(self.offsets) - 1, device=self.offsets.device, dtype=torch.int64)[index]
        lengths = _lengths(self.offsets)[positions]
        offsets = _offsets(lengths)
        moved = (self.offsets[:-1][positions].long() - offsets[:-1]).repeat_interleave(lengths)
        at = moved + torch.arange(len(moved), device=moved.device, dtype=torch.int64)
        return Support(self.ids[at], offsets)

    def spread(self, where: torch.Tensor) -> Support:
        """One set for each entry of where (...) bool: those of self, in order, where it is True; elsewhere none.

        So a padded batch of labels takes the sets of its answers: support.spread(labels != -100).
        """
        _check.tensor("where", where, dtypes=(torch.bool,), device=self.offsets.device)
        lengths = _lengths(self.offsets)
        flat = where.reshape(-1)
        at = flat.cumsum(0) - 1
        if _check.readable(where) and int(flat.sum()) != len(lengths):
            _check.bad_value("where", f"{len(lengths)} entries that are True, one for each set", int(flat.sum()))
        if not len(lengths):
            return Support(self.ids, _offsets(torch.zeros_like(at)))
        return Support(self.ids, _offsets(lengths[at.clamp(0, len(lengths) - 1)].where(flat, 0)))

    def to(self, device: torch.device | str) -> Support:
        """On another device."""
        return Support(self.ids.to(device), self.offsets.to(device))


def _row(name: str, row: Any) -> list[int]:
    try:
        return [operator.index(i) for i in (row.tolist() if hasattr(row, "tolist") else row)]
    except TypeError:
        _check.bad_type(name, "a list of ints for each position", f"{type(row).__name__} among them")


def _lengths(offsets: torch.Tensor) -> torch.Tensor:
    return offsets.long().diff()


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.long().cumsum(0), (1, 0))


def _kept(z: torch.Tensor, top_p: float, top_k: int, min_p: float, temperature: float) -> torch.Tensor:
    """(n, V) bool of float32 logits."""
    z = z / temperature
    if min_p > 0:
        p = z.softmax(-1)
        z = z.masked_fill(p < p.amax(-1, keepdim=True) * min_p, -torch.inf)
    limited = 0 < top_k < z.shape[1]
    if limited and top_p == 1:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -torch.inf)
    elif top_p < 1:
        ascending, index = z.sort(-1)
        if limited:
            ascending = ascending.masked_fill(ascending < ascending[:, -top_k, None], -torch.inf)
        # The sampler has top_p in float32: 1 - 0.8 is 0.19999999 there, and a sum may lie between that and 0.2.
        most = 1 - torch.tensor(top_p, dtype=torch.float32, device=z.device)
        outside = ascending.softmax(-1).cumsum(-1) <= most
        outside[:, -1] = False
        z = torch.empty_like(z).scatter_(1, index, ascending.masked_fill(outside, -torch.inf))
    return (z > -torch.inf) & (z < torch.inf)


def check(support: Any, rows: int, device: torch.device) -> None:
    """A Support of so many positions, whose values are sound where they may be read; ids in [0, V) apart."""
    if not isinstance(support, Support):
        _check.bad_type("support", "a qempo_fast.Support or None", type(support).__name__)
    _check.tensor("support.ids", support.ids, dtypes=_check.INTS, ndim=1, device=device)
    _check.tensor("support.offsets", support.offsets, dtypes=_check.INTS, shape=(rows + 1,), device=device)
    _check.offsets("support.offsets", support.offsets, len(support.ids))
    if _check.readable(support.ids):
        _distinct(Support(dense("support.ids", support.ids), dense("support.offsets", support.offsets)))


def check_ids(support: Support, vocabulary: int) -> None:
    """ids in [0, vocabulary), where they may be read."""
    if len(support.ids) and _check.readable(support.ids):
        low, high = map(int, support.ids.aminmax())
        if low < 0 or high >= vocabulary:
            _check.bad_value("support", f"ids in [0, {vocabulary})", low if low < 0 else high)


def _distinct(support: Support) -> None:
    ids, offsets = support
    first = torch.zeros(len(ids) + 1, dtype=torch.bool, device=ids.device)
    first[offsets.long()] = True
    # Ids that rise, as vLLM exports them and from_mask makes them, are distinct: one pass and no sort.
    if not bool(((ids[1:] > ids[:-1]) | first[1:-1]).all()):
        low, high = map(int, ids.aminmax())
        pairs = first[:-1].cumsum(0) * (high - low + 1) + (ids.long() - low)
        if repeated := len(ids) - len(pairs.unique()):
            _check.bad_value("support", "no token twice in one set", f"{repeated} repeated")
