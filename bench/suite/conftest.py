"""Options of `pytest bench/suite`, and one test for each case, provider and mode."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suite.interleave import MODES
from suite.ops import OPS
from suite.run import ROUNDS, Options, planned


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qempo_fast")
    group.addoption("--bench-set", action="append", help="set of cases: quick (default), main, scaling, tiny, ...")
    group.addoption("--bench-op", action="append", help=f"op: {', '.join(OPS)}; default: all")
    group.addoption("--bench-device", default="cpu", help="cpu or cuda")
    group.addoption("--bench-rounds", type=int, default=ROUNDS, help="turns that each provider takes")


def _options(config: pytest.Config) -> Options:
    return Options(
        ops=tuple(config.getoption("--bench-op") or ()),
        sets=tuple(config.getoption("--bench-set") or ("quick",)),
        rounds=config.getoption("--bench-rounds"),
        device=config.getoption("--bench-device"),
        memory=False,
    )


@pytest.fixture(scope="session")
def options(pytestconfig: pytest.Config) -> Options:
    return _options(pytestconfig)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"run", "provider", "mode"} <= set(metafunc.fixturenames):
        runs = planned(_options(metafunc.config))
        every = [(run, name, mode) for run in runs for name in run.names for mode in MODES]
        metafunc.parametrize(("run", "provider", "mode"), every, ids=[f"{r}, {n}, {m}" for r, n, m in every])
