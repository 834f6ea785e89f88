"""What a run on a GPU is made of: items that fail, the kit, the card's name, peers, the tools' command lines."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_modules import BENCH, ROOT, load, python
from gpu_runs import clean_environment, end, lines, of, start

pytest.importorskip("triton", reason="Triton runs on Linux only")
pytest.importorskip("xdist", reason="the run's tests are shared out by pytest-xdist")


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """A repository whose first call takes seconds, and whose own qempo_fast has no compiled part."""
    tree = tmp_path / "tree"
    for folder, names in (
        ("gpu", ("run.sh", "__init__.py", "env.py", "kit.py", "lines.py", "plugin.py", "steps.py")),
        ("suite", ("__init__.py", "provenance.py")),
    ):
        (tree / "bench" / folder).mkdir(parents=True)
        for name in names:
            shutil.copy(BENCH / folder / name, tree / "bench" / folder)
    (tree / "qempo_fast").mkdir()
    (tree / "qempo_fast" / "__init__.py").write_text("raise ImportError('the repository, not what is installed')\n")
    return tree


ITEMS = """
import functools, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu import steps

def bad():
    raise ValueError("wrong by 3\\nsecond line")

def body(run):
    run.settings.rehearse = False
    with steps.children() as alive:
        # It outlives a program that crashes beside it, in a second start.
        words = steps.python("-c", "import time; time.sleep(2)")
        alive.append(steps.Child(run, "beside", words, Path(os.environ["OUT"]) / "log.txt", 20))
        run.do("time", "early", functools.partial(os.kill, os.getpid(), signal.SIGSEGV), provider="early")
        alive[0].wait()
    run.do("time", "good", lambda: {"full_ms": 1.0}, provider="good")
    run.do("time", "raises", bad, provider="raises")
    run.do("time", "crashes", functools.partial(os.kill, os.getpid(), signal.SIGSEGV), provider="crashes")
    run.do("time", "hangs", functools.partial(time.sleep, 1000), provider="hangs", most=0.5)
    run.part("part", bad)
    run.do("time", "late", lambda: {"full_ms": 1.0}, provider="late", need=10000)
    run.do("time", "last", lambda: [{"full_ms": 1.0}, {"full_ms": 2.0}], provider="last")

if __name__ == "__main__":
    steps.main(body)
"""


def test_an_item_that_raises_crashes_or_hangs_costs_itself_alone(small_tree: Path, tmp_path: Path) -> None:
    (small_tree / "bench" / "gpu" / "first.py").write_text(ITEMS)
    process = start(tmp_path, "first", tree=small_tree, LIMIT="200")
    out, err = end(process, 120)
    assert process.returncode == 0, out + err
    rows = lines(tmp_path)
    assert rows[-1]["kind"] == "end"
    time_rows = {name: of(rows, "time", provider=name) for name in ("good", "raises", "hangs", "late", "last")}
    assert [r["full_ms"] for r in time_rows["good"]] == [1.0]
    assert time_rows["raises"][0]["reason"] == "ValueError: wrong by 3"
    assert "did not end" in time_rows["hangs"][0]["reason"]
    assert "no time" in time_rows["late"][0]["reason"]
    assert [r["full_ms"] for r in time_rows["last"]] == [1.0, 2.0]
    assert [r["item"] for r in of(rows, "lost")] == ["beside", "early", "crashes"]
    assert [(r["item"], r["status"]) for r in of(rows, "program")] == [("beside", 0)]
    assert [r["part"] for r in of(rows, "part")] == ["part"]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "second line" in log
    assert "Segmentation fault" in log
    assert "time.sleep" not in out


IMPORTS = """
import os, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu import steps

def body(run):
    import qempo_fast, peer
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    held = [str(p.relative_to(cache)) for p in cache.rglob("*.cubin")]
    run.lines.write("imported", **{"from": qempo_fast.__file__, "peer": peer.__file__, "cache": held})
    words = steps.pytest_words(run.settings, 1, "tests/test_it.py")
    run.settings.rehearse = False
    with steps.children() as alive:
        alive.append(steps.Child(run, "tests", words, Path(os.environ["OUT"]) / "tests.txt", 12))
        alive[0].wait()

