"""A forgotten entry fails here by name: a loss has its kernels, its tables a row for it, every one its tests.

What stands in two places is compared, so that adding a loss (CONTRIBUTING.md) cannot stop halfway. That OPS keeps its
promises to every op is in test_architecture.py.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import losses_bad_input
import losses_triton_cases
import pytest
import test_losses_compile
import test_losses_cpu
import test_losses_public
import test_losses_reference
import torch

import qempo_fast as qf
from qempo_fast import _backends
from qempo_fast._backends import OPS
from qempo_fast.losses import _values
from qempo_fast.reference.tokens import SURROGATES

ROOT = Path(__file__).resolve().parents[1]
LOSS_OPS = [op for op, row in OPS.items() if row.policy]
PUBLIC = [name for name in qf.__all__ if name.endswith("_loss")]
KERNELS = [(op, backend) for op in LOSS_OPS for backend in OPS[op].backends]
# Tensors whose values nobody has to check: a bonus is made here, of embeddings that are checked.
UNREAD = {"bonus"}


def implementation(op: str, backend: str) -> Any:
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return _backends.implementation(op, backend)


def names(function: Any) -> set[str]:
    """Names that a lambda looks up, in it and in the functions that it makes."""
    return set(function.__code__.co_names)


def test_there_is_something_to_look_at() -> None:
    assert {"pair_loss", "token_loss", "group_loss"} <= set(LOSS_OPS)
    assert {"dpo_loss", "grpo_loss", "policy_gradient_loss"} <= set(PUBLIC)


@pytest.mark.parametrize("op", LOSS_OPS)
def test_a_loss_has_both_kernels_and_an_operator(op: str) -> None:
    assert {"triton", "cpu"} <= set(OPS[op].backends), "OPS in qempo_fast/_backends.py"
    assert hasattr(torch.ops.qempo_fast, op)


@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_a_kernel_takes_what_the_definition_takes(op: str, backend: str) -> None:
    """One order of arguments, one set of settings; the operator's schema follows from the definition."""

    def taken(function: Any) -> list[tuple[str, bool]]:
        return [(p.name, p.kind is p.KEYWORD_ONLY) for p in inspect.signature(function).parameters.values()]

    assert taken(implementation(op, backend)) == taken(OPS[op].reference)


@pytest.mark.parametrize("op", LOSS_OPS)
def test_every_value_has_its_check(op: str) -> None:
    """A tensor is log-probs, whose NaN shows in the loss, or a layout, or is checked by its name in every loss."""
    positional, by_keyword = _values.arguments(op)
    tensors = [name for name, kind in (positional | by_keyword).items() if kind.startswith("torch.Tensor")]
    log_probs = {*list(positional)[: OPS[op].policy], *(name for name in tensors if name.startswith(("ref_", "old_")))}
    checked = {"cu_seqlens", "offsets", *_values.WANTED}
    assert set(tensors) - log_probs - checked - UNREAD == set(), "WANTED in qempo_fast/losses/_values.py"


@pytest.mark.parametrize("op", LOSS_OPS)
def test_an_op_is_tested_on_each_backend(op: str) -> None:
    assert op in {call.op for call in test_losses_cpu.CASES.values()}, "no case in tests/test_losses_cpu.py"
    assert op in test_losses_compile.operator_calls(), "no call for opcheck in tests/test_losses_compile.py"
    checked = set().union(*(names(row[0]) for row in test_losses_reference.GRADCHECK.values()))
    assert OPS[op].reference.__name__ in checked, "no gradcheck in tests/test_losses_reference.py"  # type: ignore[union-attr]


@pytest.mark.parametrize("op", LOSS_OPS)
def test_an_op_has_triton_cases(op: str) -> None:
    assert op in {case.op for case in losses_triton_cases.CASES}
    assert op in losses_triton_cases.TYPICAL, "no case is typical"


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_surrogate_has_cases(surrogate: str) -> None:
    def taken(settings: dict[str, Any]) -> str:
        return settings.get("surrogate", "clip")

    by_cpu = {taken(call.settings) for call in test_losses_cpu.CASES.values() if call.op == "token_loss"}
    by_triton = {taken(case.make()[1]) for case in losses_triton_cases.CASES if case.op == "token_loss"}
    assert surrogate in by_cpu, "no case in tests/test_losses_cpu.py"
    assert surrogate in by_triton, "no case in tests/losses_triton_cases.py"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_loss_is_defined_and_tested(name: str) -> None:
    assert hasattr(qf.reference, name), "qempo_fast/reference/__init__.py"
    called = set().union(*(names(row.call) for row in test_losses_public.LOSSES.values()))
    assert name in called, "LOSSES in tests/test_losses_public.py"
    refused = {make()[0].__name__ for _, make, *_ in losses_bad_input.ROWS}
    assert name in refused, "ROWS in tests/losses_bad_input.py"


@pytest.mark.parametrize("page", ["README.md", "docs/losses.md"])
@pytest.mark.parametrize("name", PUBLIC)
def test_a_loss_has_its_rows(name: str, page: str) -> None:
    rows = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert any(f"`{name}`" in row for row in rows), f"no row of {page} names {name}"
