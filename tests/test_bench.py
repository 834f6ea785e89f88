"""The benchmarks run: tiny cases by subprocess, results checked against float64 before a row is written."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_modules import BENCH, ROOT, load, python
from typer.testing import CliRunner

import qempo_fast as qf
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
    return python(code, cwd, COLUMNS="160", XDG_CACHE_HOME=str(cwd))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """One smoke run of the command: (its table, what it depends on with its rows, what it printed)."""
    folder = tmp_path_factory.mktemp("bench")
    out = folder / "tiny.jsonl"
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
    rows = load("suite.results").load(out)
    return out, {**rows[0]["run"], "rows": rows}, done.stdout


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
                assert row["samples"] >= 3
                assert 0 < row["ratio_low"] <= row["ratio_high"]
                assert max(v for k, v in row.items() if k.startswith("error_")) < 0.04
            full = next(r for r in mine if r["mode"] == "full")
            ceilings = tiny[1]["ceilings"][0]
            rate = ceilings["gemm_gflops"][full.get("dtype", "float32")]
            floor = max(full["floor_bytes"] / ceilings["copy_gbs"], full["floor_flops"] / rate) / 1e6
            assert math.isclose(full["floor_ms"], floor, rel_tol=1e-7)
    sampled = [r for r in rows if r["provider"] == "qempo_fast sampled"]
    assert all(0 < r["kept"] <= 1 and r["entropy_nats"] > 0 for r in sampled)


def test_a_median_is_the_smallest_of_the_turns() -> None:
    """Of turns with medians 3 and 2 milliseconds; ratios of turn against turn give the range."""
    interleave = load("suite.interleave")
    times = {0: [[1.0], [3.0], [4.0]], 1: [[2.0], [9.0], [1.0]]}
    row = interleave.timings(times)["forward"]
    assert (row["median_ms"], row["turn_ms"], row["samples"]) == (2.0, {"0": 3.0, "1": 2.0}, 6)
    case = {"op": "dpp", "case": "a", "threads": 1, "mode": "forward"}
    mine = {**case, **row, "kind": "ours", "provider": "ours"}
    peer = {**mine, "kind": "peer", "provider": "peer", "median_ms": 6.0, "turn_ms": {"0": 6.0, "1": 8.0}}
    interleave.add_ratios([mine, peer])
    assert (mine["best_peer"], mine["ratio_to_best_peer"]) == ("peer", 3.0)
    assert (mine["ratio_low"], mine["ratio_high"]) == (2.0, 4.0)


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
    compare = load("suite.compare")
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


def test_comparison_says_first_that_the_processor_is_another(tiny: tuple[Path, dict[str, Any], str]) -> None:
    compare = load("suite.compare")
    rows = tiny[1]["rows"]
    elsewhere = [{**r, "run": {**r["run"], "cpu": "another CPU (family 1, model 2)"}} for r in rows]

    def printed(then: list[dict]) -> str:
        console = compare.Console(file=io.StringIO(), width=300)
        compare.regressions(rows, then, Path("then.json"), 0.2, console)
        return console.file.getvalue()

    assert printed(elsewhere).startswith("another processor: this is ")
    assert "then.json is of another CPU (family 1, model 2)." in printed(elsewhere)
    assert "another processor" not in printed(rows)


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
    ini = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    done = _run("-m", "pytest", str(BENCH / "suite"), *ini, *words, *chosen, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks = json.loads(out.read_text())["benchmarks"]
    assert {"qempo_fast", "TRL", "plain torch"} <= {b["extra_info"]["provider"] for b in benchmarks}
    for b in benchmarks:
        assert math.isclose(b["stats"]["min"] * 1e3, b["extra_info"]["median_ms"], rel_tol=1e-6)
        assert b["stats"]["rounds"] == 2
        assert b["extra_info"]["error_grad"] < 1e-4


_FAULTS = """
import json, pathlib, sys
from suite import dpp, run as suite
from suite.provider import Provider
right, P = dpp.eager_inv, dpp.PROVIDERS
calls = []
def tires(x):
    calls.append(1)
    if len(calls) > 3: raise MemoryError('out of memory')
    return right(x)
