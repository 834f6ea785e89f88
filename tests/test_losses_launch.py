"""Losses past Triton's binder: the form launched is the one that Triton would take, with the same arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton runs on Linux only")


def test_the_form_is_tritons_own() -> None:
    # Here Triton is its interpreter, which compiles nothing; it became so when it was imported.
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "QEMPO_STANDIN")}
    script = Path(__file__).with_name("losses_launch.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    direct, by_triton = map(int, done.stdout.split())
    assert direct == by_triton > 100
