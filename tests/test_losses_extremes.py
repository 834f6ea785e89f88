"""Losses at mask fills, infinities, common offsets, long inputs and odd settings: every backend against float64.

The truth is the reference in float64 at the same numbers; entry by entry, an error of twice that of plain torch in the
same dtype and 16 units of rounding of the entry is allowed. LIMITS has what the reference itself has to give there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_losses_cpu import Call, draw, offsets

import qempo_fast as qf
from qempo_fast import _backends

# Triton's interpreter computes both sides of a `where`, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
D, INF, NAN = torch.float64, math.inf, math.nan
UNITS = 16.0


def fills(dtype: torch.dtype, infinite: bool = True) -> list[float]:
    """What masked log-probs are filled with."""
    return [-1e4, -1e8, -1e9, torch.finfo(dtype).min, *([-INF] if infinite else [])]


def filled(width: int, dtype: torch.dtype, infinite: bool = True, scale: float = 0.7) -> list[torch.Tensor]:
    """width columns of log-probs; each fill stands once in each, in a row of its own."""
    values = fills(dtype, infinite)
    columns = [draw(len(values) * width, scale=scale, shift=-1.5, seed=i) for i in range(width)]
    for row in range(len(values) * width):
        columns[row % width][row] = values[row // width]
    return columns


def pairs(alpha: float = 0.3, beta: float = 0.1, **settings: Any) -> Callable[[torch.dtype], Call]:
    def make(dtype: torch.dtype) -> Call:
        settings_ = {"alpha": alpha, "beta": beta, "reduction": "none", **settings}
        return Call("pair_loss", tuple(filled(4, dtype)), settings_)

    return make


def epa(dtype: torch.dtype) -> Call:
    one, a, b, c, fone, fa, fb, fc = filled(8, dtype)
    # And rows where every negative, or the reference's log-prob of every negative, is filled.
    for i, fill in enumerate(fills(dtype)):
        a[8 * i], b[8 * i], c[8 * i], one[8 * i] = fill, fill, fill, -2.0
    args = (one, torch.stack([a, b], 1), c[:, None], fone, torch.stack([fa, fb], 1), fc[:, None])
    return Call("epa_loss", args, {"beta": 0.7, "reduction": "none"})


def poft(dtype: torch.dtype) -> Call:
    logps, (first, second) = filled(1, dtype)[0], filled(2, dtype, infinite=False)
    n = logps.shape[0] + first.shape[0]
    aligned = torch.stack([torch.cat([draw(logps.shape[0], seed=3), x]) for x in (first, second)], 1)
    logps = torch.cat([logps, draw(first.shape[0], seed=4)])
    return Call("poft_loss", (logps, torch.arange(1.0, n + 1, dtype=D), aligned), {"reduction": "none"})


def tokens(
    width: int, advantages: tuple[float, ...], infinite: bool = True, **settings: Any
) -> Callable[[torch.dtype], Call]:
    """Sequences of two tokens, one of which has a fill in one of the first `width` of policy, old and reference."""

    def make(dtype: torch.dtype) -> Call:
        columns = filled(width, dtype, infinite)
        columns += [draw(columns[0].shape[0], shift=-1.5, seed=9) for _ in range(3 - width)]
        columns = [torch.stack([x, draw(x.shape[0], shift=-1.5, seed=20 + i)], 1) for i, x in enumerate(columns)]
        rows = columns[0].shape[0]
        logps, old, ref = (x.repeat_interleave(len(advantages), 0).flatten() for x in columns)
        a = torch.tensor(advantages, dtype=D).repeat(rows)
        extra = {"ref_token_logps": ref} if settings.get("kl") else {}
        return Call("token_loss", (logps, old, a, 2 * torch.arange(len(a) + 1)), {**extra, **settings})

    return make


def groups(op: str, **settings: Any) -> Callable[[torch.dtype], Call]:
    """Groups of four, the first of which has a fill, the policy's or the reference's."""

    def make(dtype: torch.dtype) -> Call:
        columns = []
        for i, x in enumerate(filled(2, dtype, infinite=False, scale=0.3)):
            columns.append(torch.cat([x[:, None], draw(x.shape[0], 3, shift=-1, seed=5 + i)], 1).flatten())
        rewards = draw(columns[0].shape[0], seed=8)
        return Call(op, (*columns, rewards), {"alpha": 0.3, "beta": 0.1, "group_size": 4, **settings}, cancels=True)

    return make


def shifted(op: str, offset: float, of: str, **settings: Any) -> Callable[[torch.dtype], Call]:
    """One offset for all log-probs, or for all rewards, beside differences of order 1 that float32 holds."""

    def make(_: torch.dtype) -> Call:
        logps, ref, rewards = (draw(64, scale=4, seed=i).round() for i in range(3))
        if of == "logps":
            logps, ref = logps - offset, ref - offset
        else:
            rewards = rewards + offset
        settings_ = {"group_size": 8, **settings}
        if op == "rspo_loss":
            return Call(op, (logps, rewards), {"k": 3, **settings_}, cancels=True)
        return Call(op, (logps, ref, rewards), {"alpha": 0.25, "beta": 0.125, **settings_}, cancels=True)

    return make


def risk(k: int) -> Callable[[torch.dtype], Call]:
    def make(dtype: torch.dtype) -> Call:
        logps = torch.cat([filled(1, dtype)[0], draw(3, seed=1)])
        rewards = draw(8, seed=2)
        rewards[0] = -1e9
        return Call("rspo_loss", (logps, rewards), {"k": k, "group_size": 8}, cancels=True)

    return make


def long(op: str, *sizes: int, **settings: Any) -> Callable[[int], Call]:
    """Of n samples or tokens in segments of these sizes, and one of all that is left."""

    def make(n: int) -> Call:
        logps, ref = draw(n, shift=-2, seed=1), draw(n, shift=-2, seed=2)
        cu = offsets(*sizes, n - sum(sizes))
        if op == "token_loss":
            old = (logps + draw(n, scale=0.1, seed=3)).float().double()
            args = (logps, old, draw(len(cu) - 1, seed=4) + 2, cu)
            return Call(op, args, {"kl": 0.1, "ref_token_logps": ref, **settings}, cancels=True)
        if op == "rspo_loss":
            return Call(op, (logps, draw(n, seed=3)), {"offsets": cu, **settings}, cancels=True)
        args = (logps, ref, draw(n, seed=3))
        return Call(op, args, {"alpha": 0.3, "beta": 0.1, "offsets": cu, **settings}, cancels=True)

    return make


CASES: dict[str, Callable[[torch.dtype], Call]] = {
    "pairs": pairs(),
    "pairs, smoothed": pairs(label_smoothing=0.1),
    "pairs, alpha 1e-8, beta 1e6": pairs(alpha=1e-8, beta=1e6),
    "pairs, beta 0": pairs(beta=0.0),
    "epa": epa,
    "poft": poft,
    "grpo, policy and old, A >= 0": tokens(2, (1.0, 0.0)),
    "grpo, policy and old, A < 0": tokens(2, (-1.0,), normalize="token"),
    "grpo, kl": tokens(3, (1.0, 0.0), kl=0.3, normalize=7),
    "grpo, kl, reference alone": tokens(3, (-1.0,), infinite=False, kl=0.3, normalize="token"),
    "gspo": tokens(2, (1.0, 0.0), ratio="sequence", eps_low=3e-4, eps_high=4e-4),
    "gspo, A < 0, kl": tokens(3, (-1.0,), ratio="sequence", kl=0.3),
    "grpo, kl 1e-50": tokens(3, (1.0,), kl=1e-50),
    "grpo, kl 1e50": tokens(3, (1.0,), kl=1e50),
    "grpo, eps_high 1e39": tokens(2, (0.0,), eps_high=1e39),
    **{f"group, {b}": groups("group_loss", baseline=b) for b in ("loo", "mean", "none")},
    # float64's least times 1e15 has no number.
    "group, alpha 1e-20, beta 1e15": lambda _: groups("group_loss", alpha=1e-20, beta=1e15)(torch.float32),
    "variance": groups("variance_loss"),
    **{f"group, log-probs by {x:g}": shifted("group_loss", x, "logps") for x in (1e4, 1e7)},
    **{f"group, rewards by {x:g}": shifted("group_loss", x, "rewards", baseline="mean") for x in (1e4, 1e7)},
    "variance, log-probs by 1e7": shifted("variance_loss", 1e7, "logps"),
    "variance, rewards by 1e7": shifted("variance_loss", 1e7, "rewards"),
    "rspo, rewards by 1e7": shifted("rspo_loss", 1e7, "rewards"),
    "rspo, k = 1, rewards by 1e7": shifted("rspo_loss", 1e7, "rewards", k=1),
    "rspo": risk(3),
    "rspo, k = 1": risk(1),
}
LONG: dict[str, Callable[[int], Call]] = {
    "grpo": long("token_loss"),
    "dapo": long("token_loss", 7, 0, 1500, normalize="token"),
    "gspo": long("token_loss", ratio="sequence"),
    "group": long("group_loss"),
    "variance": long("variance_loss", 3, 700),
    "rspo": long("rspo_loss", k=3),
}


def run(call: Call, backend: str, device: torch.device) -> list[torch.Tensor]:
    """Value and coefficients, on the CPU."""
    if backend != "triton":
        return call.run(backend)
    pytest.importorskip("triton", reason="Triton runs on Linux only")
    args = [x if x is None else x.to(device) for x in call.args]
    settings = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in call.settings.items()}
    value, coefs = _backends.kernel(call.op, device, "triton")(*args, **settings)
    return [value.cpu(), *[x.cpu() for x in coefs]]


def assert_entries(name: str, out: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, unit: float = 0.0) -> None:
    """Each entry for itself; what is not finite in the dtype, or is NaN, exactly so. unit: of terms that cancel."""
    dtype, wanted = out.dtype, truth.to(out.dtype).double()
    out, error = out.double(), (plain.double() - wanted).abs()
    # Where plain torch overflows, so may a kernel; a NaN of plain torch allows nothing.
    allowed = 2 * error.nan_to_num(nan=0.0, posinf=INF) + torch.finfo(dtype).tiny
    allowed += UNITS * torch.finfo(dtype).eps * wanted.abs().clamp(min=unit)
    same = (out == wanted) | (out.isnan() & wanted.isnan())
    bad = ~(same | ((out - wanted).abs() <= allowed))
    assert not bad.any(), (
        f"{name}[{bad.nonzero()[:4].tolist()}]: {out[bad][:4].tolist()}, wanted {wanted[bad][:4].tolist()}"
    )


def compare(call: Call, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    call = call.cast(dtype)
    truth = call.cast(D).run("reference")
    plain = call.run("reference")
    mine = plain if backend == "reference" else run(call, backend, device)
    terms = sum(
        float((c * x.double()).abs().nan_to_num(0, 0, 0).sum()) for c, x in zip(truth[1:], call.args, strict=False)
    )
    assert_entries("value", mine[0], plain[0], truth[0], terms if call.cancels else 0.0)
    for i, (got, other, want) in enumerate(zip(mine[1:], plain[1:], truth[1:], strict=True)):
        # A centred sample is as good as the samples are large.
        assert_entries(f"d{i}", got, other, want, float(want.abs().max()) if call.cancels else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=["float32", "float64"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_extremes_against_float64(name: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    compare(CASES[name](dtype), backend, device, dtype)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", LONG)
def test_long_inputs_against_float64(name: str, backend: str, device: torch.device) -> None:
    # Triton's interpreter takes 10 seconds for 200,000 tokens.
    n = 200_000 if backend == "cpu" or device.type == "cuda" else 4_000
    compare(LONG[name](n), backend, device, torch.float32)


def scores(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=D)


def pair(chosen: float, rejected: float, **settings: Any) -> Call:
    return Call("pair_loss", (scores(chosen), scores(rejected), None, None), {"alpha": 0.5, "beta": 0.0, **settings})


def tilted(ref_chosen: float, ref_rejected: float) -> Call:
    refs = (scores(ref_chosen), scores(ref_rejected))
    return Call("pair_loss", (scores(-1), scores(-1), *refs), {"alpha": 0.5, "beta": 0.1})


def contrast(positive: tuple[float, float], *negatives: tuple[float, float]) -> Call:
    """Of (policy's, reference's) log-probs; the last negative is a weak one."""
    own, each = scores(*positive), torch.tensor(negatives, dtype=D).T[:, None]
    args = [x.contiguous() for i in range(2) for x in (own[i : i + 1], each[i][:, :-1], each[i][:, -1:])]
    return Call("epa_loss", tuple(args), {"beta": 1.0})


def token(logp: float, old: float, advantage: float, ref: float | None = None, **settings: Any) -> Call:
    extra = {} if ref is None else {"ref_token_logps": scores(ref), "kl": 0.5}
    return Call("token_loss", (scores(logp), scores(old), scores(advantage), offsets(1)), {**extra, **settings})


def group(op: str, logps: torch.Tensor, ref: torch.Tensor | None, rewards: torch.Tensor, **settings: Any) -> Call:
    if op == "rspo_loss":
        return Call(op, (logps, rewards), {"group_size": 2, **settings})
    return Call(op, (logps, ref, rewards), {"alpha": 0.0, "beta": 0.0, "group_size": 2, **settings})


SHARE = 1 / (1 + math.exp(-0.5))
# What of a call: its value, and its coefficients one after another.
LIMITS: dict[str, tuple[Call, float, list[float]]] = {
    "pair, chosen excluded": (pair(-INF, -1), INF, [-0.5, 0.5]),
    "pair, chosen excluded, smoothed": (pair(-INF, -1, label_smoothing=0.25), INF, [-0.375, 0.375]),
    "pair, rejected excluded": (pair(-1, -INF), 0.0, [0.0, 0.0]),
    "pair, rejected excluded, smoothed": (pair(-1, -INF, label_smoothing=0.25), INF, [0.125, -0.125]),
    "pair, both excluded": (pair(-INF, -INF), NAN, [NAN, NAN]),
    "pair, chosen excluded by the reference": (tilted(-INF, -1), 0.0, [0.0, 0.0]),
    "pair, rejected excluded by the reference": (tilted(-1, -INF), INF, [-0.5, 0.5]),
    "pair, a reference that weighs nothing": (
        Call("pair_loss", (scores(0), scores(0), scores(-INF), scores(-INF)), {"alpha": 2.0, "beta": 0.0}),
        math.log(2),
        [-1.0, 1.0],
    ),
    "epa, positive excluded": (
        contrast((-INF, 0), (-1, 0), (-1.5, 0), (-INF, 0)),
        INF,
        [-1.0, SHARE, 1 - SHARE, 0.0],
    ),
    "epa, positive filled": (contrast((-3e38, 0), (-1, 0), (-1.5, 0)), 3e38, [-1.0, SHARE, 1 - SHARE]),
    "epa, negatives excluded": (contrast((-1, 0), (-INF, 0), (-INF, 0)), 0.0, [0.0] * 3),
    "epa, positive excluded by the reference": (contrast((-1, -INF), (-1, 0), (-1, 0)), 0.0, [0.0] * 3),
    "epa, a negative excluded by the reference": (contrast((-1, 0), (-1, 0), (-1, -INF)), INF, [-1.0, 0.0, 1.0]),
    "epa, two excluded by the reference": (contrast((-1, 0), (-1, -INF), (-1, -INF)), NAN, [NAN] * 3),
    "epa, nothing possible": (contrast((-INF, 0), (-INF, 0), (-INF, 0)), NAN, [NAN] * 3),
    "poft": (Call("poft_loss", (scores(-INF), scores(4), scores(-1)[:, None]), {"beta": 2.0}), INF, [-0.5]),
    # The two of the report: the ratio was infinity times 1 + what float32 had cut off, -inf or NaN.
    "grpo, old filled": (token(-25, -1e9, 1), -1.2, [0.0]),
    "grpo, old filled, no advantage": (token(-1, -1e9, 0), 0.0, [0.0]),
    "grpo, old excluded": (token(-1, -INF, 1), -1.2, [0.0]),
    "grpo, old excluded, A < 0": (token(-1, -INF, -1), INF, [INF]),
    "grpo, policy excluded": (token(-INF, -1, 1), 0.0, [0.0]),
    "grpo, policy excluded, A < 0": (token(-INF, -1, -1), 0.8, [0.0]),
    "gspo, old filled": (token(-25, -1e9, 1, ratio="sequence"), -1.2, [0.0]),
    "grpo, both excluded": (token(-INF, -INF, 1), NAN, [NAN]),
    # The slope was formed as k3 + d: 0 from d = -1.7e7 on in float32, and NaN at -inf.
    "grpo, reference -2e7": (token(-1, -1, 0, -2e7), 0.5 * (2e7 - 2), [0.5]),
    "grpo, reference -1e9": (token(-1, -1, 0, -1e9), 0.5 * (1e9 - 2), [0.5]),
    "grpo, reference excluded": (token(-1, -1, 0, -INF), INF, [0.5]),
    "grpo, policy excluded, kl": (token(-INF, -1, 1, -1), INF, [-INF]),
    "grpo, policy and reference excluded": (token(-INF, -1, 1, -INF), NAN, [NAN]),
    "policy gradient, no advantage": (
        group("group_loss", scores(-INF, -2), None, scores(0, 3), baseline="none"),
        3.0,
        [0.0, -1.5],
    ),
    "rspo, no weight": (group("rspo_loss", scores(-INF, -2), None, scores(0, 3), k=2), 6.0, [0.0, -3.0]),
    "rspo, k = 1": (group("rspo_loss", scores(-INF, -2), None, scores(0, 3), k=1), -INF, [1.5, -1.5]),
    "group, beta 0": (group("group_loss", scores(-2, -2), scores(-INF, -INF), scores(0, 3)), 0.0, [1.5, -1.5]),
    "variance, beta 0": (
        group("variance_loss", scores(-2, -2), scores(-INF, -INF), scores(0, 3), alpha=0.5),
        2.25,
        [0.75, -0.75],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=["float32", "float64"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    call, value, coefs = LIMITS[name]
    got, *each = run(call.cast(dtype), backend, device)
    assert got.tolist() == pytest.approx(value, rel=1e-6, nan_ok=True)
    assert torch.cat([x.flatten() for x in each]).tolist() == pytest.approx(coefs, rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_kl_of_near_policies_keeps_its_digits(backend: str, device: torch.device) -> None:
    """Where training starts: expm1(d) - d in float32 has none left at d = 1e-7, and is off by 5e-4 at 2e-4."""
    for d in (2.0**-23, -(2.0**-12), 2.0**-6, -0.4375, 0.4375, -0.5625, 0.5625):
        value, coef = run(token(-1, -1, 0, -1 + d).cast(torch.float32), backend, device)
        x = torch.tensor(d, dtype=D)
        series = sum(d**i / math.factorial(i) for i in range(2, 25))
        torch.testing.assert_close(value.double(), torch.tensor(0.5 * series, dtype=D), rtol=1e-6, atol=0)
        torch.testing.assert_close(coef.double(), -0.5 * torch.expm1(x)[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("op", ["group_loss", "variance_loss"])
def test_an_infinite_sample_spoils_its_own_group(op: str, backend: str, device: torch.device) -> None:
    """On purpose: the mean of such a group is infinite, and so is what it leaves of the others."""
    logps, ref, rewards = (draw(12, shift=-2, seed=i) for i in range(3))
    settings = {"alpha": 0.3, "beta": 0.1, "group_size": 4}
    _, clean = run(Call(op, (logps, ref, rewards), settings), backend, device)
    for x in (logps, ref):
        kept, x[5] = float(x[5]), -INF
        value, coef = run(Call(op, (logps, ref, rewards), settings), backend, device)
        x[5] = kept
        assert not value.isfinite()
        assert not coef[4:8].isfinite().any()
        assert torch.equal(coef[[*range(4), *range(8, 12)]], clean[[*range(4), *range(8, 12)]])


ADVANTAGES = {
    "1e7": 1e7 + draw(64, scale=4).round(),
    "-1e7, apart by 1e-8": 1e-8 * draw(64) - 1e7,
    "a fill of -1e9": torch.cat([scores(-1e9), draw(63)]),
    "a fill of float32's least": torch.cat([scores(torch.finfo(torch.float32).min), draw(63)]),
    "1e30": 1e30 * draw(64),
    "1e-30": 1e-30 * draw(64),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("scale", ["none", "std"])
@pytest.mark.parametrize("layout", [{"group_size": 8}, {"offsets": offsets(3, 5, 56)}], ids=["equal", "ragged"])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_group_advantages(name: str, layout: Any, scale: str, backend: str) -> None:
    """Of float32 rewards, as float64 has them: the reference too, which is what a GPU runs."""
    rewards = ADVANTAGES[name].float()
    call = _backends.kernel("group_advantages", torch.device("cpu"), backend)
    for baseline in ("mean", "loo"):
        truth = _advantages(rewards.double(), layout, scale, baseline)
        got = call(rewards, scale=scale, baseline=baseline, **layout)
        torch.testing.assert_close(got, truth.float(), rtol=3e-7, atol=1e-37)


def _advantages(rewards: torch.Tensor, layout: Any, scale: str, baseline: str) -> torch.Tensor:
    out = []
    for r in rewards.split(layout["offsets"].diff().tolist() if "offsets" in layout else 8):
        others = (r.sum() - r) / (len(r) - 1)
        centred = r - (r.mean() if baseline == "mean" else others)
        out.append(centred / (r.std() + 1e-4) if scale == "std" else centred)
    return torch.cat(out)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_group_advantages_whose_squares_overflow(backend: str) -> None:
    """float64 rewards beyond 1e154: the deviation came out infinite, and every advantage as 0."""
    run = _backends.kernel("group_advantages", torch.device("cpu"), backend)
    for fill in (-1e200, torch.finfo(D).min):
        got = run(scores(1, 1, 1, fill, 1, 2, 3, 4), group_size=4)
        torch.testing.assert_close(got[:4], scores(0.5, 0.5, 0.5, -1.5))
        torch.testing.assert_close(got[4:], run(scores(1, 2, 3, 4), group_size=4))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_dqo_where_the_policy_excludes_a_response(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a KL term a log-prob weighs nothing in the advantages: the coefficients do not see it."""
    monkeypatch.setenv("QEMPO_BACKEND", backend)
    logps, rewards, embeddings = draw(8, shift=-3), draw(8, seed=1), draw(8, 5, seed=2)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return qf.dqo_loss(x, rewards, embeddings, group_size=4)

    _, clean = qf.coefficients(loss, logps)
    logps[2] = -INF
    _, coef = qf.coefficients(loss, logps)
    torch.testing.assert_close(coef, clean, rtol=1e-12, atol=0)
