"""Triton kernels of the DPP op against the float64 reference, on the GPU or in the interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only")

import dpp_select_cases as selection
from dpp_cases import draw
from dpp_kernel_cases import (
    CASES,
    CHECKS,
    DEPENDENT,
    WRONG,
    Case,
    check_case,
    check_dependent,
    check_large_ragged_groups,
    check_wrong_offsets,
)

from qempo_fast import _dpp_gpu
from qempo_fast.dpp import dpp_gains, dpp_logdet
from qempo_fast.kernels.dpp import split_ridge

# Triton's interpreter computes both sides of a `where`, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LAUNCH = _dpp_gpu.triton_launchers()
FWD, SELECT = functools.partial(_dpp_gpu.dpp_fwd, LAUNCH), selection.select_by(LAUNCH)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_against_float64_and_plain_torch(case: Case, device: torch.device) -> None:
    check_case(FWD, device, case)


@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_rows(name: str, device: torch.device) -> None:
    check_dependent(FWD, device, name)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check(check: Callable[..., None], device: torch.device) -> None:
    check(FWD, device)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_offsets(name: str, device: torch.device) -> None:
    check_wrong_offsets(FWD, device, name)


def test_large_ragged_groups(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    check_large_ragged_groups(FWD, device, monkeypatch)


@pytest.mark.parametrize("case", selection.CASES, ids=lambda case: case.why)
def test_selection(case: selection.Case, device: torch.device) -> None:
    selection.check_select_case(SELECT, device, case)


@pytest.mark.parametrize("check", [*selection.CHECKS, selection.check_broken_groups], ids=lambda check: check.__name__)
def test_selection_check(check: Callable[..., None], device: torch.device) -> None:
    check(SELECT, device)


@pytest.mark.parametrize("name", WRONG)
def test_selection_by_wrong_offsets(name: str, device: torch.device) -> None:
    selection.check_wrong_offsets(SELECT, device, name)


def test_selection_of_unread_sizes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    selection.check_groups_that_are_too_small_or_too_large(SELECT, device, monkeypatch)


@pytest.mark.parametrize("ridge", [1.0, 0.3, 1e-300, 7e200])
def test_ridge_reaches_a_kernel_with_48_bits(ridge: float) -> None:
    high, low, exponent = split_ridge(ridge)
    assert float(torch.tensor(high, dtype=torch.float32)) == high
    single = float(torch.tensor(low, dtype=torch.float32))
    assert abs((high + single) * 2.0**exponent - ridge) <= 2.0**-48 * ridge


def test_public_op_by_name() -> None:
    """dpp_gains and dpp_logdet reach the kernels through the table of backends; a backend that cannot run says why."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = draw(2, 3, 4, dtype=torch.float32).to(device).requires_grad_()
    out = dpp_gains(x, backend="triton")
    (out.gains.sum() + dpp_logdet(x, backend="triton").sum()).backward()
    direct = FWD(x, None, None, 1.0, True)
    assert torch.equal(out.gains, direct.gains)
    assert torch.equal(out.baselines, direct.baselines)
    assert bool(x.grad.isfinite().all())
    with pytest.raises(ValueError, match="cuda does not run on cpu tensors"):
        dpp_gains(x.detach().cpu(), backend="cuda")
