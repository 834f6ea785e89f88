"""DPP log-determinants, gains, baselines and their gradients, on every backend of the CPU."""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dpp_cases import LABELS, draw, plain
from tolerances import assert_as_good

from qempo_fast import _C, _backends
from qempo_fast._operator import scalar
from qempo_fast.dpp import dpp_gains, dpp_logdet
from qempo_fast.reference import dpp as reference

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())


@pytest.fixture(autouse=True, params=["cpu", "reference"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMPO_BACKEND", f"dpp={request.param}")


def unchecked(x: torch.Tensor) -> reference.DppGains:
    """dpp_gains without its checks."""
    fwd = _backends.kernel("dpp", x.device)
    return reference.DppGains(*reference.DppFunction.apply(fwd, x, None, None, 1.0, True))


def plain_gains(x: torch.Tensor, q: torch.Tensor | None = None, **settings: float) -> torch.Tensor:
    return -torch.linalg.inv(plain(x, q, **settings)).diagonal(dim1=-2, dim2=-1).log()


def drop(matrix: torch.Tensor, i: int) -> torch.Tensor:
    keep = [j for j in range(matrix.shape[-1]) if j != i]
    return matrix[..., keep, :][..., keep]


def test_golden_dqo() -> None:
    case = GOLDEN["dqo"]
    x = torch.tensor(case["inputs"]["phi_raw"], dtype=torch.float64)[None]
    out = dpp_gains(x)
    expected = case["outputs"]
    assert out.logdet.item() == pytest.approx(expected["logdet_L_plus_I"], abs=1e-14)
    assert out.gains[0].tolist() == pytest.approx(expected["g"], abs=1e-14)
    assert torch.exp(-out.gains[0]).tolist() == pytest.approx(expected["diag_inv"], abs=1e-14)


def test_golden_gradient_of_a_gain() -> None:
    """dg_0/dL of the golden case, through normalize=False and a square root x of L: dx = 2 dL x."""
    case = GOLDEN["dqo"]["outputs"]
    gram = torch.tensor(case["L"], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram)
    x = (vectors * values.clamp(min=0).sqrt())[None].requires_grad_()
    dpp_gains(x, normalize=False).gains[0, 0].backward()
    expected = 2 * torch.tensor(case["dg0_dL"], dtype=torch.float64) @ x.detach()[0]
    torch.testing.assert_close(x.grad[0], expected, rtol=0, atol=1e-13)


def test_golden_baselines() -> None:
    case = GOLDEN["dqo_loo"]
    out = dpp_gains(torch.tensor(case["inputs"]["phi_raw"], dtype=torch.float64)[None])
    assert out.gains[0].tolist() == pytest.approx(case["outputs"]["g"], abs=1e-14)
    assert out.baselines[0].tolist() == pytest.approx(case["outputs"]["baseline"], abs=1e-14)


def test_golden_duplicates() -> None:
    case = GOLDEN["dqo_duplicates"]
    x = draw(1, 5).expand(case["inputs"]["k"], 5)[None]
    assert dpp_gains(x).gains[0].tolist() == pytest.approx(case["outputs"]["g"], abs=1e-14)


def test_golden_quality_enters_as_log_quality() -> None:
    """log det L_psi, psi = sqrt(exp(r / alpha) ref) phi, is logdet at log_quality = r / alpha + log ref."""
    case = GOLDEN["dqo_quality_identity"]["inputs"]
    reward, ref = (torch.tensor(case[name], dtype=torch.float64) for name in ("reward", "ref"))
    x = torch.tensor(case["phi"], dtype=torch.float64)[None]
    q = (reward / case["alpha"] + ref)[None]
    logdet = dpp_logdet(x, log_quality=q, ridge=1e-14, normalize=False)
    expected = GOLDEN["dqo_quality_identity"]["outputs"]["rhs"]
    assert case["alpha"] * logdet.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("k", "d", "ridge", "normalize"), [(2, 3, 1.0, True), (5, 3, 0.1, True), (6, 9, 2.0, False)])
def test_brute_force_leave_one_out(k: int, d: int, ridge: float, normalize: bool) -> None:
    x, q = draw(3, k, d), draw(3, k, seed=1)
    matrix = plain(x, q, ridge, normalize)
    out = dpp_gains(x, log_quality=q, ridge=ridge, normalize=normalize)
    torch.testing.assert_close(out.logdet, torch.logdet(matrix), rtol=0, atol=1e-12)
    for i in range(k):
        without = drop(matrix, i)
        torch.testing.assert_close(out.gains[:, i], torch.logdet(matrix) - torch.logdet(without), rtol=0, atol=1e-12)
        others = (
            [torch.logdet(without) - torch.logdet(drop(without, j)) for j in range(k - 1)]
            if k > 2
            else [torch.logdet(without)]
        )
        torch.testing.assert_close(out.baselines[:, i], torch.stack(others).mean(0), rtol=0, atol=1e-12)


# q = 0 and q near 1 take the direct factorisation, q near 15 the one by QR; d < k makes L singular; ragged
# mixes sizes.
@pytest.mark.parametrize(
    ("k", "d", "quality", "ridge", "normalize"),
    [
        (4, 6, 1.0, 1.0, True),
        (5, 3, 1.0, 0.3, True),
        (4, 3, 15.0, 1.0, True),
        (3, 5, 1.0, 1.0, False),
        (1, 4, 1.0, 1.0, True),
    ],
)
def test_gradcheck(k: int, d: int, quality: float, ridge: float, normalize: bool) -> None:
    x, q = draw(2, k, d).requires_grad_(), (quality * (1 + 0.1 * draw(2, k, seed=1))).requires_grad_()

    def both(x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return dpp_gains(x, log_quality=q, ridge=ridge, normalize=normalize)[:2]

    assert torch.autograd.gradcheck(both, (x, q), atol=1e-6)
    assert torch.autograd.gradcheck(lambda x: dpp_logdet(x, ridge=ridge, normalize=normalize), (x,), atol=1e-6)


def test_gradcheck_ragged() -> None:
    x, q, offsets = draw(9, 4).requires_grad_(), draw(9, seed=1).requires_grad_(), torch.tensor([0, 3, 4, 9])
    assert torch.autograd.gradcheck(lambda x, q: dpp_gains(x, log_quality=q, offsets=offsets)[:2], (x, q))


@pytest.mark.parametrize("which", [0, 1], ids=["logdet", "gains"])
@pytest.mark.parametrize("quality", [1.0, 15.0])
@pytest.mark.parametrize("ragged", [False, True])
def test_gradcheck_of_a_lone_output(which: int, quality: float, ragged: bool) -> None:
    """The other output's gradient is None; so is this one's for a moment, which gradcheck asks for too."""
    shape, offsets = ((6,), torch.tensor([0, 2, 6])) if ragged else ((2, 3), None)
    x, q = draw(*shape, 5).requires_grad_(), (quality * (1 + 0.1 * draw(*shape, seed=1))).requires_grad_()
    check = functools.partial(torch.autograd.gradcheck, atol=1e-6, check_undefined_grad=True)
    assert check(lambda x, q: dpp_gains(x, log_quality=q, offsets=offsets)[which], (x, q))


def test_a_lone_gradient_of_the_operator() -> None:
    """What torch.compile takes: the same as with zeros for the output that no loss used."""
    op, name = torch.ops.qempo_fast.dpp_fwd, _backends.choose("dpp", torch.device("cpu"))
    x, q = draw(2, 5, 7).requires_grad_(), draw(2, 5, seed=1).requires_grad_()
    weights = [draw(2, seed=2), draw(2, 5, seed=3)]
    for which in (0, 1):
        outputs = op(x, q, None, scalar(0.7), True, name)
        incoming = [w if n == which else torch.zeros_like(w) for n, w in enumerate(weights)]
        expected = torch.autograd.grad(outputs[:2], (x, q), incoming, retain_graph=True)
        for a, b in zip(torch.autograd.grad(outputs[which], (x, q), weights[which]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_a_second_derivative_is_refused() -> None:
    x = draw(2, 4, 6).requires_grad_()
    (grad,) = torch.autograd.grad(dpp_gains(x).gains.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_gradients_equal_autograd_through_linalg() -> None:
    x, q, weight = draw(3, 6, 8).requires_grad_(), draw(3, 6, seed=1).requires_grad_(), draw(3, 6, seed=2)
    out = dpp_gains(x, log_quality=q)
    ours = torch.autograd.grad(out.logdet.sum() + (weight * out.gains).sum(), (x, q))
    loss = torch.logdet(plain(x, q)).sum() + (weight * plain_gains(x, q)).sum()
    for name, a, b in zip(("d_embeddings", "d_log_quality"), ours, torch.autograd.grad(loss, (x, q)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("ridge", [1.0, 0.25])
def test_quality_gradient_of_logdet_is_one_minus_ridge_m(ridge: float) -> None:
    x, q = draw(2, 5, 4), draw(2, 5, seed=1).requires_grad_()
    dpp_logdet(x, log_quality=q, ridge=ridge).sum().backward()
    m = torch.linalg.inv(plain(x, q.detach(), ridge)).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(q.grad, 1 - ridge * m, rtol=0, atol=1e-14)


def test_only_requested_gradients() -> None:
    x, q = draw(2, 3, 4), draw(2, 3, seed=1)
    assert dpp_gains(x, log_quality=q).gains.grad_fn is None
    x.requires_grad_()
    out = dpp_gains(x, log_quality=q)
    out.gains.sum().backward()
    assert x.grad is not None
    assert q.grad is None
    assert not out.baselines.requires_grad


@pytest.mark.parametrize("k", [2, 3, 8])
def test_bounds_of_unit_rows(k: int) -> None:
    low, high = math.log(1 + 1 / k), math.log(2)
    cases = {
        "any": draw(50, k, k),
        "close": 1 + 1e-3 * draw(50, k, k),
        "orthonormal": torch.eye(k).double()[None],
    }
    for name, x in cases.items():
        gains = dpp_gains(x).gains
        assert float(gains.min()) >= low - 1e-14, name
        assert float(gains.max()) <= high + 1e-14, name
    torch.testing.assert_close(dpp_gains(cases["orthonormal"]).gains, torch.full((1, k), high).double())
    torch.testing.assert_close(dpp_gains(torch.ones(1, k, 3).double()).gains, torch.full((1, k), low).double())


def test_eigenvalue_bounds_of_the_paper() -> None:
    x = draw(20, 5, 7)
    values = torch.linalg.eigvalsh(plain(x))
    gains = dpp_gains(x).gains.exp()
    assert bool((gains >= values[:, :1] - 1e-12).all())
    assert bool((gains <= values[:, -1:] + 1e-12).all())


def test_invariances() -> None:
    x, q = draw(2, 6, 8), draw(2, 6, seed=1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    rotation = torch.linalg.qr(draw(8, 8, seed=2))[0]
    base = dpp_gains(x, log_quality=q)
    moved = {
        "permutation": dpp_gains(x[:, order], log_quality=q[:, order]),
        "rotation": dpp_gains(x @ rotation, log_quality=q),
        "row lengths": dpp_gains(x * draw(2, 6, 1, seed=3).exp(), log_quality=q),
    }
    for name, out in moved.items():
        torch.testing.assert_close(out.logdet, base.logdet, rtol=0, atol=1e-13, msg=name)
        at = order if name == "permutation" else torch.arange(6)
        torch.testing.assert_close(out.gains, base.gains[:, at], rtol=0, atol=1e-13, msg=name)
        torch.testing.assert_close(out.baselines, base.baselines[:, at], rtol=0, atol=1e-13, msg=name)


def test_pair_gains_are_equal() -> None:
    """k = 2, unit rows: why group-centring of the gains would remove the signal."""
    gains = dpp_gains(draw(10, 2, 5)).gains
    torch.testing.assert_close(gains[:, 0], gains[:, 1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("ridge", [1.0, 0.5])
def test_zero_rows(ridge: float) -> None:
    x = draw(1, 4, 5)
    x[0, 1] = 0
    x[0, 3] = 0
    x.requires_grad_()
    q = torch.tensor([[0.3, 900.0, 0.1, -5.0]], dtype=torch.float64).requires_grad_()
    out = dpp_gains(x, log_quality=q, ridge=ridge)
    (out.logdet.sum() + out.gains.sum()).backward()
    assert out.gains[0, [1, 3]].tolist() == pytest.approx([math.log(ridge)] * 2, abs=1e-15)
    assert x.grad[0, [1, 3]].abs().max() == 0
    assert q.grad[0, [1, 3]].abs().max() == 0
    kept = dpp_gains(x.detach()[:, [0, 2]], log_quality=q.detach()[:, [0, 2]], ridge=ridge)
    torch.testing.assert_close(out.gains[:, [0, 2]], kept.gains, rtol=0, atol=1e-14)
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("normalize", [True, False])
def test_all_zero_group(normalize: bool) -> None:
    x = torch.zeros(2, 3, 4).requires_grad_()
    out = dpp_gains(x, ridge=2.0, normalize=normalize)
    out.gains.sum().backward()
    torch.testing.assert_close(out.logdet, torch.full((2,), 3 * math.log(2.0)))
    assert x.grad.abs().max() == 0


def test_group_of_one() -> None:
    out = dpp_gains(draw(3, 1, 4), ridge=0.5)
    torch.testing.assert_close(out.gains, torch.full((3, 1), math.log(1.5)).double())
    torch.testing.assert_close(out.logdet, out.gains[:, 0])
    assert bool(out.baselines.isnan().all())


@pytest.mark.parametrize("ragged", [False, True])
def test_no_groups_keep_the_graph(ragged: bool) -> None:
    shape, offsets = ((0, 4), torch.tensor([0])) if ragged else ((0, 3, 4), None)
    x = torch.zeros(shape).requires_grad_()
    out = dpp_gains(x, offsets=offsets)
    (out.logdet.sum() + out.gains.sum()).backward()
    assert out.logdet.shape == (0,)
    assert out.gains.shape == shape[:-1]
    assert x.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ragged_equals_a_loop(dtype: torch.dtype) -> None:
    offsets = torch.tensor([0, 3, 4, 9, 12, 17], dtype=dtype)
    x, q = draw(17, 6).requires_grad_(), draw(17, seed=1).requires_grad_()
    weight = draw(17, seed=2)
    out = dpp_gains(x, log_quality=q, offsets=offsets, ridge=0.7)
    (out.logdet.sum() + (weight * out.gains).sum()).backward()
    for g, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        part = x.detach()[None, start:end].requires_grad_()
        quality = q.detach()[None, start:end].requires_grad_()
        one = dpp_gains(part, log_quality=quality, ridge=0.7)
        (one.logdet.sum() + (weight[start:end] * one.gains).sum()).backward()
        pairs = {
            "logdet": (out.logdet[g : g + 1], one.logdet),
            "gains": (out.gains[start:end], one.gains[0]),
            "baselines": (out.baselines[start:end], one.baselines[0]),
            "d_embeddings": (x.grad[start:end], part.grad[0]),
            "d_log_quality": (q.grad[start:end], quality.grad[0]),
        }
        for name, (a, b) in pairs.items():
            torch.testing.assert_close(a, b, rtol=0, atol=1e-14, equal_nan=True, msg=f"{name} of group {g}")


def test_large_group_and_several_chunks() -> None:
    """k = 80 and more elements than one float64 chunk holds."""
    x = draw(30, 80, 512)
    assert x.numel() > reference._CHUNK
    out = dpp_gains(x)
    torch.testing.assert_close(out.logdet, torch.logdet(plain(x)), rtol=0, atol=1e-10)
    torch.testing.assert_close(out.gains, plain_gains(x), rtol=0, atol=1e-12)


def test_non_contiguous_and_unmodified_inputs() -> None:
    x, q = draw(2, 12, 10)[:, ::2, 1::2], draw(6, 2, seed=1).T
    assert not x.is_contiguous()
    before = x.clone(), q.clone()
    x_leaf, q_leaf = x.detach().requires_grad_(), q.detach().requires_grad_()
    dpp_gains(x_leaf, log_quality=q_leaf).gains.sum().backward()
    y_leaf, r_leaf = x.contiguous().requires_grad_(), q.contiguous().requires_grad_()
    dpp_gains(y_leaf, log_quality=r_leaf).gains.sum().backward()
    torch.testing.assert_close(x_leaf.grad, y_leaf.grad, rtol=0, atol=1e-15)
    torch.testing.assert_close(q_leaf.grad, r_leaf.grad, rtol=0, atol=1e-15)
    assert torch.equal(x, before[0])
    assert torch.equal(q, before[1])


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_row_lengths_beyond_the_range_of_squares(scale: float) -> None:
    x = draw(2, 4, 6)
    torch.testing.assert_close(dpp_gains(x * scale).gains, dpp_gains(x).gains, rtol=0, atol=1e-14)


def test_unnormalised_rows_equal_their_log_quality() -> None:
    x, q = draw(2, 4, 6), draw(2, 4, seed=1)
    lengths = 2 * x.norm(dim=-1).log()
    a, b = dpp_gains(x, log_quality=q, normalize=False), dpp_gains(x, log_quality=q + lengths)
    torch.testing.assert_close(a.gains, b.gains, rtol=0, atol=1e-13)
    torch.testing.assert_close(a.logdet, b.logdet, rtol=0, atol=1e-13)


def test_nan_stays_in_its_group() -> None:
    """What happens where the check is left out, as on a GPU."""
    x = draw(3, 4, 5)
    expected = dpp_gains(x)
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[1, 2, 3] = bad
        broken.requires_grad_()
        out = unchecked(broken)
        (out.gains.sum() + out.logdet.sum()).backward()
        assert bool(out.logdet[1].isnan())
        assert bool(out.gains[1].isnan().all())
        assert bool(out.baselines[1].isnan().all())
        assert bool(broken.grad[1].isnan().all())
        torch.testing.assert_close(out.gains[[0, 2]], expected.gains[[0, 2]], rtol=0, atol=1e-13)
        assert bool(broken.grad[[0, 2]].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_plain_torch(dtype: torch.dtype) -> None:
    """At most twice the error of eager torch in that dtype (float32 for halves), plus two roundings."""
    x, weight = draw(16, 8, 96, dtype=dtype), draw(16, 8, seed=2)
    wide = x.double().requires_grad_()
    truth_gains = plain_gains(wide)
    truth = {"gains": truth_gains.detach(), "logdet": torch.logdet(plain(wide)).detach()}
    (truth["grad"],) = torch.autograd.grad((weight * truth_gains).sum() + torch.logdet(plain(wide)).sum(), wide)

    def run(leaf: torch.Tensor, ours: bool) -> dict[str, torch.Tensor]:
        if ours:
            out = dpp_gains(leaf)
            logdet, gains = out.logdet, out.gains
        else:
            logdet, gains = torch.logdet(plain(leaf.float())), plain_gains(leaf.float())
        (grad,) = torch.autograd.grad((weight.float() * gains).sum() + logdet.sum(), leaf)
        return {"gains": gains, "logdet": logdet, "grad": grad}

    ours, eager = (run(x.clone().requires_grad_(), flag) for flag in (True, False))
    assert ours["gains"].dtype == torch.float32
    assert ours["grad"].dtype == dtype
    for name, value in truth.items():
        unit = dtype if name == "grad" else torch.float32
        assert_as_good(name, ours[name].detach(), eager[name].detach(), value, unit, floor=2.0)


def test_runs_and_thread_counts_are_bitwise_equal() -> None:
    x = draw(40, 6, 32, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        runs = [dpp_gains(x), dpp_gains(x)]
        torch.set_num_threads(3)
        runs.append(dpp_gains(x))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_groups_of_a_batch_do_not_touch_each_other() -> None:
    """Easy groups, hard ones (large log_quality) and zero rows side by side, as in one vector of lanes."""
    x, q = draw(10, 5, 7), draw(10, 5, seed=1)
    q[[1, 4]] = 700.0
    x[4] = x[4, :1]
    x[6, 2] = 0
    together = gradients_of(x, q)
    for g in range(10):
        alone = gradients_of(x[g : g + 1], q[g : g + 1])
        for name, a, b in zip(LABELS, together, alone, strict=True):
            torch.testing.assert_close(a[g : g + 1], b, rtol=1e-12, atol=1e-12, msg=f"{name} of group {g}")


def gradients_of(x: torch.Tensor, q: torch.Tensor | None, **settings: Any) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    q = None if q is None else q.clone().requires_grad_()
    out = dpp_gains(x, log_quality=q, **settings)
    weight = torch.linspace(-1, 2, out.gains.shape[-1], dtype=out.gains.dtype)
    (out.logdet.sum() + (weight * out.gains).sum()).backward()
    return [*(o.detach() for o in out), x.grad, *([] if q is None else [q.grad])]


# Widths around the register tiles (8, 16 and 32 doubles), sizes around tiles of 4 rows, and the largest, 64.
@pytest.mark.parametrize(
    ("groups", "k", "d"), [(1, 1, 1), (9, 2, 8), (3, 3, 33), (8, 5, 31), (17, 8, 384), (2, 17, 65), (2, 64, 70)]
)
@pytest.mark.parametrize("isa", _C.isas())
def test_instruction_sets_equal_the_reference(
    isa: str, groups: int, k: int, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, q = draw(groups, k, d), draw(groups, k, seed=1)
    monkeypatch.setenv("QEMPO_BACKEND", "dpp=reference")
    expected = gradients_of(x, q, ridge=0.5)
    best = _C.isa()
    monkeypatch.setenv("QEMPO_BACKEND", "dpp=cpu")
    try:
        _C.use_isa(isa)
        ours = gradients_of(x, q, ridge=0.5)
    finally:
        _C.use_isa(best)
    for name, a, b in zip(LABELS, ours, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-12, atol=1e-12, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
