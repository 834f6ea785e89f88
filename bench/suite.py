"""The benchmark suite: what a case and a provider are, and the one way in which every op's are run.

An op is a module bench_NAME that has
    SETS                        {set: Set}; "quick", "main", "scaling" and "tiny" are asked for by name
    PROVIDERS                   {name: Provider}
    inputs(case, device)        the tensors of a case, and its truth in float64 or what leads to it
    checked(name, case, made)   (Step, columns): the provider's step after one run, errors within its limits. What
                                cannot run raises ImportError or RuntimeError with the reason, which becomes its row
    baselines(case, made)       {name: Step} of bare work, for scale: kind "floor"
    floors(case)                {mode: {"floor_bytes": ..., "floor_flops": ...}}, what no provider can do without
    unchecked(name, case, made) (smaller Step of the same widths, Step), where a set asks for memory
`qempo-fast bench` runs this file, and test_suite.py hands the same runs to pytest-benchmark.
"""

from __future__ import annotations

import datetime
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import interleave
import machine
import memory
import torch
from interleave import console, environment, interleaved, reason, rows
from rich.progress import Progress

OPS = ("logps", "dpp", "losses", "step")
# What `qempo-fast bench` runs without an argument; every set of another name is asked for.
DEFAULT_SETS = {"cpu": ("main", "models", "completions", "scaling", "threads", "memory"), "cuda": ("gpu",)}
PEERS = ("trl", "cut-cross-entropy", "liger-kernel", "transformers", "triton")
# pytest-benchmark and --quick want an answer soon; the full run wants a quiet moment of the machine in each case.
ROUNDS, QUICK_ROUNDS = 6, 3
SECONDS, QUICK_SECONDS = 0.5, 0.1


class Provider(NamedTuple):
    """One way to compute an op: kind "ours" or "peer", and how to make its function on a device."""

    kind: str
    make: Callable[..., Any]


class Set(NamedTuple):
    """Cases that are run alike; providers None for all, threads "one" and "all"; not timed: memory alone.

    rounds: the most turns, where each costs a minute.
    """

    cases: Sequence[Any]
    providers: tuple[str, ...] | None = None
    threads: tuple[str, ...] = ("all",)
    memory: bool = False
    timed: bool = True
    rounds: int = 100


@dataclass(frozen=True)
class Options:
    """What to run, and for how long."""

    ops: tuple[str, ...] = ()
    case: str = ""
    sets: tuple[str, ...] = DEFAULT_SETS["cpu"]
    providers: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    rounds: int = ROUNDS
    seconds: float = SECONDS
    device: str = "cpu"
    memory: bool = True


class Run(NamedTuple):
    """One case of one op at one number of threads, with the providers to time."""

    op: str
    set: str
    case: Any
    threads: int
    names: tuple[str, ...]
    memory: bool
    timed: bool
    rounds: int

    def __str__(self) -> str:
        return f"{self.op}: {self.case}, {self.threads} thread{'s' * (self.threads != 1)}"


def load(op: str) -> ModuleType:
    return importlib.import_module(f"bench_{op}")


def planned(options: Options) -> list[Run]:
    """The runs that options ask for, each once; raises ValueError where nothing matches."""
    every = {"one": 1, "all": torch.get_num_threads()}
    out: dict[tuple, Run] = {}
    for op in options.ops or OPS:
        module = load(op)
        for name in options.sets:
            chosen = module.SETS.get(name)
            for case in chosen.cases if chosen else ():
                if options.case not in str(case):
                    continue
                names = tuple(
                    p for p in module.PROVIDERS
                    if p in (chosen.providers or module.PROVIDERS) and (not options.providers or p in options.providers)
                )  # fmt: skip
                # dict: on one core "one" and "all" are the same run.
                for threads in options.threads or dict.fromkeys(every[t] for t in chosen.threads):
                    key = (op, str(case), threads)
                    memory_too, rounds = chosen.memory and options.memory, min(options.rounds, chosen.rounds)
                    out.setdefault(key, Run(op, name, case, threads, names, memory_too, chosen.timed, rounds))
    if not out:
        raise ValueError(f"no case of {', '.join(options.ops or OPS)} holds {options.case!r} in {options.sets}")
    return list(out.values())


def columns_of(run: Run) -> dict[str, Any]:
    """What every row of a run says of its case."""
    return {"op": run.op, "set": run.set, "case": str(run.case), **run.case._asdict(), "threads": run.threads}


