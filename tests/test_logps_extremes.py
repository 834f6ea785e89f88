"""Logits that cost digits: common offsets, mask fills, temperatures and caps far from 1, NaN. On CPU and reference.

Each row of the table below is judged by itself against float64, by what plain torch loses in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tolerances import assert_as_good

import qempo_fast as qf
from qempo_fast import reference
from qempo_fast.logps import _forward, _row_stats
from qempo_fast.logps import cpu as pass_cpu
from qempo_fast.logps import reference as pass_reference
from qempo_fast.logps._head import Draw, Tile
from qempo_fast.logps._options import Options, TileSizes, accumulator
from qempo_fast.logps._row_stats import RowStats

BACKENDS = ["cpu", "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF = math.inf
V = 333
TARGET = 250
# A mask fill, as each dtype can hold it; "least" is torch.finfo(dtype).min.
FILLS = [-1e4, -1e9, "least", -INF]
# Units of rounding that each number may be off beside twice what plain torch is.
FLOOR = 16.0


@dataclass(frozen=True)
class Row:
    """Logits of one row: small integers and a fraction, at an offset, the columns of mask at fill."""

    why: str
    offset: float = 0.0
    fill: float | str = 0.0
    mask: str = "none"
    temperature: float = 1.0
    spread: float = 4.0
    lead: float = 0.0  # of the target over all others

    @property
    def size(self) -> float:
        """Of z - max: a softmax entry's relative error is that many units of rounding."""
        return max(1.0, min((2 * self.spread + abs(self.lead)) / self.temperature, 200.0))


MASKS = {
    "none": lambda c: c < 0,
    "the first tiles": lambda c: c < 200,
    "all but the target": lambda c: c != TARGET,
    "the target": lambda c: c == TARGET,
    "the target and the last tiles": lambda c: c >= TARGET,
    "all": lambda c: c >= 0,
}
ROWS = [
    Row("plain"),
    *(Row(f"offset {x:g}", x) for x in (2.0**12, 2.0**22, -(2.0**22), 2.0**40)),
    *(Row(f"{f} at {m}", 0.0, f, m) for f in FILLS for m in MASKS if m != "none" and (f, m) != (-INF, "all")),
    *(Row(f"temperature {t:g}", 0.0, 0.0, "none", t) for t in (1e-6, 1e-2, 1e2, 1e6)),
    Row("temperature and offset", 2.0**14, 0.0, "none", 1e-2),
    Row("temperature and fill", 0.0, -1e9, "the first tiles", 0.5),
    Row("equal logits", spread=0.0),
    Row("equal logits at an offset", 2.0**22, spread=0.0),
    Row("confident", lead=12.0),
    Row("sure", lead=200.0),
    Row("hopeless", lead=-200.0),
]


def filled(fill: float | str, dtype: torch.dtype) -> float:
    least = torch.finfo(dtype).min
    return least if fill == "least" else fill if fill == -INF else max(float(fill), least)


def logits_of(row: Row, dtype: torch.dtype) -> torch.Tensor:
    """(V,) in dtype."""
    x = torch.randint(-8, 9, (V,)).double() * row.spread / 8
    x[TARGET] += row.lead
    x += max(-1.0, min(1.0, row.offset / 2**15)) * 2**14 if dtype == torch.float16 else row.offset
    return x.masked_fill(MASKS[row.mask](torch.arange(V)), filled(row.fill, dtype)).to(dtype)


@dataclass(frozen=True)
class Head:
    """What all rows of a call share: a bias of this value where mask says, 0 elsewhere; cap and scale."""

    why: str
    bias: float | str | None = None
    mask: str = "none"
    softcap: float | None = None
    scale: float = 1.0


HEADS = [
    Head("plain"),
    *(Head(f"bias {f} at the first tiles", f, "the first tiles") for f in FILLS),
    *(Head(f"bias {f} at all but the target", f, "all but the target") for f in ("least", -INF)),
    *(Head(f"bias {f} at the target", f, "the target") for f in (-1e9, -INF)),
    *(Head(f"bias {x:g} everywhere", x, "all") for x in (2.0**12, -1e9)),
    *(Head(f"cap {c:g}", softcap=c) for c in (1e-3, 1e6)),
    Head("cap and bias", -1e9, "the first tiles", 30.0, 0.25),
]

Results = dict[str, torch.Tensor]


