"""Workers, what they say, and what becomes of one that dies or hangs."""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from . import worker
from .judge import GOOD, Verdict, judge
from .spec import Spec

# Seconds without a word after which a worker counts as hanging: Inductor's first import takes ten on a busy machine.
HANGS = 60.0


@dataclass
class Fault:
    spec: str
    kind: str
    detail: str


@dataclass
class Tally:
    """What has been seen."""

    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)  # (function, kind)
    modes: Counter[tuple[str, str]] = field(default_factory=Counter)
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def calls(self) -> int:
        return sum(self.verdicts.values())

    def join(self, other: Tally) -> None:
        self.verdicts += other.verdicts
        self.modes += other.modes
        self.changes += other.changes
        self.faults += other.faults
        self.seconds += other.seconds

    def add(self, line: str, kind: str, detail: str = "") -> None:
        spec = Spec.parse(line)
        self.verdicts[spec.function, kind] += 1
        self.modes[spec.mode, kind] += 1
        for _, change in spec.changes:
            self.changes[change, kind] += 1
        if kind not in GOOD:
            self.faults.append(Fault(line, kind, detail))


class _Worker:
    def __init__(self, folder: str, number: int, step: int, *rest: object) -> None:
        self.number, self.step, self.rest = number, step, rest
        self.log = Path(folder) / f"{number}.log"
        self.next, self.finished = number, False
        self.start()

    def start(self) -> None:
        seed, only, until, calls = self.rest
        self.pipe, end = os.pipe()
        self.process = worker.start(end, str(self.log), seed, self.next, self.step, only, until, calls)
        os.close(end)
        self.buffer, self.current, self.heard = b"", "", time.monotonic()

    def read(self, tally: Tally) -> None:
        chunk = os.read(self.pipe, 1 << 16)
        self.heard = time.monotonic()
        if not chunk:
            self.died(tally)
            return
        *lines, self.buffer = (self.buffer + chunk).split(b"\n")
        for line in lines:
            what, *words = json.loads(line)
            if what == "call":
                index, self.current = words
                self.next = index + self.step
            elif what == "end":
                tally.add(self.current, *words[1:])
                self.current = ""
            elif what == "broken":
                tally.faults.append(Fault(self.current or "none", "broken", str(words[0])))
                self.finished = True
            else:
                self.finished = True

    def died(self, tally: Tally) -> None:
        os.close(self.pipe)
        _, status = os.waitpid(self.process, 0)
        if self.finished:
            self.pipe = -1
            return
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        tally.add(self.current, "crash", f"{how}\n{_last(self.log)}") if self.current else None
        self.start()

    def watch(self, tally: Tally) -> None:
        if time.monotonic() - self.heard > HANGS and self.current:
            os.kill(self.process, signal.SIGKILL)
            tally.add(self.current, "hang", f"no word for {HANGS:g} s")
            self.current = ""


def _last(log: Path) -> str:
    """Of what a dead worker wrote: where it was in this library, or the sanitizer's words."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    found = [line.strip() for line in lines if "qempo_fast/" in line or "ERROR" in line or "runtime error" in line]
    return "\n".join(found[:6])


def _warm() -> None:
    """Imports that a first compilation makes, so that no worker makes them: ten seconds of each on a busy machine."""
    torch.set_num_threads(1)
    x = torch.ones(2, requires_grad=True)
    torch.compile(lambda x: x.cos(), backend="aot_eager")(x).sum().backward()
    make_fx(torch.cos)(torch.ones(2))
    torch.jit.trace(torch.cos, (torch.ones(2),))
    mode = FakeTensorMode()
    fake = mode.from_tensor(torch.ones(2))
    with mode:
        fake.cos()


def fuzz(seed: int, seconds: float, calls: int, workers: int, only: str = "") -> Tally:
    """Runs until the time is over or the calls are made."""
    tally = Tally()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _warm()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qempo-fuzz-") as folder:
        rest = (seed, only, start + seconds, calls)
        live = [_Worker(folder, number, workers, *rest) for number in range(workers)]
        while live:
            ready, _, _ = select.select([w.pipe for w in live], [], [], 1.0)
            for w in live:
                if w.pipe in ready:
                    w.read(tally)
                else:
                    w.watch(tally)
            live = [w for w in live if w.pipe >= 0]
    tally.seconds = time.monotonic() - start
    return tally


def alone(spec: Spec) -> Verdict:
    """The verdict on one call in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        verdict = judge(spec)
        os.write(write, json.dumps([verdict.kind, verdict.detail]).encode())
        os._exit(0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], HANGS)
    if not ready:
        os.kill(child, signal.SIGKILL)
    said = os.read(read, 1 << 16) if ready else b""
    os.close(read)
    os.waitpid(child, 0)
    return Verdict(*json.loads(said)) if said else Verdict("crash" if ready else "hang")


def reduced(fault: Fault) -> Spec:
    """The fault's call with as little done to it as still gives the same kind of fault."""
    spec = Spec.parse(fault.spec)
    for _ in range(len(spec.changes) + 1):
        smaller = next((s for s in spec.simpler() if alone(s).kind == fault.kind), None)
        if smaller is None:
            break
        spec = smaller
    return spec
