"""How often the Triton backend makes the host wait for a GPU: each wait empties the queue of launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only")

from test_logps import Case, make
from test_logps_triton import place
from torch.utils._python_dispatch import TorchDispatchMode

import qempo_fast as qf
from qempo_fast import _check
from qempo_fast.logps._options import TileSizes
from qempo_fast.logps.triton import TritonPass


class Reads(TorchDispatchMode):
    """Lists what makes the host wait for a GPU: values and sizes that are read, and scalars sent by an assignment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        # A mode that looks on would make the call an operator's.
        monkeypatch.setattr(_check, "_modes", lambda: 0)
        tolist = torch._C.TensorBase.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (self.found.append("tolist"), tolist(t))[1])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        sends = name == "index_put_" and args[2].dim() == 0
        if masks or sends or name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("block", [0, 60], ids=["one block", "blocks"])
@pytest.mark.parametrize("rows", [30, 130], ids=["one chunk", "two chunks"])
def test_how_often_the_host_waits_for_a_sampled_step(
    rows: int, block: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    x = place(make(Case("", rows, 4, 150, entropy=True, spread=4.0), torch.float16), device)
    x.targets[2::3] = -100
    leaves = [x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()]
    monkeypatch.setattr(_check, "readable", lambda tensor: False)  # as for a tensor on a GPU
    monkeypatch.setattr(TritonPass, "sizes", lambda self, *_: TileSizes(48, 96, block=block))
    monkeypatch.setattr("qempo_fast.logps.linear.seed", lambda: 5)  # reads a CPU tensor, which waits for nothing
    with Reads(monkeypatch) as forward:
        out = qf.linear_logps(*leaves, x.targets, entropy=True, grad="sampled", tau=0.9, backend="triton")
    stats = qf.last_stats()
    assert stats is not None
    assert (len(stats.kept_columns), stats.exact_chunks) == (1 if rows == 30 else 2, 0)
    assert forward.found == ["nonzero", "tolist"]  # the counted rows; the kept columns of every chunk
    losses = out.logps.sum() + out.entropy.sum(), (out.logps * (torch.arange(rows, device=device) % 4 > 0)).sum()
    # The rows with a coefficient; where they end in each chunk if some have none, and where blocks end, in one.
    for loss, some in zip(losses, (False, True), strict=True):
        with Reads(monkeypatch) as backward:
            loss.backward(retain_graph=True)
        assert backward.found == ["nonzero"] + ["tolist"] * (some or block > 0)


@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
def test_how_often_the_host_waits_for_an_exact_step(
    some: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    x = place(make(Case("", 130, 4, 150, entropy=True, spread=4.0), torch.float16), device)
    leaves = [x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()]
    monkeypatch.setattr(_check, "readable", lambda tensor: False)
    monkeypatch.setenv("QEMPO_KEEP_LOGITS", "0")
    with Reads(monkeypatch) as forward:
        out = qf.linear_logps(*leaves, x.targets, entropy=True, grad="exact", backend="triton")
    assert forward.found == ["nonzero"]
    with Reads(monkeypatch) as backward:
        (out.logps * (torch.arange(130, device=device) % 4 >= int(some))).sum().backward()
    assert backward.found == ["nonzero"] + ["tolist"] * some


def test_logits_that_exist_wait_for_nothing(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    logits = torch.randn(9, 35, device=device, requires_grad=True)
    targets = torch.randint(0, 35, (9,), device=device)
    targets[::3] = -100
    monkeypatch.setattr(_check, "readable", lambda tensor: False)
    with Reads(monkeypatch) as reads:
        out = qf.logps_from_logits(logits, targets, entropy=True, backend="triton")
        (out.logps.sum() + out.entropy.sum()).backward()
    assert reads.found == []
