"""One tile of logits through the Triton kernels: statistics, bounds, gradient and draw, on the GPU or interpreted."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only")

from qempo_fast.kernels.linear_logps_grad import tile_bwd
from qempo_fast.kernels.linear_logps_select import select_columns
from qempo_fast.kernels.linear_logps_tiles import COLUMN_ROWS, tile_fwd

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF = math.inf


@dataclass(frozen=True)
class Case:
    """rows, widths of the tiles, the head and what is asked for."""

    why: str
    rows: int
    widths: tuple[int, ...]
    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False
    temperature: bool = False
    sums: bool = False
    bounds: bool = True
    gap: int = 0  # entries between a tile's rows


# The interpreter's blocks: up to 32 rows, and 32 to 256 columns by the dtype.
CASES = [
    Case("few rows, tiles of no whole block, one column", 5, (70, 33, 1)),
    Case("two parts, everything", COLUMN_ROWS + 37, (130, 77), 0.5, 20.0, True, True, True, gap=3),
    Case("a whole part and whole blocks", COLUMN_ROWS, (128, 128)),
    Case("one row, its columns split over programs", 1, (333,), sums=True),
    Case("negative scale: what fills a block up must stay out", 40, (75, 20), -0.5, None, True),
    Case("rows alone, many", 70, (333, 10), temperature=True, sums=True, bounds=False),
]


def new_stats(n: int, dtype: torch.dtype, sums: bool, device: torch.device) -> list[torch.Tensor | None]:
    def full(value: float) -> torch.Tensor:
        return torch.full((n,), value, dtype=dtype, device=device)

    return [full(-INF), full(0.0), full(0.0) if sums else None, full(0.0) if sums else None, full(-INF)]


def head_of(case: Case, raw: torch.Tensor, bias: torch.Tensor | None, inv_t: torch.Tensor | None) -> torch.Tensor:
    z = raw.double()
    z = (z if bias is None else z + bias.double()) * case.scale
    z = z if case.softcap is None else case.softcap * torch.tanh(z / case.softcap)
    return z if inv_t is None else z * inv_t.double().unsqueeze(1)


def tiles_of(case: Case, raw: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    found, v = [], 0
    for width in case.widths:
        wide = torch.full((case.rows, width + case.gap), torch.nan, device=raw.device).to(raw.dtype)
        wide[:, :width] = raw[:, v : v + width]
        found.append((v, wide[:, :width]))
        v += width
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_bounds_against_float64(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    n, vocabulary = case.rows, sum(case.widths)
    raw = (torch.randn(n, vocabulary, device=device) * 3).to(dtype)
    bias = torch.randn(vocabulary, dtype=acc, device=device) if case.bias else None
    inv_t = torch.rand(n, dtype=acc, device=device) + 0.5 if case.temperature else None
    targets = torch.randint(0, vocabulary, (n,), device=device)
    if n > 1:
        targets[0], targets[1] = -100, vocabulary  # in other shards
    z = head_of(case, raw, bias, inv_t)
    elsewhere = (targets < 0) | (targets >= vocabulary)
    target_z = z.gather(1, targets.clamp(0, vocabulary - 1)[:, None])[:, 0].masked_fill(elsewhere, -INF)
    floor = target_z.to(acc)
    stats = new_stats(n, acc, case.sums, device)
    parts = -(-n // COLUMN_ROWS)
    columns = torch.full((parts, vocabulary), torch.nan, dtype=acc, device=device) if case.bounds else None
    for v, tile in tiles_of(case, raw):
        before = tile.clone()
        part = None if bias is None else bias[v : v + tile.shape[1]]
        tile_fwd(tile, part, inv_t, targets, stats, floor, columns, v, case.scale, case.softcap)
        assert torch.equal(tile, before)
    top, total, sum_z, sum_sq, found = stats
    assert top is not None
    assert total is not None
    tight = {"rtol": 0, "atol": 1e-13 if acc == torch.float64 else 1e-5}
    torch.testing.assert_close(top.double(), z.amax(1), **tight)
    torch.testing.assert_close((top + total.log()).double(), torch.logsumexp(z, 1), **tight)
    torch.testing.assert_close(found.double(), target_z, **tight)
    p = torch.softmax(z, 1)
    if sum_z is not None and sum_sq is not None:
        entropy = total.log() - sum_z / total
        torch.testing.assert_close(entropy.double(), -torch.xlogy(p, p).sum(1), **tight)
        torch.testing.assert_close((sum_sq / total**2).double(), p.square().sum(1), **tight)
    if columns is not None:
        for v, tile in tiles_of(case, raw):
            stop = v + tile.shape[1]
            # The first tile's own log-sum-exp, else that of the tiles before: not of this one.
            seen = torch.maximum(torch.logsumexp(z[:, : v or stop], 1), floor.double())
            u = z[:, v:stop] - seen[:, None]
            wanted = torch.stack([u[a : a + COLUMN_ROWS].amax(0) for a in range(0, n, COLUMN_ROWS)])
            torch.testing.assert_close(columns[:, v:stop].double(), wanted, **tight)


def test_tiles_twice_are_bitwise_equal(device: torch.device) -> None:
    n = COLUMN_ROWS + 37
    raw, targets = torch.randn(n, 500, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    floor, found = torch.full((n,), -9.0, device=device), []
    for _ in range(2):
        stats, columns = new_stats(n, torch.float32, True, device), torch.empty(2, 500, device=device)
        for v in (0, 250):
            tile_fwd(raw[:, v : v + 250], None, None, targets, stats, floor, columns, v, 1.0, None)
        found.append([columns, *stats])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_masked_or_broken_row_leaves_the_others_alone(device: torch.device) -> None:
    raw = torch.randn(6, 90, device=device)
    plain = raw.clone()
    raw[1] = -INF
    raw[2, :80] = -INF  # all of its first tile
    raw[3, 40] = torch.nan
    targets = torch.full((6,), 85, dtype=torch.int64, device=device)
    found = []
    for logits in (raw, plain):
        stats = new_stats(6, torch.float32, True, device)
        for v, stop in ((0, 80), (80, 90)):
            tile_fwd(logits[:, v:stop], None, None, targets, stats, None, None, v, 1.0, None)
        found.append(torch.stack([s for s in stats if s is not None]))
    assert torch.equal(found[0][:, [0, 4, 5]], found[1][:, [0, 4, 5]])
    assert (found[0][0, 1], found[0][1, 1]) == (-INF, 0)
    lse = found[0][0] + found[0][1].log()
    torch.testing.assert_close(lse[2], torch.logsumexp(raw[2, 80:], 0))
    assert lse[3].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_the_cap_of_half_precision_keeps_its_digits(dtype: torch.dtype, cap: float, device: torch.device) -> None:
    # Each finite value of the dtype, as the target's logit of its own row.
    raw = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)
    raw = raw[raw.isfinite()][:: 1 if device.type == "cuda" else 131].unsqueeze(1)
    stats = new_stats(len(raw), torch.float32, False, device)
    targets = torch.zeros(len(raw), dtype=torch.int64, device=device)
    tile_fwd(raw, None, None, targets, stats, None, None, 0, 1.0, cap)
    assert stats[4] is not None
    error = (stats[4].double() - cap * torch.tanh(raw[:, 0].double() / cap)).abs().max().item()
    # A GPU's exp2 and reciprocal have an error of their own.
    assert error <= (5e-7 if device.type == "cuda" else 2.5e-7) * cap


def two_parts(x: torch.Tensor) -> torch.Tensor:
    """(N, 2) maximum of each row, and what the log-sum-exp has above it."""
    top = x.amax(1)
    return torch.stack([top, torch.logsumexp(x, 1) - top], 1)


def gradient(
    z: torch.Tensor,
    bias: torch.Tensor | None,
    inv_t: torch.Tensor | None,
    g: torch.Tensor,
    gh: torch.Tensor | None,
    inverse: torch.Tensor | None,
    target: torch.Tensor,
    case: Case,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The formula in float64, and lse in two parts and entropy."""
    x = z.double() if bias is None else z.double() + bias.double()
    x = x * case.scale
    slope = torch.full_like(x, case.scale)
    if case.softcap is not None:
        x = case.softcap * torch.tanh(x / case.softcap)
        slope = slope * (1 - (x / case.softcap).square())
    if inv_t is not None:
        x, slope = x * inv_t.double()[:, None], slope * inv_t.double()[:, None]
    lse = two_parts(x)
    lp = torch.log_softmax(x, 1)
    p = lp.exp()
    h = -(p * lp).sum(1)
    d = -g.double()[:, None] * p
    if gh is not None:
        d = d - gh.double()[:, None] * p * (lp + h[:, None])
    d = d if inverse is None else d * inverse.double()
    hit = torch.arange(z.shape[1], device=z.device) == target[:, None]
    exact = g.double()[:, None] * (1 - p)
    exact = exact if gh is None else exact - gh.double()[:, None] * p * (lp + h[:, None])
    return torch.where(hit, exact, d) * slope, lse, h


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "everything"])
def test_gradient_in_place_and_elsewhere(full: bool, dtype: torch.dtype, device: torch.device) -> None:
    case = Case("", 21, (150,), 0.5, 9.0) if full else Case("", 21, (150,))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    wide = (torch.randn(21, 155, device=device) * 3).to(dtype)
    z = wide[:, 2:152]
    bias, inverse = torch.randn(150, dtype=acc, device=device), torch.rand(150, dtype=acc, device=device) + 1
    inv_t, g, gh = (torch.rand(21, dtype=acc, device=device) + 0.5 for _ in range(3))
    # Some targets in other tiles, one in the last block, and whole blocks of rows and columns without any.
    target = torch.full((21,), -3, device=device)
    target[0], target[3], target[20] = 149, 0, 150
    some = (bias, inv_t, g, gh, inverse) if full else (None, None, g, None, None)
    wanted, lse, h = gradient(z, *some, target, case)
    b, t, _, e, q = some
    rest = (b, t, lse.to(acc), g, e, None if e is None else h.to(acc), q, target, case.scale, case.softcap)
    before, out = wide.clone(), torch.full((21, 160), torch.nan, device=device).to(dtype)
    tile_bwd(z, *rest, out=out[:, :150])
    assert torch.equal(wide, before)
    assert out[:, 150:].isnan().all()
    eps = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[dtype]
    torch.testing.assert_close(out[:, :150].double(), wanted, rtol=eps, atol=eps)
    tile_bwd(z, *rest)
    assert torch.equal(z, out[:, :150])
    assert torch.equal(wide[:, :2], before[:, :2])
    assert torch.equal(wide[:, 152:], before[:, 152:])


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_padding_behind_the_kept_columns_gets_zeros(biased: bool, device: torch.device) -> None:
    """As the sampled backward calls it: 77 columns kept of a tile that is 128 wide."""
    z = torch.randn(9, 128, device=device) - 200  # beside a logit of 0 the padding's exponential is e^200, infinity
    z[:, 77:] = 0
    alone = z[:, :77].clone()
    bias, inverse = torch.randn(77, device=device) if biased else None, torch.rand(77, device=device) + 1
    lse, g = two_parts(alone), torch.rand(9, device=device)
    # 80 and 127 are columns of another tile, where this one has padding.
    target = torch.tensor([3, 76, 77, 80, 127, 128, -1, 5, 0], device=device)
    tile_bwd(z, bias, None, lse, g, None, None, inverse, target, 1.0, None)
    tile_bwd(alone, bias, None, lse, g, None, None, inverse, target, 1.0, None)
    assert torch.equal(z[:, :77], alone)
    assert (z[:, 77:] == 0).all()
    assert alone[0, 3] > 0
    assert (alone[3] < 0).all()


