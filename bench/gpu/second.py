"""The second call on a GPU: what failed again, launch sizes searched, sanitizers, counters, compiled peers.

bench/gpu/run.sh second [--results FILE] starts it; FILE: results.jsonl of the first call.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import steps, tools
from gpu.lines import read, standard_error_as_lines
from gpu.steps import Child, Refused, Run

# Seconds that each of these may take.
AGAIN, SANITIZERS, COUNTERS = 25.0, 40.0, 35.0
WORKERS = 12


def failed_tests(path: Path | None) -> list[str]:
    """Of the first call's lines, each test that failed, once."""
    if path is None:
        return []
    rows = read(path)
    return list(dict.fromkeys(r["test"] for r in rows if r["kind"] == "test" and r.get("outcome") == "failed"))


def tests_again(run: Run, out: Path, results: Path | None) -> None:
    chosen, names = run.settings, failed_tests(results)
    if "tests again" in run.begun:
        return
    if not names:
        why = "no --results" if results is None else f"no test failed in {results}"
        run.lines.write("tests", run="again", done=0, reason=why)
        return
    workers = 1 if chosen.rehearse else min(WORKERS, len(names))
    words = steps.pytest_words(chosen, workers, *names)
    interpreter = {"TRITON_INTERPRET": "1"} if chosen.rehearse else {}
    child = Child(
        run, "tests again", words, out / "tests.txt", AGAIN, GPU_TESTS="again", **steps.QUIET, **interpreter,
    )  # fmt: skip
    _together(run, [child])


def _together(run: Run, made: list[Child]) -> None:
    with steps.children() as alive:
        alive += made
        for child in made:
            child.wait()


