"""The fuzzer's own tests: a short run of it, and that it sees each kind of fault. `make fuzz` runs it for longer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fuzz import operators, supervisor
from fuzz.functions import FUNCTIONS, NOT_CALLED
from fuzz.judge import GOOD, Verdict, judge
from fuzz.operators import CALLED
from fuzz.report import grouped, table
from fuzz.spec import Spec, draw

import qempo_fast as qf

# Calls that were faults once.
ONCE = [
    # A wrong number: other strides, a bias or a KL term that vanished with its null pointer.
    "linear_logps 301 weight=transposed @plain",
    "linear_logps 301 weight=sliced @plain",
    "linear_logps 302 bias=waiting @plain",
    "logps_from_logits 5 logits=negated @plain",
    # A crash.
    "logps_from_logits 5 logits=wrapper @plain",
    "dpo_loss 7 rejected=functional @plain",
    "coefficients 14512062 @all_meta",
    "variance_loss 385904832 logps=functional @plain",
    "ops.dpp_bwd 16291766 offsets=plus_one @plain",
    # torch's words, or a refusal of what is good.
    "sequence_logps 1454093229 @default_meta",
    "linear_logps 388428376 sum_sq=is_-1 @plain",
    "rspo_loss 47413077 k=is_2^63 @plain",
    "hdpo_loss 957607377 rejected=mkldnn @plain",
    "policy_gradient_loss 901987232 advantages=sparse @plain",
    "linear_logps 1651264810 weight=overlapping @plain",
    "dpp_select 83942717 n=is_int64 @plain",
]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_public_name_is_called() -> None:
    assert set(qf.__all__) | set(qf.metrics.__all__) | {"pack_prompts"} == set(FUNCTIONS) | NOT_CALLED


def test_every_operator_is_called() -> None:
    known = {name for name in dir(torch.ops.qempo_fast) if hasattr(getattr(torch.ops.qempo_fast, name), "default")}
    # These three check values and give back what they were given.
    assert {f"ops.{name}" for name in known - {"values", "offsets", "groups"}} == set(operators.OPERATORS)


@pytest.mark.parametrize("name", CALLED)
def test_a_plain_call_is_right(name: str) -> None:
    for seed in range(3):
        verdict = judge(Spec(name, seed))
        assert verdict.kind in ("right", "returned"), (str(Spec(name, seed)), verdict)


@pytest.mark.parametrize("line", ONCE)
def test_what_was_once_a_fault(line: str) -> None:
    assert judge(Spec.parse(line)).kind in GOOD, judge(Spec.parse(line))


@pytest.mark.parametrize("part", range(4))
def test_some_hundred_calls(part: int) -> None:
    """The same in each run. Compiling takes a second a call and is left to `make fuzz`."""
    for index in range(part, 400, 4):
        spec = draw(20261127, index)
        if spec.mode not in ("compile_eager", "compile_aot"):
            assert judge(spec).kind in GOOD, (str(spec), judge(spec))


def test_a_line_says_all() -> None:
    spec = Spec("linear_logps", 17, (("weight", "transposed"), ("bias", "none")), "no_grad")
    assert str(spec) == "linear_logps 17 weight=transposed bias=none @no_grad"
    assert Spec.parse(str(spec)) == spec
    assert draw(3, 4) == draw(3, 4) != draw(3, 5)


def dies(**x: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(**x: Any) -> Any:
    time.sleep(20)


def writes(**x: Any) -> Any:
    x["logps"].detach().zero_()
    return qf.policy_gradient_loss(**x)


def fails(**x: Any) -> Any:
    raise RuntimeError("Expected all tensors to be on the same device")


CALLS = {"crash": 3, "hang": 1, "modified": 12, "wrong": 12, "unwilling": 12}
FAULTS: dict[str, Callable[..., Any]] = {
    "crash": dies,
    "hang": hangs,
    "modified": writes,
    "wrong": lambda **x: 1.01 * qf.policy_gradient_loss(**x),
    "unwilling": fails,
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_seen_and_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = replace(CALLED["policy_gradient_loss"], call=FAULTS[kind])
    monkeypatch.setitem(CALLED, "policy_gradient_loss", bad)
    monkeypatch.setattr(supervisor, "HANGS", 3.0)
    monkeypatch.setattr(supervisor, "_warm", lambda: None)
    tally = supervisor.fuzz(seed=1, seconds=30, calls=CALLS[kind], workers=1, only="policy_gradient_loss")
    assert {fault.kind for fault in tally.faults} >= {kind}, tally.faults
    fault = next(fault for fault in tally.faults if fault.kind == kind)
    assert fault.spec in {str(draw(1, index, "policy_gradient_loss")) for index in range(CALLS[kind])}
    assert "policy_gradient_loss" in table(tally)
    assert any(kind in title for title, _ in grouped(tally.faults))


def test_a_fault_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = replace(CALLED["policy_gradient_loss"], call=dies)
    monkeypatch.setitem(CALLED, "policy_gradient_loss", bad)
    line = "policy_gradient_loss 4 advantages=sliced logps=offset @no_grad"
    assert str(supervisor.reduced(supervisor.Fault(line, "crash", ""))) == "policy_gradient_loss 4 @plain"


def test_a_strided_read_that_takes_no_strides_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """What csrc did with a head that was a slice."""
    monkeypatch.setitem(CALLED, "segment_sum", replace(CALLED["segment_sum"], call=_by_address))
    verdicts = [judge(Spec("segment_sum", seed, (("values", "stepped"),))) for seed in range(8)]
    assert Verdict("wrong") in [Verdict(v.kind) for v in verdicts]


def _by_address(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return qf.segment_sum(values.as_strided(values.shape, (1,)), cu_seqlens)
