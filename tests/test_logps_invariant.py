"""batch_invariant=True: a row's bits are its own, whatever rows come with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_logps import CASES, DTYPES, Case, make, run
from tolerances import assert_as_good

import qempo_fast as qf
from qempo_fast import reference
from qempo_fast.logps import _gemm as gemm
from qempo_fast.logps import _slopes
from qempo_fast.logps import cpu as cpu_pass
from qempo_fast.logps._options import TileSizes

N, BATCHES = 150, 30
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float16": (torch.float16, {}),
    "bfloat16, float32 logits": (torch.bfloat16, {"logits_dtype": torch.float32}),
}


@dataclass
class Rows:
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    bias: torch.Tensor | None
    temperature: torch.Tensor | float
    head: dict[str, Any]
    grad: torch.Tensor

    def call(self, index: torch.Tensor, needs: bool, **how: Any) -> list[torch.Tensor]:
        """logps, entropy, sum_sq of these rows, and dhidden where it is asked for."""
        hidden = self.hidden[index].requires_grad_(needs)
        t = self.temperature[index] if isinstance(self.temperature, torch.Tensor) else self.temperature
        head = {**self.head, **how, "bias": self.bias, "temperature": t, "batch_invariant": True}
        weight = self.weight.requires_grad_(needs and not how.get("frozen"))
        head.pop("frozen", None)
        out = qf.linear_logps(hidden, weight, self.targets[index], entropy=True, sum_sq=True, **head)
        if not needs:
            return [x for x in out if x is not None]
        (out.logps * self.grad[index]).sum().backward()
        self.weight.grad = None
        assert hidden.grad is not None
        return [*(x.detach() for x in out if x is not None), hidden.grad]


def rows(dtype: torch.dtype, full: bool, depth: int = 19, vocabulary: int = 4500, device: str = "cpu") -> Rows:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    targets = torch.randint(vocabulary, (N,), generator=generator).to(device)
    head: dict[str, Any] = {"softcap": 20.0, "logit_scale": 0.7} if full else {}
    bias = draw(vocabulary) if full else None
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    t = torch.rand(N, generator=generator, dtype=torch.float64).add(0.5).to(device, acc) if full else 1.0
    return Rows(draw(N, depth), draw(vocabulary, depth), targets, bias, t, head, draw(N).to(acc))


def batches(count: int, most: int = N) -> Iterator[torch.Tensor]:
    """Places of rows: one alone, all, then some in any order, some of them more than once."""
    generator = torch.Generator().manual_seed(7)
    yield torch.tensor([N - 1])
    yield torch.arange(N)
    for _ in range(count - 2):
        n = int(torch.randint(1, most, (1,), generator=generator))
        yield torch.randint(N, (n,), generator=generator)


def assert_same_bits(x: Rows, count: int = BATCHES, most: int = N, needs: bool = True, **how: Any) -> None:
    """needs: in turns with a gradient and without; dhidden is compared too."""
    whole = x.call(torch.arange(N), needs, **how)
    for number, index in enumerate(batches(count, most)):
        with_gradient = needs and number % 2 == 0
        found = x.call(index, with_gradient, **how)
        for name, mine, true in zip(("logps", "entropy", "sum_sq", "dhidden"), found, whole, strict=False):
            assert torch.equal(mine, true[index]), f"{name} of batch {number}, {len(index)} rows"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "all of the head"])
@pytest.mark.parametrize("budget", ["0", ""], ids=["logits again", "logits kept"])
def test_any_batch_has_the_same_bits(kind: str, full: bool, budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMPO_KEEP_LOGITS", budget)
    monkeypatch.setattr(cpu_pass, "EXACT", TileSizes(70, 2048))
    dtype, how = KINDS[kind]
    assert_same_bits(rows(dtype, full), grad="exact", **how)


@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=lambda c: c.why)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    x = make(case, dtype)
    truth, plain = (run(reference.linear_logps, x, kind, sum_sq=True) for kind in (torch.float64, dtype))
    ours = run(qf.linear_logps, x, dtype, sum_sq=True, grad="exact", batch_invariant=True)
    for name, value in ours.items():
        assert_as_good(name, value, plain[name], truth[name], dtype, 16.0, not name.startswith("d"))


def test_chunks_threads_and_a_frozen_head(monkeypatch: pytest.MonkeyPatch) -> None:
    x, wanted = rows(torch.float32, True), None
    threads = torch.get_num_threads()
    for rows_, number in ((1024, 1), (37, 2), (128, 3)):
        monkeypatch.setattr(cpu_pass, "EXACT", TileSizes(rows_, 2048))
        monkeypatch.setattr(_slopes, "ROWS", rows_)
        torch.set_num_threads(number)
        found = x.call(torch.arange(N), True, frozen=True)
        torch.set_num_threads(threads)
        wanted = wanted or found
        for mine, true in zip(found, wanted, strict=True):
            assert torch.equal(mine, true)
    assert_same_bits(x, 8, frozen=True)


@pytest.mark.parametrize("tau", [0.05, None], ids=["tau", "chosen"])
def test_a_sampled_step_scores_alike(tau: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its rows go in another order, and its tiles would have other columns.
    monkeypatch.setattr(cpu_pass, "SAMPLED", TileSizes(32, 4096, 32, 2048, 4096))
    x = rows(torch.float32, True)
    exact = x.call(torch.arange(N), False)
    for index in batches(6):
        leaf = x.hidden[index].requires_grad_()
        assert isinstance(x.temperature, torch.Tensor)
        head = {**x.head, "bias": x.bias, "temperature": x.temperature[index], "tau": tau, "grad": "sampled"}
        out = qf.linear_logps(leaf, x.weight, x.targets[index], **head, entropy=True, batch_invariant=True)
        assert torch.equal(out.logps.detach(), exact[0][index])
        assert out.entropy is not None
        assert torch.equal(out.entropy.detach(), exact[1][index])


def test_ignored_rows_and_packings() -> None:
    x = rows(torch.float32, False)
    wanted = x.call(torch.arange(N), False)[0]
    padded = x.hidden[:60].clone().view(3, 20, -1)
    targets = x.targets[:60].clone().view(3, 20)
    targets[:, 13:] = -100
    out = qf.linear_logps(padded, x.weight, targets, batch_invariant=True).logps
    assert torch.equal(out[:, :13], wanted[:60].view(3, 20)[:, :13])
    sums = []
    for order in ([0, 1, 2], [2, 0, 1]):  # 40, 30 and 80 tokens
        parts = [torch.arange(N).split([40, 30, 80])[i] for i in order]
        index, ends = torch.cat(parts), torch.tensor([0, *(len(p) for p in parts)]).cumsum(0)
        found = qf.sequence_logps(x.hidden[index], x.weight, x.targets[index], ends, batch_invariant=True)
        assert torch.equal(found.token_logps, wanted[index])
        sums.append(found.logps[torch.tensor(order).argsort()])
    assert torch.equal(*sums)


def test_compiled() -> None:
    x = rows(torch.float32, True)
    wanted = x.call(torch.arange(N), False)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a, **k: qf.linear_logps(*a, **k).logps, fullgraph=True, backend="aot_eager")
    for index in batches(4):
        assert isinstance(x.temperature, torch.Tensor)
        head = {**x.head, "bias": x.bias, "temperature": x.temperature[index], "batch_invariant": True}
        assert torch.equal(compiled(x.hidden[index], x.weight, x.targets[index], **head), wanted[0][index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("library", ["oneDNN", "MKL"])
@pytest.mark.parametrize("depth", [3, 19, 64, 577])
def test_what_torch_gemms_keep(depth: int, library: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's place in a tile of one size, the other rows and the threads change no bit: nobody promises it."""
    if library == "oneDNN" and (dtype == torch.float64 or not gemm._onednn_float32()):
        pytest.skip("oneDNN: float32 on AMD")
    monkeypatch.setattr(gemm, "_onednn_float32", lambda: library == "oneDNN")
    generator, threads = torch.Generator().manual_seed(depth), torch.get_num_threads()
    for columns in (1, 7, 333, 2048):
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
        weight, row, wanted = draw(columns, depth), draw(depth), None
        for trial, n in enumerate((1, 5, 128, 129, 300)):
            a = draw(n, depth) * 10.0 ** (trial - 2)
            at = torch.arange(0, n, max(1, n // 5))
            a[at] = row
            torch.set_num_threads(1 + trial % 2)
            found = gemm.fixed(a, weight)[at]
            torch.set_num_threads(threads)
            wanted = found[0].clone() if wanted is None else wanted
            assert torch.equal(found, wanted.expand_as(found)), (columns, n)
