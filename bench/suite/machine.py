"""What this machine can do at most: its GEMM rate and copy bandwidth, measured; the ceilings of every row."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from qempo_fast.logps._gemm import linear
from suite.interleave import Step

DTYPES = ("float32", "bfloat16")
# (rows, columns, inner) of the GEMM and bytes of the copy: past every cache, under a second in all.
SIZES = {"cpu": ((2048, 2048, 2048), 2**27), "cuda": ((8192, 8192, 8192), 2**31)}


_SLOW = 1e9  # nanoseconds, as a GFLOP/s is a FLOP each


class Ceilings(NamedTuple):
    """Best of several: GEMM GFLOP/s by dtype, and GB/s of a copy, the bytes read and those written both counted."""

    threads: int
    gemm_gflops: dict[str, float]
    copy_gbs: float

    def floor_ms(self, dtype: str, floor_bytes: float = 0.0, floor_flops: float = 0.0) -> float:
        """Time that the longer of the two needs."""
        return max(floor_bytes / self.copy_gbs, floor_flops / self.gemm_gflops[dtype]) / 1e6


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, for the rest of the process; False where the C library is another.

    A gradient of 108 MiB went back to the system at each free and came back page by page. On a virtual machine that
    took 20 to 120 ms, by turns: more than the backward that it was part of. Allocators of training runs keep it too.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, -1))


def _best(function: Callable[[], torch.Tensor], device: str, runs: int) -> float:
    step = Step(function, device=device)
    step.run()
    return min(step.run()[2][0] for _ in range(runs))


def gemm_gflops(n: int, c: int, d: int, dtype: str, device: str) -> float:
    """Rate of (n, d) times (d, c); where that takes seconds, of a quarter of each size.

    A processor without bfloat16 of its own makes 3 of the 60 GFLOP/s of its float32: twelve products were 80 seconds.
    """
    if 2 * n * c * d / _gflops(n // 8, c // 8, d // 8, dtype, device) > _SLOW:
        n, c, d = n // 4, c // 4, d // 4
    return _gflops(n, c, d, dtype, device)


def _gflops(n: int, c: int, d: int, dtype: str, device: str) -> float:
    a, w = (torch.randn(s, d, device=device, dtype=getattr(torch, dtype)) for s in (n, c))
    # torch.mm and linear may take different libraries: the faster one is the ceiling.
    ms = min(_best(lambda: linear(a, w), device, 5), _best(lambda: a @ w.T, device, 5))
    return 2 * n * c * d / ms / 1e6


def measured(device: str, sizes: Mapping[str, tuple[tuple[int, int, int], int]] = SIZES) -> Ceilings:
    """The ceilings at the current number of threads."""
    (n, c, d), size = sizes[device]
    gemm = {name: gemm_gflops(n, c, d, name, device) for name in DTYPES}
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    copy = 2 * size / _best(lambda: target.copy_(source), device, 10) / 1e6
    return Ceilings(torch.get_num_threads(), gemm, copy)
