"""Triton kernels of the log-prob ops against the float64 reference, on the GPU or in the interpreter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only")

from test_logps import Case, Inputs, make, run
from test_logps_from_logits import run as run_logits
from test_logps_slopes import gradient as frozen
from tolerances import assert_as_good

import qempo_fast as qf
from qempo_fast import _backends, reference
from qempo_fast.kernels import _launch, linear_logps_fused
from qempo_fast.kernels.linear_logps_grad import tile_bwd
from qempo_fast.kernels.linear_logps_select import select_columns
from qempo_fast.kernels.linear_logps_tiles import COLUMN_ROWS
from qempo_fast.logps import _slopes
from qempo_fast.logps import triton as pass_triton
from qempo_fast.logps._gemm import linear
from qempo_fast.logps._head import HeadTensors, Tile
from qempo_fast.logps._options import Options
from qempo_fast.logps._row_stats import RowStats

# The interpreter's tiles are 64 rows x 160 columns (48 x 96 when sampling), its blocks 4 to 64 rows x 32 to 64 columns.
CASES = [
    Case("odd N and D, V no multiple of a block, three tiles", 21, 7, 333),
    Case("two row chunks, everything in the head", 70, 5, 171, True, 5.0, 0.7, 0.8, True),
    Case("one row: its columns are split over programs", 1, 9, 333, entropy=True),
    Case("per-token temperature", 13, 8, 65, temperature="tensor", entropy=True),
    Case("V under one block", 5, 3, 7, True, entropy=True),
    Case("cap saturated", 12, 8, 100, softcap=30.0, spread=40.0),
    Case("cap far above the logits: tanh near 0", 12, 8, 100, softcap=1e4),
    Case("large logits: exp overflows unless shifted", 12, 8, 100, entropy=True, spread=300.0),
]


@pytest.fixture(params=["tiles", "fused"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which forward runs: vendor GEMM and tile passes, or the fused kernel for any number of rows."""
    for arch in pass_triton._FUSED_ROWS:
        monkeypatch.setitem(pass_triton._FUSED_ROWS, arch, 0 if request.param == "tiles" else 2**31)
    return str(request.param)