def table_of(run: Run, options: Options, ceilings: machine.Ceilings) -> list[dict]:
    """Rows of one run: providers checked, then timed in turns; one row with the reason where one cannot run."""
    module = load(run.op)
    torch.set_num_threads(run.threads)
    made = module.inputs(run.case, options.device)
    columns = columns_of(run)
    table: list[dict] = []
    steps, bases = {}, {}
    for name in run.names:
        base = {**columns, "provider": name, "kind": module.PROVIDERS[name].kind}
        try:
            steps[name], extra = module.checked(name, run.case, made)
        except (ImportError, RuntimeError) as error:
            table.append({**base, "reason": reason(error)})
            continue
        bases[name] = {**base, **extra}
    for name, step in module.baselines(run.case, made).items():
        steps[name], bases[name] = step, {**columns, "provider": name, "kind": "floor"}
    dtype = getattr(run.case, "dtype", "float32")
    floors = {mode: {**floor, "floor_ms": ceilings.floor_ms(dtype, **floor)}
              for mode, floor in module.floors(run.case).items()}  # fmt: skip
    for name, samples in interleaved(steps, run.rounds, options.seconds).items():
        table += rows(bases[name], samples, floors)
    interleave.add_ratios(table)
    # A compiled function is tied to its shapes; without this the eighth case would meet dynamo's limit.
    torch.compiler.reset()
    return table


def measure(options: Options, on_rows: Callable[[list[dict]], None] = lambda table: None) -> tuple[dict, list[dict]]:
    """(what the run depends on, its rows); on_rows is called with the rows of each case as it ends."""
    interleave.clock.cache_clear()
    plan = planned(options)
    before = torch.get_num_threads()
    header: dict[str, Any] = {**environment(PEERS, options.device), "rounds": options.rounds, "ceilings": []}
    keep = os.environ.get("QEMPO_BENCH_ALLOCATOR") != "system"
    header["keeps_freed_memory"] = keep and machine.keep_freed_memory()
    ceilings: dict[int, machine.Ceilings] = {}
    table: list[dict] = []
    try:
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("", total=len(plan))
            for run in plan:
                progress.update(bar, description=str(run))
                if run.threads not in ceilings:
                    torch.set_num_threads(run.threads)
                    ceilings[run.threads] = machine.measured(options.device)
                    header["ceilings"].append(ceilings[run.threads]._asdict())
                made = table_of(run, options, ceilings[run.threads]) if run.timed else []
                if run.memory:
                    failed = {r["provider"] for r in made if "reason" in r}
                    made += memory.table_of(run, columns_of(run), options.device, failed)
                on_rows(made)
                table += made
                progress.advance(bar)
    finally:
        torch.set_num_threads(before)
    return header, table


def result_path(path: Path, device: str) -> Path:
    """path, or for a folder <device>-<date>.json in it."""
    if path.suffix == ".json":
        return path
    name = torch.cuda.get_device_name().split()[-1].lower() if device == "cuda" else "cpu"
    return path / f"{name}-{datetime.date.today():%Y-%m-%d}.json"


def main(
    *,
    ops: Sequence[str] = (),
    case: str = "",
    quick: bool = False,
    compare: Path | None = None,
    tolerance: float = 0.2,
    json: Path | None = None,
    device: str = "cpu",
    threads: Sequence[int] = (),
    providers: Sequence[str] = (),
    sets: Sequence[str] = (),
    rounds: int | None = None,
) -> int:
    """Run, print, write, compare; returns the exit status: 0, 1 where a ratio fell, 2 where nothing could be run."""
    import show
    from compare import regressions
    from results import committed

    unknown = [op for op in ops if op not in OPS]
    if unknown:
        return _refuse(f"op: wanted some of {', '.join(OPS)}, got {', '.join(unknown)}")
    if device == "cuda" and not torch.cuda.is_available():
        return _refuse("device: wanted a GPU that torch can use, got none")
    if compare is not None and not compare.exists():
        return _refuse(f"compare: wanted a file or a folder of results, got {compare}")
    options = Options(
        tuple(ops), case, DEFAULT_SETS[device], device=device, threads=tuple(threads), providers=tuple(providers)
    )
    if quick:
        options = replace(options, sets=("quick",), rounds=QUICK_ROUNDS, seconds=QUICK_SECONDS, memory=False)
    if sets:
        options = replace(options, sets=tuple(sets))
    if rounds:
        options = replace(options, rounds=rounds)
    try:
        header, table = measure(options, lambda made: show.rows(made, console))
    except ValueError as error:
        return _refuse(str(error))
    show.header(header, console)
    if json is not None:
        path = result_path(json, device)
        interleave.write(path, header, table)
        console.print(f"written: {path}", soft_wrap=True)
    if compare is None:
        return 0
    return regressions(table, committed(compare, header["device"]), compare, tolerance, console)


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
