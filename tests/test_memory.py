"""The logits are never kept: peak memory of a process, against what the logits alone would take."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
import qempo_fast as qf
from qempo_fast import reference
torch.set_num_threads(1)
n, d, v = 4096, 8, 49152
hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
targets = torch.randint(0, v, (n,))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
qf.linear_logps(hidden[:8], weight, targets[:8]).logps.sum().backward()
before = peak()
grad = sys.argv[1]
qf.linear_logps(hidden, weight, targets, entropy=True, grad=grad).logps.sum().backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("grad", ["exact", "sampled"])
def test_peak_memory(grad: str) -> None:
    out = subprocess.run([sys.executable, "-c", SCRIPT, grad], capture_output=True, text=True, check=True, timeout=240)
    grown = float(out.stdout.split()[-1])
    logits = 4096 * 49152 * 4 / 2**20  # 768 MiB once; plain torch keeps about three of them
    assert grown < 0.12 * logits, f"{grown:.0f} MiB more, logits alone are {logits:.0f}"
