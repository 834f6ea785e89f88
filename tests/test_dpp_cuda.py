"""CUDA kernels of the DPP op: on the host under the emulation of tests/emulation, and on the GPU where there is one.

The emulation runs the lanes of a block in random order between barriers. That it notices a missing barrier or a wrong
shuffle is itself tested, on sources with one of them broken.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dpp_select_cases as selection
import pytest
import standin_plugin
import torch
from dpp_cases import draw
from dpp_kernel_cases import (
    CASES,
    CHECKS,
    DEPENDENT,
    WRONG,
    Case,
    Fwd,
    TorchOps,
    check_case,
    check_dependent,
    check_large_ragged_groups,
    check_wrong_offsets,
    gradients,
)

from qempo_fast import _C
from qempo_fast.dpp import _gpu, cuda
from qempo_fast.reference.dpp import DppFunction

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
EMULATION = ROOT / "tests" / "emulation"
CPU = torch.device("cpu")


class _Groups(ctypes.Structure):
    """qempo::cuda::DppGroups."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "log_quality")),
        ("quality", ctypes.c_int),
        ("offsets", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("groups", "rows", "width")),
        ("k", ctypes.c_int),
        ("ridge", ctypes.c_double),
        ("normalize", ctypes.c_bool),
    ]


class Emulated:
    """The functions of csrc/bindings/dpp_cuda.cpp over the emulated launchers."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("emulated_fwd", "emulated_bwd", "emulated_select"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def reseed(self, seed: int) -> None:
        """Another order of the lanes."""
        self._library.reseed(ctypes.c_uint64(seed))

    def dpp_cuda_fwd(self, dtype: int, groups: Any, kept: Any, out: Any, stream: int) -> str:
        return self._run(self._library.emulated_fwd, dtype, groups, kept, out)

    def dpp_cuda_bwd(self, dtype: int, groups: Any, kept: Any, grads: Any, stream: int) -> str:
        return self._run(self._library.emulated_bwd, dtype, groups, kept, grads)

    def dpp_cuda_select(self, dtype: int, groups: Any, n: int, picks: int, stream: int) -> str:
        arguments = (dtype, ctypes.byref(_Groups(*groups)), n, ctypes.c_void_p(picks))
        return self._library.emulated_select(*arguments).decode()

    def _run(self, function: Any, dtype: int, groups: Any, kept: Any, out: Any) -> str:
        addresses = (ctypes.c_void_p * len(out))(*out)
        return function(dtype, ctypes.byref(_Groups(*groups)), ctypes.c_void_p(kept), addresses).decode()


def compiled(*words: Any) -> None:
    """g++, with the headers of the emulation in place of CUDA's."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulation needs g++")
    flags = "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{EMULATION}"
    done = subprocess.run([compiler, *flags, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def build(sources: Path, objects: list[Path], library: Path, *, level: str = "-O1") -> Emulated:
    """dpp.cu as C++, linked with the emulation."""
    dpp = "-x", "c++", sources / "cuda" / "dpp.cu", "-x", "none"
    compiled(level, "-shared", f"-I{sources / 'include'}", *dpp, *objects, "-o", library)
    return Emulated(library)


def forward_by(native: Any) -> Fwd:
    return functools.partial(_gpu.dpp_fwd, cuda.launchers(native))


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The emulation itself, which no mutant changes."""
    folder, names = tmp_path_factory.mktemp("emulation"), ("emulation", "dpp_driver")
    for name in names:
        include = f"-I{SOURCES / 'include'}"
        compiled("-O1", "-c", include, EMULATION / f"{name}.cpp", "-o", folder / f"{name}.o")
    return [folder / f"{name}.o" for name in names]


@pytest.fixture(scope="module")
def emulated(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return build(SOURCES, objects, tmp_path_factory.mktemp("emulated") / "dpp.so")


@pytest.fixture(scope="module")
def outcomes(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of what stands there, compiled as the mutants are: half the time of -O1, and they run for a moment."""
    return _outcomes(build(SOURCES, objects, tmp_path_factory.mktemp("whole") / "dpp.so", level="-O0"))


@pytest.fixture(params=["emulated", "gpu"])
def native(request: pytest.FixtureRequest) -> tuple[Any, torch.device]:
    """Each form of the kernels and where its tensors lie."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated"), CPU
    if standin_plugin.mode() and hasattr(_C, "dpp_cuda_fwd"):
        return standin_plugin.native(), CPU
    if not torch.cuda.is_available() or not hasattr(_C, "dpp_cuda_fwd"):
        pytest.skip("needs a GPU and a build with CUDA")
    return _C, torch.device("cuda")


@pytest.fixture
def on(native: tuple[Any, torch.device]) -> tuple[Fwd, torch.device]:
    return forward_by(native[0]), native[1]


@pytest.fixture
def select_on(native: tuple[Any, torch.device]) -> tuple[selection.Select, torch.device]:
    return selection.select_by(cuda.launchers(native[0])), native[1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_against_float64_and_plain_torch(case: Case, on: tuple[Fwd, torch.device]) -> None:
    check_case(*on, case)


@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_rows(name: str, on: tuple[Fwd, torch.device]) -> None:
    check_dependent(*on, name)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check(check: Callable[..., None], on: tuple[Fwd, torch.device]) -> None:
    check(*on)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_offsets(name: str, on: tuple[Fwd, torch.device]) -> None:
    check_wrong_offsets(*on, name)


def test_large_ragged_groups(on: tuple[Fwd, torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    check_large_ragged_groups(*on, monkeypatch)


@pytest.mark.parametrize("case", selection.CASES, ids=lambda case: case.why)
def test_selection(case: selection.Case, select_on: tuple[selection.Select, torch.device]) -> None:
    selection.check_select_case(*select_on, case)


@pytest.mark.parametrize("check", [*selection.CHECKS, selection.check_broken_groups], ids=lambda check: check.__name__)
def test_selection_check(check: Callable[..., None], select_on: tuple[selection.Select, torch.device]) -> None:
    check(*select_on)


@pytest.mark.parametrize("name", WRONG)
def test_selection_by_wrong_offsets(name: str, select_on: tuple[selection.Select, torch.device]) -> None:
    selection.check_wrong_offsets(*select_on, name)


def test_selection_of_unread_sizes(
    select_on: tuple[selection.Select, torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    selection.check_groups_that_are_too_small_or_too_large(*select_on, monkeypatch)


def test_torch_only_allocates(on: tuple[Fwd, torch.device]) -> None:
    """Four tensors forward, two backward, and nothing that converts, fills, copies or makes a view: a step at d = 384
    costs the host more time than the GPU."""
    fwd, device = on
    x = draw(4, 8, 16, dtype=torch.float32).to(device).requires_grad_()
    q = draw(4, 8, seed=1).float().to(device).requires_grad_()
    incoming = torch.ones(4, 8, device=device)
    with TorchOps() as ops:
        _, gains, _ = DppFunction.apply(fwd, x, q, None, 1.0, True)
        torch.autograd.grad(gains, (x, q), incoming)
    assert sorted(ops.names) == ["empty", *["empty_like"] * 3, *["new_empty"] * 2]


def _everything(native: Emulated) -> list[torch.Tensor]:
    """Results of inputs that reach every barrier: a warp's and a block's kernel, direct and careful, two chunks."""
    results = []
    for k, d, quality in ((16, 70, 1.0), (6, 9, 30.0), (36, 200, 1.0), (20, 6, 30.0)):
        x, q = draw(2, k, d, dtype=torch.float32), quality * draw(2, k, seed=1).abs().float()
        out = gradients(forward_by(native), x, q, torch.ones(2), draw(2, k, seed=2).float(), ridge=0.9)
        results += out.values()
        results.append(selection.chosen(selection.select_by(cuda.launchers(native)), CPU, x, k // 2, q))
    return results


def test_the_order_of_lanes_changes_nothing(emulated: Emulated) -> None:
    first = _everything(emulated)
    for seed in range(1, 6):
        emulated.reseed(seed)
        for a, b in zip(first, _everything(emulated), strict=True):
            assert torch.equal(a, b)


def _outcomes(native: Emulated) -> list[list[list[float]] | str]:
    """Results, or the error of the launch, under four orders of the lanes."""
    outcomes: list[list[list[float]] | str] = []
    for seed in range(4):
        native.reseed(seed)
        try:
            # As bytes: a NaN then equals itself.
            outcomes.append([t.view(torch.uint8).flatten().tolist() for t in _everything(native)])
        except RuntimeError as error:
            outcomes.append(str(error))
    return outcomes


# Name, file, what stands there, what to put instead. Each removes one synchronisation, bends one shuffle or takes too
# little shared memory; the emulation must notice, by an error or by another result.
MUTANTS = [
    (
        "no barrier between the sweep's steps",
        "dpp_direct.cuh",
        "    team.sync();\n    const double* column",
        "    const double* column",
    ),
    (
        "no barrier before the scales are read",
        "dpp_direct.cuh",
        "  team.sync();\n  const double* length",
        "  const double* length",
    ),
    ("no barrier after a chunk is staged", "dpp_gram.cuh", "team, stage);\n    team.sync();", "team, stage);"),
    (
        "no barrier before the next chunk is staged",
        "dpp_gram.cuh",
        "    team.sync();\n    stage_rows",
        "    stage_rows",
    ),
    ("no barrier after the float64 products", "dpp_gram.cuh", "  typename Tile<K>::Team{}.sync();", ""),
    (
        "no barrier between pivots",
        "dpp_careful.cuh",
        "    team.sync();\n  }\n}\n\n// E into b",
        "  }\n}\n\n// E into b",
    ),
    (
        "no barrier in the triangular solution",
        "dpp_careful.cuh",
        "/ pivot : 0.0;\n    team.sync();",
        "/ pivot : 0.0;",
    ),
    ("no barrier before the weights overwrite P", "dpp.cu", "  team.sync();\n#pragma unroll", "#pragma unroll"),
    (
        "no barrier behind the backward product",
        "dpp.cu",
        "    team.sync();\n  }\n}\n\ntemplate <class T, int K>\n__device__ __noinline__ void multiply_careful",
        "  }\n}\n\ntemplate <class T, int K>\n__device__ __noinline__ void multiply_careful",
    ),
    ("a warp that does not wait for itself", "dpp_team.cuh", "__syncwarp();", ""),
    ("half a warp in the mask of a barrier", "dpp_team.cuh", "__syncwarp();", "__syncwarp(0xffffu);"),
    ("half a warp in the mask of a shuffle", "dpp_team.cuh", "kAllLanes = 0xffffffffu", "kAllLanes = 0x0000ffffu"),
    ("the wrong partner in the fold", "dpp_gram.cuh", "other, Step)", "other, Step ^ 1)"),
    ("the wrong half in the fold", "dpp_gram.cuh", "lane & Step;", "lane & (Step / 2);"),
    (
        "lanes that leave before a shuffle",
        "dpp_gram.cuh",
        "  const int lane = rank % 32;",
        "  const int lane = rank % 32;\n  if (lane == 7) return;",
    ),
    ("no barrier between choices", "dpp_select.cuh", "    team.sync();\n    double best", "    double best"),
    ("one buffer of gains", "dpp_select.cuh", "step % 2 ? kColumnToo : kColumn", "kColumn"),
    ("one vector too few in shared memory", "dpp_team.cuh", "kVectors = 9;", "kVectors = 8;"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[0])
def test_the_emulation_notices(
    mutant: tuple[str, str, str, str], outcomes: Any, objects: list[Path], tmp_path: Path
) -> None:
    _, file, there, instead = mutant
    shutil.copytree(SOURCES / "cuda", tmp_path / "csrc" / "cuda")
    shutil.copytree(SOURCES / "include", tmp_path / "csrc" / "include")
    source = tmp_path / "csrc" / "cuda" / file
    text = source.read_text()
    assert there in text, "the source no longer reads so: write the mutant anew"
    source.write_text(text.replace(there, instead, 1))
    broken = build(tmp_path / "csrc", objects, tmp_path / "broken.so", level="-O0")
    assert _outcomes(broken) != outcomes


def test_no_kernel_of_the_build_spills() -> None:
    """Registers of each kernel in the native module for the A100 and Hopper, and PTX for what is newer."""
    if not hasattr(_C, "dpp_cuda_fwd"):
        pytest.skip("this build holds no CUDA kernels")
    triton = pytest.importorskip("triton", reason="cuobjdump comes inside triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "-res-usage", _C.__file__], check=True, capture_output=True, text=True).stdout
    kernels: dict[str, int] = {}
    arch = name = ""
    for line in report.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r" *Function (\w+):", line):
            name = found[1]
        elif (found := re.match(r" *REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line)) and "dpp_" in name:
            print(arch, name, line)
            # No kernel has an array that is not in registers: what lies on its stack was spilled.
            assert (int(found[2]), int(found[3])) == (0, 0), f"{arch} {name}:{line}"
            kernels[arch] = kernels.get(arch, 0) + 1
    # Forward, backward and selection, four sizes, three dtypes.
    assert kernels == {"sm_80": 36, "sm_90a": 36}
    ptx = subprocess.run([tool, "-lptx", _C.__file__], check=True, capture_output=True, text=True).stdout
    assert "PTX file" in ptx
