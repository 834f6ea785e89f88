"""Log-probs over kept sets: the sets, and every backend against the float64 reference, forward and each gradient."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_logps import DTYPES, Case, Inputs, make, run
from tolerances import assert_as_good

import qempo_fast as qf
from qempo_fast import _C, reference
from qempo_fast.logps import _support

BACKENDS = ["cpu", "reference"]
WAYS = [None, *_support.WAYS]
# With the share of the vocabulary that a row keeps.
CASES = [
    (Case("ragged sizes, several row chunks", 700, 8, 57), 0.1),
    (Case("all of the head at once", 37, 19, 203, True, 5.0, 0.7, 0.8, True), 0.2),
    (Case("per-token temperature", 33, 8, 257, temperature="tensor", entropy=True), 0.05),
    (Case("sets of one token: log p = 0", 9, 5, 31, True, entropy=True), 0.0),
    (Case("full sets", 12, 7, 300, entropy=True), 1.0),
    (Case("large logits", 16, 8, 100, entropy=True, spread=300.0), 0.3),
    (Case("one row", 1, 3, 5, entropy=True), 0.5),
]


def sets(x: Inputs, v: int, share: float) -> qf.Support:
    """Random sets that hold the target; an ignored row's is empty, of every other one of them."""
    mask = torch.rand(len(x.targets), v) < share * 2 * torch.rand(len(x.targets), 1) if share < 1 else None
    mask = torch.ones(len(x.targets), v, dtype=torch.bool) if mask is None else mask
    counted = x.targets != -100
    mask[counted, x.targets[counted]] = True
    mask[::10] &= counted[::10, None]
    return qf.Support.from_mask(mask)


def compare(case: Case, share: float, dtype: torch.dtype, device: torch.device | None = None, **how: Any) -> None:
    if dtype == torch.float16 and case.spread > 100:
        case = replace(case, spread=100.0)
    x = make(case, dtype)
    support = sets(x, case.v, share)
    if device is not None:
        from test_logps_triton import place

        x, support = place(x, device), support.to(device)
    truth = run(reference.linear_logps, x, torch.float64, sum_sq=True, support=support)
    plain = run(reference.linear_logps, x, dtype, sum_sq=True, support=support)
    ours = run(qf.linear_logps, x, dtype, sum_sq=True, support=support, **how)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        floor = 16.0 * max(1.0, case.spread)
        assert_as_good(name, value, plain[name], truth[name], dtype, floor, not name.startswith("d"))


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_support, "WAY", request.param)


@pytest.mark.parametrize(("case", "share"), CASES, ids=lambda x: getattr(x, "why", ""))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("way")
def test_against_float64(case: Case, share: float, dtype: torch.dtype, backend: str) -> None:
    compare(case, share, dtype, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("way")
def test_logits_in_float32(dtype: torch.dtype, backend: str) -> None:
    """As sharp as plain torch's, which has no rounded logit in it."""
    x = make(CASES[1][0], dtype)
    how = {"support": sets(x, 203, 0.2), "logits_dtype": torch.float32}
    truth = run(reference.linear_logps, x, torch.float64, support=how["support"])
    plain = run(reference.linear_logps, x, dtype, **how)
    ours = run(qf.linear_logps, x, dtype, **how, backend=backend)
    for name, value in ours.items():
        kind = dtype if name.startswith("d") else torch.float32
        assert_as_good(name, value, plain[name], truth[name], kind, 16.0, not name.startswith("d"))


def test_a_hand_worked_number() -> None:
    """z = (log 1, log 2, log 5) of tokens 0, 1, 3 of four: p = (1, 2, 5) / 8 of them, whatever token 2 has."""
    logits = torch.tensor([[1.0, 2.0, 9.0, 5.0]], dtype=torch.float64).log()
    support = qf.Support.from_lists([[3, 0, 1]])
    for function in (reference.logps_from_logits, qf.logps_from_logits):
        out = function(logits, torch.tensor([1]), support=support, entropy=True)
        assert out.logps.item() == pytest.approx(math.log(2 / 8))
        assert out.entropy.item() == pytest.approx(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)))


