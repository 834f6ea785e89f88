"""Machine code of the kernels, which Triton makes without a GPU: what bench/gpu/sass.py counts, and what must hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
from bench_modules import BENCH, load

pytest.importorskip("triton", reason="Triton runs on Linux only")

SCRIPT = BENCH / "gpu" / "sass.py"


@pytest.fixture(scope="module")
def sass() -> ModuleType:
    return load("gpu.sass")


def test_innermost_loops_and_the_shortest_way_through(sass: ModuleType) -> None:
    # 0: S2R; 10: outer loop from here: FADD; 20: inner loop: LDG, skip of two, FMUL, FMUL, back; 70: back to 10; trap.
    code = [
        (0x00, "S2R", "R0, SR_TID"),
        (0x10, "FADD", "R1, R1, R2"),
        (0x20, "LDG.E.128", "R4, desc[UR4][R2.64]"),
        (0x30, "BRA", "0x60"),
        (0x40, "FMUL", "R5, R5, R5"),
        (0x50, "FMUL", "R5, R5, R5"),
        (0x60, "BRA", "0x20"),
        (0x70, "BRA", "0x10"),
        (0x80, "EXIT", ""),
        (0x90, "BRA", "0x90"),
    ]
    (body,) = sass.loops(code)
    assert [at for at, _, _ in body] == [0x20, 0x30, 0x40, 0x50, 0x60]
    assert sass.shortest(body) == 3
    assert sass.loops(code[:3]) == [code[:3]]
    assert "    3 instructions,   1.5 an entry, 5 with all branches; 0 barriers" in sass.line(body, 2)
    assert sass.line(body, 2).endswith("1 LDG.128")


def test_the_hot_loops_have_wide_loads_and_no_barrier() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", SCRIPT, "add_rows", "rows_out", "_logps_rows", "_logps_columns"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    heads = re.findall(
        r"^(_\w+_kernel): (.*); \d+ warps, \d+ registers, (\d+) bytes spilled$", done.stdout, re.MULTILINE
    )
    bodies = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    assert {name for name, _, _ in heads} == {
        "_add_rows_kernel",
        "_rows_out_kernel",
        "_logps_rows_kernel",
        "_logps_columns_kernel",
    }
    assert len(bodies) == len(heads)
    for (name, form, spilled), body in zip(heads, bodies, strict=True):
        assert spilled == "0" or "fp64" in form, (name, form)
        assert " 0 barriers" in body, (name, form, body)
        assert " LDG.128" in body, (name, form, body)
        assert name in ("_logps_rows_kernel", "_logps_columns_kernel") or " STG.128" in body, (name, form, body)
        # A plain head in half precision, at 16 an entry for the rows and 12 for the columns once.
        if name.startswith("_logps") and "SOFTCAP" not in form and "fp64" not in form:
            assert float(re.search(r"([\d.]+) an entry", body)[1]) < 14, (name, form, body)  # type: ignore[index]
