"""Greedy selection of diverse subsets."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import dpp_select_cases as selection
import pytest
import torch
from dpp_cases import draw, plain

from qempo_fast import _C, _backends
from qempo_fast import dpp_select as public

Choose = Callable[..., torch.Tensor]
CPU = torch.device("cpu")


@pytest.fixture(params=["reference", "cpu"])
def dpp_select(request: pytest.FixtureRequest) -> Choose:
    return functools.partial(public, backend=request.param)


@pytest.fixture(params=_C.isas())
def kernel(request: pytest.FixtureRequest) -> Iterator[Choose]:
    """The C++ kernel on each instruction set."""
    best = _C.isa()
    _C.use_isa(request.param)
    yield _backends.kernel("dpp_select", CPU, "cpu")
    _C.use_isa(best)


@pytest.mark.parametrize("case", selection.CASES, ids=lambda case: case.why)
def test_kernel_against_the_reference(case: selection.Case, kernel: Choose) -> None:
    selection.check_select_case(kernel, CPU, case)
    selection.check_select_case(kernel, CPU, case._replace(dtype=torch.float64))


@pytest.mark.parametrize("check", selection.CHECKS, ids=lambda check: check.__name__)
def test_kernel_check(check: Callable[..., None], kernel: Choose) -> None:
    check(kernel, CPU)


def test_threads_and_default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _backends.choose("dpp_select", CPU) == "cpu"
    x = draw(100, 9, 20)
    one = public(x, 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(public(x, 6), one)


def greedy(x: torch.Tensor, n: int, q: torch.Tensor, ridge: float) -> list[int]:
    """Each step by all determinants of the chosen set and one more."""
    matrix, chosen = plain(x, q, ridge), []
    for _ in range(n):
        rest = [i for i in range(len(q)) if i not in chosen]
        values = [float(torch.logdet(matrix[[*chosen, i]][:, [*chosen, i]])) for i in rest]
        chosen.append(rest[max(range(len(rest)), key=lambda j: (round(values[j], 9), -rest[j]))])
    return chosen


@pytest.mark.parametrize(("k", "d", "ridge"), [(7, 5, 1.0), (8, 3, 0.1), (6, 12, 2.0)])
def test_select_equals_determinants_step_by_step(k: int, d: int, ridge: float, dpp_select: Choose) -> None:
    x, q = draw(5, k, d), draw(5, k, seed=1)
    picks = dpp_select(x, k, log_quality=q, ridge=ridge)
    assert picks.dtype == torch.int64
    assert picks.tolist() == [greedy(x[g], k, q[g], ridge) for g in range(5)]
    assert torch.equal(dpp_select(x, 3, log_quality=q, ridge=ridge), picks[:, :3])


def test_select_by_hand(dpp_select: Choose) -> None:
    """Row 1 repeats row 0: the orthogonal row 2 comes second, the repetition last."""
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]])
    assert dpp_select(x, 3).tolist() == [[0, 2, 1]]
    assert dpp_select(x, 2, log_quality=torch.tensor([[0.0, 0.5, -3.0]])).tolist() == [[1, 0]]


def test_select_ties_go_to_the_lowest_index(dpp_select: Choose) -> None:
    x = torch.linalg.qr(draw(9, 9))[0][None, :6]
    assert dpp_select(x, 6).tolist() == [list(range(6))]
    assert dpp_select(draw(1, 5).expand(4, 5)[None], 4).tolist() == [[0, 1, 2, 3]]
    assert dpp_select(torch.zeros(1, 3, 2), 3).tolist() == [[0, 1, 2]]


def test_select_with_large_quality_skips_duplicates(dpp_select: Choose) -> None:
    row = draw(4, 6, dtype=torch.float32)
    x = torch.stack([row[0], row[0], row[1], row[0], row[2]])[None]
    q = torch.tensor([[1000.0, 999.0, 990.0, 1000.0, 5.0]])
    assert dpp_select(x, 3, log_quality=q).tolist() == [[0, 2, 4]]


def test_select_ragged_equals_a_loop(dpp_select: Choose) -> None:
    offsets = torch.tensor([0, 4, 10, 14], dtype=torch.int32)
    x, q = draw(14, 5), draw(14, seed=1)
    picks = dpp_select(x, 3, log_quality=q, offsets=offsets)
    loop = [
        dpp_select(x[None, a:b], 3, log_quality=q[None, a:b])[0].tolist()
        for a, b in itertools.pairwise(offsets.tolist())
    ]
    assert picks.tolist() == loop


def test_select_leaves_out_the_graph_and_its_inputs(dpp_select: Choose) -> None:
    x = draw(2, 4, 3).requires_grad_()
    before = x.detach().clone()
    assert not dpp_select(x, 2).requires_grad
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("offsets", [None, torch.tensor([0])])
def test_select_from_no_groups(offsets: torch.Tensor | None, dpp_select: Choose) -> None:
    x = torch.zeros(0, 4) if offsets is not None else torch.zeros(0, 3, 4)
    assert dpp_select(x, 1, offsets=offsets).shape == (0, 1)