@pytest.mark.parametrize("function", [reference.linear_logps, qf.linear_logps])
def test_gradcheck(function: Any) -> None:
    x = make(replace(CASES[1][0], n=6, d=3, v=9), torch.float64)
    support = sets(x, 9, 0.5)

    def outputs(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = function(h, w, x.targets, bias=b, support=support, softcap=3.0, temperature=0.7, entropy=True)
        return out.logps, out.entropy

    assert x.bias is not None
    leaves = [t.requires_grad_() for t in (x.hidden, x.weight, x.bias)]
    assert torch.autograd.gradcheck(outputs, leaves)


def test_a_set_of_one_is_sure_and_moves_nothing() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = torch.arange(5)
    out = qf.linear_logps(hidden, weight, targets, support=qf.Support(targets, torch.arange(6)), entropy=True)
    assert out.logps.tolist() == out.entropy.tolist() == [0.0] * 5
    (out.logps.sum() + out.entropy.sum()).backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("way")
def test_rows_that_nobody_kept_are_exactly_0(backend: str) -> None:
    hidden, weight = torch.randn(40, 4, requires_grad=True), torch.randn(90, 4, requires_grad=True)
    targets = torch.arange(40)
    support = qf.Support.from_lists([[i, 50, 51] for i in range(40)])
    qf.linear_logps(hidden, weight, targets, support=support, backend=backend).logps.sum().backward()
    assert not weight.grad[40:50].any()
    assert not weight.grad[52:].any()
    assert weight.grad[:40].any(1).all()


def test_all_of_the_vocabulary_is_no_support() -> None:
    x = make(CASES[1][0], torch.float32)
    full = qf.Support.from_mask(torch.ones(37, 203, dtype=torch.bool))
    ours, today = (run(qf.linear_logps, x, torch.float32, sum_sq=True, **k) for k in ({"support": full}, {}))
    for name, value in ours.items():
        torch.testing.assert_close(value, today[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits(dtype: torch.dtype, backend: str) -> None:
    logits, temperature = torch.randn(21, 33, dtype=torch.float64).mul(3).to(dtype), torch.rand(21) + 0.5
    x = make(Case("", 21, 2, 33), dtype)
    support, results = sets(x, 33, 0.3), []
    for function, to, how in (
        (reference.logps_from_logits, torch.float64, {}),
        (reference.logps_from_logits, dtype, {}),
        (qf.logps_from_logits, dtype, {"backend": backend}),
    ):
        z = logits.to(to).requires_grad_()
        out = function(z, x.targets, support=support, entropy=True, temperature=temperature.to(to), **how)
        ((out.logps.double() * x.grads[0]).sum() + (out.entropy.double() * x.grads[1]).sum()).backward()
        results.append([out.logps.detach(), out.entropy.detach(), z.grad])
    for name, true, plain, ours in zip(("logps", "entropy", "dlogits"), *results, strict=True):
        assert_as_good(name, ours, plain, true, dtype, 16.0, name != "dlogits")


def test_sequences() -> None:
    x = make(Case("", 30, 4, 50), torch.float32)
    support, cu = sets(x, 50, 0.2), torch.tensor([0, 7, 7, 30])
    out = qf.sequence_logps(x.hidden, x.weight, x.targets, cu, average=True, entropy=True, support=support)
    want = reference.sequence_logps(x.hidden, x.weight, x.targets, cu, average=True, entropy=True, support=support)
    for ours, true in zip(out, want, strict=True):
        torch.testing.assert_close(ours, true)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_each_instruction_set(isa: str, dtype: torch.dtype) -> None:
    before = _C.isa()
    try:
        _C.use_isa(isa)
        compare(*CASES[1], dtype, backend="cpu")
    finally:
        _C.use_isa(before)


def test_threads_change_no_bit() -> None:
    """More rows than two blocks have, so that both threads get some."""
    x = make(Case("", 300, 37, 91, entropy=True), torch.float32)
    support, before = sets(x, 91, 0.3), torch.get_num_threads()
    try:
        runs = [torch.set_num_threads(n) or run(qf.linear_logps, x, torch.float32, support=support) for n in (1, 2, 1)]
    finally:
        torch.set_num_threads(before)
    for name, value in runs[0].items():
        assert all(torch.equal(other[name], value) for other in runs[1:]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("way")
def test_only_what_is_asked_for(backend: str) -> None:
    """Whichever leaves want a gradient get theirs alone; a weight may lie in any layout."""
    x = make(Case("", 12, 5, 40, True), torch.float32)
    support, truth = sets(x, 40, 0.3), None
    assert x.bias is not None
    for wanted in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        leaves = [t.clone() for t in (x.hidden, x.weight.t().contiguous(), x.bias)]
        h, w, b = (t.requires_grad_(want) for t, want in zip(leaves, wanted, strict=True))
        qf.linear_logps(h, w.t(), x.targets, bias=b, support=support, backend=backend).logps.sum().backward()
        truth = truth or [t.grad for t in leaves]
        for leaf, want, true in zip(leaves, wanted, truth, strict=True):
            assert leaf.grad is None if not want else torch.equal(leaf.grad, true)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("way")
def test_masks_and_nan(backend: str) -> None:
    """Kept tokens at -inf or float32's least number, sets of nothing else, and a row of NaN, which stays alone."""
    hidden, weight, bias = torch.randn(6, 4), torch.randn(12, 4), torch.zeros(12)
    bias[3:5], bias[5], hidden[5, 0] = -torch.inf, -3.4e38, torch.nan
    support = qf.Support.from_lists([[0, 1, 3], [3, 4, 0], [3, 4], [5, 1, 2], [5], [0, 1]])
    targets = torch.tensor([0, 3, 4, 5, 5, 1])
    good = [0, 3, 4]
    for entropy in (False, True):
        head = {"bias": bias, "entropy": entropy, "sum_sq": True, "support": support}
        h = hidden.clone().requires_grad_()
        out = qf.linear_logps(h, weight, targets, backend=backend, **head)
        want = reference.linear_logps(hidden, weight, targets, **head)
        for ours, true in zip(out, want, strict=True):
            torch.testing.assert_close(ours, true, equal_nan=True)
        out.logps[good].sum().backward()
        assert h.grad.isfinite().all()
        assert not h.grad[[1, 2, 5]].any()


# Ties at both ends, masked tokens, and a row with one candidate.
HARD = torch.tensor(
    [
        [2.0, 2.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.5],
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        [0.0, -torch.inf, 3.0, -torch.inf, 3.0, 2.9, -1.0, 0.0],
        [40.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ]
)


def restated(z: torch.Tensor, top_p: float, top_k: int, min_p: float, temperature: float) -> list[list[int]]:
    """One token after another, as the sampler's rule is told."""
    out = []
    for row in z / temperature:
        alive = {i: float(x) for i, x in enumerate(row) if x > -math.inf}
        if min_p:
            p = row.softmax(0)
            alive = {i: x for i, x in alive.items() if not p[i] < p.max() * min_p}
        if 0 < top_k < len(alive):
            least = sorted(alive.values())[-top_k]
            alive = {i: x for i, x in alive.items() if x >= least}
        if top_p < 1:
            masked = torch.tensor([alive.get(i, -math.inf) for i in range(len(row))])
            ascending, order = masked.sort()
            below, most = torch.cumsum(ascending.softmax(0), 0), 1 - torch.tensor(top_p)
            alive = {i: alive[i] for n, i in enumerate(order.tolist())
                     if i in alive and (below[n] > most or n == len(row) - 1)}  # fmt: skip
        out.append(sorted(alive))
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("min_p", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 4, 8, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.8, 0.5, 1e-6])
def test_the_samplers_rule(top_p: float, top_k: int, min_p: float, temperature: float) -> None:
    z = torch.cat([HARD, torch.randn(6, 8)])
    found = qf.Support.from_logits(z, top_p, top_k, min_p, temperature)
    assert lists(found) == restated(z, top_p, top_k, min_p, temperature)


def lists(support: qf.Support) -> list[list[int]]:
    return [sorted(s.tolist()) for s in support.ids.split(support.offsets.diff().tolist())]


def test_constructors_agree() -> None:
    rows = [[3, 1], [], [0, 2, 4], [4]]
    mask = torch.zeros(2, 2, 5, dtype=torch.bool)
    for i, row in enumerate(rows):
        mask.view(4, 5)[i, row] = True
    flat = SimpleNamespace(token_ids=[3, 1, 0, 2, 4, 4], offsets=[0, 2, 2, 5, 6])
    made = [qf.Support.from_lists(rows), qf.Support.from_mask(mask), qf.Support.from_vllm(rows),
            qf.Support.from_vllm(flat), qf.Support.from_vllm(SimpleNamespace(token_ids=rows))]  # fmt: skip
    assert [lists(s) for s in made] == [[sorted(r) for r in rows]] * 5
    one = qf.Support.from_vllm(SimpleNamespace(token_ids=torch.tensor([7, 2]).numpy(), offsets=None))
    assert lists(one) == [[2, 7]]
    assert lists(qf.Support.cat([one, made[1]])) == [[2, 7], [1, 3], [], [0, 2, 4], [4]]
    assert lists(made[0].rows(slice(1, 3))) == [[], [0, 2, 4]]
    assert lists(made[0].rows(torch.tensor([3, 0]))) == [[4], [1, 3]]
    assert lists(made[0].rows(torch.tensor([True, False, False, True]))) == [[1, 3], [4]]
    where = torch.tensor([[False, True, True], [True, False, True]])
    assert lists(made[0].spread(where)) == [[], [1, 3], [], [0, 2, 4], [], [4]]


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_nothing_to_score(ids: torch.dtype) -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    none = qf.Support(torch.empty(0, dtype=ids), torch.zeros(4, dtype=torch.int32))
    out = qf.linear_logps(hidden, weight, torch.full((3,), -100), support=none, entropy=True)
    (out.logps.sum() + out.entropy.sum()).backward()
    assert not out.logps.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()
    empty = qf.linear_logps(
        hidden[:0], weight, torch.empty(0, dtype=ids), support=none._replace(offsets=none.offsets[:1])
    )
    assert empty.logps.shape == (0,)


def test_what_is_unread_on_a_gpu_is_nan_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values may not be read, a wrong row is NaN, is safe to compute, and leaves the others as they are."""
    x = make(Case("", 8, 4, 20), torch.float32)
    x.targets[x.targets == -100] = 3
    good = sets(x, 20, 0.3)
    wanted = qf.linear_logps(x.hidden, x.weight, x.targets, support=good).logps
    bad = qf.Support(good.ids.clone(), good.offsets.clone())
    bad.ids[int(bad.offsets[2])] = 99
    lost = x.targets.clone()
    lost[5] = next(i for i in range(20) if i not in lists(good)[5])
    monkeypatch.setattr("qempo_fast._check.may_read", lambda x: False)
    out = qf.linear_logps(x.hidden, x.weight, lost, support=bad).logps
    assert out.isnan().nonzero().flatten().tolist() == [2, 5]
    keep = [0, 1, 3, 4, 6, 7]
    torch.testing.assert_close(out[keep], wanted[keep])
    bad = qf.Support(good.ids, good.offsets.clone())
    bad.offsets[4] = 10**9
    assert qf.linear_logps(x.hidden, x.weight, x.targets, support=bad).logps[[3, 4]].isnan().all()


SHARDS = [20, 37]


def sharded(group: Any, mine: slice, entropy: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(4)
    x = make(Case("", 30, 5, 57, True), torch.float64)
    support = sets(x, 57, 0.2)
    assert x.bias is not None
    leaves = [t.clone().requires_grad_() for t in (x.hidden, x.weight[mine], x.bias[mine])]
    out = qf.linear_logps(
        *(leaves[0], leaves[1], x.targets), bias=leaves[2], softcap=9.0, temperature=0.8, entropy=True, sum_sq=True,
        support=support, process_group=group,
    )  # fmt: skip
    ((out.logps * x.grads[0]).sum() + (out.entropy * x.grads[1]).sum()).backward()
    return [*(t.detach() for t in out), *(t.grad for t in leaves)]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    start = sum(SHARDS[:rank])
    torch.save(sharded(dist.group.WORLD, slice(start, start + SHARDS[rank])), Path(folder) / f"{rank}.pt")
    other = qf.Support(torch.tensor([3, rank]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"^targets: .*support"):
        qf.linear_logps(torch.ones(1, 2), torch.ones(9, 2), torch.tensor([3]), support=other,
                        process_group=dist.group.WORLD)  # fmt: skip
    dist.destroy_process_group()


def test_two_shards_of_the_vocabulary() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks = [subprocess.Popen([sys.executable, __file__, str(rank), folder]) for rank in range(2)]
        try:
            assert [process.wait(timeout=100) for process in ranks] == [0, 0]
        finally:
            for process in ranks:
                process.kill()
        parts = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    *whole, dweight, dbias = sharded(None, slice(None))
    for rank, part in enumerate(parts):
        start = sum(SHARDS[:rank])
        mine = slice(start, start + SHARDS[rank])
        for ours, true in zip(part, [*whole, dweight[mine], dbias[mine]], strict=True):
            torch.testing.assert_close(ours, true, rtol=0, atol=1e-12)


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
