"""qempo-fast compile: every Triton kernel built for GPUs that need not be here."""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import qempo_fast.kernels

from ._fail import fail

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
# Bytes of shared memory (LDS) that one block may take; a kernel over it compiles but cannot be launched.
_SHARED_LIMIT = {"cuda:80": 166_912, "cuda:90": 232_448, "cuda:100": 232_448, "hip:gfx942": 65_536}


@dataclass(frozen=True)
class Usage:
    """Registers and spilled bytes of a thread, shared bytes of a block."""

    registers: int
    spilled: int
    shared: int


def _defines(module: Any, name: str) -> bool:
    return name.endswith("_kernel") and getattr(getattr(module, name), "__module__", "") == module.__name__


def signatures() -> list[Any]:
    """Every entry of COMPILE in qempo_fast.kernels; raises where a kernel has none."""
    found: list[Any] = []
    for module_info in pkgutil.iter_modules(qempo_fast.kernels.__path__):
        module = importlib.import_module(f"qempo_fast.kernels.{module_info.name}")
        entries = getattr(module, "COMPILE", [])
        missing = {n for n in vars(module) if _defines(module, n)} - {e.kernel.__name__ for e in entries}
        if missing:
            raise LookupError(f"{module.__name__}.COMPILE lists no signature of {', '.join(sorted(missing))}")
        found += entries
    return found


def gpu_target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    kind, _, arch = name.partition(":")
    if kind == "cuda" and arch.isdecimal():
        return GPUTarget("cuda", int(arch), 32)
    if kind == "hip" and re.fullmatch(r"gfx[0-9a-f]{3,4}", arch):
        # CDNA (gfx9) runs waves of 64 lanes, RDNA (gfx10 and up) waves of 32.
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return fail(f"--target: wanted cuda:<capability> such as cuda:90, or hip:<arch> such as hip:gfx942, got {name!r}")


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes by cuobjdump, which comes inside triton's package."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        fail(f"compile: wanted triton's own cuobjdump at {tool}, which this triton lacks")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        report = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    # A Triton kernel has no local arrays and calls no function: what lies on its stack is what ptxas spilled.
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _hsaco_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and spilled bytes from the AMDGPU metadata that becomes the code object's note."""
    fields = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    spilled = 4 * (fields["vgpr_spill_count"] + fields["sgpr_spill_count"])
    # vgpr_count is the whole unified file, accumulation registers included.
    return fields["vgpr_count"], max(spilled, fields["private_segment_fixed_size"])


def build(signature: Any, target: str) -> Any:
    """Triton's compiled kernel of one signature for one target; raises what Triton raises."""
    import triton
    from triton.compiler import ASTSource

    kernel = signature.kernel
    types = {n: "constexpr" if n in signature.constexprs else signature.types[n] for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if types[n].startswith("*") or n in signature.aligned
    }
    return triton.compile(
        ASTSource(kernel, types, dict(signature.constexprs), aligned),
        target=gpu_target(target),
        options={"num_warps": signature.num_warps, "num_stages": signature.num_stages},
    )


def compile_one(signature: Any, target: str) -> Usage:
    """Compile one signature for one target; raises what Triton raises."""
    compiled = build(signature, target)
    if target.startswith("cuda"):
        registers, spilled = cubin_usage(compiled.asm["cubin"])
    else:
        registers, spilled = _hsaco_usage(compiled.asm["amdgcn"])
    return Usage(registers, spilled, compiled.metadata.shared)


def label(signature: Any) -> str:
    """What tells this form from the kernel's others: pointer types, and constexprs that are on."""
    pointers = [v for v in signature.types.values() if v.startswith("*")]
    return " ".join([*pointers, *(f"{n}={v}" for n, v in signature.constexprs.items() if v not in (None, False))])


