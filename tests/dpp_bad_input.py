"""Bad arguments of the DPP functions: id, what to call, the error and its message."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from qempo_fast.dpp import dpp_gains, dpp_logdet, dpp_select

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _with(value: float) -> torch.Tensor:
    x = _x(2, 3, 4)
    x[1, 2, 0] = value
    return x


def _offsets(*values: int, dtype: torch.dtype = torch.int64) -> dict[str, torch.Tensor]:
    return {"offsets": torch.tensor(values, dtype=dtype)}


ROWS: list[tuple[str, Callable[[], Call], type[Exception], str]] = [
    ("list", lambda: (dpp_gains, ([[1.0]],), {}), TypeError, "embeddings: wanted a tensor, got list"),
    (
        "ints",
        lambda: (dpp_logdet, (torch.ones(1, 2, 3, dtype=torch.int64),), {}),
        TypeError,
        "embeddings: wanted float",
    ),
    (
        "2-d",
        lambda: (dpp_gains, (_x(6, 4),), {}),
        ValueError,
        r"embeddings: wanted .*got \(6, 4\) without offsets",
    ),
    (
        "3-d with offsets",
        lambda: (dpp_gains, (_x(2, 3, 4),), _offsets(0, 2)),
        ValueError,
        r"embeddings: wanted .*got \(2, 3, 4\) with offsets",
    ),
    (
        "no width",
        lambda: (dpp_gains, (_x(2, 3, 0),), {}),
        ValueError,
        "embeddings: wanted a width of at least 1",
    ),
    (
        "k = 0",
        lambda: (dpp_logdet, (_x(2, 0, 4),), {}),
        ValueError,
        "embeddings: wanted groups of at least one row",
    ),
    (
        "NaN",
        lambda: (dpp_gains, (_with(math.nan),), {}),
        ValueError,
        "embeddings: wanted finite values, got 1 NaN",
    ),
    (
        "infinite",
        lambda: (dpp_select, (_with(math.inf), 1), {}),
        ValueError,
        "embeddings: wanted finite values",
    ),
    ("ridge 0", lambda: (dpp_gains, (_x(2, 3, 4),), {"ridge": 0.0}), ValueError, "ridge: wanted .*got 0.0"),
    (
        "ridge below 0",
        lambda: (dpp_select, (_x(2, 3, 4), 1), {"ridge": -1}),
        ValueError,
        "ridge: wanted .*got -1",
    ),
    (
        "ridge NaN",
        lambda: (dpp_logdet, (_x(2, 3, 4),), {"ridge": math.nan}),
        ValueError,
        "ridge: wanted .*got nan",
    ),
    (
        "ridge a tensor",
        lambda: (dpp_logdet, (_x(2, 3, 4),), {"ridge": torch.ones(())}),
        TypeError,
        "ridge: wanted a number, got Tensor",
    ),
    (
        "log_quality shape",
        lambda: (dpp_gains, (_x(2, 3, 4),), {"log_quality": _x(3, 2)}),
        ValueError,
        r"log_quality: wanted shape \(2, 3\), got \(3, 2\)",
    ),
    (
        "log_quality of ragged rows",
        lambda: (dpp_gains, (_x(6, 4),), {"log_quality": _x(2, 3), **_offsets(0, 2, 6)}),
        ValueError,
        r"log_quality: wanted shape \(6\), got \(2, 3\)",
    ),
    (
        "log_quality infinite",
        lambda: (dpp_gains, (_x(2, 3, 4),), {"log_quality": torch.full((2, 3), -math.inf)}),
        ValueError,
        "log_quality: wanted finite values, got 6",
    ),
    (
        "log_quality int",
        lambda: (dpp_gains, (_x(2, 3, 4),), {"log_quality": torch.ones(2, 3, dtype=torch.int32)}),
        TypeError,
        "log_quality: wanted float16",
    ),
    (
        "offsets fall",
        lambda: (dpp_gains, (_x(6, 4),), _offsets(0, 4, 2, 6)),
        ValueError,
        "offsets: .*never fall",
    ),
    (
        "offsets end",
        lambda: (dpp_gains, (_x(6, 4),), _offsets(0, 4, 7)),
        ValueError,
        "offsets: wanted .*0 to 6",
    ),
    (
        "offsets start",
        lambda: (dpp_logdet, (_x(6, 4),), _offsets(1, 6)),
        ValueError,
        "offsets: wanted .*0 to 6",
    ),
    (
        "empty group",
        lambda: (dpp_gains, (_x(6, 4),), _offsets(0, 3, 3, 6)),
        ValueError,
        "offsets: .*an empty group",
    ),
    (
        "offsets dtype",
        lambda: (dpp_gains, (_x(6, 4),), _offsets(0, 6, dtype=torch.int16)),
        TypeError,
        "offsets: wanted int32 or int64, got torch.int16",
    ),
    (
        "normalize",
        lambda: (dpp_gains, (_x(2, 3, 4),), {"normalize": 1}),
        TypeError,
        "normalize: wanted a bool, got int",
    ),
    (
        "backend",
        lambda: (dpp_gains, (_x(2, 3, 4),), {"backend": "fortran"}),
        ValueError,
        "backend: wanted .*got 'fortran'",
    ),
    ("n = 0", lambda: (dpp_select, (_x(2, 3, 4), 0), {}), ValueError, "n: wanted an int of at least 1"),
    ("n above k", lambda: (dpp_select, (_x(2, 3, 4), 4), {}), ValueError, "n: wanted .*at most 3, got 4"),
    (
        "n above the smallest group",
        lambda: (dpp_select, (_x(6, 4), 3), _offsets(0, 2, 6)),
        ValueError,
        "n: wanted .*at most 2, got 3",
    ),
    ("n a float", lambda: (dpp_select, (_x(2, 3, 4), 2.0), {}), TypeError, "n: wanted an int, got float"),
]
