"""The stand-in for a GPU, and what of a test run on it counts as a failure; in processes without the interpreter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton runs on Linux only")

TESTS = Path(__file__).resolve().parent


def run(*args: object, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    unset = ("TRITON_INTERPRET", "QEMPO_STANDIN", "QEMPO_BACKEND", "PYTEST_ADDOPTS")
    outside = {k: v for k, v in os.environ.items() if k not in unset and not k.startswith("PYTEST_XDIST")}
    cache = {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(TESTS), "QEMPO_BACKEND": "triton"}
    return subprocess.run(
        [sys.executable, *map(str, args)],
        env=outside | cache | env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )


def script(text: str, folder: Path, **env: str) -> list[str]:
    done = run("-W", "ignore", "-c", text, folder=folder, **env)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.split("\n")[:-1]


SEGMENTS = """
import torch
import qempo_fast as qf
from qempo_fast.cli.standin import standin

def step(dtype=torch.float32):
    values = torch.zeros(50, dtype=dtype, requires_grad=True)
    qf.segment_sum(values, torch.tensor([0, 20, 50])).sum().backward()
"""


@pytest.mark.parametrize("compiles", [True, False])
def test_launches_are_counted_and_every_form_once(compiles: bool, tmp_path: Path) -> None:
    text = f"""{SEGMENTS}
with standin(compiles={compiles}) as launches:
    step()
    step()
    print(*sorted(launches.items()), len(launches.forms))
    step(torch.float64)
    print(sum(launches.values()), len(launches.forms))
"""
    forward, backward = "('_segment_sum_fwd_kernel', 2)", "('_segment_sum_bwd_kernel', 2)"
    assert script(text, tmp_path) == [f"{backward} {forward} 2", "6 4"]
    assert bool(list(tmp_path.rglob("*.cubin"))) == compiles


def test_launches_of_several_threads_are_counted(tmp_path: Path) -> None:
    text = f"""{SEGMENTS}
from concurrent.futures import ThreadPoolExecutor
with standin(compiles=False) as launches, ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: [step() for _ in range(50)], range(4)))
    print(sum(launches.values()))
"""
    assert script(text, tmp_path) == ["400"]


def test_everything_is_put_back(tmp_path: Path) -> None:
    text = f"""{SEGMENTS}
import sys
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
import qempo_fast.dpp.triton, qempo_fast.logps.triton, qempo_fast.losses.triton
from qempo_fast.cli.compile import signatures

def state():
    modules = [m for name, m in sorted(sys.modules.items()) if name.startswith("qempo_fast")]
    found = {{(m.__name__, k): v for m in modules for k, v in vars(m).items() if callable(v)}}
    return found, driver._active, JITFunction._do_compile

signatures()
before = state()
sizes = [s for s in before[0].values() if hasattr(s, "cache_info") and s.__module__.endswith("_launch")]
for name in ("inside", "again"):
    with standin(compiles=False):
        step()
        assert state() != before
    assert state() == before
    assert not any(s.cache_info().currsize for s in sizes), name
    assert not any(s.kernel.device_caches for s in signatures())
try:
    step()
except ValueError as error:
    print(error)
"""
    assert script(text, tmp_path) == [
        "QEMPO_BACKEND: wanted a backend that runs segment_sum on cpu, got 'triton': triton does not run on cpu tensors"
    ]


def test_the_sampled_gradient_has_columns_to_launch_for(tmp_path: Path) -> None:
    text = """
