"""The first call on a GPU: is every kernel right, then what takes how long. bench/gpu/run.sh first starts it.

In order of value, so that a call cut at any second has brought the most that it could: every kernel and test, the
machine's ceilings, the headline against peers, other shapes, DPP and losses, kernels by name, graphs, repeats.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import steps
from gpu.steps import ROOT, Child, Run, Settings

# Files of the tests that a GPU decides, and which of a file's tests those are.
TESTS: dict[str, str] = {
    "test_kernels": "segment_sum",
    "test_logps_triton": "",
    "test_logps_support_triton": "",
    "test_logps_wide_triton": "",
    "test_logps_invariant_triton": "",
    "test_logps_weighted_triton": "",
    "test_logps_tiles": "",
    "test_dpp_triton": "",
    "test_losses_triton": "",
    "test_dpp_cuda": "gpu",
    "test_logps_waits": "",
    "test_gpu_smoke": "",
    "test_losses_stress": "",
    "test_add_rows": "",
}
# The second at which tests and kernels end, finished or not.
TESTS_UNTIL, KERNELS_UNTIL = 92.0, 75.0
WORKERS = 12


def selection(rehearse: bool) -> list[str]:
    """pytest's words: the files that are there, and one expression that picks the tests of each."""
    if rehearse:
        return ["tests/test_kernels.py", "-k", "test_kernels and segment_sum and (strided or repeatable)"]
    there = [name for name in TESTS if (ROOT / "tests" / f"{name}.py").is_file()]
    picked = [f"({name} and {TESTS[name]})" if TESTS[name] else name for name in there]
    return [*(f"tests/{name}.py" for name in there), "-k", " or ".join(picked)]


def programs(run: Run, out: Path) -> list[Child]:
    """Started together: the kernels one by one, and the tests."""
    chosen, log = run.settings, out / "log.txt"
    made = []
    for name, words in _kernels(chosen).items():
        made.append(Child(run, f"kernels/{name}", words, log, max(20, KERNELS_UNTIL - run.now())))
    words = steps.pytest_words(chosen, 1 if chosen.rehearse else WORKERS, *selection(chosen.rehearse))
    most = max(20, TESTS_UNTIL - run.now())
    made.append(Child(run, "tests", words, out / "tests.txt", most, **steps.QUIET))
    return made


def _kernels(chosen: Settings) -> dict[str, list[str]]:
    if chosen.rehearse:
        few = ("--op", "losses", "--only", "pairs")
        return {"triton": steps.sanitize(chosen, "--backend", "triton", *few)}
    return {
        "dpp cuda": steps.sanitize(chosen, "--op", "dpp", "--backend", "cuda"),
        "triton": steps.sanitize(chosen, "--backend", "triton"),
    }


def _imported(device: str) -> dict[str, Any]:
    """What Python sees: the library that is tested, and the card."""
    import torch

    import qempo_fast as qf
    from qempo_fast import _C

    seen = {"device": "cpu"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        seen = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
        }
    return {
        **seen,
        "cuda": torch.version.cuda,
        "qempo_fast": qf.__version__,
        "from": str(Path(qf.__file__).parent),
        "library": Path(_C.__file__).name,
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def body(run: Run) -> None:
    out, chosen = Path(os.environ["OUT"]), run.settings
    if chosen.rehearse:
        # For the repeats, which ask for Triton by name; what is timed takes the CPU's own backend.
        os.environ["TRITON_INTERPRET"] = "1"
    with steps.children() as alive:
        alive += programs(run, out)
        run.do("imported", "import", functools.partial(_imported, chosen.device))
        from gpu import cases, checks

        if not all(child.skipped for child in alive):
            cases.prepare(run)
        for child in alive:
            child.wait()
    run.do("ceiling", "ceilings", functools.partial(cases.ceilings, chosen))
    for title in ("headline", "shapes", "dpp", "losses"):
        run.part(title, functools.partial(cases.measure, run, title))
    run.part("profile", functools.partial(checks.profiles, run))
    run.part("smoke", functools.partial(checks.smoke, run))
    run.part("stress", functools.partial(checks.stress, run))


if __name__ == "__main__":
    steps.main(body)
