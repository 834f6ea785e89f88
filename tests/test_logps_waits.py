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
from qempo_fast.logps.options import TileSizes
from qempo_fast.logps.pass_triton import TritonPass


class Reads(TorchDispatchMode):
    """Lists what makes the host wait for a GPU: values and sizes that are read, and scalars sent by an assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        sends = name == "index_put_" and args[2].dim() == 0
        if masks or sends or name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [30, 130], ids=["one chunk", "two chunks"])
def test_how_often_the_host_waits_for_a_sampled_step(
    rows: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    x = place(make(Case("", rows, 4, 150, entropy=True, spread=4.0), torch.float16), device)
    x.targets[2::3] = -100
    leaves = [x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()]
    monkeypatch.setattr(_check, "readable", lambda tensor: False)  # as for a tensor on a GPU
    monkeypatch.setattr(TritonPass, "sizes", lambda self, sampled: TileSizes(48, 96))
    monkeypatch.setattr("qempo_fast.logps._seed", lambda: 5)  # reads a CPU tensor, which waits for nothing
    tolist = torch.Tensor.tolist
    with Reads() as forward:
        monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (forward.found.append("tolist"), tolist(t))[1])
        out = qf.linear_logps(*leaves, x.targets, entropy=True, grad="sampled", tau=0.9, backend="triton")
    stats = qf.last_stats()
    assert stats is not None
    assert (len(stats.kept_columns), stats.exact_chunks) == (1 if rows == 30 else 2, 0)
    assert forward.found == ["nonzero", "tolist"]  # the counted rows; the kept columns of every chunk
    losses = out.logps.sum() + out.entropy.sum(), (out.logps * (torch.arange(rows, device=device) % 4 > 0)).sum()
    # The rows with a coefficient, where they end in each chunk if some have none, the rows of dweight.
    for loss, wanted in zip(losses, (["nonzero", "nonzero"], ["nonzero", "tolist", "nonzero"]), strict=True):
        with Reads() as backward:
            monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (backward.found.append("tolist"), tolist(t))[1])
            loss.backward(retain_graph=True)
        assert backward.found == wanted