@pytest.mark.parametrize("inside", [False, True], ids=["no target", "target"])
def test_rows_that_do_not_count_get_zeros(inside: bool, device: torch.device) -> None:
    z = torch.randn(9, 140, device=device)
    plain = z.clone()
    z[2], z[5, 7] = torch.nan, INF
    live = torch.ones(9, dtype=torch.bool, device=device)
    live[2] = live[5] = False
    lse, g = two_parts(plain), torch.rand(9, device=device)
    lse[2] = torch.nan
    target = torch.full((9,), 70 if inside else -1, device=device)
    tile_bwd(z, None, None, lse, g, None, None, None, target, 1.0, None, live=live)
    tile_bwd(plain, None, None, lse, g, None, None, None, target, 1.0, None)
    assert torch.equal(z[live], plain[live])
    assert (z[~live] == 0).all()


def test_all_chunks_at_once_are_each_alone(device: torch.device) -> None:
    bounds = torch.rand(3, 2, 2500, device=device).log()
    bounds[2, 1] = -INF  # a last chunk of one part
    forced = torch.zeros(3, 2501, dtype=torch.uint8, device=device)[:, :2500]
    forced[1, 7] = forced[2, 2499] = 1
    entropy = torch.tensor([0.0, 1.0, 2.0], device=device)
    spread = torch.empty(2, 3, 2600, device=device).transpose(0, 1)[:, :, 50:2550]
    spread.copy_(bounds)
    rows = range(64, 64 + 3 * 256, 256)
    index, inverse, counts = select_columns(spread, forced, 2.0, entropy, 5, rows, 0)
    named = select_columns(bounds, forced, 2.0, entropy, 5, torch.tensor(list(rows), device=device), 0)
    for chunk, row in enumerate(rows):
        part = slice(chunk, chunk + 1)
        alone = select_columns(bounds[part], forced[part], 2.0, entropy[part], 5, range(row, row + 1), 0)
        n = int(counts[chunk, 0])
        for other, at in ((alone, 0), (named, chunk)):
            assert torch.equal(counts[chunk], other[2][at])
            assert torch.equal(index[chunk, :n], other[0][at, :n])
            assert torch.equal(inverse[chunk, :n], other[1][at, :n])
        assert 0 < n < 2500
    assert 7 in index[1, : int(counts[1, 0])]
    assert 2499 in index[2, : int(counts[2, 0])]
    assert inverse[2, int(counts[2, 0]) - 1] == 1
    # The first row is in the draw: chunks of like bounds draw apart.
    same = bounds[:1].expand(3, 2, 2500)
    index, _, counts = select_columns(same, forced[:1].expand(3, 2500), 2.0, None, 5, rows, 0)
    kept = [set(index[i, : int(counts[i, 0])].tolist()) for i in range(3)]
    u = bounds[0].amax(0).exp().double() / 2
    overlap = (u * u).sum().item()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(len(kept[a] & kept[b]) - overlap) <= 4.5 * math.sqrt(overlap)


def test_a_transposed_weight_is_addressed_in_64_bits() -> None:
    """The fused kernel's pointers: d * stride passes 2^31 for a transposed weight of 16384 x 131072."""
    code = """
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton._C.libtriton import ir
from qempo_fast.kernels import linear_logps_fused as fused
signature = fused.COMPILE[0]
constants = {k: v for k, v in signature.constexprs.items() if k != "stride_wd"}
types = {**signature.types, "stride_wd": "i32"}
types = {n: "constexpr" if n in constants else types[n] for n in signature.kernel.arg_names}
source = ASTSource(signature.kernel, types, constants, {})
backend = make_backend(GPUTarget("cuda", 90, 32))
options = backend.parse_options({})
context = ir.context()
ir.load_dialects(context)
backend.load_dialects(context)
try:
    names = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(GPUTarget("cuda", 90, 32), options, *names, context)
except TypeError:  # before Triton 3.5
    module = source.make_ir(options, *names, context)
print(module)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # The stride goes into no product before it is widened.
    assert set(re.findall(r"= (\S+) %stride_wd\b", done.stdout)) == {"arith.extsi"}
