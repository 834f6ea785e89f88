"""Launches repeated bitwise: RSPO's exchange of ranks and the losses' sum over programs, which racecheck cannot see."""

from __future__ import annotations

import pytest
import torch
from bench_modules import load

pytest.importorskip("triton", reason="Triton runs on Linux only")

# Triton's interpreter computes both sides of a `where`, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_every_launch_is_as_the_first(device: torch.device) -> None:
    """2000 of each case on a GPU, alone and on two streams among the others; in the interpreter 2 of small ones."""
    on_gpu = device.type == "cuda"
    rows = list(load("gpu.stress").stress(device, 2000 if on_gpu else 2, small=not on_gpu))
    assert len(rows) == 13
    for row in rows:
        assert row["different_alone"] == row["different_among"] == 0, row


def test_a_launch_that_differs_is_counted(device: torch.device) -> None:
    """One bit of one coefficient, and a NaN that was there before is no difference."""
    bench, results = load("gpu.stress"), []
    for low in (1.0, 1.0, 1.0000001, 1.0):
        results.append((torch.tensor(2.0, device=device), torch.tensor([float("nan"), low], device=device)))
    each = iter(results)
    case = bench.Compared(lambda: next(each))
    counts = []
    for _ in results[1:]:
        case.launch(case.different)
        counts.append(int(case.different))
    assert counts == [0, 1, 1]


def test_the_cases_have_several_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the one group of RSPO: a sum in one program would prove nothing."""
    from qempo_fast.kernels import loss_contrastive, loss_groups, loss_pairs, loss_risk, loss_tokens

    programs: list[int] = []
    for module in (loss_contrastive, loss_groups, loss_pairs, loss_risk, loss_tokens):
        monkeypatch.setattr(module, "launch", lambda kernel, n, *rest, **more: programs.append(n))
    calls = load("gpu.stress").cases(device, small=device.type != "cuda")
    for call in calls.values():
        call()
    assert dict(zip(calls, programs, strict=True)).pop("rspo one group") == 1
    assert sorted(programs)[1] > 1
