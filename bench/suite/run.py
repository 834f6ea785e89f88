"""The one way in which every op of the suite is run: checked, then timed in turns; memory in processes of its own.

`qempo-fast bench` runs this file, and test_suite.py hands the same runs to pytest-benchmark.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.progress import Progress

from suite import interleave, machine, memory, results, show
from suite.compare import regressions
from suite.interleave import Inaccurate, console, interleaved, reason, rows
from suite.ops import OPS, load
from suite.provenance import environment

# What `qempo-fast bench` runs without an argument; every set of another name is asked for.
DEFAULT_SETS = {"cpu": ("main", "models", "completions", "scaling", "threads", "memory"), "cuda": ("gpu",)}
PEERS = ("trl", "cut-cross-entropy", "liger-kernel", "transformers", "triton")
# pytest-benchmark and --quick want an answer soon; the full run wants a quiet moment of the machine in each case.
ROUNDS, QUICK_ROUNDS = 6, 3
SECONDS, QUICK_SECONDS = 0.5, 0.1


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
    columns = columns_of(run)
    bases = {name: {**columns, "provider": name, "kind": module.PROVIDERS[name].kind} for name in run.names}
    try:
        made = module.inputs(run.case, options.device)
    except Exception as error:
        return [{**base, "reason": reason(error)} for base in bases.values()]
    table: list[dict] = []
    steps = {}
    for name in run.names:
        try:
            steps[name], extra = module.checked(name, run.case, made)
            bases[name].update(extra)
        except Exception as error:
            wrong = {"wrong": True} if isinstance(error, Inaccurate) else {}
            table.append({**bases[name], "reason": reason(error), **wrong})
        if name not in steps:
            interleave.free(options.device)
    for name, step in module.baselines(run.case, made).items():
        steps[name], bases[name] = step, {**columns, "provider": name, "kind": "floor"}
    dtype = getattr(run.case, "dtype", "float32")
    floors = {mode: {**floor, "floor_ms": ceilings.floor_ms(dtype, **floor)}
              for mode, floor in module.floors(run.case).items()}  # fmt: skip
    timed, failed = interleaved(steps, run.rounds, options.seconds)
    table += [{**bases[name], "reason": why} for name, why in failed.items()]
    for name, samples in timed.items():
        made_rows = rows(bases[name], samples, floors)
        if options.device == "cuda":
            # The last row is the whole step's.
            made_rows[-1]["wall_ms"] = interleave.wall_ms(steps[name], 5)
        table += made_rows
    interleave.add_ratios(table)
    # A compiled function is tied to its shapes; without this the eighth case would meet dynamo's limit.
    torch.compiler.reset()
    return table


def measure(
    options: Options, on_case: Callable[[list[dict], dict, list[dict]], None] = lambda made, header, table: None
) -> tuple[dict, list[dict]]:
    """(what the run depends on, its rows); on_case gets each case's rows as it ends, then both of these so far."""
    interleave.clock.cache_clear()
    plan = planned(options)
    before = torch.get_num_threads()
    header: dict[str, Any] = {**environment(PEERS, options.device), "rounds": options.rounds, "ceilings": []}
    keep = os.environ.get("QEMPO_BENCH_ALLOCATOR") != "system"
    header["keeps_freed_memory"] = keep and machine.keep_freed_memory()
    if not keep:
        header["variant"] = results.SYSTEM_ALLOCATOR
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
                table += made
                on_case(made, header, table)
                progress.advance(bar)
    finally:
        torch.set_num_threads(before)
    return header, table


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
    """Run, print, write, compare; the exit status: 0, 1 where a ratio fell, 2 where nothing ran or ours was wrong."""
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
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    path = None if json is None else results.result_path(json, name)
    try:
        then = [] if compare is None else results.committed(compare, name)
        if path is not None and path.exists():
            results.load(path)
    except ValueError as error:
        return _refuse(str(error))

    def on_case(made: list[dict], header: dict, so_far: list[dict]) -> None:
        if path is not None:
            results.save(path, header, so_far)
        show.rows(made, console)

    try:
        header, table = measure(options, on_case)
    except ValueError as error:
        return _refuse(str(error))
    show.header(header, console)
    if path is not None:
        console.print(f"written: {path}", soft_wrap=True)
    for row in table:
        if row.get("wrong") and row["kind"] == "ours":
            return _refuse(f"wrong result: {row['reason']}")
    if compare is None:
        return 0
    return regressions(table, then, compare, tolerance, console)


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
