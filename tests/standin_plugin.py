"""QEMPO_STANDIN: the GPU test files under the stand-in driver, where every kernel is built and launched and none runs.

Results are then garbage. Comparisons with a tolerance are passed over, and a test that ends at another wrong number has
done what it could here, its launches: both pass as "ran". Whatever else ends a test fails it: a refused backend, an
error of the compiler, of Triton's launcher or of a launcher of ours, an unknown keyword. QEMPO_STANDIN=1 compiles each
form, QEMPO_STANDIN=launch leaves that out; QEMPO_STANDIN=device is another matter, of tests/standin_device.py.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

MODES = ("1", "launch", "device")
RAN = ("standin", "ran, wrong number")
# What garbage does besides failing a comparison: the type of the error, and a part of its message.
_GARBAGE = (
    (ValueError, "cannot convert float NaN to integer"),
    (OverflowError, "cannot convert float infinity to integer"),
)
# Tests of what happens where there is no GPU: that CPU tensors are refused, and what the interpreter is asked.
_LEFT_OUT = {
    "test_triton_takes_cpu_tensors_only_by_name_and_in_the_interpreter",
    "test_each_op_is_one_launch",
}
_NO_GPU = ("driver version is insufficient", "no CUDA-capable device")


def mode() -> str | None:
    """What QEMPO_STANDIN asks for, or None."""
    asked = os.environ.get("QEMPO_STANDIN", "0")
    if asked not in ("", "0", *MODES):
        raise pytest.UsageError(f"QEMPO_STANDIN: wanted {', '.join(MODES)}, got {asked!r}")
    if asked in MODES and torch.cuda.is_available():
        raise pytest.UsageError("QEMPO_STANDIN: wanted a machine without a GPU: a real one would read CPU addresses")
    return asked if asked in MODES else None


def ends_at_a_number(error: BaseException, file: Path, tests: Path) -> bool:
    """Whether error, raised in file, is what garbage does to a test that has reached all its launches so far."""
    # In a test itself: an assertion of the compiler or of the library is no wrong number.
    if file.parent != tests:
        return False
    return type(error) is AssertionError or any(
        isinstance(error, kind) and text in str(error) for kind, text in _GARBAGE
    )


def native() -> Any:
    """The CUDA kernels' bindings, which take their arguments as ever: that there is no GPU is then no error.

    CUDA says so at its first call, before anything reads what the addresses name.
    """
    from qempo_fast import _C

    def launch(name: str, *args: Any) -> str:
        error = str(getattr(_C, name)(*args))
        return "" if any(text in error for text in _NO_GPU) else error

    names = ("dpp_cuda_fwd", "dpp_cuda_bwd", "dpp_cuda_select")
    return SimpleNamespace(**{name: functools.partial(launch, name) for name in names})


def leave_out(items: list[pytest.Item], names: set[str]) -> None:
    """Skip the tests of these names."""
    for item in items:
        if item.name.partition("[")[0] in names:
            item.add_marker(pytest.mark.skip(reason="what there is without a GPU; the stand-in is one"))


class StandIn:
    """The plugin; conftest registers it before any test file is imported."""

    def __init__(self, compiles: bool) -> None:
        self._compiles = compiles
        self._open = contextlib.ExitStack()
        self._launches: Counter[str] = Counter()
        self._forms: set[str] = set()
        self._wrong = False

    def pytest_sessionstart(self) -> None:
        import tolerances

        from qempo_fast.cli.standin import standin

        self._session = self._open.enter_context(standin(compiles=self._compiles))
        # Test files take them by name, so before any is imported.
        for module, name in ((torch.testing, "assert_close"), (tolerances, "assert_as_good")):
            self._open.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, self._passing_over(getattr(module, name)))

    def _passing_over(self, compare: Callable[..., None]) -> Callable[..., None]:
        """A wrong number here must not hide the launches that come after it."""

        @functools.wraps(compare)
        def noted(*args: Any, **more: Any) -> None:
            try:
                compare(*args, **more)
            except AssertionError:
                self._wrong = True

        return noted

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        found = {"launches": dict(self._session), "forms": sorted(self._session.forms)}
        self._add(found)
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["standin"] = found
        self._open.close()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self._add(getattr(node, "workeroutput", {}).get("standin", {}))

    def _add(self, found: dict[str, Any]) -> None:
        self._launches.update(found.get("launches", {}))
        self._forms.update(found.get("forms", ()))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        leave_out(items, _LEFT_OUT)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        if call.when == "setup":
            self._wrong = False
        if call.when != "call":
            return report
        error = call.excinfo if report.failed else None
        if error is not None and ends_at_a_number(error.value, Path(error.traceback[-1].path), item.path.parent):
            report.outcome, self._wrong = "passed", True
        if report.passed and self._wrong:
            report.user_properties.append(RAN)
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        # Of another process it comes as a list.
        return ("ran", "r", "RAN") if report.when == "call" and RAN in map(tuple, report.user_properties) else None

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        by_kernel = ", ".join(f"{name} {count}" for name, count in sorted(self._launches.items()))
        terminalreporter.section("stand-in for a GPU")
        terminalreporter.line(f"launches: {by_kernel}")
        terminalreporter.line(
            f"{sum(self._launches.values())} launches of {len(self._launches)} kernels, {len(self._forms)} forms "
            f"{'compiled' if self._compiles else 'not compiled'}; {len(terminalreporter.stats.get('ran', []))} tests "
            "ran on to wrong numbers"
        )