def _verdict(signature: Any, target: str, usage: Usage) -> str | None:
    """Why this kernel fails on target, or None."""
    limit = _SHARED_LIMIT.get(target)
    if limit is not None and usage.shared > limit:
        return f"{usage.shared} bytes of shared memory, {limit} at most"
    if signature.hot and usage.spilled:
        return f"{usage.spilled} bytes spilled in a hot kernel"
    return None


def _attempt(signature: Any, target: str) -> tuple[str, str | None]:
    """The cell of the table, and why this kernel fails on target, or None."""
    if not target.startswith(signature.targets):
        return "-", None
    try:
        usage = compile_one(signature, target)
    except Exception as error:  # Triton raises many types; each is a kernel that does not build.
        return "[red]does not compile[/red]", f"{type(error).__name__}: {error}"
    reason = _verdict(signature, target, usage)
    cell = f"{usage.registers} / {usage.spilled} / {usage.shared}"
    return (cell if reason is None else f"[red]{cell}[/red]"), reason


# What a process of _cells compiles from: a kernel does not pickle, so they inherit it.
_chosen: list[Any] = []


def _cell(task: tuple[int, str]) -> tuple[str, str | None]:
    return _attempt(_chosen[task[0]], task[1])


def _cells(chosen: Sequence[Any], targets: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """_attempt of every signature for every target, in order, one process a core: a kernel takes half a second."""
    _chosen[:] = chosen
    tasks = list(itertools.product(range(len(chosen)), targets))
    pool = ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), len(tasks)), multiprocessing.get_context("fork"))
    found = pool.map(_cell, tasks)
    pool.shutdown(wait=False)
    return found


def _uncovered(chosen: Sequence[Any], targets: Sequence[str]) -> list[tuple[str, str]]:
    """Kernels that no signature launches on a target: they would go uncompiled there without a word."""
    covered = {(s.kernel.__name__, t) for s in chosen for t in targets if t.startswith(s.targets)}
    return sorted({(s.kernel.__name__, t) for s in chosen for t in targets} - covered)


def run(targets: Sequence[str], only: str, console: Console) -> int:
    """Compile, print the table, and return the exit status: 0, or 1 where a kernel fails."""
    try:
        import triton
    except ImportError as error:
        fail(f"compile needs triton, which runs on Linux: {error}")
    for target in targets:
        gpu_target(target)
    if triton.knobs.runtime.interpret:
        fail("compile: TRITON_INTERPRET is set, which replaces the kernels by their interpreter; unset it")
    chosen = [s for s in signatures() if only in s.kernel.__name__]
    if not chosen:
        fail(f"--only: wanted a part of a kernel's name, got {only!r}, which is in none")

    title = f"Triton {triton.__version__}: registers / spilled bytes / shared bytes"
    if not console.is_terminal:
        # A log has no width; at the default 80 columns the names of the kernels vanish.
        console.width = max(console.width, 160)
    table = Table(title=title, show_lines=True)
    table.add_column("kernel", overflow="fold", min_width=32)
    for target in targets:
        table.add_column(target, no_wrap=True)
    failures = [f"{name}: no signature for {target}" for name, target in _uncovered(chosen, targets)]
    # Before the bar, which has a thread: processes fork here.
    found = _cells(chosen, targets)
    for signature in track(chosen, "compiling", console=console, transient=True):
        name = f"{signature.kernel.__name__}\n{label(signature)}"
        cells = []
        for target, (cell, reason) in zip(targets, found, strict=False):
            cells.append(cell)
            if reason is not None:
                failures.append(f"{signature.kernel.__name__} ({label(signature)}) for {target}: {reason}")
        table.add_row(name, *cells)
    console.print(table)
    for failure in failures:
        console.print(f"FAILED {failure}", style="red", markup=False, highlight=False, soft_wrap=True)
    compiled = sum(t.startswith(s.targets) for s in chosen for t in targets)
    console.print(f"{compiled} compiled, {len(failures)} failed", highlight=False)
    return 1 if failures else 0