def place(x: Inputs, device: torch.device) -> Inputs:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    tensors = {name: move(getattr(x, name)) for name in ("hidden", "weight", "targets", "bias")}
    keywords = {k: move(v) for k, v in x.keywords.items()}
    return replace(x, **tensors, keywords=keywords, grads=(move(x.grads[0]), move(x.grads[1])))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exact_against_float64(case: Case, dtype: torch.dtype, path: str, device: torch.device) -> None:
    if path == "fused" and dtype == torch.float64:
        pytest.skip("the fused kernel has no float64: tiles run")
    if path == "fused" and dtype == torch.bfloat16 and _launch.architecture(device) == "interpreter":
        pytest.skip("Triton's interpreter multiplies bfloat16 by its bit patterns")
    if dtype == torch.float16 and case.spread > 100:
        case = replace(case, spread=100.0)  # float16 ends at 65504, and its GEMM gradients pass that
    x = place(make(case, dtype), device)
    truth = run(reference.linear_logps, x, torch.float64, sum_sq=True)
    plain = run(reference.linear_logps, x, dtype, sum_sq=True)
    ours = run(qf.linear_logps, x, dtype, sum_sq=True, grad="exact", backend="triton")
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        # A softmax entry's relative error is that of z - lse, eps times the size of the logits.
        floor = 16.0 * max(1.0, case.spread)
        assert_as_good(name, value, plain[name], truth[name], dtype, floor, not name.startswith("d"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_frozen_head_against_float64(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(_slopes, "ROWS", 24)
    x = place(make(Case("", 50, 8, 150, True, 5.0, 0.7, "tensor", True), dtype), device)
    truth, plain, ours = (
        frozen(function, x, kind, **how)
        for function, kind, how in (
            (reference.linear_logps, torch.float64, {}),
            (reference.linear_logps, dtype, {}),
            (qf.linear_logps, dtype, {"backend": "triton"}),
        )
    )
    assert_as_good("dhidden", ours, plain, truth, dtype, 16.0)


def test_masked_columns(path: str, device: torch.device) -> None:
    # More than the first tile is masked: its rows have no finite logit until the second.
    x = make(Case("", 6, 5, 333, bias=True, entropy=True), torch.float32)
    assert x.bias is not None
    x.bias[:200] = -torch.inf
    x.targets[:] = torch.tensor([-100, 200, 332, 250, 300, 7])
    x.grads[0][5] = x.grads[1][5] = 0  # its target is masked: log p is -inf
    x = place(x, device)
    truth = run(reference.linear_logps, x, torch.float64)
    ours = run(qf.linear_logps, x, torch.float32, grad="exact", backend="triton")
    assert ours["logps"][5] == -torch.inf
    assert (ours["dbias"][:200] == 0).all()
    for name, value in ours.items():
        live = slice(None, 5) if name in ("logps", "entropy") else slice(None)
        torch.testing.assert_close(value.double()[live], truth[name][live], rtol=0, atol=2e-5)


@pytest.mark.parametrize("rows", [11, COLUMN_ROWS + 37], ids=["one part", "two parts"])
def test_column_bounds(rows: int, path: str, device: torch.device) -> None:
    x = place(make(Case("", rows, 6, 210, True, 20.0, 1.0, "tensor", spread=3.0), torch.float32), device)
    assert x.bias is not None
    inverse = x.keywords["temperature"].reciprocal()
    z = reference.logps.finish_head(
        torch.nn.functional.linear(x.hidden.double(), x.weight.double(), x.bias.double()),
        softcap=20.0,
        temperature=1 / inverse.double().unsqueeze(1),
    )
    # The largest logit: where a later tile holds it, the floor is above the running log-sum-exp.
    targets = z.argmax(1)
    options = Options(1.0, 20.0, False, False, 0.1, 0, None)
    head = HeadTensors(x.hidden, x.weight, x.bias, targets, inverse)
    tiles = pass_triton.TritonPass()
    stats = RowStats.new(rows, torch.float32, device, False, False)
    columns = tiles.new_columns(210, stats)
    floor = z.gather(1, targets.unsqueeze(1)).squeeze(1).float()
    width = 96
    if path == "fused":
        assert tiles.fused(head, stats, floor, columns, options)
    for v in range(0, 0 if path == "fused" else 210, width):
        raw = linear(x.hidden, x.weight[v : v + width])
        tiles.forward(Tile(raw, x.bias[v : v + width], inverse, targets), stats, floor, columns, v, options)
    bounds = columns.amax(0).double()
    if path == "tiles":
        seen = [torch.logsumexp(z[:, : v or width], 1) for v in range(0, 210, width)]
        wanted = torch.cat(
            [
                (z[:, v : v + width] - torch.maximum(lse, floor.double()).unsqueeze(1)).amax(0)
                for v, lse in zip(range(0, 210, width), seen, strict=True)
            ]
        )
        torch.testing.assert_close(bounds, wanted, rtol=0, atol=1e-5)
    # What the sampled gradient needs of any bound, and that this one is not trivial.
    assert (bounds >= torch.log_softmax(z, 1).amax(0) - 1e-5).all()
    assert bounds.exp().mean() < 0.5
    torch.testing.assert_close(stats.lse().sum(1).double(), torch.logsumexp(z, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [8, 7], ids=["descriptors", "pointers"])
def test_rows_that_fill_a_block_up_bound_no_column(width: int, device: torch.device) -> None:
    # Peaked rows: one of zeros, or without its temperature, is flatter and would raise the bounds.
    hidden, weight = torch.randn(16, width, device=device) * 10, torch.randn(70, width, device=device)
    inverse = torch.full((16,), 3.0, device=device)
    hidden[11:], inverse[11:] = hidden[:1], inverse[:1]  # rows seen already add nothing to a maximum
    targets = torch.zeros(16, dtype=torch.int64, device=device)
    found = []
    for n in (11, 16):
        stats, columns = RowStats.new(n, torch.float32, device, False, False), torch.empty(1, 70, device=device)
        vectors, floor = pass_triton._vectors(stats), torch.full((n,), -9.0, device=device)
        linear_logps_fused.fused_fwd(
            *(hidden[:n], weight, None, inverse[:n], targets[:n], vectors, floor, columns, 1.0, None)
        )
        found.append(columns)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)


def kept(bounds: torch.Tensor, tau: float, seed: int, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(V,) keep flags and 1 / q of the kept columns, 0 elsewhere."""
    forced = more.pop("forced", torch.zeros(bounds.shape[-1], dtype=torch.uint8, device=bounds.device))
    arguments = {"mean_entropy": None, "rows": range(0, 1), "first_column": 0} | more
    if arguments["mean_entropy"] is not None:
        arguments["mean_entropy"] = bounds.new_tensor([arguments["mean_entropy"]])
    all_index, all_inverse, all_counts = select_columns(
        bounds.reshape(1, -1, len(forced)), forced[None], tau, seed=seed, **arguments
    )
    counts = all_counts[0]
    count, expected = counts.tolist()
    index, inverse = all_index[0, : int(count)], all_inverse[0, : int(count)]
    assert index.dtype == torch.int64
    assert (index[1:] > index[:-1]).all()
    full = torch.zeros(bounds.shape[-1], dtype=bounds.dtype, device=bounds.device)
    full[index] = inverse
    flags = torch.zeros_like(full, dtype=torch.bool)
    flags[index] = True
    # Five standard deviations of a sum of independent draws, each of variance under 1/4.
    assert abs(expected - len(index)) <= 2.5 * len(flags) ** 0.5
    return flags, full


@pytest.mark.parametrize("entropy", [None, 1.5])
def test_kept_columns_follow_their_probabilities(entropy: float | None, device: torch.device) -> None:
    tau, draws = 0.25, 60
    u = torch.tensor([1.0, 0.3, 0.2, 0.125, 0.05, 0.01, 1e-30, 0.0], device=device).repeat(150)
    forced = torch.zeros(len(u), dtype=torch.uint8, device=device)
    forced[7] = 1
    bound = u if entropy is None else torch.where(u > 0, u * (1 - u.log() + entropy), 0.0)
    q = (bound / tau).clamp(max=1)
    q[7] = 1
    runs = [kept(u.log(), tau, seed << 31, forced=forced, mean_entropy=entropy) for seed in range(draws)]
    share = torch.stack([r[0] for r in runs]).double().reshape(draws, 150, 8)
    for j in range(7):
        p = q[8 + j].double().item()
        error = math.sqrt(p * (1 - p) / (draws * 150))
        assert abs(share[:, :, j].mean().item() - p) <= 4.5 * error, f"u = {u[j]:.3g}"
    assert (share[:, :, 0] == 1).all()
    assert (share[:, :, 6] == 0).all()
    assert (share[:, 1:, 7] == 0).all()
    assert (share[:, 0, 7] == 1).all()
    for flags, inverse in runs:
        torch.testing.assert_close(inverse[flags], 1 / q[flags], rtol=1e-5, atol=0)
    # Independent draws: the covariance of neighbours and of successive seeds is 0 within its error.
    flips = share[:, :, 5].flatten() - q[13].double()
    for shift in (1, 150):
        scale = (flips * flips).mean()
        assert abs((flips[shift:] * flips[:-shift]).mean() / scale) < 4.5 / math.sqrt(len(flips))


def test_a_draw_depends_on_seed_and_column_alone(device: torch.device) -> None:
    bounds = torch.rand(1500, device=device).log()
    whole, inverse = kept(bounds, 2.0, 5)
    again, _ = kept(bounds, 2.0, 5)
    assert torch.equal(whole, again)
    # A shard draws what the whole vocabulary draws there.
    shard, shard_inverse = kept(bounds[700:], 2.0, 5, first_column=700)
    assert torch.equal(shard, whole[700:])
    assert torch.equal(shard_inverse, inverse[700:])
    # Both halves of the seed count; bounds of two parts are joined by their maximum.
    for other in (6, 5 + 2**32, 5 + 2**63):
        assert not torch.equal(kept(bounds, 2.0, other)[0], whole)
    parts = torch.stack([bounds, bounds - 1])
    parts[:, ::2] = parts[:, ::2].flip(0)
    assert torch.equal(kept(parts, 2.0, 5)[0], whole)


@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "entropy"])
def test_sampled_is_unbiased(entropy: bool, path: str, device: torch.device) -> None:
    x = place(make(Case("", 12, 4, 120, True, 20.0, 1.0, 0.9, entropy, 4.0), torch.float32), device)
    exact = run(qf.linear_logps, x, torch.float32, grad="exact", backend="triton")
    runs = [run(qf.linear_logps, x, torch.float32, grad="sampled", tau=0.5, backend="triton") for _ in range(25)]
    for name in ("dhidden", "dweight", "dbias"):
        stack = torch.stack([r[name] for r in runs]).double()
        error = stack.var(0).sum() / len(runs)
        ratio = ((stack.mean(0) - exact[name]).square().sum() / error).item()
        # The expected ratio is 1; a bias of a quarter of one draw's error would make it 2.6.
        assert 0.2 < ratio < 2.2, f"{name}: squared error over squared standard error {ratio:.2f}"
    # The forward is not sampled; only its tiles are narrower.
    torch.testing.assert_close(runs[0]["logps"], exact["logps"], rtol=0, atol=1e-5)


def test_two_runs_are_bitwise_equal(path: str, device: torch.device) -> None:
    x = place(make(Case("", 50, 4, 150, entropy=True, spread=4.0), torch.float32), device)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(run(qf.linear_logps, x, torch.float32, sum_sq=True, grad="sampled", tau=0.9, backend="triton"))
    stats = qf.last_stats()
    assert stats is not None
    # Both draw: with a small tau a chunk keeps every column.
    assert stats.exact_chunks == 0
    assert 0 < stats.kept_share < 1
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_strided_inputs_stay_untouched(path: str, device: torch.device) -> None:
    hidden = torch.randn(4, 6, 3, device=device).transpose(0, 1)
    weight = torch.randn(5, 71, device=device).t()[:, 1:4]
    targets = torch.randint(0, 71, (4, 6), device=device).t()
    bias = torch.randn(71, 2, device=device)[:, 0]
    before = [t.clone() for t in (hidden, weight, targets, bias)]
    out = qf.linear_logps(hidden, weight, targets, bias=bias, entropy=True, backend="triton")
    wanted = reference.linear_logps(hidden.double(), weight.double(), targets, bias=bias.double(), entropy=True)
    torch.testing.assert_close(out.logps.double(), wanted.logps, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), wanted.entropy, rtol=0, atol=1e-5)
    for now, old in zip((hidden, weight, targets, bias), before, strict=True):
        assert torch.equal(now, old)


@pytest.mark.parametrize(
    ("arch", "width", "taken"),
    [
        ("cuda:90", 8, True),
        ("cuda:100", 8, True),
        ("cuda:80", 8, False),
        ("hip:gfx942", 8, False),
        ("cuda:90", 7, False),
    ],
)
def test_the_copy_engine_is_used_where_it_can_be(
    arch: str, width: int, taken: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    # CASES run both ways: width 8 through descriptors, 7 and 5, whose rows do not start at 16 bytes, without.
    pytest.importorskip("triton.tools.tensor_descriptor", reason="Triton 3.4 or newer")
    monkeypatch.setattr(linear_logps_fused, "architecture", lambda device: arch)
    x, w = torch.randn(3, width, device=device), torch.randn(40, width, device=device)
    block = linear_logps_fused.LAUNCH["interpreter"].few
    assert (linear_logps_fused._descriptors(x, w, block) is not None) == taken
    assert linear_logps_fused._descriptors(x, torch.randn(width, 40, device=device).t(), block) is None


@pytest.mark.parametrize(
    ("arch", "width", "triton", "few", "many", "float32"),
    [
        ("cuda:100", 8, True, 4, 5, 3),
        ("cuda:103", 8, True, 4, 5, 3),
        ("cuda:90", 8, True, 2, 0, 0),  # the blocks of 64 rows and four warps in half precision
        ("cuda:80", 8, True, 0, 0, 0),
        ("cuda:100", 7, True, 0, 0, 0),  # without descriptors it does not compile
        ("cuda:100", 8, False, 0, 0, 0),
    ],
)
def test_loads_get_warps_of_their_own_where_they_can(
    arch: str,
    width: int,
    triton: bool,
    few: int,
    many: int,
    float32: int,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    pytest.importorskip("triton.tools.tensor_descriptor", reason="Triton 3.4 or newer")
    fused = linear_logps_fused
    monkeypatch.setattr(fused, "architecture", lambda device: arch)
    monkeypatch.setattr(fused, "_SPECIALIZES", triton)
    for size, wanted in (("few", few), ("many", many), ("float32", float32)):
        dtype = torch.float32 if size == "float32" else torch.float16
        x, w = (torch.randn(n, width, device=device).to(dtype) for n in (3, 40))
        found = fused._candidates(size, x, w, True)
        plain = getattr(fused._CANDIDATES, size)
        assert found[: len(plain)] == plain
        assert [b.specialize for b in found[len(plain) :]] == [True] * wanted
    # Not measured yet, so no committed row has it.
    assert not any(b.specialize for sizes in fused.LAUNCH.values() for b in sizes)


def test_warps_of_their_own_change_no_number(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    # The interpreter has no warps: it runs the loop that the compiler splits. 130 columns: programs of 3 and 2 tiles.
    fused = linear_logps_fused
    hidden, weight = torch.randn(20, 8, device=device), torch.randn(130, 8, device=device)
    targets, floor = torch.randint(0, 130, (20,), device=device), torch.full((20,), -9.0, device=device)
    sizes, found = fused._sizes(device), []
    on_blackwell = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10
    for specialize in (False, True):
        if device.type == "cpu":
            monkeypatch.setattr(fused, "_specializes", lambda *_: True)
        elif not on_blackwell:
            pytest.skip("warps of their own: Blackwell alone")
        row = fused.Sizes(*(b._replace(specialize=specialize) for b in sizes))
        monkeypatch.setattr(fused, "_sizes", lambda device, row=row: row)
        stats, columns = RowStats.new(20, torch.float32, device, True, True), torch.empty(1, 130, device=device)
        vectors = pass_triton._vectors(stats)
        fused.fused_fwd(hidden, weight, None, None, targets, vectors, floor, columns, 0.7, 20.0)
        found.append([columns, *(v for v in vectors if v is not None)])
    for plain, own in zip(*found, strict=True):
        torch.testing.assert_close(plain, own, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        found[1][1] + found[1][2].log(),
        torch.logsumexp(20 * torch.tanh(0.7 / 20 * hidden.double() @ weight.double().T), 1).float(),
    )


def test_the_gradient_of_a_confident_target_keeps_its_digits(device: torch.device) -> None:
    # p = 1 - 1e-5: 1 - p in float32 would be off by 0.5%.
    z = torch.tensor([[0.0, -20.0, -30.0]], device=device)
    lse = torch.tensor([[0.0, 1e-5]], device=device)
    grad = torch.tensor([3.0], device=device)
    tile_bwd(z, None, None, lse, grad, None, None, None, torch.zeros(1, dtype=torch.int64, device=device), 1.0, None)
    assert z[0, 0].item() == pytest.approx(-3 * math.expm1(-1e-5), rel=1e-6)
    assert z[0, 1].item() == pytest.approx(-3 * math.exp(-20 - 1e-5), rel=1e-5)


def test_a_confident_row_has_no_gradient_in_half_precision(path: str, device: torch.device) -> None:
    # A logit of about 50 is rounded by up to 0.016; forward and backward must see the same rounded one. p is 1 - 1e-20.
    hidden = (torch.rand(8, 8, device=device) + 1).half().requires_grad_()
    weight = torch.randn(100, 8, device=device).half() / 10
    weight[17] = 4.3
    out = qf.linear_logps(hidden, weight, torch.full((8,), 17, device=device), grad="exact", backend="triton")
    out.logps.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-6
    assert out.logps.abs().max() < 1e-6


@pytest.mark.parametrize("size", [(3, 67), (1, 1), (9, 500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, "tensor"])
def test_logps_from_logits(size: tuple[int, int], dtype: torch.dtype, temperature: Any, device: torch.device) -> None:
    n, v = size
    logits = (torch.randn(n, v) * 3).to(dtype).to(device)
    targets = torch.randint(0, v, (n,), device=device)
    targets[n // 2 :: 7] = -100
    t = (torch.rand(n, dtype=torch.float64) + 0.5).to(device) if temperature == "tensor" else temperature
    low = t.float() if isinstance(t, torch.Tensor) and dtype != torch.float64 else t
    truth = run_logits(reference.logps_from_logits, logits.double(), targets, temperature=t)
    plain = run_logits(reference.logps_from_logits, logits, targets, temperature=low)
    ours = run_logits(qf.logps_from_logits, logits, targets, temperature=low, backend="triton")
    for name, value in ours.items():
        assert_as_good(name, value, plain[name], truth[name], dtype, 16.0, not name.startswith("d"))


def test_masked_and_strided_logits(device: torch.device) -> None:
    wide = torch.randn(4, 150, dtype=torch.float64, device=device)
    logits = wide[:, 3:143]  # rows 150 apart
    logits[:, 3:90] = -torch.inf
    logits[1, 0] = -torch.inf
    before = wide.clone()
    targets = torch.tensor([0, 2, 135, -100], device=device)
    truth = run_logits(reference.logps_from_logits, logits, targets)
    leaf = logits.detach().requires_grad_()
    out = qf.logps_from_logits(leaf, targets, entropy=True, backend="triton")
    grads = torch.linspace(-1, 2, 4, dtype=torch.float64, device=device)
    ((out.logps * grads).sum() + (out.entropy * grads.flip(0)).sum()).backward()
    for value, name in ((out.logps, "logps"), (out.entropy, "entropy"), (leaf.grad, "dlogits")):
        assert value is not None
        torch.testing.assert_close(value, truth[name], rtol=0, atol=1e-13)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_segment_sum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setenv("QEMPO_BACKEND", "segment_sum=triton")
    values = torch.randn(50).to(dtype).to(device).requires_grad_()
    cu = torch.tensor([0, 0, 1, 20, 20, 50], device=device)
    out = qf.segment_sum(values, cu)
    assert out.grad_fn is not None
    assert type(out.grad_fn).__name__ == "_SegmentSumBackward"
    wanted = torch.stack([part.sum() for part in values.detach().double().split([0, 1, 19, 0, 30])])
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    (out * torch.arange(5, device=device)).sum().backward()
    assert values.grad is not None
    assert values.grad.dtype == dtype
    assert values.grad.tolist() == [1.0] + [2.0] * 19 + [4.0] * 30
    empty = torch.zeros(0, device=device, requires_grad=True)
    qf.segment_sum(empty, cu[:1]).sum().backward()
    assert empty.grad is not None


def test_triton_takes_cpu_tensors_only_by_name_and_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _backends.choose("linear_logps", cpu, "triton") == "triton"
    assert _backends.choose("linear_logps", cpu) == "cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="triton does not run on cpu tensors"):
        _backends.choose("linear_logps", cpu, "triton")
    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="triton is not installed"):
        _backends.choose("linear_logps", cpu, "triton")


def test_launch_sizes_of_an_unlisted_architecture_are_the_nearest_older_ones() -> None:
    table = {"interpreter": 0, "cuda:80": 80, "cuda:90": 90, "cuda:100": 100, "hip:gfx942": 942}
    found = {"cuda:89": 80, "cuda:75": 80, "cuda:90": 90, "cuda:103": 100, "cuda:120": 100, "hip:gfx950": 942}
    assert {arch: _launch.row(table, arch) for arch in found} == found
    with pytest.raises(LookupError, match="xpu"):
        _launch.row(table, "xpu:12")


def test_autotune_runs_each_candidate_and_prints_the_fastest_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[int] = []
    gpu = torch.device("cuda", 0)

    def clock(run: Any) -> float:
        run()
        return float(abs(ran[-1] - 20))

    monkeypatch.setattr(_launch, "_milliseconds", clock)
    kinds = {"cuda": "cuda:90", "cpu": "interpreter"}
    monkeypatch.setattr(_launch, "architecture", lambda device: kinds[device.type])
    monkeypatch.setattr(_launch, "_FOUND", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "chip")
    arguments = ("op", "4 x 5", gpu, 10, [10, 20, 30], ran.append)
    monkeypatch.setattr(_launch, "AUTOTUNE", False)
    assert _launch.tuned(*arguments) == 10
    monkeypatch.setattr(_launch, "AUTOTUNE", True)
    assert _launch.tuned("op", "4 x 5", torch.device("cpu"), *arguments[3:]) == 10
    assert ran == []
    assert [_launch.tuned(*arguments) for _ in range(2)] == [20, 20]
    assert ran == [10, 20, 30]
    assert capsys.readouterr().err == 'op, 4 x 5: "cuda:90": 20,  # 0.0000 ms, chip\n'
