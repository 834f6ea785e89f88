"""pytest plugin of a run on a GPU: each failure is a line of JSON as it happens, and a count stands every few tests.

pytest -p gpu.plugin; GPU_RESULTS names the file. A worker whose GPU context a test has broken (an illegal access sticks
to it) goes after that test, so that xdist starts another and the tests after it say what they have to say.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any

import pytest

from gpu.lines import Lines, die_with_parent, gpu_is_lost

# Tests between two lines of counts; a run that is killed has its last one.
_EVERY = 50


def _message(report: Any) -> str:
    """The last line that pytest would show of the failure: with --tb=line "path:line: error"."""
    crash = getattr(getattr(report, "longrepr", None), "reprcrash", None)
    if crash is not None:
        return f"{os.path.basename(crash.path)}:{crash.lineno}: " + " ".join(str(crash.message).split())[:300]
    return " ".join(str(getattr(report, "longreprtext", "")).split())[-300:]


class Worker:
    """In each process that runs tests."""

    failed = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed = self.failed or report.failed

    # Last: xdist has sent the report by then.
    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        if self.failed and gpu_is_lost():
            os._exit(70)
        self.failed = False


class Report:
    """In the process that hears of every test."""

    def __init__(self, config: Any) -> None:
        self.lines = Lines(os.environ["GPU_RESULTS"])
        self.counts: Counter[str] = Counter()
        self.config, self.start, self.done = config, time.time(), 0
        # Which run of tests of the call this is; the same test may fail in two.
        self.run = os.environ.get("GPU_TESTS", "tests")

    def _say(self, text: str) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            # Progress is dots on one line.
            reporter.write(f"\n{text}\n", flush=True)

    def _fail(self, name: str, when: str, message: str) -> None:
        self.lines.write("test", run=self.run, test=name, outcome="failed", when=when, message=message, quiet=True)
        self._say(f"FAILED {name} ({when}): {message}")

    def _count(self, ended: bool) -> None:
        seconds = round(time.time() - self.start, 1)
        self.lines.write("tests", run=self.run, **self.counts, done=self.done, took_s=seconds, ended=ended, quiet=True)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._fail(report.nodeid, report.when, _message(report))
        if report.failed or report.skipped or report.when == "call":
            self.counts[report.outcome] += 1
        if report.when == "teardown" or report.when == "???":
            self.done += 1
            if self.done % _EVERY == 0:
                self._count(False)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.counts["uncollected"] += 1
            self._fail(report.nodeid, "collect", _message(report))

    def pytest_keyboard_interrupt(self) -> None:
        # At once: the end may not come, where workers hang.
        self._count(False)

    def pytest_sessionfinish(self) -> None:
        self._count(True)


def pytest_configure(config: Any) -> None:
    die_with_parent()
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker(), "gpu_worker")
        return
    if not config.getoption("numprocesses", None):
        config.pluginmanager.register(Worker(), "gpu_worker")
    config.pluginmanager.register(Report(config), "gpu_report_lines")
