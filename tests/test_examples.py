"""Every example runs offline in seconds and does what its last line says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# Modules that the scripts share have no main.
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text())
RUNS = [(name, []) for name in SCRIPTS if name != "plain_torch.py"]
RUNS += [("plain_torch.py", ["--loss", loss]) for loss in ("grpo", "grpo+dqo", "spl")]
# Whose last line is toy.report's.
TOY = ("plain_torch.py", "accelerate_loop.py", "fsdp2.py")


def test_the_examples_are_found() -> None:
    assert set(TOY) <= set(SCRIPTS)


@pytest.mark.parametrize(("name", "words"), RUNS, ids=lambda x: x if isinstance(x, str) else "-".join(x) or "default")
def test_example_runs(name: str, words: list[str], tmp_path: Path) -> None:
    if name.startswith("trl_") and importlib.util.find_spec("trl") is None:
        pytest.skip('needs pip install "qempo-fast[trl]"')
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if name == "fsdp2.py" else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(EXAMPLES / name), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip(), "nothing printed"
    if name in TOY:
        found = re.search(r"reward (\S+) -> (\S+), (\d+) distinct answers in 64", done.stdout)
        assert found, done.stdout
        before, after, distinct = (float(x) for x in found.groups())
        assert before < 0.3
        assert after > 0.6
        if words != ["--loss", "grpo"]:
            assert distinct > 16


def test_fsdp2_says_how_to_run_it(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    command = [sys.executable, str(EXAMPLES / "fsdp2.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "torchrun --nproc-per-node 2" in done.stderr
