"""What every kernel of dpp_select must do: checks that take its function and the device to run on."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from dpp_cases import draw
from dpp_kernel_cases import WRONG

from qempo_fast.dpp import _gpu
from qempo_fast.reference.dpp import dpp_select

Select = Callable[..., torch.Tensor]


class Case(NamedTuple):
    why: str
    groups: int
    k: int
    d: int
    n: int
    dtype: torch.dtype = torch.float32
    quality: float | None = 1.0
    ridge: float = 1.0


# Sizes at both ends of each kernel's: up to 4, 8 and 16 rows a warp, above that a block.
CASES = [
    Case("a group of one", 9, 1, 5, 1),
    Case("all of four; more groups than a block's warps", 9, 4, 33, 4),
    Case("padding from 5 to 8, bfloat16", 3, 5, 67, 3, torch.bfloat16),
    Case("k = 8, float16, no log_quality", 2, 8, 64, 5, torch.float16, None),
    Case("more rows than columns, all of them, a small ridge", 3, 12, 4, 12, ridge=1e-3),
    Case("k = 16 exactly", 2, 16, 300, 16),
    Case("the smallest group of a block", 2, 17, 40, 9),
    Case("qualities e^300 apart", 3, 7, 9, 5, quality=300.0),
    Case("qualities that a double's exponent does not hold", 3, 20, 9, 9, quality=1000.0),
    Case("a ridge far below the qualities", 2, 6, 5, 6, ridge=1e-200),
    Case("a ridge far above them", 2, 6, 5, 6, ridge=1e7),
    Case("k = 64 exactly, all of them", 1, 64, 70, 64),
]


def chosen(
    select: Select, device: torch.device, x: Any, n: int, q: Any = None, offsets: Any = None, ridge: float = 1.0
) -> torch.Tensor:
    x, q, offsets = (None if t is None else t.to(device) for t in (x, q, offsets))
    picks = select(x, n, log_quality=q, offsets=offsets, ridge=ridge)
    assert picks.dtype == torch.int64
    assert picks.device == x.device
    return picks.cpu()


CPU = torch.device("cpu")
truth = functools.partial(chosen, dpp_select, CPU)


def check_select_case(select: Select, device: torch.device, case: Case) -> None:
    x = draw(case.groups, case.k, case.d, dtype=case.dtype)
    q = None if case.quality is None else (case.quality * draw(case.groups, case.k, seed=1)).float()
    ours = chosen(select, device, x, case.n, q, ridge=case.ridge)
    assert torch.equal(ours, truth(x.double(), case.n, q, ridge=case.ridge))


def check_repetitions(select: Select, device: torch.device) -> None:
    """Multiples of a row tie with it: the lowest index wins, at each step and at any size of the kernels."""
    for k, d in ((3, 40), (8, 9), (16, 130), (30, 20)):
        rows = draw(2, (k + 2) // 3, d, seed=k, dtype=torch.float32)
        x = torch.cat([rows, 4 * rows, rows / 2], 1)[:, :k]
        # More rows than columns at the end: no step may be decided by what rounding leaves.
        n = min(k, d)
        assert torch.equal(chosen(select, device, x, n), truth(x.double(), n))
    equal = draw(1, 5, dtype=torch.float32).expand(4, 5)[None]
    assert chosen(select, device, equal, 4).tolist() == [[0, 1, 2, 3]]
    assert chosen(select, device, torch.eye(20)[None], 20).tolist() == [list(range(20))]


def check_zero_rows(select: Select, device: torch.device) -> None:
    """A row of zeros is the zero vector whatever its quality: chosen last."""
    x, q = draw(1, 4, 5, dtype=torch.float32), torch.tensor([[0.0, 900.0, 1.0, 2.0]])
    x[0, 1] = 0
    assert chosen(select, device, x, 4, q)[0, -1] == 1
    assert chosen(select, device, torch.zeros(1, 3, 2), 3).tolist() == [[0, 1, 2]]


def check_large_quality(select: Select, device: torch.device) -> None:
    row = draw(4, 6, dtype=torch.float32)
    x = torch.stack([row[0], row[0], row[1], row[0], row[2]])[None]
    q = torch.tensor([[1000.0, 999.0, 990.0, 1000.0, 5.0]])
    assert chosen(select, device, x, 3, q).tolist() == [[0, 2, 4]]
    # Of a row and its repetition the second adds at most log 2: never before an independent row of such quality.
    x = draw(30, 6, 22, seed=2, dtype=torch.float32)
    x[:, 3] = x[:, 0]
    for level in (60.0, 500.0, 1000.0):
        picks = chosen(select, device, x, 5, (level + 5 * draw(30, 6, seed=3)).float())
        assert bool(((picks == 0) | (picks == 3)).sum(-1).eq(1).all()), level


def check_row_lengths(select: Select, device: torch.device) -> None:
    """Squares of these lengths leave float32."""
    x = draw(2, 6, 24, dtype=torch.float32)
    for scale in (1e-30, 1e30):
        assert torch.equal(chosen(select, device, x * scale, 6), truth(x.double(), 6))


def check_ragged(select: Select, device: torch.device) -> None:
    """Sizes on both sides of 16, then none above it."""
    for sizes in ([3, 5, 20, 16, 4, 17, 64], [3, 6]):
        bounds = [0, *itertools.accumulate(sizes)]
        x, q = draw(bounds[-1], 37, dtype=torch.float32), draw(bounds[-1], seed=1).float()
        for dtype in (torch.int32, torch.int64):
            picks = chosen(select, device, x, 3, q, torch.tensor(bounds, dtype=dtype), ridge=0.7)
            for g, (a, b) in enumerate(itertools.pairwise(bounds)):
                assert torch.equal(picks[g], truth(x[None, a:b].double(), 3, q[None, a:b], ridge=0.7)[0])


def check_no_groups(select: Select, device: torch.device) -> None:
    assert chosen(select, device, torch.zeros(0, 3, 4), 2).shape == (0, 2)
    assert chosen(select, device, torch.zeros(0, 4), 2, None, torch.tensor([0])).shape == (0, 2)


def check_inputs(select: Select, device: torch.device) -> None:
    """Non-contiguous inputs, left as they were, out of the graph."""
    x, q = draw(2, 12, 20, dtype=torch.float32)[:, ::2, 1::2], draw(6, 2, seed=1).half().T
    leaf, before = x.to(device).requires_grad_(), (x.clone(), q.clone())
    picks = chosen(select, device, leaf, 4, q)
    assert torch.equal(picks, truth(x.double(), 4, q))
    assert torch.equal(leaf.detach().cpu(), before[0])
    assert torch.equal(q, before[1])


def check_left_to_plain_torch(select: Select, device: torch.device) -> None:
    """Groups beyond 64 rows, equal and ragged, and float64."""
    for x, offsets in (
        (draw(2, 9, 4), None),
        (draw(1, 70, 9, dtype=torch.float32), None),
        (draw(75, 9, dtype=torch.float32), torch.tensor([0, 70, 75])),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QEMPO_CHECK", "1")  # sizes on a GPU are read only then
            picks = chosen(select, device, x, 5, None, offsets)
        assert torch.equal(picks, truth(x, 5, None, offsets))


CHECKS = [
    check_repetitions,
    check_zero_rows,
    check_large_quality,
    check_row_lengths,
    check_ragged,
    check_no_groups,
    check_inputs,
    check_left_to_plain_torch,
]


def check_broken_groups(select: Select, device: torch.device) -> None:
    """Values that are not finite, unchecked as on a GPU: -1 in that group alone."""
    for k in (4, 20):
        x, q = draw(6, k, 5, dtype=torch.float32), draw(6, k, seed=1).float()
        right = chosen(select, device, x, 3, q)
        for bad in (math.nan, math.inf):
            x[1, 2, 3] = bad
            q[4, 0] = bad
            picks = chosen(select, device, x, 3, q)
            assert picks[[1, 4]].tolist() == [[-1] * 3] * 2
            assert torch.equal(picks[[0, 2, 3, 5]], right[[0, 2, 3, 5]])


def check_wrong_offsets(select: Select, device: torch.device, name: str) -> None:
    """Unchecked offsets, as on a GPU: -1 in the wrong groups; the others stay right."""
    offsets, _, wrong = WRONG[name]
    x, groups = draw(24, 5, dtype=torch.float32), range(len(offsets) - 1)
    picks = chosen(select, device, x, 3, None, torch.tensor(offsets))
    for g in groups:
        right = [-1] * 3 if g in wrong else truth(x[None, offsets[g] : offsets[g + 1]], 3)[0].tolist()
        assert picks[g].tolist() == right


def check_groups_that_are_too_small_or_too_large(select: Select, device: torch.device, monkeypatch: Any) -> None:
    """Sizes that may not be read: -1 in groups of fewer than n rows and in those of more than 64."""
    monkeypatch.setattr("qempo_fast._check.readable", lambda _: False)
    x, offsets = draw(92, 9, dtype=torch.float32), torch.tensor([0, 3, 69, 74, 92])
    picks = chosen(select, device, x, 4, None, offsets)
    assert picks[:2].tolist() == [[-1] * 4] * 2
    assert torch.equal(picks[2:], truth(x[69:], 4, None, offsets[2:] - 69))


def select_by(launch: _gpu.Launchers) -> Select:
    return functools.partial(_gpu.dpp_select, launch)
