"""bench/gpu/run.sh rehearsed without a GPU: both calls whole, and cut at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from bench_modules import ROOT
from gpu_runs import end, lines, of, start

pytest.importorskip("triton", reason="Triton runs on Linux only")
pytest.importorskip("xdist", reason="the run's tests are shared out by pytest-xdist")


def _status() -> str:
    words = ["git", "status", "--porcelain", "--", "bench", "qempo_fast", "kernels", "csrc", "docs", "."]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout


class _Watch(threading.Thread):
    """Reads the results every few milliseconds: what a kill at that moment would have left."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path, self.wrong, self.looks, self.over = path, [], 0, False

    def run(self) -> None:
        while not self.over:
            with contextlib.suppress(FileNotFoundError):
                self.looks += 1
                # A write that crosses a page shows in two steps, and a kill between them lets it end: look once more.
                if self._torn() and (text := self._torn()):
                    self.wrong.append(text[-300:])
            time.sleep(0.01)

    def _torn(self) -> str:
        """What stands there, unless it is whole lines behind the environment's."""
        text = self.path.read_text()
        try:
            kinds = [json.loads(line)["kind"] for line in text.splitlines()]
        except ValueError:
            return text
        return text if (text and not text.endswith("\n")) or (kinds and kinds[0] != "environment") else ""


def _whole(home: Path, rows: list[dict[str, Any]], kind: str) -> None:
    """From its first line to its last, in three files, and nothing left in the folders for temporary things."""
    assert (rows[0]["kind"], rows[0]["call"], rows[0]["rehearsal"]) == ("environment", kind, True)
    assert rows[-1]["kind"] == "end"
    assert all(0 <= r["s"] <= rows[-1]["s"] for r in rows)
    assert {p.name for p in (home / "out").iterdir()} == {"log.txt", "results.jsonl", "tests.txt"}
    assert {p.name for p in home.iterdir()} == {"home", "tmp", "bin", "out"}
    assert list((home / "tmp").iterdir()) == []
    assert list((home / "home").rglob("*")) == []


# One test: with a worker for each core, xdist would go through the call once for each of several.
def test_the_first_call(tmp_path: Path) -> None:
    """Every step has its lines, whole at every moment. git is on no path; the work tree stays as it was."""
    before, watch = _status(), _Watch(tmp_path / "out" / "results.jsonl")
    watch.start()
    process = start(tmp_path, "first")
    out, err = end(process)
    watch.over = True
    watch.join()
    assert process.returncode == 0, out + err + (tmp_path / "out" / "log.txt").read_text()
    rows = lines(tmp_path)
    _whole(tmp_path, rows, "first")
    assert watch.looks > 100
    assert watch.wrong == []
    assert rows[0]["commit"] == "unknown"
    _right(rows)
    _timed(rows)
    assert "kernel: " in out
    assert _status() == before


def _right(rows: list[dict[str, Any]]) -> None:
    """Kernels, tests, graphs and repeats."""
    assert len(of(rows, "kernel", ok=True)) == len(of(rows, "kernel")) > 0
    (tests,) = of(rows, "tests", run="tests", ended=True)
    assert tests["passed"] == tests["done"] > 0
    assert {r["item"]: r["status"] for r in of(rows, "program")} == {"kernels/triton": 0, "tests": 0}
    smoke = of(rows, "smoke", what="fullgraph")
    assert len(smoke) == 14
    assert all(r["error"] <= 1e-4 for r in smoke)
    assert all("no GPU" in r["reason"] for r in of(rows, "smoke", what="graph"))
    assert {r["what"] for r in of(rows, "stress", different=0)} >= {"sampled step", "rspo ragged", "grpo"}
    assert len(of(rows, "stress", different=0)) == len(of(rows, "stress"))