def missing(case, device): import no_such_peer
P['eager inv'] = Provider({kind!r}, lambda case, device: lambda x: right(x) + 1e-3)
P['eager cholesky'] = Provider('peer', missing)
P['python loop'] = Provider('peer', lambda case, device: tires)
names = ['qempo_fast cpu', 'eager inv', 'eager cholesky', 'python loop']
status = suite.main(ops=['dpp'], sets=['tiny'], providers=names, rounds=2, json=pathlib.Path('out.jsonl'))
"""


def test_a_peer_that_is_wrong_missing_or_fails_is_a_row_and_the_others_keep_theirs(tmp_path: Path) -> None:
    """Gains off by 1e-3, a module that is not there, memory that runs out while it is timed."""
    done = _in_bench(_FAULTS.format(kind="peer") + "sys.exit(status)\n", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = load("suite.results").load(tmp_path / "out.jsonl")
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


_CUT = """
import os, pathlib, signal
from suite import run as suite
table_of, runs = suite.table_of, []
def cut(run, *rest):
    runs.append(run)
    if len(runs) > 1: os.kill(os.getpid(), signal.SIGKILL)
    return table_of(run, *rest)
suite.table_of = cut
suite.main(ops=['dpp'], sets=['tiny'], providers=['eager inv'], rounds=1, json=pathlib.Path('out.jsonl'))
"""


def test_the_file_has_every_case_that_ended(tmp_path: Path) -> None:
    """Killed in its second case, a run leaves the first one's rows, in a whole table."""
    done = _in_bench(_CUT, tmp_path)
    assert done.returncode == -9
    rows = load("suite.results").load(tmp_path / "out.jsonl")
    assert {r["case"] for r in rows} == {"G=16 k=4 d=24"}
    assert rows[0]["run"]["ceilings"]
    assert rows[0]["run"]["commit"]
    assert [p.name for p in tmp_path.glob("*out.json*")] == ["out.jsonl"]