if __name__ == "__main__":
    steps.main(body)
"""


def _wheel(folder: Path, name: str, tag: str, **files: str) -> None:
    """A wheel of a few files, as pip takes it."""
    import zipfile

    info = f"{name}-0.1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0.1.0\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-0.1.0-{tag}.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
        wheel.writestr(f"{info}/RECORD", record)


TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"


def test_what_the_kit_brings_is_used_and_not_the_repositorys(small_tree: Path, tmp_path: Path) -> None:
    """In the program, and in the tests it starts, a worker of xdist among them; the commit is the kit's.

    Of the tests one hangs: they are stopped in time, and say what failed.
    """
    pytest.importorskip("pip", reason="the kit's wheels are installed by pip")
    (small_tree / "bench" / "gpu" / "first.py").write_text(IMPORTS)
    (small_tree / "tests").mkdir()
    (small_tree / "tests" / "test_it.py").write_text(
        "import os, qempo_fast\n"
        "def test_right(): assert os.environ['TMPDIR'] in qempo_fast.__file__.replace('/site/', '/tmp/')\n"
        "def test_wrong(): assert qempo_fast.__file__ == 1\n"
        "def test_hangs(): __import__('time').sleep(1000)\n"
    )
    shutil.copy(ROOT / "pyproject.toml", small_tree)
    kit = tmp_path / "kit"
    _wheel(kit / "wheels", "qempo_fast", f"{TAG}-none-any", **{"qempo_fast/__init__.py": ""})
    _wheel(kit / "wheels", "peer", "py3-none-any", **{"peer.py": ""})
    (kit / "kit.json").write_text('{"commit": "abc123"}')
    (tmp_path / "tgz" / "KEY").mkdir(parents=True)
    (tmp_path / "tgz" / "KEY" / "k.cubin").write_bytes(b"machine code")
    subprocess.run(["tar", "-cJf", kit / "triton.tar.xz", "-C", tmp_path / "tgz", "KEY/k.cubin"], check=True)
    process = start(tmp_path, "first", tree=small_tree, KIT=str(kit))
    out, err = end(process, 120)
    rows = lines(tmp_path)
    assert process.returncode == 0, out + err
    assert rows[0]["commit"] == "abc123"
    # kit.json says nothing of the sources, so none of it counts as new.
    assert rows[0]["stale"] == ["triton", "wheel"]
    (imported,) = of(rows, "imported")
    assert "/site/" in imported["from"]
    assert "/site/" in imported["peer"]
    assert imported["cache"] == ["KEY/k.cubin"]
    (failed,) = of(rows, "test")
    assert failed["test"] == "tests/test_it.py::test_wrong"
    (program,) = of(rows, "program")
    assert program["reason"].startswith("stopped at")
    said = (tmp_path / "out" / "tests.txt").read_text()
    # pytest hears that it is to stop, also where its worker does not.
    counts = of(rows, "tests")[0]
    assert (counts["passed"], counts["failed"], counts["done"], counts["ended"]) == (1, 1, 2, False), said
    assert "FAILED tests/test_it.py::test_wrong (call): test_it.py:3: AssertionError" in said


def _kits(folder: Path) -> Iterator[tuple[str, str]]:
    """(a kit that will not do, a part of what is said of it)."""
    yield str(folder / "nowhere"), "make gpu-kit"
    other = folder / "other"
    _wheel(other / "wheels", "qempo_fast", "cp27-none-any")
    (other / "kit.json").write_text("{}")
    yield str(other), f"wanted one wheel of qempo_fast for {TAG}, found qempo_fast-0.1.0-cp27-none-any.whl"
    broken = folder / "broken"
    _wheel(broken / "wheels", "qempo_fast", f"{TAG}-none-any")
    (broken / "kit.json").write_text("{")
    yield str(broken), "wanted JSON"
    yield "", "KIT is empty"


def test_a_kit_that_will_not_do_is_refused_in_one_line(tmp_path: Path) -> None:
    for kit, said in _kits(tmp_path):
        process = start(tmp_path, "first", KIT=kit, REHEARSE="0")
        out, err = end(process, 60)
        assert process.returncode == 2
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert err.startswith("gpu/run: ")
        assert said in err
        assert not (tmp_path / "out" / "results.jsonl").exists() or lines(tmp_path) == []


def test_wrong_words_are_refused_and_the_last_results_stay(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text('{"kind": "environment"}\n')
    for words, said in (
        (["third"], "wanted first or second, got 'third'"),
        (["second", "--results", "x"], "no file x"),
    ):
        process = start(tmp_path, *words)
        out, err = end(process, 60)
        assert (process.returncode, out) == (2, "")
        assert said in err
        assert len(lines(tmp_path)) == 1
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_cards_name_and_state_are_read(tmp_path: Path) -> None:
    """nvidia-smi's own form; the chip is what files and rows are named after."""
    told = "NVIDIA H100 80GB HBM3, 580.159.04, 81559 MiB, 0 MiB, 345 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W, 31"
    told += ", Enabled, Default, Disabled"
    fake = tmp_path / "bin" / "nvidia-smi"
    environment = clean_environment(tmp_path)
    fake.write_text(f'#!/usr/bin/env bash\necho "{told}"\n')
    fake.chmod(0o755)
    (tmp_path / "out").mkdir()
    words = [sys.executable, "-P", str(BENCH / "gpu" / "env.py"), "--out", str(tmp_path / "out")]
    subprocess.run(words, env=environment, check=True, capture_output=True)
    (row,) = lines(tmp_path)
    assert (row["device"], row["chip"]) == ("NVIDIA H100 80GB HBM3", "h100")
    assert (row["driver_version"], row["clocks.sm"], row["mig.mode.current"]) == ("580.159.04", "345 MHz", "Disabled")
    done = python(
        "from gpu import env\n"
        "from suite import results\n"
        "from pathlib import Path\n"
        "for name, chip in (('NVIDIA H100 80GB HBM3', 'h100'), ('NVIDIA H200', 'h200'),"
        " ('NVIDIA GH200 480GB', 'gh200'),"
        " ('NVIDIA A100-SXM4-80GB', 'a100'), ('AMD Instinct MI300X', 'mi300x'), ('Tesla T4', 'tesla-t4'),"
        " ('NVIDIA GeForce RTX 4090', 'geforce-rtx-4090')):\n"
        "    assert env.chip(name) == chip, (name, env.chip(name))\n"
        "    assert results.result_path(Path('x'), name) == Path('x', chip + '.jsonl')\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_line_is_one_write_of_a_page_at_most(tmp_path: Path) -> None:
    """Several processes append, and are killed in it."""
    code = (
        "import os\n"
        "from gpu.lines import Lines\n"
        "written = []\n"
        "write = os.write\n"
        "os.write = lambda file, data: (written.append(data), write(file, data))[1]\n"
        "lines = Lines(os.environ['GPU_RESULTS'])\n"
    )
    path = tmp_path / "results.jsonl"
    done = python(
        code + "lines.write('time', reason='é' * 9000, error=float('nan'), more=['x' * 3000], many={'a' * 2000: 2})\n"
        "assert len(written) == 1 and len(written[0]) <= 4096 and written[0].endswith(b'\\n'), len(written[0])\n",
        GPU_RESULTS=str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(path.read_text())["error"] == "nan"
    loop = code + "while True: lines.write('time', x='y' * 700, quiet=True)\n"
    running = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", loop], env={**os.environ, "PYTHONPATH": str(BENCH), "GPU_RESULTS": str(path)}
        )
        for _ in range(3)
    ]
    draw = random.Random(time.time_ns())
    for process in running:
        time.sleep(0.2 + 0.3 * draw.random())
        process.kill()
        process.wait()
    # Three kills cut three lines at most, each where it crosses a page of the file; what came behind one is read.
    found = load("gpu.lines").read(path)
    assert path.read_text().count('{"kind": ') - len(found) <= 3
    assert len(found) > 30


