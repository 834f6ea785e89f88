"""The rows of test_logps_extremes through the Triton kernels, on the GPU or in the interpreter."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only")

from test_logps_extremes import (
    HEADS,
    INF,
    ROWS,
    always_sampled,
    check_broken_head,
    check_broken_logits,
    compared,
    from_logits,
    judge,
)
from test_logps_triton import path  # noqa: F401

import qempo_fast as qf
from qempo_fast import reference
from qempo_fast.kernels import _launch
from qempo_fast.kernels.linear_logps_select import select_columns
from qempo_fast.kernels.linear_logps_tiles import tile_fwd

BY_NAME = {h.why: h for h in HEADS}
# Few: each takes seconds in the interpreter.
CASES = [
    ("plain", torch.float32, "exact"),
    ("bias least at the first tiles", torch.float32, "sampled"),
    ("bias -1e+09 everywhere", torch.float32, "sampled"),
    ("cap 1e+06", torch.bfloat16, "exact"),
]


@pytest.mark.parametrize(("head", "dtype", "mode"), CASES, ids=str)
def test_linear_logps(
    head: str,
    dtype: torch.dtype,
    mode: str,
    path: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    if path == "fused" and dtype == torch.bfloat16 and _launch.architecture(device) == "interpreter":
        pytest.skip("Triton's interpreter multiplies bfloat16 by its bit patterns")
    always_sampled(monkeypatch)
    with device:
        wrong = compared(BY_NAME[head], dtype, "triton", mode)
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logps_from_logits(dtype: torch.dtype, device: torch.device) -> None:
    with device:
        truth = from_logits(ROWS, dtype, torch.float64, reference.logps_from_logits)
        plain = from_logits(ROWS, dtype, dtype, reference.logps_from_logits)
        ours = from_logits(ROWS, dtype, dtype, qf.logps_from_logits, backend="triton")
    wrong = judge(ROWS, dtype, ours, plain, truth)
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize(
    ("columns", "value"), [("first tile", math.nan), ("one, middle", math.nan), ("one, last", INF)]
)
def test_a_broken_logit_breaks_its_row_and_no_other(columns: str, value: float, device: torch.device) -> None:
    check_broken_logits("triton", columns, value, device)


@pytest.mark.parametrize(
    ("columns", "mode", "entropy"),
    [
        ("first tile", "exact", True),
        ("first tile", "sampled", True),
        ("one, last", "sampled", False),
        ("hidden", "sampled", True),
    ],
    ids=str,
)
def test_a_broken_head_breaks_all_that_it_reaches(
    columns: str,
    mode: str,
    entropy: bool,
    path: str,  # noqa: F811
    device: torch.device,
) -> None:
    check_broken_head("triton", columns, mode, entropy, device)


@pytest.mark.parametrize("value", [math.nan, INF])
def test_a_broken_bound_keeps_every_column(value: float, device: torch.device) -> None:
    columns = torch.full((1, 3, 50), -40.0, device=device)
    columns[0, 1, 9] = value
    forced = torch.zeros(1, 50, dtype=torch.uint8, device=device)
    for mean_entropy in (None, torch.ones(1, device=device)):
        index, inverse, counts = select_columns(columns, forced, 0.1, mean_entropy, 0, range(1), 0)
        assert counts.tolist() == [[1.0, INF]]
        assert (index[0, 0].item(), inverse[0, 0].item()) == (9, 1.0)


def test_bounds_far_from_0_are_bounds(device: torch.device) -> None:
    z = torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 2, device=device) + 2.0**22
    targets = torch.zeros(2, dtype=torch.int64, device=device)
    columns = torch.empty(1, 8, device=device)
    stats = [torch.full((2,), x, device=device) for x in (-INF, 0.0, -INF)]
    vectors = [stats[0], stats[1], None, None, stats[2]]
    for v in (0, 4):
        tile_fwd(z, None, None, targets, vectors, torch.full((2,), -INF, device=device), columns, v, 1.0, None)
    # The log-sum-exp is rounded, to multiples of a half there, but never up.
    above = columns[0].double().cpu() - torch.log_softmax(torch.arange(4.0, dtype=torch.float64), 0).repeat(2)
    assert (above >= 0).all()
    assert (above <= 0.5).all()
