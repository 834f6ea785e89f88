"""DPP quantities at large log_quality, against arithmetic with 1200 digits, on every backend of the CPU."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from dpp_cases import LABELS, draw

from qempo_fast.dpp import dpp_gains
from qempo_fast.reference import dpp as reference


@pytest.fixture(autouse=True, params=["cpu", "reference"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMPO_BACKEND", f"dpp={request.param}")


def exact(x: torch.Tensor, q: torch.Tensor, gl: float, gg: torch.Tensor, ridge: float = 1.0) -> list[torch.Tensor]:
    """One group with 1200 digits: logdet, gains, baselines, and the gradients of gl logdet + gg . gains."""
    k, d = x.shape
    with mpmath.workdps(1200):
        rows = [[mpmath.mpf(v) for v in row] for row in x.tolist()]
        lengths = [mpmath.sqrt(sum(v * v for v in row)) for row in rows]
        unit = mpmath.matrix([[v / (n or 1) for v in row] for row, n in zip(rows, lengths, strict=True)])
        s = mpmath.diag([mpmath.exp(mpmath.mpf(v) / 2) for v in q.tolist()])
        matrix = s * unit * unit.T * s + ridge * mpmath.eye(k)
        m = matrix**-1
        gains = [-mpmath.log(m[i, i]) for i in range(k)]
        others = [[j for j in range(k) if j != i] for i in range(k)]
        baselines = [sum(-mpmath.log(m[j, j] - m[i, j] ** 2 / m[i, i]) for j in others[i]) / (k - 1) for i in range(k)]
        total = gl * m
        for i, weight in enumerate(gg.tolist()):
            total += (weight / m[i, i]) * (m[:, i] * m[:, i].T)
        grad = 2 * s * total * s * unit
        quality = [sum(grad[i, c] * unit[i, c] for c in range(d)) / 2 for i in range(k)]
        raw = [
            [(grad[i, c] - 2 * quality[i] * unit[i, c]) / (lengths[i] or 1) if lengths[i] else 0 for c in range(d)]
            for i in range(k)
        ]
        logdet = mpmath.log(mpmath.det(matrix))
        return [
            torch.tensor(float(logdet), dtype=torch.float64),
            *(torch.tensor([float(v) for v in values], dtype=torch.float64) for values in (gains, baselines)),
            torch.tensor([[float(v) for v in row] for row in raw], dtype=torch.float64),
            torch.tensor([float(v) for v in quality], dtype=torch.float64),
        ]


def with_gradients(
    x: torch.Tensor, q: torch.Tensor, gl: float, gg: torch.Tensor, **settings: float
) -> list[torch.Tensor]:
    x, q = x.clone()[None].requires_grad_(), q.clone()[None].requires_grad_()
    out = dpp_gains(x, log_quality=q, **settings)
    (gl * out.logdet.sum() + (gg.to(out.gains.dtype) * out.gains).sum()).backward()
    return [out.logdet[0].detach(), out.gains[0].detach(), out.baselines[0], x.grad[0], q.grad[0]]


DUPLICATES = draw(3, 8, seed=7)
LATTICE = torch.tensor([[1.0, 2, -1, 3, 1], [2, 0, 1, 0, -2], [0, 1, 3, -1, 1], [1, 1, 1, 1, 4]]).double()
NEAR = draw(4, 8, seed=9)
NEAR[2] = NEAR[0] + 1e-4 * draw(8, seed=10)
# Embeddings, log_quality, allowed error of logdet, gains, baselines and gradients.
EXTREMES = {
    "generic, all 1000": (draw(5, 8), [1000.0] * 5, 1e-11),
    "generic, all -1000": (draw(5, 8), [-1000.0] * 5, 1e-11),
    "generic, mixed": (draw(6, 8), [1000.0, -1000.0, 500.0, 0.0, -3.0, 30.0], 1e-11),
    "two equal rows": (draw(1, 8).expand(2, 8), [1000.0] * 2, 1e-11),
    "four equal rows": (draw(1, 8).expand(4, 8), [1000.0] * 4, 1e-11),
    "equal rows, unequal quality": (draw(1, 8).expand(3, 8), [1000.0, 500.0, -20.0], 1e-11),
    "three pairs": (torch.cat([DUPLICATES] * 2), [1000.0] * 6, 1e-11),
    "three pairs, unequal quality": (
        torch.cat([DUPLICATES] * 2),
        [1000.0, 900.0, 800.0, 200.0, 950.0, -5.0],
        1e-11,
    ),
    "three triples": (torch.cat([DUPLICATES] * 3), (300 * draw(9, seed=3)).tolist(), 1e-11),
    "more rows than width": (draw(6, 3), [1000.0] * 6, 1e-10),
    "more rows than width, mixed": (draw(6, 3), [1000.0, 900.0, -1000.0, 20.0, 40.0, 700.0], 1e-10),
    "more rows than width, 30": (draw(6, 3), [30.0] * 6, 1e-10),
    "a zero row": (draw(4, 8) * torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None].double(), [1000.0] * 4, 1e-11),
    "near duplicates, 0": (NEAR, [0.0] * 4, 1e-12),
    # Squared sine 1e-8: float64 rounding of a cosine, 1e-16, is 1e-8 of it.
    "near duplicates, 20": (NEAR, [20.0] * 4, 3e-7),
    "near duplicates, 1000": (NEAR, [1000.0] * 4, 3e-7),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_large_log_quality_against_1200_digits(name: str) -> None:
    x, quality, tolerance = EXTREMES[name]
    q = torch.tensor(quality, dtype=torch.float64)
    weights = torch.linspace(-1, 2, len(q), dtype=torch.float64)
    truth = exact(x, q, 0.7, weights)
    ours = with_gradients(x, q, 0.7, weights)
    for label, a, b in zip(LABELS, ours, truth, strict=True):
        scale = max(1.0, float(b.abs().max())) if label == "d_embeddings" else 1.0
        error = float((a - b).abs().max())
        assert error <= tolerance * scale, f"{label}: error {error:.1e}"


@pytest.mark.parametrize("name", [n for n in EXTREMES if not n.startswith("near")])
def test_large_log_quality_in_float32(name: str) -> None:
    """The answer for the float32 inputs, rounded: 1000 has an eps of 6e-5 there."""
    x, quality, _ = EXTREMES[name]
    x, q = x.float(), torch.tensor(quality)
    weights = torch.linspace(-1, 2, len(q), dtype=torch.float64)
    truth = exact(x.double(), q.double(), 0.7, weights)
    for label, a, b in zip(
        LABELS,
        with_gradients(x, q, 0.7, weights),
        truth,
        strict=True,
    ):
        assert a.dtype == torch.float32
        # 4 eps: the result is rounded once, gradients pass a float32 incoming gradient too.
        torch.testing.assert_close(
            a.double(), b, rtol=5e-7, atol=5e-7, msg=lambda text, label=label: f"{label}: {text}"
        )


def test_dependent_rows_that_are_not_duplicates() -> None:
    """x_4 = x_0 + x_1 - x_2 exactly, in integers; normalisation rounds, and the rank must not care."""
    x = torch.cat([LATTICE, (LATTICE[0] + LATTICE[1] - LATTICE[2])[None], 3 * LATTICE[3:]])
    q = torch.tensor([1000.0, 400.0, 900.0, 30.0, 950.0, 1000.0], dtype=torch.float64)
    weights = torch.linspace(-1, 2, 6, dtype=torch.float64)
    for label, a, b in zip(
        LABELS,
        with_gradients(x, q, 0.7, weights),
        exact(x, q, 0.7, weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda text, label=label: f"{label}: {text}")


def test_small_ridge_and_duplicates() -> None:
    """The amplification is s^2 / ridge: a ridge of 1e-20 asks for the same care as a log_quality of 46."""
    x, q = torch.cat([DUPLICATES] * 2), torch.zeros(6, dtype=torch.float64)
    weights = torch.linspace(-1, 2, 6, dtype=torch.float64)
    for label, a, b in zip(
        LABELS,
        with_gradients(x, q, 0.7, weights, ridge=1e-20),
        exact(x, q, 0.7, weights, ridge=1e-20),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda text, label=label: f"{label}: {text}")


def test_beyond_the_range_no_plausible_number() -> None:
    """log_quality 2000 needs e^-1000: wrong for equal rows, but visibly; independent rows do not need it."""
    x, q = draw(1, 2, 5), torch.full((1, 2), 2000.0, dtype=torch.float64)
    cosine = torch.cosine_similarity(x[:, 0], x[:, 1], dim=-1)
    expected = (2000 + torch.log(1 - cosine**2))[:, None].expand(1, 2)
    torch.testing.assert_close(dpp_gains(x, log_quality=q).gains, expected, rtol=0, atol=1e-12)
    equal = dpp_gains(x[:, :1].expand(1, 2, 5), log_quality=q)
    assert not torch.isfinite(equal.logdet).any()
    assert not torch.isfinite(equal.gains).any()


def test_both_factorisations_agree() -> None:
    """At amplification 1e4, where the reference changes from one to the other."""
    gram, _ = reference._gram(draw(4, 6, 4))
    log_s = torch.full((4, 6), 0.5 * math.log(1e4)).double() + 0.1 * draw(4, 6, seed=1)
    log_d = log_s.clamp(min=0)
    t = torch.exp(log_s - log_d)
    direct = reference._direct(gram, log_d, t, 1.0)
    root = reference._square_root(gram, log_s, log_d, t, 1.0)
    torch.testing.assert_close(direct.logdet, root.logdet, rtol=0, atol=1e-11)
    torch.testing.assert_close(direct.v @ direct.v.mT, root.v @ root.v.mT, rtol=1e-9, atol=0)
