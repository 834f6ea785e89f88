"""What the log-prob ops ask of a GPU: sizes of tiles, the way past break-even, float32 sums in the GEMM, launches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from test_logps import Case, make, peaked, run
from torch.utils._python_dispatch import TorchDispatchMode

import qempo_fast as qf
from qempo_fast import _check, reference
from qempo_fast.logps import _backward as backward
from qempo_fast.logps import _gemm as gemm
from qempo_fast.logps._options import TileSizes
from qempo_fast.logps._policy import COLUMNS, POLICIES
from qempo_fast.logps.cpu import CpuPass

HALF = (torch.float16, torch.bfloat16)
H100 = POLICIES["cuda:90"]


class WideProducts(TorchDispatchMode):
    """The path of a CUDA tensor: products of half precision into float32, computed another way on a CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.monkeypatch = monkeypatch

    def __enter__(self) -> Any:
        self.monkeypatch.setattr(gemm, "widens", lambda a: a.dtype in HALF)
        # A mode that looks on makes the call an operator's, and sees nothing inside of it.
        self.monkeypatch.setattr(_check, "_modes", lambda: 0)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.monkeypatch.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.mm.dtype:
            a, b, dtype = args
            assert dtype == torch.float32
            out = a.float() @ b.float()
        elif func is torch.ops.aten.mm.dtype_out:
            a, b, dtype = args
            assert dtype == kwargs["out"].dtype == torch.float32
            out = kwargs["out"].copy_(a.float() @ b.float())
        elif func is torch.ops.aten.addmm.dtype_out:
            total, a, b, dtype = args
            assert dtype == total.dtype == torch.float32
            assert kwargs["out"] is total
            assert kwargs.get("beta", 1) == kwargs.get("alpha", 1) == 1
            out = total.copy_(total + a.float() @ b.float())
        else:
            name = str(func).removeprefix("aten.")
            self.found.update([name] if name in ("mm.out", "mm.default") else [])
            return func(*args, **kwargs)
        assert a.dtype == b.dtype
        assert a.dtype in HALF
        self.found[str(func).removeprefix("aten.")] += 1
        return out


