"""batch_invariant=True in the Triton passes: no split, block or column depends on the number of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only")

from test_logps_invariant import KINDS, assert_same_bits, batches, rows

import qempo_fast as qf
from qempo_fast.kernels import linear_logps_tiles
from qempo_fast.logps import triton as pass_triton
from qempo_fast.logps._policy import POLICIES


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16, float32 logits"])
@pytest.mark.parametrize("budget", ["0", ""], ids=["logits again", "logits kept"])
def test_any_batch_has_the_same_bits(
    kind: str, budget: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setenv("QEMPO_KEEP_LOGITS", budget)
    # Where the fused kernel could run, and few rows have another block and split.
    for arch in pass_triton._FUSED_ROWS:
        monkeypatch.setitem(pass_triton._FUSED_ROWS, arch, 64)
    monkeypatch.setattr(linear_logps_tiles, "processors", lambda device: 4)
    dtype, how = KINDS[kind]
    x = rows(dtype, kind == "float32", 8, 160, str(device))
    count = 30 if kind == "float32" and budget else 5
    assert_same_bits(x, count, 16, grad="exact", backend="triton", **how)


@pytest.mark.parametrize("tau", [0.05, None], ids=["tau", "chosen"])
def test_a_sampled_step_scores_alike(tau: float | None, device: torch.device) -> None:
    x = rows(torch.float32, False, 8, 160, str(device))
    how: dict[str, Any] = {"batch_invariant": True, "backend": "triton"}
    wanted = qf.linear_logps(x.hidden, x.weight, x.targets, **how).logps
    for index in list(batches(4))[1:]:
        out = qf.linear_logps(
            x.hidden[index].requires_grad_(), x.weight, x.targets[index], grad="sampled", tau=tau, **how
        )
        assert torch.equal(out.logps.detach(), wanted[index])


@pytest.mark.parametrize("arch", POLICIES)
def test_columns_depend_on_no_rows(arch: str) -> None:
    policy = POLICIES[arch]
    sizes = [policy.fixed(policy.exact(n, 2), 2) for n in (1, 300, 9000)]
    sizes += [policy.fixed(policy.sampled(n, 576, 2, 128), 2) for n in (1, 300, 9000)]
    assert len({s.columns for s in sizes}) == 1
    assert all(s.rows * s.columns * 2 <= max(policy.tile, 2 * s.rows * 128) for s in sizes)
