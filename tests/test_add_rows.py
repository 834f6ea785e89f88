"""The sum of rows that arrive by index, and its write-out: Triton kernels on the GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only")

from qempo_fast.kernels import _launch
from qempo_fast.kernels.add_rows import add_rows, rows_out

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_rounded(out: torch.Tensor, wanted: torch.Tensor) -> None:
    if out.dtype == torch.bfloat16 and _launch.architecture(out.device) == "interpreter":
        # Triton's interpreter cuts bits off where a GPU rounds.
        torch.testing.assert_close(out.float(), wanted, rtol=2.0**-7, atol=0)
    else:
        assert torch.equal(out, wanted.to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 2048 + 5], ids=["one", "odd", "one step", "two steps"])
def test_rows_are_added_as_index_add_adds_them(dtype: torch.dtype, width: int, device: torch.device) -> None:
    # Rows 2, 5 and 9 are never named; 0 is named thrice, and -0 must stay what it is in a row stored once.
    total = torch.full((11, width), torch.nan, device=device)
    seen = torch.zeros(11, dtype=torch.uint8, device=device)
    wanted, named = torch.zeros(11, width, device=device), torch.zeros(11, dtype=torch.bool, device=device)
    for at in ([0, 3, 10], [10, 0], [8, 1, 0, 4, 6, 7]):
        rows = torch.randn(len(at), width, device=device).to(dtype)
        rows[-1, 0] = -0.0
        index = torch.tensor(at, device=device)
        before = rows.clone()
        add_rows(total, index, rows, seen)
        assert torch.equal(rows, before)
        wanted.index_add_(0, index, rows.float())
        named[index] = True
    assert torch.equal(seen.bool(), named)
    assert torch.equal(total[named], wanted[named])
    assert total[~named].isnan().all()
    assert total[7, 0].signbit()


def test_rows_in_a_row_and_with_strides(device: torch.device) -> None:
    wide = torch.randn(3, 20, device=device)
    rows = wide[:, 2:19]  # 20 apart, not at 16 bytes
    total = torch.randn(9, 24, device=device)[:, :17]
    seen = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.uint8, device=device)
    wanted = total.clone()
    wanted[3:6] = rows + torch.tensor([[0.0], [1.0], [0.0]], device=device) * total[3:6]
    add_rows(total, 3, rows, seen)
    assert torch.equal(total, wanted)
    assert seen.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    add_rows(total, torch.zeros(0, dtype=torch.int64, device=device), rows[:0], seen)
    assert torch.equal(total, wanted)


def test_the_order_of_calls_is_the_order_of_the_sum(device: torch.device) -> None:
    # (1e8 + 1) - 1e8 is 0 in float32, (1e8 - 1e8) + 1 is 1.
    at = torch.zeros(1, dtype=torch.int64, device=device)
    for values, wanted in (([1e8, 1.0, -1e8], 0.0), ([1e8, -1e8, 1.0], 1.0)):
        total = torch.full((1, 1), torch.nan, device=device)
        seen = torch.zeros(1, dtype=torch.uint8, device=device)
        for value in values:
            add_rows(total, at, torch.tensor([[value]], device=device), seen)
        assert total.item() == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 2048 + 5])
def test_each_row_is_written_once(dtype: torch.dtype, width: int, device: torch.device) -> None:
    total = torch.randn(4, width, device=device)
    total[1], total[2] = torch.nan, torch.inf
    seen = torch.tensor([1, 0, 1, 1], dtype=torch.uint8, device=device)
    place = torch.tensor([3, -1, 0, 1, -1, 2], device=device)
    out = torch.full((6, width + 3), torch.nan, device=device).to(dtype)
    rows_out(out[:, :width], total, seen, place)
    wanted = torch.zeros(6, width, device=device)
    wanted[[0, 2, 5]] = total[[3, 0, 2]]
    assert_rounded(out[:, :width], wanted)
    assert out[:, width:].isnan().all()
    same = torch.full((4, width), torch.nan, device=device).to(dtype)
    rows_out(same, total, seen, None)
    wanted = total.clone()
    wanted[1] = 0
    assert_rounded(same, wanted)
    rows_out(same[:0], total, seen, None)