@pytest.fixture(autouse=True)
def _products_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the processor has them, so that what is counted is the same everywhere."""
    monkeypatch.setattr(gemm, "_runs", lambda dtype: True)


@pytest.fixture
def wide() -> WideProducts:
    assert not gemm.widens(torch.zeros(1, dtype=torch.bfloat16))
    return WideProducts(pytest.MonkeyPatch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_gemm_writes_and_adds_float32(dtype: torch.dtype, wide: WideProducts) -> None:
    a, w = torch.randn(7, 5).to(dtype), torch.randn(9, 5).to(dtype)
    truth = a.double() @ w.double().t()
    with wide:
        one = gemm.product(a, w)
        total = torch.ones(7, 9)
        two = gemm.add_product(total, a, w)
    assert two is total
    assert one.dtype == torch.float32
    torch.testing.assert_close(one.double(), truth, rtol=0, atol=1e-5)
    torch.testing.assert_close(two.double(), truth + 1, rtol=0, atol=1e-5)
    assert wide.found == {"mm.dtype": 1, "addmm.dtype_out": 1}
    # As torch 2.11 and 2.13 have them. In 2.11 addmm's form for meta tensors fails (pytorch#163880), so it must not be
    # traced: eager functions and the insides of custom ops call it.
    ops = torch.ops.aten
    assert str(ops.mm.dtype._schema) == "aten::mm.dtype(Tensor self, Tensor mat2, ScalarType out_dtype) -> Tensor"
    assert str(ops.addmm.dtype_out._schema) == (
        "aten::addmm.dtype_out(Tensor self, Tensor mat1, Tensor mat2, ScalarType out_dtype, *, Scalar beta=1, "
        "Scalar alpha=1, Tensor(a!) out) -> Tensor(a!)"
    )
    assert str(ops.mm.dtype_out._schema) == (
        "aten::mm.dtype_out(Tensor self, Tensor mat2, ScalarType out_dtype, *, Tensor(a!) out) -> Tensor(a!)"
    )
    low = [x.to("meta") for x in (a, w.t())]
    assert torch.mm(*low, out_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("runs", [True, False], ids=["", "in float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_elsewhere(dtype: torch.dtype, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_runs", lambda dtype: runs)
    a, w = torch.randn(7, 5).to(dtype), torch.randn(9, 5).to(dtype)
    truth = a.double() @ w.double().t()
    bound = 4 * torch.finfo(dtype).eps * truth.abs().max().item()
    one = gemm.product(a, w)
    assert one.dtype == (dtype if runs or dtype not in HALF else torch.float32)
    out = torch.empty(7, 9, dtype=dtype)
    for z in (gemm.linear(a, w), gemm.linear(a, w, out)):
        assert z.dtype == dtype
        torch.testing.assert_close(z.double(), truth, rtol=0, atol=bound)
    total = torch.ones(7, 9, dtype=torch.promote_types(dtype, torch.float32))
    assert gemm.add_product(total, a, w) is total
    torch.testing.assert_close(one.double(), truth, rtol=0, atol=bound)
    torch.testing.assert_close(total.double(), truth + 1, rtol=0, atol=bound)


def test_an_exact_step_on_a_gpu_rounds_each_gradient_once(wide: WideProducts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qempo_fast.logps.cpu.EXACT", TileSizes(64, 96))
    monkeypatch.setenv("QEMPO_KEEP_LOGITS", "0")
    x = make(Case("", 60, 24, 290, spread=3.0), torch.bfloat16)
    x.targets[:] = x.targets.clamp(min=0)
    with wide:
        ours = run(qf.linear_logps, x, torch.bfloat16, grad="exact", backend="cpu")
    # Four tiles: logits twice and dweight, in its own dtype at once, then dhidden added to float32.
    assert wide.found == {"mm.out": 12, "addmm.dtype_out": 4}
    plain = run(qf.linear_logps, x, torch.bfloat16, grad="exact", backend="cpu")
    truth = run(reference.linear_logps, x, torch.float64)
    errors = [(r["dhidden"].double() - truth["dhidden"]).norm() for r in (ours, plain)]
    assert errors[0] < errors[1]
    torch.testing.assert_close(ours["dweight"], plain["dweight"], rtol=0, atol=0)


def test_rows_of_several_blocks_are_summed_in_float32(wide: WideProducts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qempo_fast.logps.cpu.EXACT", TileSizes(20, 400))
    monkeypatch.setenv("QEMPO_KEEP_LOGITS", "0")
    x = make(Case("", 60, 24, 290, spread=3.0), torch.bfloat16)
    x.targets[:] = x.targets.clamp(min=0)
    with wide:
        ours = run(qf.linear_logps, x, torch.bfloat16, grad="exact", backend="cpu")
    assert wide.found == {"mm.out": 6, "addmm.dtype_out": 3 + 2, "mm.dtype": 1}
    truth = run(reference.linear_logps, x, torch.float64)
    for name in ("dhidden", "dweight"):
        error = (ours[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < 2 * torch.finfo(torch.bfloat16).eps, name


def test_a_sampled_step_on_a_gpu_adds_products_in_float32(wide: WideProducts) -> None:
    x = peaked(torch.bfloat16, n=600, d=24, v=3000)
    with wide:
        torch.manual_seed(2)
        ours = run(qf.linear_logps, x, torch.bfloat16, grad="sampled", tau=0.01, backend="reference")
    stats = qf.last_stats()
    assert stats is not None
    assert stats.exact_chunks == 0
    assert (wide.found["mm.dtype"], wide.found["addmm.dtype_out"]) == (2, 0)  # one chunk of one tile
    torch.manual_seed(2)
    plain = run(qf.linear_logps, x, torch.bfloat16, grad="sampled", tau=0.01, backend="reference")
    for name in ("dhidden", "dweight"):
        torch.testing.assert_close(ours[name], plain[name], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("arch", [a for a in POLICIES if a != "interpreter"])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 64, 300, 2048, 8192, 9000, 40000])
def test_tiles_fill_their_memory_and_no_more(arch: str, size: int, rows: int) -> None:
    policy = POLICIES[arch]
    sampled = policy.sampled(rows, 4096, size, 128)
    for tile in (policy.exact(rows, size), sampled):
        taken = min(tile.rows, rows) * tile.columns * size
        assert policy.tile - min(tile.rows, rows) * COLUMNS * size < taken <= policy.tile
        assert tile.columns % COLUMNS == 0
        assert tile.rows <= policy.rows
        # As many blocks of rows as there have to be, and the last not much shorter than the others.
        blocks = -(-rows // tile.rows)
        assert blocks == -(-rows // policy.rows)
        assert rows - (blocks - 1) * tile.rows > 0.7 * tile.rows or blocks == 1
    assert sampled.chunk == policy.chunk
    assert sampled.rows % policy.chunk == 0
    assert sampled.kept * 4096 * (size + 4) <= policy.gathered
    assert sampled.kept * min(rows, policy.chunk) * size <= policy.tile
    assert sampled.block * 4096 * 4 <= policy.total


def test_sizes_of_the_shapes_in_the_docs() -> None:
    assert H100.exact(8192, 2) == TileSizes(8192, 4096)
    # A backward of 64 to 512 rows was 32 tiles of a vocabulary of 128,256; SmolLM2's was 12.
    assert [-(-128_256 // H100.exact(n, 2).columns) for n in (64, 256, 512)] == [1, 1, 2]
    assert -(-49_152 // H100.exact(2048, 2).columns) == 3
    headline = H100.sampled(8192, 4096, 2, 128)
    assert (headline.rows, headline.columns, headline.chunk) == (8192, 4096, 1024)
    assert (headline.kept, headline.block) == (16384, 32768)
    assert H100.sampled(2048, 576, 2, 128).block > 49_152


def test_the_memory_of_a_sampled_step_stays_under_its_goal() -> None:
    # Beyond inputs and gradients at 8192 x 4096 x 131072 in bfloat16: the float32 sum of a block of dweight, the kept
    # rows of the weight and their product, dhidden of every chunk, logits, and 12 bytes of each column kept.
    size, n, d, v = H100.sampled(8192, 4096, 2, 128), 8192, 4096, 131_072
    taken = size.block * d * 4 + size.kept * d * (2 + 4) + n * d * 4 + size.chunk * size.kept * 2 + 8 * v * 12
    assert taken / 2**30 < 1.2
    # The forward: logits, bounds of each 128 rows, and what the choice of columns needs.
    assert (n * size.columns * 2 + n // 128 * v * 4 + 8 * v * 30) / 2**30 < 0.2


def seconds(f: float, rows: int, size: int) -> float:
    """T(f) of the backward of rows x 4096 x 131072 on an H100, without what does not depend on f."""
    rates, entries = H100.rates, 4096 * 131_072
    assert rates is not None
    gemms = 6 * rows * entries / (rates.half if size == 2 else rates.single)
    gemms = max(gemms, 3 * entries * size / rates.bandwidth)  # few rows: the weight is read twice and dweight written
    # Gathered: read, written. Product: written in float32, half of it hidden. Sum: read, read, written.
    moved = entries * (2 * size + 2 + 12) / rates.bandwidth
    return f * (gemms + moved) if f < 1 else gemms


@pytest.mark.parametrize("size", [2, 4])
def test_break_even_is_where_the_two_ways_cost_the_same(size: int) -> None:
    found = [H100.break_even(rows, size) for rows in (64, 256, 1024, 4096)]
    for rows, f in zip((64, 256, 1024, 4096), found, strict=True):
        assert seconds(f, rows, size) == pytest.approx(seconds(1, rows, size), rel=1e-9)
    assert found == sorted(found)
    if size == 2:
        assert found == pytest.approx([0.25, 0.25, 0.58, 0.84], abs=0.01)
    assert POLICIES["interpreter"].break_even(1024, size) == TileSizes.break_even == CpuPass().sizes(True).break_even


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_step_past_break_even_takes_the_exact_path(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []
    exact, sampled = backward._exact, backward._Sampled
    monkeypatch.setattr(backward, "_exact", lambda *a: (paths.append("exact"), exact(*a))[1])
    monkeypatch.setattr(backward, "_Sampled", lambda *a: (paths.append("sampled"), sampled(*a))[1])
    flat = make(Case("flat", 700, 4, 300, True, None, 1.0, 0.9, True, 0.01), torch.float64)
    flat.grads[0][3:90] = flat.grads[1][3:90] = 0
    wanted = run(qf.linear_logps, flat, torch.float64, grad="exact", backend=backend)
    ours = run(qf.linear_logps, flat, torch.float64, grad="sampled", tau=1e-3, backend=backend)
    for name in ("dhidden", "dweight", "dbias"):
        # A sampled step has its rows in another order.
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
    stats = qf.last_stats()
    assert stats is not None
    assert stats.exact_chunks == len(stats.kept_columns)
    # One chunk of several below break-even, and each chunk goes its own way.
    first = slice(stats.chunk_rows * 5 // 4)  # a fifth of them is ignored
    flat.hidden[first] = torch.tensor([30.0, 0, 0, 0])
    flat.targets[first] = flat.targets[first].clamp(max=5)
    run(qf.linear_logps, flat, torch.float64, grad="sampled", tau=1e-3, backend=backend)
    mixed = qf.last_stats()
    assert mixed is not None
    assert 0 < mixed.exact_chunks < len(mixed.kept_columns)
    assert paths == ["exact", "exact", "sampled"]


def test_ops_that_read_sizes_are_marked_as_not_to_be_captured() -> None:
    ops = torch.ops.qempo_fast
    unsafe = torch.Tag.cudagraph_unsafe
    for op in (ops.linear_logps_fwd, ops.linear_logps_bwd):
        assert unsafe in op.default.tags
    # They wait for nothing: test_logps_waits.py.
    for op in (ops.logps_from_logits_fwd, ops.logps_from_logits_bwd):
        assert unsafe not in op.default.tags


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampling_from_a_weight_with_gaps(dtype: torch.dtype, backend: str) -> None:
    # Rows of a transpose: the native gather took them for neighbours and read other rows' entries.
    x = peaked(dtype, n=60, v=2000)
    found = []
    for weight in (x.weight, x.weight.t().contiguous().t()):
        torch.manual_seed(1)
        leaves = [x.hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        qf.linear_logps(*leaves, x.targets, grad="sampled", tau=0.1, backend=backend).logps.sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