def sanitizers(run: Run, out: Path) -> None:
    """memcheck sees past the caching allocator only where each tensor is an allocation of its own."""
    chosen = run.settings
    few = ("--only", "plain torch.float32") if chosen.rehearse else ()
    triton = steps.sanitize(chosen, "--op", "logps", "--backend", "triton", *few)
    few = ("--only", "selection") if chosen.rehearse else ()
    cuda = steps.sanitize(chosen, "--op", "dpp", "--backend", "cpu" if chosen.rehearse else "cuda", *few)
    made = []
    for tool, words in (("memcheck", triton), ("racecheck", cuda)):
        name = f"{tool}/{words[words.index('--op') + 1]}"
        if name in run.begun:
            continue
        if run.left() < SANITIZERS and not chosen.rehearse:
            run.lines.write("program", item=name, reason=f"no time: {run.left():.0f} s left, {SANITIZERS:.0f} wanted")
            continue
        env = {"GPU_SANITIZER": tool, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        env |= {"TRITON_INTERPRET": "1"} if chosen.rehearse else {}
        command = tools.sanitizer(tool, words)
        run.lines.write("command", item=name, command=" ".join(command), wrong=tools.wrong(command))
        made.append(Child(run, name, words if chosen.rehearse else command, out / "log.txt", SANITIZERS, **env))
    _together(run, made)


def counters(run: Run, out: Path) -> None:
    """Nsight Compute over one step of everything, a launch of each kernel and size."""
    chosen = run.settings
    if "ncu" in run.begun:
        return
    size = ("--scale", "64") if chosen.rehearse else ()
    words = steps.python(str(steps.HERE / "hot_kernels.py"), "--device", chosen.device, *size)
    command = tools.counters(words)
    table = Path(os.environ["TMPDIR"]) / "ncu.csv"
    run.lines.write("command", item="ncu", command=" ".join(command), wrong=tools.wrong(command))
    if run.left() < COUNTERS and not chosen.rehearse:
        run.lines.write("program", item="ncu", reason=f"no time: {run.left():.0f} s left, {COUNTERS:.0f} wanted")
        return
    _together(run, [Child(run, "ncu", words if chosen.rehearse else command, table, COUNTERS)])
    text = table.read_text(errors="replace") if table.exists() else ""
    rows = tools.counted(text)
    for row in rows:
        run.lines.write("counters", **row)
    if not rows:
        with (out / "log.txt").open("a") as log:
            log.write(text)
        run.lines.write("counters", reason="no kernel was counted; what ncu said is in log.txt")


_TUNED = re.compile(r'^(?P<what>.+): "(?P<arch>[\w:]+)": (?P<row>.+),  # (?P<ms>\S+) ms, (?P<chip>.+)$')


def tuned_row(line: str) -> dict[str, Any] | None:
    """What kernels/_launch.py prints of a search: the row to commit, its time and the card."""
    found = _TUNED.match(line)
    return {**found.groupdict(), "ms": float(found["ms"])} if found else None


MODES: dict[str, dict[str, Any]] = {"exact": {"grad": "exact"}, "sampled": {"grad": "sampled", "tau": 2.0**-9}}


def search(run: Run, name: str, case: Any, mode: str) -> None:
    """QEMPO_AUTOTUNE=1 for one case and mode, forward and backward: each row found is a line as it comes.

    A search is kept for the process, so that the times after it are those of the rows found.
    """
    import torch

    import qempo_fast as qf
    from qempo_fast.kernels import _launch
    from suite import logps

    count = 0

    def take(line: str) -> None:
        nonlocal count
        row = tuned_row(line)
        if row is not None:
            count += 1
            run.lines.write("tuned", case=str(case), **row)

    def made() -> dict[str, Any]:
        with tools.pretended(run.settings.rehearse), standard_error_as_lines(take):
            _launch.AUTOTUNE = True
            try:
                inputs = logps.inputs(case, run.settings.device)
                leaves = [x.detach().requires_grad_() for x in (inputs.hidden, inputs.weight)]
                how: dict[str, Any] = {**MODES[mode], "softcap": case.softcap, "backend": "triton"}
                out = qf.linear_logps(*leaves, inputs.targets, **how).logps
                torch.autograd.grad(out, leaves, inputs.incoming.to(out.dtype))
            finally:
                _launch.AUTOTUNE = False
        if not count:
            # The exact mode's search has some of the sampled one's kernels.
            raise Refused("no row was printed: nothing was left to search")
        return {"case": str(case), "mode": mode, "rows": count}

    run.do("search", f"search/{name}/{mode}", made, need=8.0, most=50.0)


def searches(run: Run) -> dict[str, Any]:
    from gpu.cases import GEMMA, GPU, SMALL, SMOLLM2

    cases = {"headline": SMALL} if run.settings.rehearse else {"headline": GPU, "gemma": GEMMA, "smollm2": SMOLLM2}
    # In a rehearsal nothing computes: a count of kept columns would be whatever the memory held.
    modes = ("exact",) if run.settings.rehearse else tuple(MODES)
    for name, case in cases.items():
        for mode in modes:
            run.part(f"search of {name}", functools.partial(search, run, name, case, mode))
    return cases


def compiled_peers(run: Run) -> None:
    """Four cases against torch.compile of the plain code; ours beside it, on the same card."""
    import torch

    from gpu.cases import GPU, SMOLLM2, Group, measure_group
    from suite import dpp, losses

    small = run.settings.rehearse
    ours = {"logps": "qempo_fast exact", "dpp": "qempo_fast cuda", "losses": "qempo_fast triton"}
    peers = {"logps": "torch.compile of plain", "dpp": "compile inv", "losses": "compile"}
    compiler = contextlib.nullcontext()
    if small:
        # Inductor takes half a minute for a loss on a CPU; the graph is traced and run all the same.
        compiler = mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        cases: list[tuple[str, Any]] = [("losses", losses.Case("dpo", 16, 4))]
        ours["losses"] = "qempo_fast cpu"
    else:
        cases = [
            ("logps", SMOLLM2), ("losses", losses.Case("grpo", 4096, 8)),
            ("dpp", dpp.Case(4096, 16, 1024)), ("logps", GPU),
        ]  # fmt: skip
    with compiler:
        for op, case in cases:
            runs = 1 if small else 5 if op == "logps" else 20
            group = Group(op, (case,), (ours[op], peers[op]), runs, 1 if small else 5, 10.0)
            run.part(str(case), functools.partial(measure_group, run, f"compiled/{op}", group))


def headline_again(run: Run, case: Any) -> None:
    """The headline with the rows found, then with the committed ones, in one process on one card."""
    from gpu.cases import Group, measure_group
    from qempo_fast.kernels import _launch

    runs = 1 if run.settings.rehearse else 5
    group = Group("logps", (case,), ("qempo_fast exact", "qempo_fast sampled"), runs, runs)
    for title, on in (("tuned", True), ("committed", False)):
        _launch.AUTOTUNE = on
        run.part(title, functools.partial(measure_group, run, f"headline, {title} rows", group))
    _launch.AUTOTUNE = False


def body(run: Run) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    out = Path(os.environ["OUT"])
    run.part("tests again", functools.partial(tests_again, run, out, args.results))
    cases = searches(run)
    run.part("sanitizers", functools.partial(sanitizers, run, out))
    run.part("counters", functools.partial(counters, run, out))
    run.part("compiled peers", functools.partial(compiled_peers, run))
    run.part("headline again", functools.partial(headline_again, run, cases["headline"]))


if __name__ == "__main__":
    steps.main(body)
