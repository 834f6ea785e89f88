"""The log-prob driver on Triton: several chunks at once, blocks of the vocabulary, odd tiles, TF32, launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only")

from test_logps import Case, Inputs, make, run
from test_logps_triton import place

import qempo_fast as qf
from qempo_fast import reference
from qempo_fast.logps import triton as pass_triton
from qempo_fast.logps._head import HeadTensors
from qempo_fast.logps._options import ERROR, Options
from qempo_fast.logps._policy import POLICIES, Policy
from qempo_fast.logps._row_stats import RowStats

PLAIN = Options(1.0, None, False, False, None, 0, None)
# Launches of a step at N = 2048, D = 576, V = 49152 in bfloat16, forward and backward. They were 85 + 68 sampled and
# 38 + 90 exact. One forward launch of N entries keeps the log-sum-exp in two parts (docs/linear_logps.md).
LAUNCHES = {
    "sampled": {"forward": 26, "backward": 31}, "chosen": {"forward": 167, "backward": 31},
    "exact": {"forward": 19, "backward": 19},
}  # fmt: skip


def on_triton(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    for arch in POLICIES:
        monkeypatch.setitem(POLICIES, arch, policy)


def sampled(x: Inputs, dtype: torch.dtype, tau: float) -> tuple[dict[str, torch.Tensor], tuple[int, ...], int]:
    torch.manual_seed(4)
    found = run(qf.linear_logps, x, dtype, grad="sampled", tau=tau, backend="triton")
    stats = qf.last_stats()
    assert stats is not None
    return found, stats.kept_columns, stats.exact_chunks


@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "entropy"])
def test_chunks_side_by_side_choose_as_each_alone(
    entropy: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    # 300 rows are counted: a block of two chunks and one of 44 rows; 12 columns in the last tile.
    x = place(make(Case("", 375, 6, 140, True, 20.0, 1.0, 0.9, entropy, 4.0), torch.float64), device)
    found = []
    for rows in (128, 256):
        on_triton(monkeypatch, Policy(0, rows, 128))
        found.append(sampled(x, torch.float64, 0.9 if entropy else 0.3))
    assert found[0][1:] == found[1][1:]
    assert len(found[0][1]) == 3
    assert found[0][2] == 0
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_threshold_chosen_on_triton_keeps_to_its_error(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    # Two blocks of two chunks, the last one short; the first chunk's rows are flat.
    on_triton(monkeypatch, Policy(0, 96, 48))
    x = place(make(Case("", 210, 16, 900, temperature=0.9, spread=8.0), dtype), device)
    x.hidden[:60] = 0
    exact = run(qf.linear_logps, x, dtype, grad="exact", backend="triton")
    found = run(qf.linear_logps, x, dtype, grad="sampled", backend="triton")
    stats = qf.last_stats()
    assert stats is not None
    assert stats.error is not None
    assert stats.tau is not None
    assert stats.error <= ERROR[dtype]
    assert stats.exact_chunks < len(stats.kept_columns) == 4
    off = (found["dhidden"].double() - exact["dhidden"].double()).norm() / exact["dhidden"].double().norm()
    # Both are rounded.
    assert 0 < off < 1.1 * ERROR[dtype] + (torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_blocks_of_the_vocabulary_change_nothing_on_triton(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    x = place(make(Case("", 150, 6, 600, temperature=0.9, spread=16.0), dtype), device)
    x.grads[0][60:70] = 0
    x.hidden[:60] = 0  # the first chunk is past break-even, as long as rows stay where they are
    monkeypatch.setattr(pass_triton.TritonPass, "ordered", lambda *_: False)
    found = []
    # Three blocks of 256 columns at most, of two tiles, against one.
    for total, gathered in ((4 * 6 * 256, 6 * 6 * 128), (2**30, 2**30)):
        on_triton(monkeypatch, Policy(0, 48, 48, gathered, total))
        found.append(sampled(x, dtype, 2e-3))
    assert found[0][1:] == found[1][1:]
    assert found[0][2] == 1
    assert max(found[0][1][1:]) > 200
    for name, value in found[0][0].items():
        other = found[1][0][name].double()
        assert (value.double() - other).norm() <= 4 * torch.finfo(dtype).eps * other.norm(), name


@pytest.mark.parametrize("grad", ["exact", "sampled"])
def test_rows_of_odd_tiles_start_at_16_bytes(grad: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    strides: list[int] = []
    for name in ("tile_fwd", "tile_bwd"):
        kernel = getattr(pass_triton, name)
        monkeypatch.setattr(
            pass_triton, name, lambda z, *a, kernel=kernel, **k: (strides.append(z.stride(0)), kernel(z, *a, **k))
        )
    x = place(make(Case("odd V", 30, 8, 333, spread=3.0), torch.float16), device)
    truth = run(reference.linear_logps, x, torch.float64)
    ours = run(qf.linear_logps, x, torch.float16, grad=grad, tau=None if grad == "exact" else 1e-6, backend="triton")
    assert len(strides) >= 4
    assert not any(s % 8 for s in strides)
    for name, value in ours.items():
        assert (value.double() - truth[name]).norm() <= 4e-3 * truth[name].norm(), name


def test_kept_logits_are_kept_where_the_fused_kernel_would_run(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    for arch in pass_triton._FUSED_ROWS:
        monkeypatch.setitem(pass_triton._FUSED_ROWS, arch, 64)
    x = place(make(Case("", 20, 8, 333), torch.float32), device)
    found = []
    for budget in ("1", "0"):
        monkeypatch.setenv("QEMPO_KEEP_LOGITS", budget)
        found.append(run(qf.linear_logps, x, torch.float32, grad="exact", backend="triton"))
        stats = qf.last_stats()
        assert stats is not None
        assert stats.kept_logits == (budget == "1")
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("setting", ["fp32_precision", "allow_tf32"])
def test_tf32_keeps_float32_off_the_fused_kernel(
    setting: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    launched: list[str] = []
    monkeypatch.setattr(pass_triton, "fused_fwd", lambda *a: launched.append("fused"))
    for arch in pass_triton._FUSED_ROWS:
        monkeypatch.setitem(pass_triton._FUSED_ROWS, arch, 64)
    matmul = torch.backends.cuda.matmul
    if setting == "fp32_precision" and not hasattr(matmul, setting):
        pytest.skip("before torch 2.9")
    before = getattr(matmul, setting)

    def ways() -> list[bool]:
        out = []
        for dtype in (torch.float32, torch.float16):
            head = HeadTensors(torch.randn(3, 4).to(dtype), torch.randn(9, 4).to(dtype), None, torch.arange(3), None)
            stats = RowStats.new(3, torch.float32, torch.device("cpu"), False, False)
            out.append(pass_triton.TritonPass().fused(head, stats, None, None, PLAIN))
        return out

    assert ways() == [True, True]
    try:
        setattr(matmul, setting, "tf32" if setting == "fp32_precision" else True)
        assert ways() == [False, True]
    finally:
        setattr(matmul, setting, before)
    assert len(launched) == 3


def test_launches_of_a_step(tmp_path: Path) -> None:
    """At SmolLM2's shape, bfloat16; at most half of the 154 that a sampled step had, and of the 128 of an exact one."""
    tool, found = Path(__file__).parent.parent / "bench" / "gpu" / "launches.py", tmp_path / "found.jsonl"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", str(tool), "--no-time", "--json", str(found)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {row["mode"]: row for row in map(json.loads, found.read_text().splitlines())}
    for mode, limits in LAUNCHES.items():
        for part, limit in limits.items():
            counted = rows[mode][part]
            assert counted["triton"] + counted["torch"] <= limit, counted["ops"]
            # Two GEMMs at least, or it has not run.
            assert counted["ops"]["mm"] >= 2