def _timed(rows: list[dict[str, Any]]) -> None:
    """Ceilings, times, kernels by name; what cannot run has its reason."""
    assert {r["what"] for r in of(rows, "ceiling")} >= {"gemm bfloat16", "copy", "card"}
    for op, provider in (
        ("logps", "qempo_fast exact"), ("logps", "qempo_fast sampled 2^-11"), ("logps", "plain torch"),
        ("dpp", "qempo_fast cpu"), ("dpp", "eager inv"), ("losses", "qempo_fast cpu"), ("losses", "eager"),
    ):  # fmt: skip
        found = of(rows, "time", op=op, provider=provider)
        assert found, (op, provider)
        assert all(r["full_ms"] > 0 and r["wall_ms"] > 0 for r in found), found
    assert all(0 < r["kept"] <= 1 for r in of(rows, "time", provider="qempo_fast sampled 2^-7"))
    assert of(rows, "time", provider="qempo_fast exact, logits kept", kept_logits=True)
    assert len({r["item"] for r in of(rows, "profile", kernel="all")}) == 2
    (cce,) = of(rows, "time", provider="cut-cross-entropy cce")
    assert "GPU" in cce["reason"]
    assert "full_ms" not in cce
    (native,) = of(rows, "time", provider="Liger native")
    assert native["published"]["address"].startswith("https://")
    assert native["reason"]


def test_the_second_call(tmp_path: Path) -> None:
    """After a first one in which a test failed, whose lines lie where the new ones go."""
    failed = {
        "kind": "test",
        "outcome": "failed",
        "test": "tests/test_kernels.py::test_segment_sum_is_bitwise_repeatable",
    }
    before = tmp_path / "out" / "results.jsonl"
    before.parent.mkdir()
    before.write_text('{"kind": "environment"}\n' + json.dumps(failed) + "\n" + json.dumps(failed) + "\n")
    process = start(tmp_path, "second", "--results", str(before))
    out, err = end(process)
    assert process.returncode == 0, out + err + (tmp_path / "out" / "log.txt").read_text()
    rows = lines(tmp_path)
    _whole(tmp_path, rows, "second")
    (tests,) = of(rows, "tests", run="again", ended=True)
    assert (tests["passed"], tests["done"]) == (1, 1)
    # A stand-in for the GPU: Triton's launches happen, and the row to commit is read off what is printed.
    tuned = of(rows, "tuned", arch="cuda:90")
    assert {"fused", "grad"} <= {word for r in tuned for word in r["what"].replace(",", "").split()}
    assert all(r["row"].startswith("Block(") and r["ms"] == 1.0 for r in tuned)
    commands = of(rows, "command")
    assert [r["item"] for r in commands] == ["memcheck/logps", "racecheck/dpp", "ncu"]
    assert all(r["wrong"] is None for r in commands)
    assert all(r["status"] == 0 for r in of(rows, "program"))
    # A check under a sanitizer says so: it is no proof of its own.
    assert {r["under"] for r in of(rows, "kernel", ok=True)} == {"memcheck", "racecheck"}
    assert all(r["full_ms"] > 0 for r in of(rows, "time", provider="compile"))
    titles = {r["item"].split("/")[0] for r in of(rows, "time")}
    assert {"headline, tuned rows", "headline, committed rows"} <= titles


def _alive(session: int) -> list[str]:
    """Processes of a session, but those that have ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state != "Z":
                found.append(stat.parent.name)
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])
def test_a_run_cut_at_any_moment_leaves_whole_lines(number: signal.Signals, tmp_path: Path) -> None:
    """And no process, neither where the shell is told to stop nor where all of them are killed."""
    process = start(tmp_path, "first")
    until = time.time() + 60
    while not (tmp_path / "out" / "results.jsonl").exists() or not lines(tmp_path):
        assert time.time() < until
        time.sleep(0.05)
    # A moment of its own in each run.
    time.sleep(random.Random(time.time_ns()).uniform(0, 12))
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    end(process, 30)
    until = time.time() + 15
    while (left := _alive(process.pid)) and time.time() < until:
        time.sleep(0.1)
    assert not left
    rows = lines(tmp_path)
    assert rows[0]["kind"] == "environment"
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert list((tmp_path / "tmp").iterdir()) == []