def linear(head: Head, rows: list[Row], dtype: torch.dtype, kind: torch.dtype, function: Any, **more: Any) -> Results:
    """function at these rows as dtype holds them, computed in kind. hidden is the identity: no GEMM rounds."""
    torch.manual_seed(1)
    table = torch.stack([logits_of(r, dtype) for r in rows])
    bias = None
    if head.bias is not None:
        fill = filled(head.bias, dtype) if not isinstance(head.bias, float) or head.bias < 0 else head.bias
        bias = (
            torch.zeros(V)
            .double()
            .masked_fill(MASKS[head.mask](torch.arange(V)), fill)
            .to(dtype)
            .to(kind)
            .requires_grad_()
        )
    hidden = torch.eye(len(rows), dtype=kind).requires_grad_()
    weight = table.t().contiguous().to(kind).requires_grad_()
    out = function(
        *(hidden, weight, torch.full((len(rows),), TARGET)),
        **{"bias": bias, "temperature": temperatures(rows, kind), "logit_scale": head.scale, "softcap": head.softcap},
        **{"entropy": True, "sum_sq": True},
        **more,
    )
    torch.autograd.backward(out[:2], coefficients(len(rows), out[0].dtype))
    assert weight.grad is not None
    # Entry (j, i) of dweight is that of logit j of row i.
    return dict(zip(("logps", "entropy", "sum_sq"), (x.detach() for x in out), strict=True)) | {
        "dweight": weight.grad.t()
    }


def from_logits(rows: list[Row], dtype: torch.dtype, kind: torch.dtype, function: Any, **more: Any) -> Results:
    torch.manual_seed(1)
    table = torch.stack([logits_of(r, dtype) for r in rows]).to(kind).requires_grad_()
    targets = torch.full((len(rows),), TARGET)
    out = function(table, targets, temperature=temperatures(rows, kind), entropy=True, **more)
    torch.autograd.backward(out[:2], coefficients(len(rows), out[0].dtype))
    assert table.grad is not None
    return {"logps": out[0].detach(), "entropy": out[1].detach(), "dlogits": table.grad}


def temperatures(rows: list[Row], kind: torch.dtype) -> torch.Tensor:
    return torch.tensor([r.temperature for r in rows], dtype=torch.float32).to(accumulator(kind))


def coefficients(n: int, dtype: torch.dtype, device: Any = "cpu") -> list[torch.Tensor]:
    return [torch.linspace(*ends, n, dtype=dtype, device=device) for ends in ((0.5, 1.5), (1.5, -0.5))]


def judge(
    rows: list[Row], dtype: torch.dtype, ours: Results, plain: Results, truth: Results, offset: float = 0.0
) -> list[str]:
    """What is wrong: NaN and infinities elsewhere than in truth, and rows whose error is out of bounds."""
    found = []
    for name, value in ours.items():
        # A gradient past the end of float16 is infinite in truth too.
        out, low, want = (
            x.to(value.dtype if name.startswith("d") else x.dtype).double().reshape(len(rows), -1)
            for x in (value, plain[name], truth[name])
        )
        for i, row in enumerate(rows):
            finite = want[i].isfinite()
            if not torch.equal(out[i][~finite], want[i][~finite]):
                found.append(
                    f"{name}, {row.why}: {out[i][~finite][:3].tolist()}, wanted {want[i][~finite][:3].tolist()}"
                )
            if not finite.any():
                continue
            error, loss = ((x[i] - want[i])[finite].abs().max().item() for x in (out, low))
            # Logarithms round like numbers near 1 when they are near 0, and 1 - p and 1 - tanh^2 are differences to 1.
            unit = max(want[i][finite].abs().max().item(), 0.0 if name.startswith("d") else 1.0)
            # In float64 plain torch is the truth, and shows nothing of the rounding of z.
            z = (abs(row.offset) + abs(offset)) / row.temperature if dtype == torch.float64 else 0.0
            unit = FLOOR * max(row.size, z) * unit + (8 / row.temperature if name.startswith("d") else 0.0)
            allowed = 2 * (loss if math.isfinite(loss) else 0.0) + torch.finfo(dtype).eps * unit
            if not error <= allowed:
                found.append(f"{name}, {row.why}: error {error:.3g}, allowed {allowed:.3g}")
    return found


