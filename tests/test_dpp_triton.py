"""Triton kernels of the DPP op against the float64 reference, on the GPU or in the interpreter."""

from __future__ import annotations

import functools
import inspect
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

from qempo_fast.dpp import _gpu, dpp_gains, dpp_logdet, triton
from qempo_fast.kernels.dpp import _dpp_bwd_kernel, _dpp_fwd_kernel
from qempo_fast.kernels.dpp_careful import _dpp_careful_kernel
from qempo_fast.kernels.dpp_select import _dpp_select_kernel

# Triton's interpreter computes both sides of a `where`, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LAUNCH = triton.LAUNCHERS
FWD, SELECT = functools.partial(_gpu.dpp_fwd, LAUNCH), selection.select_by(LAUNCH)


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


def test_ridge_is_a_double_to_the_compiler() -> None:
    """Triton passes a Python float as float32 where the kernel does not say otherwise; the interpreter never does."""
    for kernel in (_dpp_fwd_kernel, _dpp_careful_kernel, _dpp_select_kernel):
        assert inspect.signature(kernel.fn).parameters["ridge"].annotation == "tl.float64", kernel
    assert "ridge" not in inspect.signature(_dpp_bwd_kernel.fn).parameters


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
