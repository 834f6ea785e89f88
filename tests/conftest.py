"""Settings that must stand before torch or Triton is imported, and the fixtures of every test file."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

# Inductor imports it at its first compilation, in several threads: once, one of them took the standard library's
# distutils in the middle of it and failed, "AssertionError: .../distutils/core.py".
import setuptools  # noqa: F401
import standin_plugin
import torch

# Triton reads it at import: without a GPU its kernels run on CPU tensors, in the interpreter.
if standin_plugin.mode():
    os.environ["TRITON_INTERPRET"] = "1" if standin_plugin.mode() == "device" else "0"
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Test files import it and name it as a plugin; pytest wants to hear of it before the first does.
pytest.register_assert_rewrite("tiny_demo")


def pytest_configure(config: pytest.Config) -> None:
    mode = standin_plugin.mode()
    if mode == "device":
        import standin_device

        config.pluginmanager.register(standin_device.Plugin())
    elif mode:
        config.pluginmanager.register(standin_plugin.StandIn(compiles=mode == "1"))


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU where there is one, else CPU tensors under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded_and_poisoned() -> Iterator[None]:
    """Same numbers in each run; torch fills fresh memory with NaN, so that reading it shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    # What a test leaves behind fails there, not in a file that happens to run after it.
    left = torch.overrides._len_torch_function_stack(), torch.get_default_dtype()
    assert left == (0, torch.float32), "a default device, a torch function mode or a default dtype was left on"