def test_what_was_written_behind_a_cut_line_is_read(tmp_path: Path) -> None:
    whole = '{"kind": "time", "x": 1}'
    (tmp_path / "r").write_text(f'{whole}\n{{"kind": "time", "reason": "y{whole}\n{{"kind": "ti\n{whole}\n{{"ki')
    assert load("gpu.lines").read(tmp_path / "r") == [{"kind": "time", "x": 1}] * 3


def test_one_inaccurate_one_missing_and_one_crashing_peer_are_rows(tmp_path: Path) -> None:
    """While the others keep their times; ours, where it is off, keeps them too and says so."""
    done = python(
        "import os, torch\n"
        "from gpu import cases, lines, steps\n"
        "from suite import logps\n"
        "from suite.provider import Provider\n"
        "P, plain = logps.PROVIDERS, logps._plain\n"
        "calls = []\n"
        "def crashing(h, w, t):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 4: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 16 GiB')\n"
        "    return plain(h, w, t)\n"
        "def missing(case, device): import no_such_peer\n"
        "P['plain torch'] = Provider('peer', lambda case, device: lambda h, w, t: plain(h, w, t) * 1.1)\n"
        "P['TRL ChunkedLogProbFunction'] = Provider('peer', missing)\n"
        "P['cut-cross-entropy cce'] = Provider('peer', lambda case, device: crashing)\n"
        "P['qempo_fast exact'] = Provider('ours', lambda case, device: lambda h, w, t: plain(h, w, t) * 1.1)\n"
        "names = ('plain torch', 'TRL ChunkedLogProbFunction', 'cut-cross-entropy cce', 'qempo_fast exact',"
        " 'qempo_fast sampled')\n"
        "run = steps.Run(lines.Lines(os.environ['GPU_RESULTS']),"
        " steps.Settings('cpu', True, 240.0))\n"
        "cases.measure_group(run, 'x', cases.Group('logps', (cases.SMALL,), names, 3, 1))\n",
        GPU_RESULTS=str(tmp_path / "r.jsonl"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    inaccurate, missing, crashing, ours, sampled = of(rows, "time")
    assert "error_hidden" in inaccurate["reason"]
    assert missing["reason"] == "ModuleNotFoundError: No module named 'no_such_peer'"
    assert "out of memory" in crashing["reason"]
    assert not any("full_ms" in r for r in (inaccurate, missing, crashing))
    assert "error_hidden" in ours["inaccurate"]
    assert ours["full_ms"] > 0
    assert sampled["full_ms"] > 0
    assert "inaccurate" not in sampled


def test_the_profilers_names_are_the_kernels() -> None:
    """Every kernel of kernels/ and csrc/cuda is among those counted; a slip in a command line is found."""
    tools = load("gpu.tools")
    names = []
    for path in (*(ROOT / "kernels").glob("*.py"), *(ROOT / "csrc" / "cuda").glob("*.cu")):
        names += re.findall(r"^(?:def +|    )(\w+_kernel)\(", path.read_text(), re.MULTILINE)
    assert len(names) > 15
    assert [n for n in names if not re.search(tools.KERNELS, n)] == []
    python = [sys.executable, "-P", str(BENCH / "gpu" / "hot_kernels.py")]
    assert tools.wrong(tools.counters(python)) is None
    for command, said in (
        (tools.counters(["nothing", "x.py"]), "no Python"),
        ([*tools.counters(python)[:1], "--set", "full", *python], "ncu has no --set"),
        (["ncu", "--clock-control", "base", *python], "clocks"),
        (["ncu", "--metrics", "sm throughput", *python], "not names of metrics"),
        (["ncu", "--kernel-name", "regex:(", *python], "no regular expression"),
        (["compute-sanitizer", "--tools", "memcheck", *python], "has no --tools"),
    ):
        assert said in str(tools.wrong(command)), command
    page = (
        "==PROF== Connected to process 5\n"
        '"ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum","other"\n'
        '"","","","","usecond","%"\n'
        '"0","_logps_grad_kernel","(128, 1, 1)","(64, 2, 1)","1,234.50","7"\n'
        "==PROF== Disconnected\n"
    )
    (row,) = tools.counted(page)
    assert row == {
        "kernel": "_logps_grad_kernel", "grid": "(64, 2, 1)", "block": "(128, 1, 1)",
        "gpu__time_duration.sum usecond": 1234.5,
    }  # fmt: skip
    assert tools.counted("==ERROR== no GPU\n") == []


def test_the_tests_of_the_first_call_are_there() -> None:
    """And `make standin` has them, but for the launches of the stress, of which nothing is seen where none runs."""
    makefile = (ROOT / "Makefile").read_text()
    files = re.search(r"foreach f,([\w \\\n\t]+),", makefile)[1].replace("\\", "").split()
    done = python(
        f"files = {[f'test_{f}' for f in files]!r}\n"
        "from gpu import first\n"
        "assert sorted(files) == sorted(set(first.TESTS) - {'test_losses_stress'}), files\n"
        "missing = [n for n in first.TESTS if not (first.ROOT / 'tests' / f'{n}.py').is_file()]\n"
        "assert not missing, missing\n"
        "words = first.selection(False)\n"
        "assert '(test_dpp_cuda and gpu)' in words[-1] and words[-2] == '-k'\n"
    )
    assert done.returncode == 0, done.stderr


TORCH = """
class cuda:
    lost = False
    is_initialized = staticmethod(lambda: True)
    @staticmethod
    def synchronize():
        if cuda.lost: raise RuntimeError("an illegal memory access was encountered")
"""
LOSES_ITS_GPU = """
import torch
def test_one(): pass
def test_loses():
    torch.cuda.lost = True
    raise RuntimeError("CUDA error")
def test_after(): torch.cuda.synchronize()
"""


def test_a_test_that_breaks_its_gpu_context_costs_itself_alone(tmp_path: Path) -> None:
    """Its worker goes, and what is left runs in another; on one worker alone every test after it would fail."""
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "test_it.py").write_text(LOSES_ITS_GPU)
    words = ["-m", "pytest", "-q", "-n", "1", "-p", "gpu.plugin", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    environment = clean_environment(
        tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{BENCH}", GPU_RESULTS=str(tmp_path / "results.jsonl")
    )
    subprocess.run(
        [sys.executable, "-P", *words, "test_it.py"], cwd=tmp_path, env=environment, capture_output=True, timeout=120
    )
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    counts = of(rows, "tests", ended=True)[0]
    assert counts["passed"] == 2, rows
    failed = of(rows, "test")
    assert {r["test"] for r in failed} == {"test_it.py::test_loses"}
    assert "CUDA error" in failed[0]["message"]


def test_a_program_goes_with_the_one_that_started_it(tmp_path: Path) -> None:
    child = "import time; from gpu.lines import die_with_parent; die_with_parent(); "
    child += "print('ready', flush=True); time.sleep(100)"
    parent = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True); "
    )
    parent += "p.wait()"
    environment = {**os.environ, "PYTHONPATH": str(BENCH)}
    process = subprocess.Popen([sys.executable, "-P", "-c", parent], env=environment, stdout=subprocess.PIPE, text=True)
    said = {process.stdout.readline().strip() for _ in range(2)}
    (pid,) = said - {"ready"}
    process.kill()
    process.wait()
    until = time.time() + 20
    while (stat := Path(f"/proc/{pid}/stat")).exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.time() < until
        time.sleep(0.05)
