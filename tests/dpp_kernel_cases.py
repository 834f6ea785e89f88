"""What every GPU form of the DPP op must do: checks that take its forward function and the device to run on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from dpp_cases import LABELS, draw, plain
from tolerances import assert_as_good
from torch.utils._python_dispatch import TorchDispatchMode

from qempo_fast.dpp._gpu import kept_parts
from qempo_fast.reference.dpp import DppFunction, dpp_fwd

Fwd = Callable[..., Any]


class Case(NamedTuple):
    why: str
    groups: int
    k: int
    d: int
    dtype: torch.dtype = torch.float32
    quality: float | None = 1.0
    ridge: float = 1.0
    normalize: bool = True


# Up to 4, 8 and 16 rows a warp's three sizes; a block and padding to 32 and 64 above. A warp walks 512 bytes of a row
# at a time, a block 128 columns, Triton 64.
CASES = [
    Case("k = 1; rows off the 16-byte grid; more groups than a block's four warps", 9, 1, 5),
    Case("a pair, odd width", 3, 2, 7),
    Case("k = 4 exactly; several strides of a warp, the last not full", 2, 4, 300),
    Case("no log_quality", 2, 3, 16, quality=None),
    Case("padding from 5 to 8, bfloat16 with an odd width", 2, 5, 67, torch.bfloat16),
    Case("k = 8, float16", 2, 8, 64, torch.float16),
    Case("more rows than columns: L singular", 2, 9, 4),
    Case("k = 16 exactly, bfloat16", 1, 16, 136, torch.bfloat16),
    Case("raw rows and a ridge that no float32 holds", 2, 6, 20, ridge=0.3, normalize=False),
    Case("the smallest group of a block", 2, 17, 40),
    Case("padding to 64, two chunks", 1, 33, 140),
    Case("k = 64 exactly, off the 16-byte grid", 1, 64, 33),
    Case("a block on float16", 1, 24, 130, torch.float16),
]


def gradients(
    fwd: Fwd,
    x: torch.Tensor,
    q: torch.Tensor | None,
    gl: torch.Tensor,
    gg: torch.Tensor,
    *,
    ridge: float = 1.0,
    normalize: bool = True,
    offsets: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Results of fwd and gradients of gl . logdet + gg . gains, on the CPU."""
    x = x.detach().clone().requires_grad_()
    q = None if q is None else q.detach().clone().requires_grad_()
    logdet, gains, baselines = DppFunction.apply(fwd, x, q, offsets, ridge, normalize)
    gl, gg = gl.to(logdet), gg.to(gains)
    torch.autograd.backward((logdet, gains), (gl, gg))
    results = [logdet.detach(), gains.detach(), baselines, x.grad] + ([] if q is None else [q.grad])
    return {name: value.cpu() for name, value in zip(LABELS, results, strict=False)}


def eager(
    x: torch.Tensor, q: torch.Tensor | None, gl: torch.Tensor, gg: torch.Tensor, **settings: Any
) -> dict[str, torch.Tensor]:
    """The same by plain torch in float32."""
    leaf = x.detach().clone().requires_grad_()
    q = None if q is None else q.detach().clone().requires_grad_()
    matrix = plain(leaf.float(), q, **settings)
    inverse = torch.linalg.inv(matrix)
    own = inverse.diagonal(dim1=-2, dim2=-1)
    logdet, gains = torch.logdet(matrix), -own.log()
    torch.autograd.backward((logdet, gains), (gl.float(), gg.float()))
    rest = 1 - inverse**2 / (own[..., :, None] * own[..., None, :])
    without = (gains[..., None, :] - rest.log()).masked_fill(torch.eye(x.shape[-2], dtype=torch.bool), 0.0)
    baselines = without.sum(-1) / (x.shape[-2] - 1 if x.shape[-2] > 1 else math.nan)
    results = [logdet, gains, baselines, leaf.grad] + ([] if q is None else [q.grad])
    return {name: value.detach() for name, value in zip(LABELS, results, strict=False)}