def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 columns, and a sampled gradient that drops columns whatever their number."""
    for module in (pass_cpu.CpuPass, pass_reference.TorchPass):
        monkeypatch.setattr(module, "sizes", lambda self, *_: TileSizes(32, 64))
    always_sampled(monkeypatch)


def always_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = _forward.kept_of

    def some(index: torch.Tensor, inverse: torch.Tensor, expected: float, most: float) -> Any:
        return kept(index, inverse, expected, most if math.isinf(expected) else INF)

    monkeypatch.setattr(_forward, "kept_of", some)


MODES: dict[str, dict[str, Any]] = {"exact": {"grad": "exact"}, "sampled": {"grad": "sampled", "tau": 1e-12}}


def compared(head: Head, dtype: torch.dtype, backend: str, mode: str) -> list[str]:
    # 0 * -inf is NaN in the GEMM: -inf comes by the bias. So is 0 times what a gradient past the end of float16 is.
    rows = [r for r in ROWS if r.fill != -INF and (dtype != torch.float16 or r.temperature > 1e-4)]
    truth = linear(head, rows, dtype, torch.float64, reference.linear_logps)
    plain = linear(head, rows, dtype, dtype, reference.linear_logps)
    ours = linear(head, rows, dtype, dtype, qf.linear_logps, backend=backend, **MODES[mode])
    offset = head.bias if head.mask == "all" and isinstance(head.bias, float) else 0.0
    return judge(rows, dtype, ours, plain, truth, offset)


@pytest.mark.parametrize("head", HEADS, ids=lambda h: h.why)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_logps(head: Head, mode: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    several_tiles(monkeypatch)
    for dtype in DTYPES if head.why == "plain" else DTYPES[1:3]:
        wrong = compared(head, dtype, backend, mode)
        assert not wrong, f"{dtype}: " + "; ".join(wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logps_from_logits(dtype: torch.dtype, backend: str) -> None:
    truth = from_logits(ROWS, dtype, torch.float64, reference.logps_from_logits)
    plain = from_logits(ROWS, dtype, dtype, reference.logps_from_logits)
    ours = from_logits(ROWS, dtype, dtype, qf.logps_from_logits, backend=backend)
    wrong = judge(ROWS, dtype, ours, plain, truth)
    assert not wrong, "; ".join(wrong)


# Columns that hold NaN or infinity: all of the first tile, or one of the first, of a middle and of the last tile.
BROKEN = {
    "first tile": range(64),
    "one, first": range(5, 6),
    "one, middle": range(170, 171),
    "one, last": range(332, V),
}


@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("columns", BROKEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_logit_breaks_its_row_and_no_other(backend: str, columns: str, value: float) -> None:
    check_broken_logits(backend, columns, value)


def check_broken_logits(backend: str, columns: str, value: float, device: Any = "cpu") -> None:
    logits = torch.randn(4, V, device=device)
    logits[2, list(BROKEN[columns])] = value
    logits[2, 64:128] = -INF
    logits.requires_grad_()
    out = qf.logps_from_logits(logits, torch.full((4,), 7, device=device), entropy=True, backend=backend)
    torch.autograd.backward(out[:2], coefficients(4, torch.float32, device))
    assert logits.grad is not None
    for name, x in (("logps", out.logps), ("entropy", out.entropy), ("gradient", logits.grad)):
        assert x is not None
        assert x[2].isnan().all(), name
        assert x[[0, 1, 3]].isfinite().all(), name


@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "entropy"])
@pytest.mark.parametrize("mode", ["exact", "sampled"])
@pytest.mark.parametrize("columns", [*BROKEN, "hidden"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_head_breaks_all_that_it_reaches(
    backend: str, columns: str, mode: str, entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    several_tiles(monkeypatch)
    check_broken_head(backend, columns, mode, entropy)


def check_broken_head(backend: str, columns: str, mode: str, entropy: bool, device: Any = "cpu") -> None:
    """A NaN in hidden breaks a row; one in the bias breaks a column, which every row has."""
    hidden, weight = torch.randn(4, 6, device=device) * 3, torch.randn(V, 6, device=device)
    bias = torch.zeros(V, device=device)
    if columns == "hidden":
        hidden[2, 3] = math.nan
    else:
        bias[list(BROKEN[columns])] = math.nan
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    # A tau that drops nearly all columns: what is dropped would be 0, not NaN.
    how: dict[str, Any] = {"grad": "exact"} if mode == "exact" else {"grad": "sampled", "tau": 1.0}
    targets = torch.full((4,), 200, device=device)
    out = qf.linear_logps(hidden, weight, targets, bias=bias, entropy=entropy, sum_sq=True, backend=backend, **how)
    outputs = [x for x in out[:2] if x is not None]
    torch.autograd.backward(outputs, coefficients(4, torch.float32, device)[: len(outputs)])
    broken = torch.tensor([columns != "hidden" or i == 2 for i in range(4)], device=device)
    for name, x in (("logps", out.logps), ("entropy", out.entropy), ("sum_sq", out.sum_sq), ("dhidden", hidden.grad)):
        if x is not None:
            assert torch.equal(x.isnan().view(4, -1).all(1), broken), name
            assert torch.equal(x.isnan().view(4, -1).any(1), broken), name
    for leaf in leaves[1:]:
        assert leaf.grad is not None
        assert leaf.grad.isnan().all()


def test_a_broken_bound_keeps_every_column_whichever_thread_had_it() -> None:
    for copy in range(3):
        columns = torch.full((3, 50), -40.0)
        columns[copy, 9] = math.nan
        for mean_entropy in (None, torch.tensor(1.0)):
            forced = torch.zeros(1, 50, dtype=torch.uint8)
            kept, inverse, expected = pass_cpu.CpuPass().select(
                Draw(columns, forced, 0.1, mean_entropy, 0, range(1), 0)
            )
            assert (kept.tolist(), inverse.tolist(), expected) == ([9], [1.0], INF)


SHARDS = [(0, 64), (64, 65), (65, 200), (200, V)]


@pytest.mark.parametrize("row", [r for r in ROWS if r.temperature == 1], ids=lambda r: r.why)
def test_shards_merge_to_the_whole(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    z = logits_of(row, torch.float32)[None]
    merged = merge(z, monkeypatch)
    wanted = reference.linear_logps(
        torch.ones(1, 1).double(), z.double().t(), torch.tensor([TARGET]), entropy=True, sum_sq=True
    )
    found = (merged.logps(merged.lse()), merged.entropy(), merged.log_sum_sq())
    for name, x, true in zip(("logps", "entropy", "sum_sq"), found, wanted, strict=True):
        assert x is not None
        assert true is not None
        if not (name == "logps" and torch.equal(x.double(), true)):
            limit = FLOOR * row.size * torch.finfo(torch.float32).eps * max(1.0, abs(true.item()))
            assert abs(x.item() - true.item()) <= limit, f"{name}: {x.item()}, wanted {true.item()}"


@pytest.mark.parametrize("columns", BROKEN)
@pytest.mark.parametrize("rest", [0.0, -INF])
def test_a_broken_shard_breaks_the_whole(columns: str, rest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.full((1, V), rest)
    z[:, list(BROKEN[columns])] = math.nan
    merged = merge(z, monkeypatch)
    for x in (merged.logps(merged.lse()), merged.entropy(), merged.log_sum_sq()):
        assert x is not None
        assert x.isnan().all()


def merge(z: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> RowStats:
    """What RowStats.merged makes of the statistics that each shard's rank has, by the C++ pass."""
    options, shards = Options(1.0, None, True, True, None, 0, None), []
    for a, b in SHARDS:
        stats = RowStats.new(len(z), z.dtype, z.device, True, True)
        targets = torch.full((len(z),), TARGET - a)
        tile = Tile(z[:, a:b].contiguous(), None, None, targets)
        pass_cpu.CpuPass().forward(tile, stats, None, None, 0, options)
        shards.append(stats)
    stacked = [torch.stack([x for x in s._parts() if x is not None]) for s in shards]
    monkeypatch.setattr(_row_stats.dist, "get_world_size", lambda group: len(shards))

    def all_gather(parts: list[torch.Tensor], mine: torch.Tensor, group: Any) -> None:
        for part, given in zip(parts, stacked, strict=True):
            part.copy_(given)

    monkeypatch.setattr(_row_stats.dist, "all_gather", all_gather)
    return shards[0].merged(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", [10.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_of_large_norm(norm: float, dtype: torch.dtype, backend: str) -> None:
    hidden = torch.nn.functional.normalize(torch.randn(64, 32, dtype=torch.float64), dim=1) * norm
    weight = torch.randn(500, 32, dtype=torch.float64) / 4
    targets = (hidden @ weight.t()).argmax(1).where(torch.arange(64) % 2 == 0, torch.randint(0, 500, (64,)))

    def run(function: Any, kind: torch.dtype, **more: Any) -> Results:
        h, w = (x.to(dtype).to(kind, copy=True).requires_grad_() for x in (hidden, weight))
        out = function(h, w, targets, entropy=True, sum_sq=True, **more)
        torch.autograd.backward(out[:2], coefficients(64, out[0].dtype))
        assert h.grad is not None
        assert w.grad is not None
        named = zip(("logps", "entropy", "sum_sq"), (x.detach() for x in out), strict=True)
        return dict(named) | {"dhidden": h.grad, "dweight": w.grad}

    truth, plain = run(reference.linear_logps, torch.float64), run(reference.linear_logps, dtype)
    for name, x in run(qf.linear_logps, dtype, grad="exact", backend=backend).items():
        assert_as_good(name, x, plain[name], truth[name], dtype, FLOOR, float(not name.startswith("d")))


@pytest.mark.parametrize("spread", [1e-3, 1.0, 5.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_vocabulary(spread: float, backend: str) -> None:
    logits, targets = torch.randn(2, 131072) * spread, torch.tensor([0, 131071])
    truth = reference.logps_from_logits(logits.double(), targets, entropy=True)
    plain = reference.logps_from_logits(logits, targets, entropy=True)
    ours = qf.logps_from_logits(logits, targets, entropy=True, backend=backend)
    for name, x, low, true in zip(("logps", "entropy"), ours, plain, truth, strict=False):
        assert x is not None
        assert low is not None
        assert true is not None
        assert_as_good(name, x, low, true, torch.float32, FLOOR, 1.0)
