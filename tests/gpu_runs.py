"""What the tests of bench/gpu/run.sh share: a clean machine, a run of the script, its lines."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_modules import ROOT

# What the script starts; git is not among them.
TOOLS = ("bash", "cat", "cp", "date", "dirname", "env", "mkdir", "mktemp", "realpath", "rm", "tar", "tee")


def clean_environment(home: Path, **env: str) -> dict[str, str]:
    """Of a machine where nothing is set; what a run leaves behind would lie in this home."""
    for name in ("home", "tmp", "bin"):
        (home / name).mkdir(parents=True, exist_ok=True)
    for tool in TOOLS:
        with contextlib.suppress(FileExistsError):
            (home / "bin" / tool).symlink_to(str(shutil.which(tool)))
    places = {"HOME": str(home / "home"), "TMPDIR": str(home / "tmp"), "PATH": str(home / "bin")}
    return {**places, "OUT": str(home / "out"), "PYTHON": sys.executable, "KIT": "", "REHEARSE": "1", **env}


def start(home: Path, *words: str, tree: Path = ROOT, **env: str) -> subprocess.Popen[str]:
    script = str(tree / "bench" / "gpu" / "run.sh")
    return subprocess.Popen(
        [shutil.which("bash") or "bash", script, *words], env=clean_environment(home, **env),
        cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str], seconds: float = 280) -> tuple[str, str]:
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def lines(home: Path) -> list[dict[str, Any]]:
    """Every line of the results; raises where one is not whole."""
    text = (home / "out" / "results.jsonl").read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def of(rows: list[dict[str, Any]], kind: str, **columns: Any) -> list[dict[str, Any]]:
    return [r for r in rows if r["kind"] == kind and all(r.get(k) == v for k, v in columns.items())]