def check_case(fwd: Fwd, device: torch.device, case: Case) -> None:
    x = draw(case.groups, case.k, case.d, dtype=case.dtype)
    q = None if case.quality is None else (case.quality * draw(case.groups, case.k, seed=1)).float()
    gl, gg = draw(case.groups, seed=2).float(), draw(case.groups, case.k, seed=3).float()
    settings = {"ridge": case.ridge, "normalize": case.normalize}
    ours = gradients(fwd, x.to(device), None if q is None else q.to(device), gl, gg, **settings)
    truth = gradients(dpp_fwd, x.double(), None if q is None else q.double(), gl, gg, **settings)
    usual = eager(x, q, gl, gg, **settings)
    for name, value in ours.items():
        wide = name == "d_embeddings"
        assert value.dtype == (case.dtype if wide else torch.float32), name
        if name == "baselines" and case.k == 1:
            assert bool(value.isnan().all())
            continue
        # log_quality's gradient and the logarithms are sums of terms near 1.
        assert_as_good(name, value, usual[name], truth[name], value.dtype, unit=0.0 if wide else 1.0)


_ROWS = draw(3, 8, seed=7)
_NEAR = draw(4, 8, seed=9)
_NEAR[2] = _NEAR[0] + 1e-4 * draw(8, seed=10)
_TRIPLES = [float(v) for v in 300 * draw(9, seed=3)]
# Rows, log_quality, ridge: where rounding in float32 would decide the answer.
DEPENDENT = {
    "equal rows": (draw(1, 8).expand(4, 8), [1000.0] * 4, 1.0),
    "equal rows, unequal quality": (draw(1, 8).expand(3, 8), [1000.0, 500.0, -20.0], 1.0),
    "three pairs": (torch.cat([_ROWS] * 2), [1000.0, 900.0, 800.0, 200.0, 950.0, -5.0], 1.0),
    "three triples": (torch.cat([_ROWS] * 3), _TRIPLES, 1.0),
    "more rows than width": (draw(6, 3), [1000.0, 900.0, -1000.0, 20.0, 40.0, 700.0], 1.0),
    "a zero row": (draw(4, 8) * torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None], [1000.0, 3.0, 900.0, -2.0], 0.5),
    "near duplicates, 20": (_NEAR, [20.0] * 4, 1.0),
    "near duplicates, 1000": (_NEAR, [1000.0] * 4, 1.0),
    "duplicates, small ridge": (torch.cat([_ROWS] * 2), [0.0] * 6, 1e-20),
    "generic, far apart": (draw(6, 8), [1000.0, -1000.0, 500.0, 0.0, -3.0, 30.0], 1.0),
    "a block of pairs": (torch.cat([draw(10, 6, seed=4)] * 2), [25.0] * 20, 1.0),
}


def check_dependent(fwd: Fwd, device: torch.device, name: str) -> None:
    """As exact as float32 inputs and outputs allow, whatever the quality."""
    rows, quality, ridge = DEPENDENT[name]
    x, q = rows[None].float(), torch.tensor([quality])
    gl, gg = torch.tensor([0.7]), torch.linspace(-1, 2, len(quality))[None]
    ours = gradients(fwd, x.to(device), q.to(device), gl, gg, ridge=ridge)
    truth = gradients(dpp_fwd, x.double(), q.double(), gl, gg, ridge=ridge)
    for label, value in ours.items():
        scale = max(1.0, float(truth[label].abs().max())) if label == "d_embeddings" else 1.0
        torch.testing.assert_close(
            *(v.double() / scale for v in (value, truth[label])),
            rtol=5e-7,
            atol=5e-7,
            msg=lambda text, label=label: f"{label}: {text}",
        )


def _compare(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], tolerance: float = 5e-6) -> None:
    for label, value in ours.items():
        torch.testing.assert_close(
            value.double(),
            truth[label].double(),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, label=label: f"{label}: {text}",
        )


