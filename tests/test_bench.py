"""The benchmarks run: tiny cases by subprocess, results checked against float64 before a row is written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_modules import BENCH, load
from typer.testing import CliRunner

from qempo_fast.cli import app
from qempo_fast.cli.bench import folder

MODES = {"forward", "backward", "full"}


def _run(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    # From another folder: the repository's root must not be on sys.path.
    # Where xdist's variables are set, as in its workers, pytest-benchmark refuses to measure.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "XDG_CACHE_HOME": str(cwd), **env}
    return subprocess.run(
        [sys.executable, "-P", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )


def _in_bench(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return _run("-c", f"import sys; sys.path.insert(0, {str(BENCH)!r})\n{code}", cwd=cwd)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """One smoke run of the command: (its JSON, the content, what it printed)."""
    folder = tmp_path_factory.mktemp("bench")
    out = folder / "tiny.json"
    # Compiled providers take a minute to compile; they go through the same code.
    names = ["qempo_fast cpu", "qempo_fast reference", "eager inv", "eager cholesky", "python loop"]
    names += [
        "qempo_fast sampled",
        "qempo_fast exact",
        "plain torch",
        "cut-cross-entropy cce",
        "verl linear_cross_entropy",
    ]
    chosen = [word for name in names for word in ("--provider", name)]
    words = ["--set", "tiny", "--rounds", "3", "--op", "dpp", "--op", "logps", "--json", str(out)]
    done = _run("-m", "qempo_fast", "bench", *words, *chosen, cwd=folder)
    assert done.returncode == 0, done.stderr
    return out, json.loads(out.read_text()), done.stdout


def test_rows_say_what_they_depend_on(tiny: tuple[Path, dict[str, Any], str]) -> None:
    _, content, _ = tiny
    assert {"cpu", "cores", "torch", "qempo_fast", "commit", "date", "load_before", "load_after"} <= content.keys()
    (ceilings,) = content["ceilings"]
    assert ceilings["copy_gbs"] > 0
    assert ceilings["gemm_gflops"].keys() == {"float32", "bfloat16"}
    cases = {(r["op"], r["case"]) for r in content["rows"]}
    assert len(cases) == 4
    assert {r["threads"] for r in content["rows"]} == {1}


def test_every_provider_has_its_modes_errors_and_floor(tiny: tuple[Path, dict[str, Any], str]) -> None:
    rows = tiny[1]["rows"]
    for op, name in (
        ("dpp", "qempo_fast cpu"),
        ("dpp", "python loop"),
        ("logps", "qempo_fast sampled"),
        ("logps", "plain torch"),
    ):
        for case in {r["case"] for r in rows if r["op"] == op}:
            mine = [r for r in rows if (r["case"], r["provider"]) == (case, name)]
            assert {r["mode"] for r in mine} == MODES
            for row in mine:
                assert 0 < row["median_ms"] <= row["p80_ms"]
                assert row["median_ms"] == min(row["turn_ms"].values())
                assert len(row["turn_ms"]) == 3
                assert 0 < row["ratio_low"] <= row["ratio_high"]
                assert max(v for k, v in row.items() if k.startswith("error_")) < 0.04
            full = next(r for r in mine if r["mode"] == "full")
            ceilings = tiny[1]["ceilings"][0]
            rate = ceilings["gemm_gflops"][full.get("dtype", "float32")]
            floor = max(full["floor_bytes"] / ceilings["copy_gbs"], full["floor_flops"] / rate) / 1e6
            assert math.isclose(full["floor_ms"], floor)
    sampled = [r for r in rows if r["provider"] == "qempo_fast sampled"]
    assert all(0 < r["kept"] <= 1 and r["entropy_nats"] > 0 for r in sampled)


def test_ratio_is_to_the_fastest_peer_of_the_case(tiny: tuple[Path, dict[str, Any], str]) -> None:
    rows = [r for r in tiny[1]["rows"] if r.get("mode") == "full" and r["op"] == "dpp"]
    case = [r for r in rows if r["case"] == rows[0]["case"]]
    best = min((r for r in case if r["kind"] == "peer"), key=lambda r: r["median_ms"])
    mine = next(r for r in case if r["provider"] == "qempo_fast cpu")
    assert mine["best_peer"] == best["provider"]
    assert mine["ratio_to_best_peer"] == best["median_ms"] / mine["median_ms"]


def test_what_cannot_run_is_a_row_with_the_reason(tiny: tuple[Path, dict[str, Any], str]) -> None:
    _, content, printed = tiny
    for name, word in (("cut-cross-entropy cce", "GPU"), ("verl linear_cross_entropy", "verl")):
        found = [r for r in content["rows"] if r["provider"] == name]
        assert len(found) == 2
        assert all(word in r["reason"] and "median_ms" not in r for r in found)
        assert f"{name}: " in printed


def test_table_shows_ratio_and_share_of_the_floor(tiny: tuple[Path, dict[str, Any], str]) -> None:
    _, content, printed = tiny
    row = next(r for r in content["rows"] if r["provider"] == "qempo_fast cpu" and r["mode"] == "full")
    line = next(text for text in printed.splitlines() if text.strip().startswith("qempo_fast cpu"))
    assert f"{row['ratio_to_best_peer']:.2f}" in line
    assert f" {100 * row['floor_ms'] / row['median_ms']:.0f} " in line


def test_comparison_fails_only_past_the_tolerance(tiny: tuple[Path, dict[str, Any], str]) -> None:
    """The same rows pass; committed ratios that no turn of now comes near make the status 1; a slow turn does not."""
    compare = load("compare")
    rows = tiny[1]["rows"]
    path = Path("then.json")

    def status(factor: float, now: list[dict]) -> int:
        then = [
            {**r, "ratio_to_best_peer": r["ratio_to_best_peer"] * factor} if "ratio_to_best_peer" in r else r
            for r in rows
        ]
        return compare.regressions(now, then, path, 0.2, compare.Console(quiet=True))

    assert status(1.0, rows) == 0
    assert status(0.5, rows) == 0
    assert status(1000.0, rows) == 1
    noisy = [{**r, "ratio_to_best_peer": 0.01 * r["ratio_to_best_peer"]} if "ratio_high" in r else r for r in rows]
    assert status(1.0, noisy) == 0
    broken = [r for r in rows if r["provider"] != "eager inv" or "mode" not in r]
    assert compare.fallen(broken, rows, 0.2)[0] == []
    gone = [{k: v for k, v in r.items() if k != "ratio_to_best_peer"} for r in rows]
    lines, compared = compare.fallen(gone, rows, 0.2)
    assert len(lines) == compared > 0
    assert status(1.0, []) == 2


def test_a_folder_to_compare_with_gives_the_newest_run_on_the_device(
    tiny: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    results, run = load("results"), tiny[1]
    better = [{**r, "provider": "better"} for r in run["rows"]]
    runs = {
        "b": run,
        "a-before": {**run, "date": "2020-01-01 00:00 UTC", "rows": better},
        "c-elsewhere": {**run, "device": "a GPU", "rows": better},
    }
    for name, content in runs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    def providers(device: str) -> set[str]:
        return {r["provider"] for r in results.committed(tmp_path, device)}

    assert providers("cpu") == {r["provider"] for r in run["rows"]}
    assert providers("a GPU") == {"better"}
    assert providers("another") == set()
    assert results.committed(tmp_path / "a-before.json", "cpu") == better


def test_training_step_and_pytest_benchmark(tmp_path: Path) -> None:
    """The step op, TRL's trainers among its providers, through pytest-benchmark, whose statistics are the turns."""
    pytest.importorskip("pytest_benchmark", reason="the bench extra is not installed")
    pytest.importorskip("trl", reason="the trl extra is not installed")
    out = tmp_path / "pytest.json"
    words = [
        "--benchmark-only",
        "--bench-set",
        "tiny",
        "--bench-op",
        "step",
        "--bench-rounds",
        "2",
        "-p",
        "no:cacheprovider",
    ]
    chosen = ["-k", "DPO and full and not sampled", "--benchmark-json", str(out), "-p", "no:xdist"]
    ini = ["-c", str(BENCH.parent / "pyproject.toml"), "--rootdir", str(BENCH.parent)]
    done = _run("-m", "pytest", str(BENCH), *ini, *words, *chosen, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks = json.loads(out.read_text())["benchmarks"]
    assert {"qempo_fast", "TRL", "plain torch"} <= {b["extra_info"]["provider"] for b in benchmarks}
    for b in benchmarks:
        assert math.isclose(b["stats"]["min"] * 1e3, b["extra_info"]["median_ms"], rel_tol=1e-6)
        assert b["stats"]["rounds"] == 2
        assert b["extra_info"]["error_grad"] < 1e-4


_FAULTS = """
import json, pathlib
import bench_dpp, suite
right, P = bench_dpp.eager_inv, bench_dpp.PROVIDERS
calls = []
def tires(x):
    calls.append(1)
    if len(calls) > 3: raise MemoryError('out of memory')
    return right(x)
def missing(case, device): import no_such_peer
P['eager inv'] = suite.Provider({kind!r}, lambda case, device: lambda x: right(x) + 1e-3)
P['eager cholesky'] = suite.Provider('peer', missing)
P['python loop'] = suite.Provider('peer', lambda case, device: tires)
names = ['qempo_fast cpu', 'eager inv', 'eager cholesky', 'python loop']
status = suite.main(ops=['dpp'], sets=['tiny'], providers=names, rounds=2, json=pathlib.Path('out.json'))
"""


def test_a_peer_that_is_wrong_missing_or_fails_is_a_row_and_the_others_keep_theirs(tmp_path: Path) -> None:
    """Gains off by 1e-3, a module that is not there, memory that runs out while it is timed."""
    done = _in_bench(_FAULTS.format(kind="peer") + "sys.exit(status)\n", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    reasons: dict[str, set[str]] = {}
    for row in rows:
        reasons.setdefault(row["provider"], set()).add(row.get("reason", "timed"))
    assert reasons["qempo_fast cpu"] == reasons["three passes"] == {"timed"}
    assert all("error_gains 0.00" in r and "wanted at most 1e-05" in r for r in reasons["eager inv"])
    assert len(reasons["eager inv"]) == 2
    assert reasons["eager cholesky"] == {"ModuleNotFoundError: No module named 'no_such_peer'"}
    assert reasons["python loop"] == {"MemoryError: out of memory"}
    assert "eager cholesky: ModuleNotFoundError" in done.stdout


def test_a_wrong_result_of_ours_is_the_runs_failure(tmp_path: Path) -> None:
    done = _in_bench(_FAULTS.format(kind="ours") + "sys.exit(status)\n", tmp_path)
    assert done.returncode == 2
    assert "wrong result: Inaccurate: eager inv, G=16 k=4 d=24: error_gains" in done.stderr


def test_the_file_has_every_case_that_ended(tmp_path: Path) -> None:
    """Killed in its second case, a run leaves the first one's rows, in whole JSON."""
    done = _in_bench(
        "import os, pathlib, signal, suite\n"
        "table_of, runs = suite.table_of, []\n"
        "def cut(run, *rest):\n"
        "    runs.append(run)\n"
        "    if len(runs) > 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return table_of(run, *rest)\n"
        "suite.table_of = cut\n"
        "suite.main(ops=['dpp'], sets=['tiny'], providers=['eager inv'], rounds=1, json=pathlib.Path('out.json'))\n",
        tmp_path,
    )
    assert done.returncode == -9
    content = json.loads((tmp_path / "out.json").read_text())
    assert {r["case"] for r in content["rows"]} == {"G=16 k=4 d=24"}
    assert content["ceilings"]
    assert content["commit"]
    assert [p.name for p in tmp_path.glob("*out.json*")] == ["out.json"]


def test_a_run_needs_no_git(tmp_path: Path) -> None:
    code = "import interleave; print(interleave.environment((), 'cpu')['commit'])\n"
    done = _run("-c", f"import sys; sys.path.insert(0, {str(BENCH)!r})\n{code}", cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "unknown"


def test_the_gpu_sets_wait_for_no_compiler(tmp_path: Path) -> None:
    """Two rounds, and the text-like head where the headline is measured."""
    done = _in_bench(
        "import torch, suite\n"
        "runs = suite.planned(suite.Options(ops=('logps', 'dpp', 'losses'), sets=('gpu',)))\n"
        "assert len(runs) > 20\n"
        "assert all(r.rounds == 2 or r.op == 'step' for r in runs)\n"
        "assert not [n for r in runs for n in r.names if 'compile' in n]\n"
        "logps = [str(r.case) for r in runs if r.op == 'logps']\n"
        "assert logps[0] == 'text-like N=8192 D=4096 V=131072 bfloat16', logps\n"
        "assert logps[1] == 'flat N=8192 D=4096 V=131072 bfloat16', logps\n"
        "assert any(case.endswith('softcap=30') for case in logps)\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_wall_time_has_the_host_in_it(tmp_path: Path) -> None:
    """A step that waits on the host takes that long; its update belongs to it. Rows of a GPU's run have it."""
    done = _in_bench(
        "import time, torch, interleave, suite, bench_dpp, machine\n"
        "x, seen = torch.ones(3, requires_grad=True), []\n"
        "def work():\n"
        "    time.sleep(0.02)\n"
        "    return x * 2\n"
        "step = interleave.Step(work, (x,), torch.ones(3), 'cpu', seen.append)\n"
        "assert 20 < interleave.wall_ms(step, 3) < 500\n"
        "assert len(seen) == 3 and torch.equal(seen[0][0], torch.full((3,), 2.0))\n"
        "inputs, case = bench_dpp.inputs, bench_dpp.SETS['tiny'].cases[0]\n"
        "bench_dpp.inputs = lambda case, device: inputs(case, 'cpu')\n"
        "run = suite.Run('dpp', 'gpu', case, 1, ('eager inv', 'qempo_fast cpu'), False, True, 1)\n"
        "ceilings = machine.Ceilings(1, {'float32': 1.0}, 1.0)\n"
        "table = suite.table_of(run, suite.Options(device='cuda', seconds=0.01), ceilings)\n"
        "assert {r['mode'] for r in table if 'wall_ms' in r} == {'full', 'forward'}, table\n"
        "assert {r['provider'] for r in table if 'wall_ms' in r} == {*run.names, 'three passes'}\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_truth_in_blocks_is_the_references(tmp_path: Path) -> None:
    """dhidden and every third row of dweight, over blocks whose length three does not divide."""
    done = _in_bench(
        "import torch, bench_logps, qempo_fast as qf\n"
        "g = torch.Generator().manual_seed(0)\n"
        "h, w = (torch.randn(n, 5, generator=g) for n in (7, 20000))\n"
        "t, c = torch.randint(20000, (7,), generator=g), torch.randn(7, generator=g)\n"
        "t[0], t[1] = 8192, 19999\n"
        "leaves = [x.double().requires_grad_() for x in (h, w)]\n"
        "(qf.reference.linear_logps(*leaves, t).logps * c.double()).sum().backward()\n"
        "dh, dw, nats = bench_logps.truth(h, w, t, c, every=3)\n"
        "out = qf.reference.linear_logps(*leaves, t, entropy=True)\n"
        "assert abs(nats - float(out.entropy.mean())) < 1e-12\n"
        "torch.testing.assert_close(dh, leaves[0].grad, rtol=1e-10, atol=1e-12)\n"
        "torch.testing.assert_close(dw, leaves[1].grad[::3], rtol=1e-10, atol=1e-12)\n"
        "capped = [x.double().requires_grad_() for x in (h, w)]\n"
        "(qf.reference.linear_logps(*capped, t, softcap=2.0).logps * c.double()).sum().backward()\n"
        "dh, dw, _ = bench_logps.truth(h, w, t, c, every=3, softcap=2.0)\n"
        "torch.testing.assert_close(dh, capped[0].grad, rtol=1e-10, atol=1e-12)\n"
        "torch.testing.assert_close(dw, capped[1].grad[::3], rtol=1e-10, atol=1e-12)\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_memory_of_a_process(tmp_path: Path) -> None:
    """Plain torch keeps N x V logits, which at N = 512 and V = 16384 are 32 MiB and more; the exact op does not."""
    code = (
        "import bench_logps, memory, json\n"
        "case = bench_logps.Case('random', 512, 16, 16384, 'float32')\n"
        "bench_logps.SETS['one'] = bench_logps.Set([case])\n"
        "print(json.dumps(memory.of('logps', str(case), '{}', 1, 'cpu')))\n"
    )
    mib = {}
    for name in ("plain torch", "qempo_fast exact"):
        done = _in_bench(code.format(name), tmp_path)
        assert done.returncode == 0, done.stderr
        mib[name] = json.loads(done.stdout)["memory_mib"]
    assert mib["plain torch"] > 60
    assert 0 < mib["qempo_fast exact"] < mib["plain torch"]


class _FakeCuda:
    """Records what a GPU's stream would be handed; an event's time is the number of entries before it."""

    def __init__(self) -> None:
        self.stream: list[str] = []

    def get_device_properties(self, device: str) -> Any:
        return type("Properties", (), {"L2_cache_size": 1024})

    def _sleep(self, cycles: int) -> None:
        self.stream.append("spin")

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        cuda = self

        class Event:
            def record(self) -> None:
                cuda.stream.append("event")
                self.at, self.ready = len(cuda.stream), False

            def synchronize(self) -> None:
                self.ready = True

            def elapsed_time(self, other: Any) -> float:
                assert other.ready, "read before the GPU got there"
                return float(other.at - self.at)

        return Event()


def test_gpu_clock_flushes_then_spins_then_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Order on the stream: L2 overwritten, a spin that the host queues behind, and only then the first event."""
    interleave, cuda = load("interleave"), _FakeCuda()
    clock = interleave.EventClock(cuda, "cpu")
    assert clock._flush.numel() == 2048
    clock._flush.fill_(1)
    monkeypatch.setattr(interleave, "clock", lambda device: clock)
    x = torch.ones(3, requires_grad=True)

    def work() -> torch.Tensor:
        cuda.stream.append("forward")
        return x * 2

    step = interleave.Step(work, (x,), torch.ones(3), "cuda", lambda grads: cuda.stream.append("update"))
    out, (grad,), times = step.run()
    assert cuda.stream == ["spin", "event", "forward", "event", "event", "update", "event"]
    assert clock._flush.count_nonzero() == 0
    # forward: one entry and its event; backward records nothing of its own; all: from the first event to the last.
    assert times == [2.0, 1.0, 5.0]
    assert torch.equal(out, torch.full((3,), 2.0))
    assert torch.equal(grad, torch.full((3,), 2.0))


def test_a_wheel_says_that_it_needs_the_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qempo_fast.__file__", str(tmp_path / "site-packages" / "qempo_fast" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "--quick"])
    assert result.exit_code == 2
    assert "source tree" in result.stderr
    monkeypatch.chdir(BENCH.parent)
    assert folder() == BENCH


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "attention"], "op: wanted some of logps"),
        (["--case", "no such case", "--op", "dpp"], "no case of dpp holds 'no such case'"),
        (
            ["--compare", "nothing.json", "--op", "dpp"],
            "compare: wanted a file or a folder of results, got nothing.json",
        ),
    ],
)
def test_bad_arguments_run_nothing(words: list[str], message: str, tmp_path: Path) -> None:
    done = _run("-m", "qempo_fast", "bench", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_newer_results_replace_a_case_as_a_whole(tmp_path: Path) -> None:
    results = load("results")
    run = {"device": "cpu", "ceilings": [], "date": "2026-01-02 00:00 UTC"}
    row = {"op": "dpp", "case": "a", "threads": 1, "mode": "full"}
    old = [{**row, "provider": "ours", "median_ms": 1.0}, {**row, "provider": "peer", "median_ms": 2.0}]
    other = [{**row, "case": "b", "provider": "ours", "median_ms": 3.0}]
    # The newer run's file comes first in the alphabet.
    (tmp_path / "b.json").write_text(json.dumps({**run, "rows": old + other}))
    newer = {**run, "date": "2026-01-03 00:00 UTC", "rows": [{**row, "provider": "ours", "median_ms": 4.0}]}
    (tmp_path / "a.json").write_text(json.dumps(newer))
    (tmp_path / "reproduction.json").write_text(json.dumps({"rows": [1]}))
    rows = results.load(tmp_path)
    assert {(r["case"], r["provider"], r["median_ms"]) for r in rows} == {("a", "ours", 4.0), ("b", "ours", 3.0)}


def test_pages_match_the_results(tmp_path: Path) -> None:
    """The tables of README and docs/ are those that report.py makes from the committed results."""
    done = _run(str(BENCH / "report.py"), "--check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
