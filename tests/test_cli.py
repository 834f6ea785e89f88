"""The command line, run as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import qempo_fast
from qempo_fast.cli import app
from qempo_fast.cli.info import _VARIABLES


def run(*args: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qempo_fast", *args],
        env={**os.environ, "COLUMNS": "240", **env},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def test_help_names_every_command(tmp_path: Path) -> None:
    done = run("--help", folder=tmp_path)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("info", "demo", "bench", "compile"))


def test_info_says_what_runs_and_why(tmp_path: Path) -> None:
    done = run("info", folder=tmp_path, QEMPO_CPU_ISA="baseline", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    for fact in (
        qempo_fast.__version__,
        torch.__version__,
        "instruction set baseline of baseline",
        "1 (torch.get_num_threads)",
    ):
        assert fact in done.stdout
    for row in qempo_fast.backends():
        assert row.op in done.stdout
    environment = next(line for line in done.stdout.splitlines() if "QEMPO_CPU_ISA" in line)
    assert "baseline" in environment.split("│")[2]


def test_info_lists_every_environment_variable_that_is_read() -> None:
    root = Path(__file__).resolve().parents[1]
    sources = [p for folder in ("qempo_fast", "kernels", "csrc") for p in (root / folder).rglob("*.*")]
    text = "\n".join(p.read_text() for p in sources if p.suffix in {".py", ".cpp", ".h", ".cu"})
    read = set(re.findall(r"(?:environ\.get\(|environ\[|environment\(|getenv\()\s*\"(QEMPO_\w+)\"", text))
    assert {"QEMPO_BACKEND", "QEMPO_CPU_ISA"} <= read
    assert {name for name in _VARIABLES if name.startswith("QEMPO_")} == read


def test_info_says_why_a_backend_is_passed_over(tmp_path: Path) -> None:
    done = run("info", folder=tmp_path, QEMPO_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    rows = [line.split("│") for line in done.stdout.splitlines()]
    cpu_rows = [[cell.strip() for cell in row] for row in rows if len(row) == 6 and row[2].strip() == "cpu"]
    assert cpu_rows
    assert all(row[3] == "reference" and row[4].startswith("cpu:") for row in cpu_rows)


@pytest.mark.parametrize("args", [["train"], ["compile", "--no-such-option"], ["demo", "--steps", "0"]])
def test_wrong_arguments_exit_with_2(args: list[str], tmp_path: Path) -> None:
    done = run(*args, folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_demo_hands_its_options_on_and_returns_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    demo = types.ModuleType("qempo_fast.demo")
    demo.main = lambda **options: calls.append(options) or 130
    monkeypatch.setitem(sys.modules, "qempo_fast.demo", demo)
    options = [
        "--quick",
        "--out",
        "here",
        "--seed",
        "3",
        "--method",
        "grpo",
        "--method",
        "dqo",
        "--steps",
        "4",
    ]
    done = CliRunner().invoke(app, ["demo", *options])
    assert done.exit_code == 130
    CliRunner().invoke(app, ["demo"])
    assert calls == [
        {"quick": True, "out": Path("here"), "seed": 3, "methods": ["grpo", "dqo"], "steps": 4},
        {"quick": False, "out": Path("demo-out"), "seed": 0, "methods": None, "steps": None},
    ]


def test_the_console_script_is_installed() -> None:
    script = Path(sys.executable).parent / "qempo-fast"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, "demo" in done.stdout) == (0, True)