def check_ragged(fwd: Fwd, device: torch.device) -> None:
    """Sizes on both sides of 16, each group the same as alone."""
    sizes = [3, 1, 20, 16, 2, 17]
    bounds = [0, *itertools.accumulate(sizes)]
    x, q = draw(bounds[-1], 37, dtype=torch.float32), draw(bounds[-1], seed=1).float()
    gl, gg = draw(6, seed=2).float(), draw(bounds[-1], seed=3).float()
    for dtype in (torch.int32, torch.int64):
        offsets = torch.tensor(bounds, dtype=dtype)
        ours = gradients(fwd, x.to(device), q.to(device), gl, gg, ridge=0.7, offsets=offsets.to(device))
        truth = gradients(dpp_fwd, x.double(), q.double(), gl, gg, ridge=0.7, offsets=offsets)
        _compare(ours, truth)


def check_ragged_small(fwd: Fwd, device: torch.device) -> None:
    """No more rows than the small kernel takes: no launch of the large one."""
    x, q, offsets = draw(9, 6, dtype=torch.float32), draw(9, seed=1).float(), torch.tensor([0, 4, 9])
    gl, gg = draw(2, seed=2).float(), draw(9, seed=3).float()
    ours = gradients(fwd, x.to(device), q.to(device), gl, gg, offsets=offsets.to(device))
    _compare(ours, gradients(dpp_fwd, x.double(), q.double(), gl, gg, offsets=offsets))


# What is wrong, the offsets, and which of the rows and groups must be NaN; None: no right answer, but nothing outside.
WRONG = {
    "does not begin at 0": ([2, 5, 24], [0, 1], []),
    "ends early": ([0, 5, 20], [20, 21, 22, 23], []),
    "beyond the rows": ([0, 5, 30], list(range(5, 24)), [1]),
    "negative": ([-3, 5, 24], list(range(5)), [0]),
    "falls": ([0, 10, 5, 24], None, [1]),
    "an empty group": ([0, 5, 5, 24], [], [1]),
    "no group": ([0], list(range(24)), []),
}


def check_wrong_offsets(fwd: Fwd, device: torch.device, name: str) -> None:
    """Unchecked offsets, as on a GPU: a wrong group becomes NaN, the others stay right, nothing else is written."""
    offsets, lost, wrong = WRONG[name]
    x = draw(24, 5, dtype=torch.float32)
    groups = len(offsets) - 1
    ours = gradients(
        fwd,
        x.to(device),
        torch.zeros(24, device=device),
        torch.ones(groups),
        torch.ones(24),
        offsets=torch.tensor(offsets).to(device),
    )
    assert [g for g in range(groups) if ours["logdet"][g].isnan()] == wrong
    if lost is not None:
        for label in ("gains", "baselines", "d_log_quality"):
            assert [i for i in range(24) if ours[label][i].isnan()] == lost, label
        rows = ours["d_embeddings"].isnan()
        assert [i for i in range(24) if rows[i].all()] == lost
        assert [i for i in range(24) if rows[i].any()] == lost


def check_nan_stays_in_its_group(fwd: Fwd, device: torch.device) -> None:
    for k, bad in ((4, math.nan), (4, math.inf), (20, math.nan)):
        x, q = draw(6, k, 5, dtype=torch.float32), draw(6, k, seed=1).float()
        gl, gg = torch.ones(6), torch.ones(6, k)
        clean = gradients(fwd, x.to(device), q.to(device), gl, gg)
        x[1, 2, 3] = bad
        q[4, 0] = bad
        broken = gradients(fwd, x.to(device), q.to(device), gl, gg)
        for label, value in broken.items():
            assert bool(value[[1, 4]].isnan().all()), label
            assert torch.equal(value[[0, 2, 3, 5]], clean[label][[0, 2, 3, 5]]), label