def test_a_run_needs_no_git(tmp_path: Path) -> None:
    code = "from suite.provenance import environment; print(environment((), 'cpu')['commit'])\n"
    done = python(code, tmp_path, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "unknown"


def test_the_gpu_sets_wait_for_no_compiler() -> None:
    """Two rounds, and the text-like head where the headline is measured."""
    suite = load("suite.run")
    runs = suite.planned(suite.Options(ops=("logps", "dpp", "losses"), sets=("gpu",)))
    assert len(runs) > 20
    assert all(r.rounds == 2 for r in runs)
    assert not [n for r in runs for n in r.names if "compile" in n]
    logps = [str(r.case) for r in runs if r.op == "logps"]
    assert logps[0] == "text-like N=8192 D=4096 V=131072 bfloat16"
    assert logps[1] == "flat N=8192 D=4096 V=131072 bfloat16"
    assert any(case.endswith("softcap=30") for case in logps)


def test_wall_time_has_the_host_in_it() -> None:
    """A step that waits on the host takes that long; its update belongs to it."""
    interleave = load("suite.interleave")
    x, seen = torch.ones(3, requires_grad=True), []

    def work() -> torch.Tensor:
        time.sleep(0.02)
        return x * 2

    step = interleave.Step(work, (x,), torch.ones(3), "cpu", seen.append)
    assert 20 < interleave.wall_ms(step, 3) < 500
    assert len(seen) == 3
    assert torch.equal(seen[0][0], torch.full((3,), 2.0))


def test_rows_of_a_gpus_run_have_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    suite, dpp, machine = load("suite.run"), load("suite.dpp"), load("suite.machine")
    inputs, case = dpp.inputs, dpp.SETS["tiny"].cases[0]
    monkeypatch.setattr(dpp, "inputs", lambda case, device: inputs(case, "cpu"))
    names = ("eager inv", "qempo_fast cpu")
    run = suite.Run("dpp", "gpu", case, torch.get_num_threads(), names, False, True, 1)
    ceilings = machine.Ceilings(run.threads, {"float32": 1.0}, 1.0)
    table = suite.table_of(run, suite.Options(device="cuda", seconds=0.01), ceilings)
    walls = [r for r in table if "wall_ms" in r]
    assert {r["mode"] for r in walls} == {"full", "forward"}
    assert {r["provider"] for r in walls} == {*names, "three passes"}


def test_options_of_a_head_are_timed_where_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each beside the call without it and plain torch; a provider that forgets its option is refused."""
    options = load("suite.options")
    draw = torch.Generator().manual_seed(0)
    states, head = (torch.randn(n, 576, generator=draw) / 3 for n in (32, 1024))
    monkeypatch.setattr(options.heads, "real", lambda source, n: (states[:n], head, torch.arange(n)))
    options.inputs.cache_clear()
    assert {case.option for case in options.SETS["options"].cases} == {"columns", "logits_dtype", "batch_invariant"}
    for case in options.SETS["tiny"].cases:
        made, found = options.inputs(case, "cpu"), {}
        for name in options.PROVIDERS:
            step, found[name] = options.checked(name, case, made)
            assert step.run()[0].shape == (32, 1 if case.option != "columns" or "without" in name else 5)
            assert all(error > 0 for error in found[name].values())
        if case.option == "logits_dtype":
            plain, wide = (found[f"qempo_fast {word} the option"]["error_hidden"] for word in ("without", "with"))
            assert wide < plain / 2
    columns = options.SETS["tiny"].cases[0]
    wrong = options.PROVIDERS["plain torch"]._replace(make=lambda case, device: options._without)
    monkeypatch.setitem(options.PROVIDERS, "plain torch", wrong)
    with pytest.raises(load("suite.interleave").Inaccurate, match="plain torch"):
        options.checked("plain torch", columns, options.inputs(columns, "cpu"))
    options.inputs.cache_clear()
    options.truth.cache_clear()


def test_truth_in_blocks_is_the_references() -> None:
    """dhidden and every third row of dweight, over blocks whose length three does not divide."""
    truth = load("suite.logps").truth
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 5, generator=g) for n in (7, 20000))
    t, c = torch.randint(20000, (7,), generator=g), torch.randn(7, generator=g)
    t[0], t[1] = 8192, 19999
    for softcap in (None, 2.0):
        leaves = [x.double().requires_grad_() for x in (h, w)]
        out = qf.reference.linear_logps(*leaves, t, softcap=softcap, entropy=True)
        (out.logps * c.double()).sum().backward()
        dh, dw, nats = truth(h, w, t, c, every=3, softcap=softcap)
        assert abs(nats - float(out.entropy.detach().mean())) < 1e-12
        torch.testing.assert_close(dh, leaves[0].grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dw, leaves[1].grad[::3], rtol=1e-10, atol=1e-12)


_MEMORY = """
import json
from suite import logps, memory
case = logps.Case('random', 512, 16, 16384, 'float32')
logps.SETS['one'] = logps.Set([case])
print(json.dumps(memory.of('logps', str(case), '{}', 1, 'cpu')))
"""


def test_memory_of_a_process(tmp_path: Path) -> None:
    """Plain torch keeps N x V logits, which at N = 512 and V = 16384 are 32 MiB and more; the exact op does not."""
    mib = {}
    for name in ("plain torch", "qempo_fast exact"):
        done = _in_bench(_MEMORY.format(name), tmp_path)
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
    interleave, cuda = load("suite.interleave"), _FakeCuda()
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


def test_the_folders_import_one_way() -> None:
    """gpu/, studies/ and report/ stand on suite/, and none of them on another."""
    folders = {"suite", "gpu", "studies", "report"}
    found = set()
    for path in BENCH.glob("*/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {(path.parent.name, name.split(".")[0]) for name in names}
    between = {(here, other) for here, other in found if other in folders - {here}}
    assert between == {(here, "suite") for here in folders - {"suite"}}


def test_a_wheel_says_that_it_needs_the_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qempo_fast.__file__", str(tmp_path / "site-packages" / "qempo_fast" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "--quick"])
    assert result.exit_code == 2
    assert "source tree" in result.stderr
    monkeypatch.chdir(ROOT)
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
        (["--compare", "old.json", "--op", "dpp"], "old.json: line 1 is none of a table of results"),
        (["--json", "old.json", "--op", "dpp"], "old.json: line 1 is none of a table of results"),
    ],
)
def test_bad_arguments_run_nothing(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"rows": []}')
    done = _run("-m", "qempo_fast", "bench", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
