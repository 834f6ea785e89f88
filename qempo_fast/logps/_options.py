"""The non-tensor arguments of one call, checked and resolved."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup

from .. import _check

# Where T(f) was measured, 171 + 556 f ms of 603 in bfloat16 and 310 + 964 f of 1203 in float32 (SmolLM2, 2048 rows in
# chunks of 256, Zen 5), a column's moves took as long as some 200 rows of a GEMM; 66 with AVX2's GEMMs.
MOVED = 192.0
# What a draw may add to dhidden, relative to its norm, where no tau is given. In half precision about what rounding
# dhidden to its dtype adds (bfloat16: 0.0017), so that the whole error is at most twice plain torch's whatever the
# softmax is like. In float32 the error of sampling is all that there is: what bfloat16 costs.
ERROR = {torch.float64: 2.0**-7, torch.float32: 2.0**-7, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def break_even(rows: float, moved: float) -> float:
    """Kept share f at which a chunk of so many rows costs as much sampled as exact.

    Beside the forward, exact has three GEMMs of all columns and sampled three of a share f, whose rows of the weight
    are gathered and added to dweight's: T(f) = 1 + f (3 + moved / rows) forwards. moved: rows of a GEMM that take as
    long as those moves of one column.
    """
    return 1 / (1 + moved / (3 * rows))


@dataclass(frozen=True)
class Options:
    """The gradient is sampled at threshold tau, or at one that adds the relative error; both None: exact.

    An exact one may keep so many bytes of logits, or with slopes is made in the forward; seed drives a sampled one.
    wide: hidden is of half precision, and its logits are float32 until the softmax. lse: return it too, in the two
    parts of RowStats.lse(). fixed: a row's results depend on no other row, to the bit.
    """

    logit_scale: float
    softcap: float | None
    entropy: bool
    sum_sq: bool
    tau: float | None
    seed: int
    group: ProcessGroup | None
    keep_logits: int = 0
    error: float | None = None
    slopes: bool = False
    wide: bool = False
    lse: bool = False
    fixed: bool = False

    @property
    def sampled(self) -> bool:
        return self.tau is not None or self.error is not None

    def logits_dtype(self, hidden: torch.Tensor) -> torch.dtype:
        return torch.float32 if self.wide else hidden.dtype


class Wanted(NamedTuple):
    """What linear_logps is asked for beside log-probs, the entropy and sum_sq; columns (N, K) int64."""

    columns: torch.Tensor | None = None
    lse: bool = False
    top1: bool = False
    mean_logits: bool = False
    label_smoothing: float = 0.0

    @property
    def scores(self) -> bool:
        """Whether a TokenScores is."""
        return self.columns is not None or self.lse or self.top1 or self.mean_logits

    @property
    def mean(self) -> bool:
        return self.mean_logits or self.label_smoothing != 0

    @property
    def products(self) -> bool:
        """Whether it takes logits of single columns; log p of all of them alike is mean z - lse."""
        return self.columns is not None or self.lse or self.label_smoothing != 0


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
    break_even: float = break_even(256, MOVED)

    @property
    def chunk(self) -> int:
        return self.shared or self.rows

    @property
    def kept_columns(self) -> int:
        return self.kept or self.columns


def logits_budget(rows: int, weight: torch.Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes of logits that an exact step of so many rows may keep for its backward: QEMPO_KEEP_LOGITS in MiB.

    Where that is not set, as many as the weight has, which is the size of dweight, and at most a sixteenth of what is
    free on its device: N = D rows cost 6NDV, and of more rows the first D do. Recomputing costs most where rows are
    few: exact at N = 64 of a bfloat16 Llama-3-8B head, 0.82 of the time. dtype: of the logits, where not the weight's.
    """
    value = os.environ.get("QEMPO_KEEP_LOGITS", "").strip()
    if not value:
        few = weight.nbytes // 8
        # Of few rows without a look at what is free, which on a GPU may take longer than their kernels.
        if rows * weight.shape[0] * (dtype or weight.dtype).itemsize <= few:
            return few
        return min(weight.nbytes, max(few, _free(weight.device) // 16))
    try:
        budget = float(value)
    except ValueError:
        budget = math.nan
    if not 0 <= budget < math.inf:
        _check.bad_value("QEMPO_KEEP_LOGITS", "MiB, a number of at least 0", value)
    return int(budget * 2**20)


def _free(device: torch.device) -> int:
    """Bytes that the device has free, those that torch's allocator holds unused on a GPU included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    # Not all systems tell; then the eighth of the weight stands.
    names = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in names else 0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