def check_zero_rows(fwd: Fwd, device: torch.device) -> None:
    for normalize in (True, False):
        x = draw(2, 4, 5, dtype=torch.float32)
        x[0, 1] = 0
        x[1] = 0
        q = torch.tensor([[0.3, 900.0, 0.1, -5.0], [900.0, 0.0, 1.0, 2.0]])
        out = gradients(
            fwd, x.to(device), q.to(device), torch.ones(2), torch.ones(2, 4), ridge=0.5, normalize=normalize
        )
        zero = (x == 0).all(-1)
        assert (out["gains"][zero] - math.log(0.5)).abs().max() <= 1e-7
        assert out["d_embeddings"][zero].abs().max() == 0
        assert out["d_log_quality"][zero].abs().max() == 0
        truth = gradients(
            dpp_fwd, x.double(), q.double(), torch.ones(2), torch.ones(2, 4), ridge=0.5, normalize=normalize
        )
        _compare(out, truth)


def check_row_lengths(fwd: Fwd, device: torch.device) -> None:
    """Squares of these lengths leave float32."""
    x = draw(1, 4, 24, dtype=torch.float32)
    for scale in (1e-30, 1e-12, 1e15, 1e30):
        scaled = x * scale
        ours = gradients(fwd, scaled.to(device), None, torch.ones(1), torch.ones(1, 4))
        truth = gradients(dpp_fwd, scaled.double(), None, torch.ones(1), torch.ones(1, 4))
        for results in (ours, truth):
            results["d_embeddings"] = results["d_embeddings"].double() * scale
        _compare(ours, truth, 1e-6)


def check_bounds_and_duplicates(fwd: Fwd, device: torch.device) -> None:
    """Unit rows, ridge 1: gains in [log(1 + 1/k), log 2], the minimum for equal rows."""
    for k in (2, 8, 20):
        low, high = math.log(1 + 1 / k), math.log(2)
        for name, x in {
            "any": draw(4, k, 12),
            "equal": torch.ones(1, k, 12),
            "orthonormal": torch.eye(k)[None],
        }.items():
            gains = fwd(x.float().to(device), None, None, 1.0, True).gains.cpu()
            assert float(gains.min()) >= low - 1e-6, name
            assert float(gains.max()) <= high + 1e-6, name
            expected = {"equal": low, "orthonormal": high}
            if name in expected:
                torch.testing.assert_close(gains, torch.full_like(gains, expected[name]), rtol=0, atol=1e-6)


def check_no_groups(fwd: Fwd, device: torch.device) -> None:
    for shape, offsets in (((0, 3, 4), None), ((0, 4), torch.tensor([0], device=device))):
        x = torch.zeros(shape, device=device).requires_grad_()
        logdet, gains, _ = DppFunction.apply(fwd, x, None, offsets, 1.0, True)
        (logdet.sum() + gains.sum()).backward()
        assert logdet.shape == (0,)
        assert gains.shape == shape[:-1]
        assert x.grad.shape == shape


def check_inputs(fwd: Fwd, device: torch.device) -> None:
    """Non-contiguous inputs, left as they were; expanded gradients; only the gradients that were asked for."""
    x, q = draw(2, 12, 20, dtype=torch.float32).to(device)[:, ::2, 1::2], draw(6, 2, seed=1).half().to(device).T
    before = x.clone(), q.clone()
    leaf, quality = x.detach().requires_grad_(), q.detach()
    logdet, gains, _ = DppFunction.apply(fwd, leaf, quality, None, 1.0, True)
    (logdet.sum() + gains.sum()).backward()
    assert quality.grad is None
    solid = gradients(fwd, x.contiguous(), q.contiguous(), torch.ones(2), torch.ones(2, 6))
    assert torch.equal(leaf.grad.cpu(), solid["d_embeddings"])
    sparse = gradients(fwd, x, q, torch.ones(2), torch.ones(2, 6))
    for label, value in sparse.items():
        assert torch.equal(value, solid[label]), label
    assert solid["d_log_quality"].dtype == torch.float16
    assert torch.equal(x, before[0])
    assert torch.equal(q, before[1])


