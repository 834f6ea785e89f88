"""What a user reads where the native module is missing, does not load, or is told a word that it does not know."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qempo_fast

PACKAGE = Path(qempo_fast.__file__).parent


def last_line(*command: str, folder: Path, **variables: str) -> str:
    """What Python says last. -S: no site-packages, whose editable install would lend its native module."""
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-S", *command], capture_output=True, text=True, cwd=folder, env=environment, timeout=60
    )
    return (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The source tree as git makes it: no native module in the package."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "qempo_fast").mkdir()
    shutil.copy(PACKAGE / "__init__.py", tmp_path / "qempo_fast")
    return tmp_path


@pytest.mark.parametrize("module", ["qempo_fast", "qempo_fast.losses"])
def test_the_source_tree_says_what_it_is(clone: Path, module: str) -> None:
    said = last_line("-c", f"import {module}", folder=clone)
    assert said.startswith("ImportError: ")
    assert "is the source tree without its native module: `make setup`, or `pip install .`" in said
    assert "circular" not in said


def test_a_module_of_another_python_is_named(clone: Path) -> None:
    (clone / "qempo_fast" / "_C.cpython-37m-x86_64-linux-gnu.so").touch()
    said = last_line("-c", "import qempo_fast", folder=clone)
    assert "without its native module for this Python, with _C.cpython-37m-x86_64-linux-gnu.so" in said


def test_an_installation_without_it_is_no_source_tree(clone: Path) -> None:
    (clone / "csrc").rmdir()
    said = last_line("-c", "import qempo_fast", folder=clone)
    assert "is without its native module: install it again" in said


def test_a_module_that_does_not_load_says_why_itself(clone: Path) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (clone / "qempo_fast" / f"_C{suffix}").write_text("no library")
    said = last_line("-c", "import qempo_fast", folder=clone)
    assert "source tree" not in said
    assert f"_C{suffix}" in said


_ISA = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("qempo_fast._C", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
{first}
print(native.isa(), *native.isas())
"""


def isa(value: str, folder: Path, first: str = "") -> str:
    spec = importlib.util.find_spec("qempo_fast._C")
    assert spec is not None
    assert spec.origin is not None
    return last_line("-c", _ISA.format(first=first), spec.origin, folder=folder, QEMPO_CPU_ISA=value)


def test_an_instruction_set_that_is_none_is_refused(tmp_path: Path) -> None:
    wanted = "ValueError: QEMPO_CPU_ISA: wanted baseline, avx2 or avx512, got "
    assert isa("sse9", tmp_path) == f"{wanted}sse9"
    assert isa("AVX2", tmp_path) == f"{wanted}AVX2"
    # Each call says so, not the first alone.
    again = "try:\n    native.isa()\nexcept ValueError:\n    pass"
    assert isa("sse9", tmp_path, again) == f"{wanted}sse9"


def test_an_instruction_set_bounds_what_runs(tmp_path: Path) -> None:
    chosen, *known = isa("", tmp_path).split()
    assert chosen == known[-1]
    for level in ("baseline", "avx2", "avx512"):
        # A level above the processor's is no fault: one value serves machines of several kinds.
        assert isa(level, tmp_path).split()[0] == (level if level in known else chosen)


def test_info_shows_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from qempo_fast import _C

    # Not `from qempo_fast.cli import info`, which is the command.
    info = importlib.import_module("qempo_fast.cli.info")

    def refuse() -> str:
        raise ValueError("QEMPO_CPU_ISA: wanted baseline, avx2 or avx512, got sse9")

    monkeypatch.setattr(_C, "isa", refuse)
    assert dict(info._native())["native code"] == "refused: QEMPO_CPU_ISA: wanted baseline, avx2 or avx512, got sse9"
