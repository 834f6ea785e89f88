"""The non-tensor arguments of one call, checked and resolved."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from .. import _check

# Keep thresholds whose sampling error stays under the rounding of the dtype: docs/linear_logps.md has the table. On
# real hidden states 2^-11 errs by 0.003 where plain bfloat16 errs by 0.012 (dHidden) and 0.016 (dWeight), and the two
# together by a twentieth more than plain; at 2^-10, which keeps two thirds of the columns, by a seventh in dWeight.
DEFAULT_TAU = {
    torch.float64: 2.0**-9,
    torch.float32: 2.0**-9,
    torch.bfloat16: 2.0**-11,
    torch.float16: 2.0**-13,
}
# Past this kept share the gather costs more than the columns it saves: on CPU, where T(f) is 171 + 556 f ms of 603 in
# bfloat16 and 310 + 964 f of 1203 in float32 (SmolLM2, 2048 rows). policy.py has the GPUs'.
BREAK_EVEN = 0.8
# At equal tau the entropy gradient triples the kept share and cuts the error eightfold.
ENTROPY_TAU = 8.0


@dataclass(frozen=True)
class Options:
    """tau is None for the exact gradient, which may keep its logits; seed drives the sampled one."""

    logit_scale: float
    softcap: float | None
    entropy: bool
    sum_sq: bool
    tau: float | None
    seed: int
    group: ProcessGroup | None
    keep_logits: bool = False


@dataclass(frozen=True)
class TileSizes:
    """Rows and vocabulary columns of the one logits buffer.

    Of the sampled gradient: shared rows choose their columns together (0: as many as rows); a tile of its backward has
    at most kept columns (0: as many as columns), out of a block of the vocabulary (0: all of it); a chunk of which
    more than a share of break_even is to be kept takes all columns.
    """

    rows: int
    columns: int
    shared: int = 0
    kept: int = 0
    block: int = 0
    break_even: float = BREAK_EVEN

    @property
    def chunk(self) -> int:
        return self.shared or self.rows

    @property
    def kept_columns(self) -> int:
        return self.kept or self.columns


def logits_fit(rows: int, weight: torch.Tensor) -> bool:
    """Whether an exact step may keep its logits for the backward: QEMPO_KEEP_LOGITS in MiB.

    Where that is not set, an eighth of the weight's memory, so at most D / 8 rows: little beside dweight, and few rows
    are where recomputing costs most. Exact at N = 64 of a bfloat16 Llama-3-8B head: 0.82 of the time.
    """
    value = os.environ.get("QEMPO_KEEP_LOGITS", "").strip()
    size = rows * weight.shape[0] * weight.element_size()
    if not value:
        return size * 8 <= weight.nbytes
    try:
        budget = float(value)
    except ValueError:
        budget = math.nan
    if not 0 <= budget < math.inf:
        _check.bad_value("QEMPO_KEEP_LOGITS", "MiB, a number of at least 0", value)
    return size <= budget * 2**20 and budget > 0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