def check_left_to_plain_torch(fwd: Fwd, device: torch.device) -> None:
    """float64 and groups beyond 64 rows are the reference's own, bit for bit."""
    for x, offsets in (
        (draw(2, 3, 4), None),
        (draw(1, 65, 4, dtype=torch.float32), None),
    ):
        ours, truth = fwd(x.to(device), None, offsets, 1.0, True), dpp_fwd(x.to(device), None, offsets, 1.0, True)
        assert torch.equal(ours.gains, truth.gains)
        assert ours.gains.dtype == truth.gains.dtype


def check_large_ragged_groups(fwd: Fwd, device: torch.device, monkeypatch: Any) -> None:
    """Beyond 64 rows among ragged groups: plain torch where the sizes may be read, else NaN in that group alone."""
    x, offsets = draw(70, 3, dtype=torch.float32).to(device), torch.tensor([0, 66, 70], device=device)
    monkeypatch.setenv("QEMPO_CHECK", "1")
    truth = dpp_fwd(x, None, offsets, 1.0, True)
    assert torch.equal(fwd(x, None, offsets, 1.0, True).gains, truth.gains)
    monkeypatch.setattr("qempo_fast._check.readable", lambda _: False)
    unread = gradients(fwd, x, None, torch.ones(2), torch.ones(70), offsets=offsets)
    assert bool(unread["logdet"][0].isnan())
    for label in ("gains", "baselines", "d_embeddings"):
        assert bool(unread[label][:66].isnan().all()), label
    torch.testing.assert_close(unread["gains"][66:], truth.gains.cpu()[66:], rtol=0, atol=1e-6)
    assert bool(unread["d_embeddings"][66:].isfinite().all())


def check_two_runs_agree(fwd: Fwd, device: torch.device) -> None:
    x, q = draw(3, 20, 150, dtype=torch.float32).to(device), draw(3, 20, seed=1).float().to(device)
    first, second = (gradients(fwd, x, q, torch.ones(3), torch.ones(3, 20)) for _ in range(2))
    for label, value in first.items():
        assert torch.equal(value, second[label]), label


class TorchOps(TorchDispatchMode):
    """Names of the operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# Rows a group, width, scale of the log_quality, offsets: a warp's and a block's kernel, direct and careful, ragged.
_LONE = [(6, 20, 1.0, None), (6, 3, 30.0, None), (20, 9, 1.0, None), (20, 6, 30.0, None), (12, 9, 1.0, (0, 3, 24))]


def check_a_lone_gradient(fwd: Fwd, device: torch.device) -> None:
    """Of an output that no loss used no gradient comes, which is the same as zeros, without a fill for them."""
    for k, d, scale, bounds in _LONE:
        shape = (2, k) if bounds is None else (2 * k,)
        offsets = None if bounds is None else torch.tensor(bounds, device=device)
        x = draw(*shape, d, dtype=torch.float32).to(device).requires_grad_()
        q = (scale * draw(*shape, seed=1).abs()).float().to(device).requires_grad_()
        weights = [draw(2, seed=2).float().to(device), draw(*shape, seed=3).float().to(device)]
        for which in (0, 1):
            outputs = DppFunction.apply(fwd, x, q, offsets, 0.9, True)
            incoming = [w if n == which else torch.zeros_like(w) for n, w in enumerate(weights)]
            expected = torch.autograd.grad(outputs[:2], (x, q), incoming, retain_graph=True)
            with TorchOps() as ops:
                lone = torch.autograd.grad(outputs[which], (x, q), weights[which])
            assert [name for name in ops.names if any(part in name for part in ("zero", "full", "fill"))] == []
            for a, b in zip(lone, expected, strict=True):
                assert torch.equal(a, b), (k, d, which)


class _Silent(torch.autograd.Function):
    """Uses its inputs and passes nothing back."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        return sum(x.sum() for x in inputs)

    @staticmethod
    def backward(ctx: Any, _: Any) -> tuple[None, None]:
        return None, None


