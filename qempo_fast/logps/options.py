"""The non-tensor arguments of one call, checked and resolved."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from .. import _check

# Keep thresholds whose sampling error stays under the rounding of the dtype: docs/linear_logps.md has the table. On
# real hidden states 2^-10 errs by 0.005 in dHidden where plain bfloat16 errs by 0.012, and the two together by 0.013.
DEFAULT_TAU = {
    torch.float64: 2.0**-9,
    torch.float32: 2.0**-9,
    torch.bfloat16: 2.0**-10,
    torch.float16: 2.0**-13,
}
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
    """Rows and vocabulary columns of the one logits buffer; 0 for the last two means as many as that.

    shared: rows that choose their columns together in the sampled gradient. kept: kept columns of a backward tile.
    """

    rows: int
    columns: int
    shared: int = 0
    kept: int = 0

    @property
    def chunk(self) -> int:
        return self.shared or self.rows

    @property
    def kept_columns(self) -> int:
        return self.kept or self.columns


def logits_fit(rows: int, vocabulary: int, dtype: torch.dtype) -> bool:
    """Whether the logits of an exact step may be kept for its backward: QEMPO_KEEP_LOGITS MiB, 0 by default."""
    value = os.environ.get("QEMPO_KEEP_LOGITS", "0")
    try:
        budget = float(value)
    except ValueError:
        budget = math.nan
    if not 0 <= budget < math.inf:
        _check.bad_value("QEMPO_KEEP_LOGITS", "MiB, a number of at least 0", value)
    return rows * vocabulary * dtype.itemsize <= budget * 2**20 and budget > 0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
