"""Checks that run on several gloo processes: how a test file starts itself once for each rank, and what a rank does."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

Check = Callable[[int, int], None]
# Exit code, output and errors of a rank.
Ended = tuple[int, str, str]


def close(name: str, value: torch.Tensor, truth: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(value, truth, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")


def raises(error: type[Exception] | tuple[type[Exception], ...], words: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=words):
        call()


def join(rank: int, world: int, store: str, seconds: float = 60) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)


def run(checks: Iterable[tuple[str, Check]], rank: int, world: int) -> None:
    """Print the name of each check that passed. An error ends this rank, and by that the others: out of step they would
    only wait for each other.
    """
    for name, check in checks:
        check(rank, world)
        print(name, flush=True)
    dist.destroy_process_group()


def launch(file: str, world: int, what: str, folder: str, seconds: float = 150) -> list[Ended]:
    """What became of each rank; scripts, since pytest's import mode gives a test's module no name."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen([sys.executable, file, str(rank), str(world), what, folder], **pipes) for rank in range(world)
    ]
    try:
        texts = [process.communicate(timeout=seconds) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(ranks, texts, strict=True)]


def two_ranks(file: str) -> list[Ended]:
    """The checks of a file on two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        return launch(file, 2, "checks", folder)


def passed(name: str, ended: list[Ended]) -> None:
    for rank, (_, done, errors) in enumerate(ended):
        assert name in done.split(), f"rank {rank}\n{errors[-6000:]}"