import torch
import qempo_fast as qf
from qempo_fast.cli.standin import standin
h, w = (torch.zeros(n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (30, 400))
with standin(compiles=False) as launches:
    out = qf.linear_logps(h, w, torch.arange(30), grad="sampled", backend="triton")
    print(qf.last_stats().kept_columns)
    before = launches["_logps_grad_kernel"]
    out.logps.sum().backward()
    print(launches["_logps_grad_kernel"] - before)
"""
    assert script(text, tmp_path) == ["(100,)", "1"]


def test_a_kernel_may_outlive_the_driver(tmp_path: Path) -> None:
    """Triton 3.9 has the driver unload a kernel that goes: here when the process ends, with no GPU's driver to ask."""
    text = f"""{SEGMENTS}
from qempo_fast.cli.compile import signatures
with standin():
    step()
    caches = [cache for s in signatures() for cache in s.kernel.device_caches.values()]
    kept = [kernel for cache in caches for kernel in cache[0].values()]
print(len(set(map(id, kept))))
"""
    assert script(text, tmp_path) == ["2"]


def test_the_interpreter_is_refused(tmp_path: Path) -> None:
    done = run("-c", f"{SEGMENTS}\nwith standin(): pass", folder=tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "RuntimeError: standin: unset TRITON_INTERPRET" in done.stderr


# What each ends at is its name's beginning.
ENDS = """
import pytest
import torch
import triton
import triton.language as tl
import qempo_fast as qf

CU = torch.tensor([0, 20, 50])


@triton.jit
def _good_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)


@triton.jit
def _broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), no_such_name)


@triton.jit
def _large_kernel(x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tile = x_ptr + at[:, None] * BLOCK + at[None, :]
    tl.store(tile, tl.dot(tl.load(tile), tl.load(tile)))


def total():
    return qf.segment_sum(torch.ones(50), CU)


def test_passed_without_a_number():
    assert total().shape == (2,)


def test_ran_to_a_wrong_number():
    assert total().tolist() == [20.0, 30.0]


def test_ran_to_nan_as_an_integer():
    int((total() * torch.nan)[0])


def test_ran_past_a_comparison():
    torch.testing.assert_close(total(), torch.tensor([20.0, 30.0]))


def test_failed_past_a_comparison():
    torch.testing.assert_close(total(), torch.tensor([20.0, 30.0]))
    _good_kernel[(1,)](torch.ones(8), BLOCK=8, NO_SUCH=1)


def test_failed_by_a_backend():
    qf.dpp_gains(torch.ones(1, 2, 3), backend="cuda")


def test_failed_by_a_keyword():
    qf.segment_sum(torch.ones(50), CU, no_such=1)


def test_failed_by_an_attribute():
    total().no_such


def test_failed_by_an_assertion_of_triton():
    _good_kernel[(1,)](torch.ones(8), BLOCK=8, device=0)


def test_failed_by_an_error_that_never_came():
    with pytest.raises(ValueError, match="wanted"):
        total()


def test_failed_by_the_compiler():
    _broken_kernel[(1,)](torch.ones(8), BLOCK=8)


def test_failed_by_the_size_of_shared_memory():
    _large_kernel[(1,)](torch.ones(256 * 256), BLOCK=256, num_warps=8)
"""
NEEDS_THE_COMPILER = {"test_failed_by_the_compiler", "test_failed_by_the_size_of_shared_memory"}


@pytest.mark.parametrize(("mode", "processes"), [("1", 0), ("launch", 1)])
def test_what_a_test_ends_at(mode: str, processes: int, tmp_path: Path) -> None:
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "test_ends.py").write_text(ENDS)
    options = ("-v", "-n", processes, "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", tmp_path)
    done = run("-m", "pytest", *options, "test_ends.py", folder=tmp_path, QEMPO_STANDIN=mode)
    found = re.findall(
        r"^(?:test_ends\.py::(test_\w+) ([A-Z]+)|.* ([A-Z]+) test_ends\.py::(test_\w+))", done.stdout, re.M
    )
    ends = {a or d: b or c for a, b, c, d in found}
    names = re.findall(r"def (test_\w+)", ENDS)
    wanted = {name: name.split("_")[1].upper() for name in names}
    if mode == "launch":
        wanted |= dict.fromkeys(NEEDS_THE_COMPILER, "PASSED")
    assert ends == wanted, done.stdout
    assert done.returncode == 1
    compiled = "compiled" if mode == "1" else "not compiled"
    assert re.search(rf"launches of \d kernels, \d forms {compiled}; 3 tests ran on to wrong numbers", done.stdout)


MIXED = """
import pytest
import torch
import qempo_fast as qf

CU = torch.tensor([0, 2, 5])


def test_passed_on_the_device(device):
    x = torch.arange(5.0).to(device).requires_grad_()
    out = qf.segment_sum(x, CU.to(device))
    (out * torch.tensor([1.0, 2.0], device=device)).sum().backward()
    assert (out.tolist(), x.grad.tolist()) == ([1.0, 9.0], [1.0, 1.0, 2.0, 2.0, 2.0])
    assert out.device == x.grad.device == torch.ones(1, device=device).device != CU.device
    before = x.detach()
    assert before.add_(1) is before


def test_failed_by_a_tensor_left_behind(device):
    torch.ones(2, device=device) * torch.ones(2)


def test_failed_by_an_address_of_the_cpu(device):
    qf.segment_sum(torch.ones(5), CU)


def test_passed_without_the_device():
    assert qf.segment_sum(torch.ones(5), CU).tolist() == [2.0, 3.0]
"""


def test_the_device_shows_what_was_left_on_the_cpu(tmp_path: Path) -> None:
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "test_mixed.py").write_text(MIXED)
    options = ("-v", "-n", 0, "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", tmp_path)
    done = run("-m", "pytest", *options, "test_mixed.py", folder=tmp_path, QEMPO_STANDIN="device")
    ends = dict(re.findall(r"^test_mixed\.py::(test_\w+) ([A-Z]+)", done.stdout, re.M))
    assert ends == {name: name.split("_")[1].upper() for name in re.findall(r"def (test_\w+)", MIXED)}, done.stdout
    assert "all tensors to be on the same device, got (2,) on standin:0, (2,) on cpu" in done.stdout
    assert "cannot be accessed from Triton (cpu tensor?)" in done.stdout


def test_a_mode_that_there_is_not(tmp_path: Path) -> None:
    shutil.copy(TESTS / "conftest.py", tmp_path)
    done = run("-m", "pytest", "--rootdir", tmp_path, folder=tmp_path, QEMPO_STANDIN="yes")
    assert done.returncode != 0
    assert "QEMPO_STANDIN: wanted 1, launch, device, got 'yes'" in done.stdout + done.stderr
