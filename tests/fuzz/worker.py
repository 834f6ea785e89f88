"""A process that makes calls one after another, and says each before it makes it."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable

import torch

from . import judge as _judge
from . import spec as _spec

Say = Callable[..., None]


def run(say: Say, seed: int, start: int, step: int, only: str, until: float, calls: int) -> None:
    """Calls start, start + step, ... until the time or below their number."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    for index in range(start, calls, step):
        if time.monotonic() > until:
            break
        spec = _spec.draw(seed, index, only)
        say("call", index, str(spec))
        verdict = _judge.judge(spec)
        say("end", index, verdict.kind, verdict.detail)


def start(pipe: int, log: str, *rest: object) -> int:
    """Process id of a fork that runs, speaks through the pipe and leaves what it prints in log."""
    child = os.fork()
    if child:
        return child
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        faulthandler.enable(file=file, all_threads=False)

        def say(*words: object) -> None:
            os.write(pipe, (json.dumps(words) + "\n").encode())

        try:
            run(say, *rest)  # type: ignore[arg-type]
            say("done")
        except BaseException as error:
            say("broken", repr(error))
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