def check_no_gradient(fwd: Fwd, device: torch.device) -> None:
    """Where neither output has a gradient, the inputs have none, and nothing is launched."""
    x = draw(2, 3, 4, dtype=torch.float32).to(device).requires_grad_()

    def unused(*arguments: Any) -> Any:
        raise AssertionError("a backward pass without a gradient")

    def watched(*arguments: Any) -> Any:
        return fwd(*arguments)._replace(bwd=unused)

    _Silent.apply(*DppFunction.apply(watched, x, None, None, 1.0, True)[:2]).backward()
    assert x.grad is None


def check_quality_dtypes(fwd: Fwd, device: torch.device) -> None:
    """log_quality is read as it is; these values are in all dtypes."""
    x, q = draw(2, 5, 8, dtype=torch.float32).to(device), torch.arange(-5.0, 5.0).reshape(2, 5).to(device) / 4
    results = [
        gradients(fwd, x, q.to(dtype), torch.ones(2), torch.ones(2, 5))
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    ]
    for other in results[1:]:
        for label in LABELS[:4]:
            assert torch.equal(other[label], results[0][label]), label
        assert torch.equal(other["d_log_quality"], results[0]["d_log_quality"].to(other["d_log_quality"].dtype))


def check_what_is_kept(fwd: Fwd, device: torch.device) -> None:
    """One slab, apart from the results, each part on 16 bytes; ridge M_ii in it, which no float32 ridge gives."""
    for groups, k in ((3, 3), (1, 1), (2, 5)):
        for ridge in (1.0, 0.3, 1e-60, 7e200):
            x = torch.eye(k, k + 1, device=device).expand(groups, k, k + 1)
            result = fwd(x, None, None, ridge, True)
            (slab,) = result.saved
            starts = kept_parts(groups, groups * k, k)
            assert slab.dtype == torch.float64
            assert slab.numel() == starts[-1]
            assert slab.data_ptr() % 16 == 0
            assert all(start % 2 == 0 for start in starts[:-1])
            rows = slab[starts[1] : starts[1] + 3 * groups * k].view(-1, 3).cpu()
            careful = slab[starts[2] :].cpu()
            # Products of unit vectors are exact: M_ii = 1 / (1 + ridge).
            expected = torch.full((groups * k,), ridge / (1 + ridge), dtype=torch.float64)
            torch.testing.assert_close(rows[:, 1], expected, rtol=1e-15, atol=0)
            assert rows[:, 2].tolist() == [1.0] * (groups * k)
            assert careful.tolist() == [0.0] * groups
            for out in result[:3]:
                assert out.untyped_storage().nbytes() == 4 * out.numel()


def check_results_can_be_changed(fwd: Fwd, device: torch.device) -> None:
    """In place, before the backward pass, which does not read them."""
    x = draw(2, 4, 6, dtype=torch.float32).to(device)
    usual = gradients(fwd, x, None, torch.ones(2), torch.ones(2, 4))
    leaf = x.clone().requires_grad_()
    logdet, gains, baselines = DppFunction.apply(fwd, leaf, None, None, 1.0, True)
    gains -= baselines
    logdet += 1
    baselines.zero_()
    (gains.sum() + logdet.sum()).backward()
    assert torch.equal(leaf.grad.cpu(), usual["d_embeddings"])


CHECKS = [
    check_ragged,
    check_ragged_small,
    check_nan_stays_in_its_group,
    check_zero_rows,
    check_row_lengths,
    check_bounds_and_duplicates,
    check_no_groups,
    check_inputs,
    check_left_to_plain_torch,
    check_two_runs_agree,
    check_a_lone_gradient,
    check_no_gradient,
    check_quality_dtypes,
    check_what_is_kept,
    check_results_can_be_changed,
]
