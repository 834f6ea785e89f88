"""What both calls on a GPU are made of: items done in order, each within its time, each failure a line and no more.

The process may die in any item (an illegal access breaks its GPU context, a launch may hang). run.sh then starts it
again with what time is left, and items that were begun are passed over: so an item costs itself alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.lines import Lines, die_with_parent, digest, read, reason
from suite.provenance import ROOT

HERE = Path(__file__).resolve().parent

# Of tests in a dozen processes: a thread each, and no pool of compilers for each.
QUIET = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
# Exit status that asks run.sh to start this program again.
AGAIN = 75
# Seconds of the whole call: nothing starts past LIMIT, and past LIMIT + _GRACE the process goes whatever it is in.
LIMIT, _GRACE = 240.0, 45.0


class Refused(RuntimeError):
    """An item that cannot run here; its message is the reason of the row."""


@dataclass
class Settings:
    """Where the run takes place and how far it goes."""

    device: str
    rehearse: bool
    limit: float

    @property
    def patience(self) -> float:
        """A rehearsal may share a slow machine: what a limit there is worth in seconds here."""
        return 5.0 if self.rehearse else 1.0


def settings() -> Settings:
    rehearse = os.environ.get("REHEARSE") == "1"
    limit = float(os.environ.get("LIMIT") or LIMIT)
    return Settings("cpu" if rehearse else "cuda", rehearse, limit)


class Run:
    """Items in order, each done once however often the program is started."""

    def __init__(self, lines: Lines, chosen: Settings) -> None:
        self.lines, self.settings = lines, chosen
        rows = read(lines.path)
        self.begun = {r["item"] for r in rows if r["kind"] == "begin"}
        ended = {r["item"] for r in rows if r["kind"] != "begin" and "item" in r}
        # In the order in which they were begun.
        self.lost = [r["item"] for r in rows if r["kind"] == "begin" and r["item"] not in ended]
        for name in self.lost:
            lines.write("lost", item=name, reason="the process ended in this item; see log.txt")
        self._deadline: tuple[float, str, str, dict[str, Any]] | None = None
        self._lock = threading.Lock()
        faulthandler.enable()
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> float:
        return time.time() - self.lines.start

    def left(self) -> float:
        return self.settings.limit - self.now()

    def do(
        self,
        kind: str,
        name: str,
        function: Callable[[], Any],
        *,
        need: float = 2.0,
        most: float = 40.0,
        **columns: Any,
    ) -> bool:
        """function()'s row or rows as lines of this kind; whatever it raises is the row's reason.

        need: seconds that must be left for it to start. most: seconds after which it counts as hung.
        """
        if name in self.begun:
            return False
        self.begun.add(name)
        if self.left() < need:
            self.lines.write(kind, item=name, **columns, reason=f"no time: {self.left():.0f} s left, {need:.0f} wanted")
            return False
        self.lines.write("begin", item=name, quiet=True)
        start = time.time()
        most *= self.settings.patience
        with self._lock:
            self._deadline = (start + most, kind, name, columns)
        # Where a launch hangs with Python's lock held, the thread that watches cannot run; this one needs no lock.
        faulthandler.dump_traceback_later(most + 10, exit=True)
        made, why, refused = None, None, False
        try:
            made = function()
        except Exception as error:
            why, refused = reason(error), isinstance(error, Refused)
            if not refused:
                print(f"-- {name}", file=sys.stderr)
                traceback.print_exc()
        finally:
            faulthandler.cancel_dump_traceback_later()
            with self._lock:
                self._deadline = None
        took = round(time.time() - start, 2)
        if why is not None:
            self.lines.write(kind, item=name, **columns, reason=why, took_s=took)
            if not refused:
                self._recover()
            return False
        for row in made if isinstance(made, list) else [made or {}]:
            self.lines.write(kind, item=name, **{**columns, **row}, took_s=took)
        return True

    def part(self, name: str, function: Callable[[], Any]) -> None:
        """Several items, and what is between them: an error there ends the part, not the run."""
        try:
            function()
        except Exception as error:
            traceback.print_exc()
            self.lines.write("part", part=name, reason=reason(error))
            self._recover()

    def _recover(self) -> None:
        """Free what a failed item held; a broken GPU context ends the process, to be started again."""
        import torch

        gc.collect()
        if self.settings.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            self.lines.write("restart", reason=reason(error))
            sys.stdout.flush()
            os._exit(AGAIN)

    def _watch(self) -> None:
        while True:
            time.sleep(0.25)
            with self._lock:
                late = self._deadline if self._deadline and time.time() > self._deadline[0] else None
                if late:
                    _, kind, name, columns = late
                    self.lines.write(kind, item=name, **columns, reason="did not end in its time; stacks in log.txt")
                    self._leave(AGAIN)
                if self.left() < -_GRACE:
                    self.lines.write("end", reason="out of time in an item")
                    self._leave(0)

    def _leave(self, status: int) -> None:
        faulthandler.dump_traceback()
        sys.stdout.flush()
        os._exit(status)


class Child:
    """A program beside, with a number of seconds after which it is stopped; its output goes to a file."""

    def __init__(self, run: Run, name: str, words: Sequence[str], log: Path, seconds: float, **env: str) -> None:
        self.name, self._run = name, run
        self.until = run.now() + seconds * run.settings.patience
        # One that went with this program, whatever ended that, may start again.
        self.skipped = name in run.begun and name not in run.lost
        if self.skipped:
            return
        run.begun.add(name)
        run.lines.write("begin", item=name, quiet=True)
        self._start = time.time()
        self._file = log.open("ab", buffering=0)
        environment = {**os.environ, "GPU_RESULTS": str(run.lines.path), "GPU_BEGAN": str(run.lines.start), **env}
        self.process = subprocess.Popen(
            words, cwd=ROOT, env={k: v for k, v in environment.items() if v}, stdin=subprocess.DEVNULL,
            stdout=self._file, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait(self) -> int | None:
        """Its status as a line; at its second it is told to stop (pytest then prints what failed), 4 s later killed."""
        if self.skipped:
            return None
        why = None
        for stop, patience in ((None, max(0.1, self.until - self._run.now())), (signal.SIGINT, 4.0)):
            if stop is not None:
                why = f"stopped at {self.until:.0f} s"
                self.process.send_signal(stop)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
                break
        else:
            self.process.kill()
            self.process.wait()
        took = round(time.time() - self._start, 1)
        status = self.process.returncode
        self._run.lines.write("program", item=self.name, status=status, took_s=took, reason=why)
        self._file.close()
        return status

    def kill(self) -> None:
        if not self.skipped and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def children() -> Iterator[list[Child]]:
    """Programs that do not outlive this one where SIGTERM ends it."""
    alive: list[Child] = []

    def stop(number: int, frame: Any) -> None:
        for child in alive:
            child.kill()
        os._exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield alive
    finally:
        for child in alive:
            child.kill()
        signal.signal(signal.SIGTERM, before)


def python(*words: str) -> list[str]:
    return [sys.executable, "-P", *words]


def sanitize(chosen: Settings, *words: str) -> list[str]:
    return python(str(HERE / "sanitize.py"), "--device", chosen.device, *words)


def pytest_words(chosen: Settings, workers: int, *selection: str) -> list[str]:
    # A test that hangs in a launch hears no signal: by the thread its worker goes, and xdist starts another.
    return python(
        *("-m", "pytest", *selection, "-n", str(workers), "-p", "gpu.plugin", "-q", "--maxfail=60", "--tb=line", "-rf"),
        *("--timeout=60", "--timeout-method=thread", "-p", "no:cacheprovider", "--continue-on-collection-errors"),
    )


def main(body: Callable[[Run], None]) -> None:
    """The body of a call, from start to its "end" line."""
    die_with_parent()
    # bash starts what it puts behind an & deaf to SIGINT, and so would the tests be, which it tells to stop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = Path(os.environ["OUT"])
    run = Run(Lines(out / "results.jsonl"), settings())
    body(run)
    run.lines.write("end", reason=None)
    print("\n".join(["", *digest(read(run.lines.path))]))
    sys.stdout.flush()
    # Not sys.exit: a thread of a library, or a destructor on a tired context, may keep the interpreter.
    os._exit(0)
