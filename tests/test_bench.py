"""The benchmarks run: tiny cases by subprocess, results checked against float64 before a row is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
MODES = {"forward", "backward", "full"}


def _run(script: str, *words: str, cwd: Path) -> subprocess.CompletedProcess:
    # From another folder: the repository's root must not be on sys.path.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCH / script), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def test_dpp(tmp_path: Path) -> None:
    names = ["qempo_fast cpu", "qempo_fast reference", "eager inv", "eager cholesky", "python loop"]
    out = tmp_path / "dpp.json"
    done = _run("bench_dpp.py", "--tiny", "--rounds", "2", "--json", str(out), "--providers", *names, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"cpu", "threads", "torch", "qempo_fast", "commit", "load_before", "load_after"} <= result.keys()
    for case in {r["case"] for r in result["rows"]}:
        for name in names:
            rows = [r for r in result["rows"] if (r["case"], r["provider"]) == (case, name)]
            assert {r["mode"] for r in rows} == MODES
            for row in rows:
                assert 0 < row["median_ms"] <= row["p80_ms"]
                assert 0 <= row["error_grad"] < 1e-4
                assert row["ratio_to_best_peer"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logps(tmp_path: Path, dtype: str) -> None:
    names = ["qempo_fast sampled", "qempo_fast exact", "plain torch", "Liger"]
    out = tmp_path / "logps.json"
    words = ["--n", "0", "--dtype", dtype, "--threads", "1", "--rounds", "2", "--cache", str(tmp_path)]
    done = _run("bench_logps.py", *words, "--json", str(out), "--providers", *names, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    for name in names[:3]:
        mine = [r for r in rows if r["provider"] == name]
        assert {r["mode"] for r in mine} == MODES
        assert all(r["error_weight"] < 0.04 for r in mine)
    liger = [r for r in rows if r["provider"] == "Liger"]
    assert len(liger) == 1
    assert "GPU" in liger[0]["reason"]
    assert "median_ms" not in liger[0]


def test_memory(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    words = [
        "--n",
        "0",
        "--threads",
        "1",
        "--cache",
        str(tmp_path),
        "--memory",
        "--providers",
        "qempo_fast exact",
        "Liger",
    ]
    done = _run("bench_logps.py", *words, "--json", str(out), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["provider"] == "qempo_fast exact"
    assert row["memory_mib"] > 0


def test_wrong_results_are_not_timed(tmp_path: Path) -> None:
    """A provider whose gains are off by 1e-3 is refused by name."""
    code = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r})\n"
        "import bench_dpp\n"
        "right = bench_dpp.eager_inv\n"
        "bench_dpp.PROVIDERS['eager inv'] = ('peer', lambda: lambda x: right(x) + 1e-3)\n"
        "case = bench_dpp.TINY[0]\n"
        "bench_dpp.checked('eager inv', case, *bench_dpp.inputs(case))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "eager inv, G=16 k=4 d=24: error_gains" in done.stderr


def test_pages_match_the_results(tmp_path: Path) -> None:
    """The tables of docs/ are those that report.py makes from the committed results."""
    done = _run("report.py", "--check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
