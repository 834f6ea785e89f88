"""Every loss under torch.compile in one graph on each backend, and its operator under opcheck."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from test_losses_public import CU, LOSSES, OFFSETS, Call, data

import qempo_fast as qf
from qempo_fast._backends import OPS
from qempo_fast._operator import scalar
from qempo_fast.losses import op as _op


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Traced(NamedTuple):
    """A call and what may differ in its graph: the relative error beside eager, the backends that can be traced."""

    call: Call
    policy: str
    tolerance: float = 0.0
    backends: tuple[str, ...] = ("cpu", "reference")


# group_advantages is plain torch in a graph, and the C++ kernel out of it.
ADVANTAGES = {"policy": "l", "tolerance": 2e-5}
CALLS = {name: Traced(loss.call, loss.policy, backends=loss.traced) for name, loss in LOSSES.items()} | {
    "epa, none": Traced(
        lambda d: qf.epa_loss(d["w"], d["s"], d["v"], d["fw"], d["fs"], d["fv"], reduction="none").square().sum(),
        "w s v",
    ),
    "dpo, none": Traced(
        lambda d: qf.dpo_loss(d["w"], d["x"], d["fw"], d["fx"], reduction="none").square().sum(), "w x"
    ),
    "dapo": Traced(lambda d: qf.grpo_loss(d["tl"], d["told"], d["adv"], CU, normalize="token"), "tl"),
    "a constant beside it": Traced(lambda d: qf.dpo_loss(d["w"], d["x"].detach(), d["fw"], d["fx"]), "w"),
    "advantages": Traced(lambda d: (qf.group_advantages(d["r"], group_size=4) * d["l"]).sum(), **ADVANTAGES),
    "advantages, ragged": Traced(lambda d: (qf.group_advantages(d["r"], offsets=OFFSETS) * d["l"]).sum(), **ADVANTAGES),
}


@pytest.mark.parametrize(("name", "backend"), [(name, b) for name, traced in CALLS.items() for b in traced.backends])
def test_one_graph(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMPO_BACKEND", backend)
    call, policy, tolerance, _ = CALLS[name]

    def results(function: Any) -> list[torch.Tensor]:
        given = data(torch.float32)
        leaves = [given[key].requires_grad_() for key in policy.split()]
        loss = function(given)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    eager = results(call)
    compiled = results(torch.compile(call, fullgraph=True, backend="aot_eager"))
    for mine, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["dqo", "spl", "advantages", "advantages, ragged"])
def test_one_graph_under_a_default_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A default device is a mode that every torch function passes; Dynamo cannot trace each of them below it."""
    with torch.device("cpu"):
        test_one_graph(name, "reference", monkeypatch)


def test_inductor() -> None:
    d = data(torch.float32)
    d["w"].requires_grad_()
    call = LOSSES["dpo"].call
    want = torch.autograd.grad(2 * call(d), d["w"])[0]
    got = torch.autograd.grad(torch.compile(lambda d: 2 * call(d), fullgraph=True)(d), d["w"])[0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def operator_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of each loss operator, but for the backend, by position; a float is to become a tensor."""
    d = data(torch.float32)
    for key in ("w", "x", "s", "v", "l", "tl"):
        d[key].requires_grad_()
    return {
        "pair_loss": [
            (d["w"], d["x"], d["fw"], d["fx"], 0.3, 0.1, 0.1, "mean"),
            (d["w"], d["x"].detach(), None, None, 0.3, 0.0, 0.0, "none"),
        ],
        "group_loss": [
            (d["l"], d["f"], d["r"], 0.3, 0.1, 4, None, "loo", None),
            (d["l"], None, d["r"], 0.3, 0.0, None, OFFSETS, "none", d["r"] * 2),
        ],
        "variance_loss": [(d["l"], d["f"], d["r"], 0.3, 0.1, None, OFFSETS)],
        "epa_loss": [
            (d["w"], d["s"], d["v"], d["fw"], d["fs"], d["fv"], 0.1, reduction) for reduction in ("sum", "none")
        ],
        "poft_loss": [(d["w"], d["lengths"].float(), d["aligned"], 1.0, 0.0, "mean")],
        "rspo_loss": [(d["l"], d["r"], 2, 4, None, "loo"), (d["l"], d["r"], 1, None, OFFSETS, "mean")],
        "token_loss": [
            (d["tl"], d["told"], d["adv"], CU, d["tref"], 0.1, 0.2, 0.2, "token", normalize, "clip")
            for normalize in (*map(float, _op.NORMALIZE.values()), 7.0)
        ],
    }


@pytest.mark.parametrize("op", [op for op, row in OPS.items() if row.policy])
def test_opcheck(op: str) -> None:
    for given in operator_calls()[op]:
        args = [scalar(x) if isinstance(x, float) else x for x in given]
        result = torch.library.opcheck(getattr(torch.ops.qempo_fast, op), (*args, "cpu"))
        assert set(result.values()) == {"SUCCESS"}
