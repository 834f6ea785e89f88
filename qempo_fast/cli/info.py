"""qempo-fast info."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table

import qempo_fast

# Other packages whose versions decide what runs or what the results are compared with.
_PACKAGES = (
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "sentence-transformers",
    "numpy",
)
_VARIABLES = {
    "QEMPO_BACKEND": "backend of every op, or op=backend,...",
    "QEMPO_CPU_ISA": "lowers the instruction set of the native CPU code",
    "QEMPO_CHECK": "1 checks values on a GPU too, at the price of a synchronisation",
    "QEMPO_KEEP_LOGITS": "MiB of logits that an exact linear_logps may keep for its backward",
    "QEMPO_AUTOTUNE": "1 searches launch sizes and prints the row to commit",
    "TRITON_INTERPRET": "1 runs Triton kernels in the interpreter",
    "OMP_NUM_THREADS": "threads of torch and of the native CPU code",
    "CUDA_VISIBLE_DEVICES": "GPUs that torch sees",
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _native() -> Iterator[tuple[str, str]]:
    try:
        from qempo_fast import _C  # type: ignore[attr-defined]
    except ImportError as error:
        yield "native code", f"not loaded: {error}"
        return
    try:
        yield "native code", f"instruction set {_C.isa()} of {', '.join(_C.isas())}"
    except ValueError as error:  # of QEMPO_CPU_ISA
        yield "native code", f"refused: {error}"
    yield "processor", f"{_C.vendor() or platform.machine()}, {os.cpu_count()} cores seen"
    yield "threads", f"{torch.get_num_threads()} (torch.get_num_threads), run by {_C.thread_runtime()}"


def _devices() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"sm_{properties.major}{properties.minor}" if torch.version.cuda else properties.gcnArchName
        yield f"GPU {i}", f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"


def _facts() -> Iterator[tuple[str, str]]:
    yield "qempo_fast", qempo_fast.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    runtime = (torch.version.cuda and f"CUDA {torch.version.cuda}") or (
        torch.version.hip and f"ROCm {torch.version.hip}"
    )
    yield "torch", f"{torch.__version__} ({runtime or 'no GPU runtime'})"
    for package in _PACKAGES:
        yield package, _version(package)
    yield from _native()
    yield from _devices()


def show(console: Console) -> None:
    """Print the tables of qempo-fast info."""
    facts = Table(title="qempo_fast", show_header=False)
    for name, value in _facts():
        facts.add_row(name, value)
    console.print(facts)

    ops = Table("op", "device", "runs on", "passed over, and why", title="Backends")
    for row in qempo_fast.backends():
        why = "; ".join(f"{backend}: {reason}" for backend, reason in row.passed_over.items())
        ops.add_row(row.op, row.device, row.backend, why or "-")
    console.print(ops)

    variables = Table("variable", "value", "meaning", title="Environment")
    for name, meaning in _VARIABLES.items():
        variables.add_row(name, os.environ.get(name, "-"), meaning)
    console.print(variables)
