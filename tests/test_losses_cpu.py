"""C++ kernels of the losses: accuracy, layouts, threads, magnitudes, and the autograd function that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tolerances import FLOOR, assert_as_good

import qempo_fast as qf
from qempo_fast import _C, _backends
from qempo_fast._backends import OPS
from qempo_fast.losses.cpu import SCALES

D = torch.float64
# 1e-12.
FLOAT64 = 1e-12 / torch.finfo(D).eps


class Call(NamedTuple):
    """One call of a loss op; tensors in float64, offsets int64."""

    op: str
    args: tuple[Any, ...]
    settings: dict[str, Any]
    # A surrogate's value is a sum of terms of both signs, which round by their own size.
    cancels: bool = False

    def cast(self, dtype: torch.dtype) -> Call:
        def to(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        settings = {k: to(v) for k, v in self.settings.items()}
        return self._replace(args=tuple(map(to, self.args)), settings=settings)

    def run(self, backend: str) -> list[torch.Tensor]:
        """Value and coefficients."""
        kernel = _backends.kernel(self.op, torch.device("cpu"), backend)
        if backend != "reference":
            value, coefs = kernel(*self.args, **self.settings)
            return [value, *coefs]
        count = OPS[self.op].policy
        leaves = [x.clone().requires_grad_() for x in self.args[:count]]
        value = kernel(*leaves, *self.args[count:], **self.settings)
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def draw(*shape: int, scale: float = 1.0, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    # Numbers that float32 holds: its error is then the kernel's, not the input's.
    return (scale * torch.randn(*shape, dtype=D, generator=generator) + shift).float().double()


def offsets(*sizes: int) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])


def pairs(n: int, scale: float = 3.0, refs: bool = True, **settings: Any) -> Call:
    given = [draw(n, scale=scale, shift=-20, seed=i) for i in range(4)]
    settings = {"alpha": 0.3, "beta": 0.1, **settings}
    return Call("pair_loss", tuple(given if refs else [*given[:2], None, None]), settings)


def groups(op: str, layout: Any, n: int, scale: float = 3.0, rewards: float = 1.0, **settings: Any) -> Call:
    layout = {"offsets": layout} if isinstance(layout, torch.Tensor) else {"group_size": layout}
    given = [draw(n, scale=scale, seed=i) - 20 * (scale > 1) for i in range(2)]
    given = (*given, draw(n, scale=rewards, seed=2))
    return Call(op, given, {"alpha": 0.3, "beta": 0.1, **layout, **settings}, cancels=op == "group_loss")


def risk(layout: Any, n: int, k: int, rewards: Callable[[torch.Tensor], torch.Tensor] = lambda r: r, **kw: Any) -> Call:
    layout = {"offsets": layout} if isinstance(layout, torch.Tensor) else {"group_size": layout}
    given = (draw(n, scale=3, shift=-20), rewards(draw(n, seed=2)))
    return Call("rspo_loss", given, {"k": k, **layout, **kw}, cancels=True)


def epa(n: int, strong: int, weak: int, scale: float = 3.0, **settings: Any) -> Call:
    shapes = ((n,), (n, strong), (n, weak))
    given = [draw(*s, scale=scale, seed=10 * r + i) for r in range(2) for i, s in enumerate(shapes)]
    return Call("epa_loss", tuple(given), {"beta": 0.7, **settings})


def poft(n: int, models: int, scale: float = 20.0, **settings: Any) -> Call:
    lengths = torch.randint(1, 50, (n,), generator=torch.Generator().manual_seed(1)).double()
    return Call("poft_loss", (draw(n, scale=scale), lengths, draw(n, models, shift=-2)), settings)


def tokens(*sizes: int, spread: float = 0.2, drift: float = 0.2, advantages: float = 1.0, **settings: Any) -> Call:
    n = sum(sizes)
    logps = draw(n, shift=-2)
    old = (logps + draw(n, scale=spread, seed=1)).float().double()
    ref = (logps + draw(n, scale=drift, seed=2)).float().double()
    scale = draw(len(sizes), scale=advantages, seed=3)
    scale[len(sizes) // 2] = 0.0
    extra = {"ref_token_logps": ref} if settings.get("kl") else {}
    return Call("token_loss", (logps, old, scale, offsets(*sizes)), {**extra, **settings})


RAGGED, MANY = (2, 3, 70, 2, 600, 9), (0, 1, 5, 0, 700, 33, 0, 40, 512, 0)
N = sum(RAGGED)
CASES: dict[str, Call] = {
    # More than one block of rows, and a part of a vector.
    "pairs": pairs(1037),
    "pairs, none, no reference, smoothed": pairs(13, refs=False, reduction="none", label_smoothing=0.2),
    "pairs, sum, smoothed": pairs(37, reduction="sum", label_smoothing=0.1),
    "pairs, |l| to 1e5": pairs(37, scale=1e5),
    "pairs, beta 1e-4": pairs(37, scale=1e4, alpha=1e-4, beta=1e-4),
    "poft": poft(1037, 3),
    "poft, none, one model": poft(11, 1, gamma=0.5, beta=2.0, reduction="none"),
    "poft, |l| to 1e5": poft(37, 2, scale=1e5),
    "epa": epa(300, 1, 4),
    "epa, none, no weak": epa(7, 2, 0, reduction="none"),
    "epa, no strong, sum": epa(7, 0, 3, reduction="sum"),
    "epa, |l| to 1e5": epa(37, 1, 4, scale=1e5),
    # Sizes that have code of their own, one that has none, and one beyond a block.
    **{f"group, k = {k}": groups("group_loss", k, 3 * k) for k in (2, 4, 8, 16, 5, 1500)},
    "group, many blocks": groups("group_loss", 8, 4096, baseline="mean"),
    "group, one a group": groups("group_loss", 1, 9, baseline="none"),
    "group, ragged": groups("group_loss", offsets(*RAGGED), N),
    "group, int32 offsets, bonus": groups("group_loss", offsets(*RAGGED).int(), N, bonus=draw(N, seed=5)),
    "group, |l| to 1e5": groups("group_loss", 8, 64, scale=1e5),
    "group, rewards 1e8": groups("group_loss", 8, 64, rewards=1e8),
    "group, rewards 1e-8": groups("group_loss", 8, 64, scale=1e-8, rewards=1e-8),
    "variance": groups("variance_loss", 8, 4096),
    "variance, ragged": groups("variance_loss", offsets(*RAGGED), N),
    "variance, |l| to 1e5": groups("variance_loss", 4, 64, scale=1e5),
    "variance, rewards 1e-8": groups("variance_loss", 2, 64, scale=1e-8, rewards=1e-8),
    # By comparing all pairs, and beyond 320 by sorting.
    **{f"rspo, n = {n}": risk(n, 2 * n, 3) for n in (4, 8, 16, 13, 320, 321, 1500)},
    "rspo, k = n": risk(8, 64, 8),
    "rspo, k = 1": risk(8, 64, 1),
    "rspo, k = 1, ragged, mean": risk(offsets(*RAGGED), N, 1, baseline="mean"),
    "rspo, ragged": risk(offsets(*RAGGED), N, 2),
    "rspo, ties": risk(8, 64, 3, torch.Tensor.round),
    "rspo, 0 and 1 in large groups": risk(400, 1200, 10, lambda r: (r > 1).double()),
    "rspo, rewards 1e8": risk(8, 64, 3, lambda r: 1e8 * r),
    "rspo, rewards 1e-8 of either sign, sorted": risk(400, 800, 3, lambda r: 1e-8 * r),
    "grpo": tokens(*MANY),
    "grpo, kl": tokens(*MANY, kl=0.1),
    "grpo, kl of near policies": tokens(*MANY, kl=0.1, drift=1e-3, spread=0.0),
    "grpo, kl of far policies": tokens(*MANY, kl=0.1, drift=3.0),
    "dapo": tokens(*MANY, kl=0.2, normalize="token", eps_high=0.28),
    "dr grpo": tokens(*MANY, normalize=77, eps_low=0.0),
    "gspo": tokens(*MANY, ratio="sequence", eps_low=3e-4, eps_high=4e-4),
    "gspo, kl, token": tokens(*MANY, ratio="sequence", kl=0.1, normalize="token", spread=0.01),
    "grpo, ratios to e^40": tokens(*MANY, spread=20.0, advantages=1e-8),
    "grpo, advantages 1e8": tokens(*MANY, advantages=1e8),
    "grpo, many short sequences": tokens(*[3] * 700),
}


@pytest.fixture(params=_C.isas())
def _each_isa(request: pytest.FixtureRequest) -> Any:
    before = _C.isa()
    _C.use_isa(request.param)
    yield
    _C.use_isa(before)


@pytest.mark.usefixtures("_each_isa")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    call = CASES[name]
    value, *coefs = call.run("reference")
    mine, plain = (call.cast(dtype).run(backend) for backend in ("cpu", "reference"))
    # Two orders of addition in float64: the truth is no better than plain.
    floor = FLOOR if dtype == torch.float32 else FLOAT64
    terms = sum((c * x).abs().sum().item() for c, x in zip(coefs, call.args, strict=False))
    unit = terms if call.cancels else 0.0
    assert_as_good("value", mine[0], plain[0], value, dtype, floor, unit)
    for got, other, want in zip(mine[1:], plain[1:], coefs, strict=True):
        assert got.dtype == dtype
        assert_as_good("coefficients", got, other, want, dtype, floor)


@pytest.mark.parametrize("h", [1.0, 20.0, 60.0, 85.0])
def test_small_losses_and_coefficients_keep_their_digits(h: float) -> None:
    """log(1 + e^-h) and its slope, relative to themselves: plain float32 rounds h first, an error of h eps."""
    w, zero = torch.full((3,), h), torch.zeros(3)
    want = torch.log1p(torch.exp(torch.tensor(-h, dtype=D)))
    slope = torch.sigmoid(torch.tensor(-h, dtype=D))
    for loss in (
        lambda x: qf.spl_pair_loss(x, zero, None, None, alpha=1.0, beta=0.0),
        lambda x: qf.epa_loss(x, zero[:, None], zero[:, None] - 1e4, zero, zero[:, None], zero[:, None], beta=1.0),
        lambda x: qf.poft_loss(x, zero + 1, zero[:, None]),
    ):
        value, coef = qf.coefficients(loss, w)
        torch.testing.assert_close(value.double(), want, rtol=6e-7, atol=0)
        torch.testing.assert_close(3 * coef.double(), -slope.expand(3), rtol=6e-7, atol=0)


def test_threads_and_runs_are_bitwise_equal() -> None:
    big = [
        pairs(70_001, label_smoothing=0.1),
        epa(20_011, 1, 4),
        groups("group_loss", 8, 80_000),
        groups("variance_loss", offsets(*[7, 1200, 3] * 60), 72_600),
        risk(8, 80_000, 3),
        tokens(*[33, 0, 5, 1100] * 80, kl=0.1),
        tokens(*[33, 0, 5, 1100] * 80, ratio="sequence"),
    ]
    threads = torch.get_num_threads()
    try:
        for call in big:
            call = call.cast(torch.float32)
            results = []
            for n in (1, 2, 3, 1):
                torch.set_num_threads(n)
                results.append(call.run("cpu"))
            for other in results[1:]:
                assert all(map(torch.equal, results[0], other)), call.op
    finally:
        torch.set_num_threads(threads)


def test_infinite_and_nan_log_probs_stay_where_they_are() -> None:
    inf, nan = torch.inf, torch.nan
    w, zero = torch.tensor([inf, -inf, nan, 1.0]), torch.zeros(4)
    loss = qf.spl_pair_loss(w, zero, None, None, alpha=1.0, beta=0.0, reduction="none")
    assert loss[:2].tolist() == [0.0, inf]
    assert loss[2].isnan()
    assert loss[3].isfinite()
    # Of two groups only the one with the NaN is lost.
    _, (coef,) = groups("group_loss", 2, 4)._replace(args=(w[[2, 3, 3, 3]], zero, zero)).run("cpu")[0:1] or (), (None,)
    value, coef = (
        groups("group_loss", 2, 4)._replace(args=(w[[2, 3, 3, 3]].double(), zero.double(), zero.double())).run("cpu")
    )
    assert value.isnan()
    assert coef[:2].isnan().all()
    assert coef[2:].isfinite().all()


D_L, D_F, D_R = draw(12, scale=3, shift=-20), draw(12, seed=1), draw(12, seed=2)
ASKED: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "pair": (lambda w, x: qf.dpo_loss(w, x, D_F, D_R), 2),
    "pair, none": (lambda w, x: (qf.dpo_loss(w, x, D_F, D_R, reduction="none") * D_R).sum(), 2),
    "epa": (lambda w, x, v: qf.epa_loss(w, x[:, None], v[:, None], D_F, D_R[:, None], D_R[:, None]), 3),
    "epa, none": (
        lambda w, x, v: (
            qf.epa_loss(w, x[:, None], v[:, None], D_F, D_R[:, None], D_R[:, None], reduction="none") * D_R
        ).sum(),
        3,
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_only_the_gradients_that_are_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, count = ASKED[name]
    inputs = [draw(12, scale=3, seed=7 + i) for i in range(count)]

    def grads(asked: tuple[int, ...]) -> list[torch.Tensor | None]:
        leaves = [x.clone().requires_grad_(i in asked) for i, x in enumerate(inputs)]
        loss(*leaves).backward()
        return [x.grad for x in leaves]

    monkeypatch.setenv("QEMPO_BACKEND", "reference")
    truth = grads(tuple(range(count)))
    monkeypatch.delenv("QEMPO_BACKEND")
    for asked in [(i,) for i in range(count)] + [tuple(range(count))]:
        for i, (got, want) in enumerate(zip(grads(asked), truth, strict=True)):
            if i in asked:
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
            else:
                assert got is None


def test_the_graph() -> None:
    w, x = D_L.clone().requires_grad_(), D_F.clone().requires_grad_()
    with torch.no_grad():
        assert not qf.dpo_loss(w, x, D_F, D_R).requires_grad
    assert not qf.dpo_loss(w.detach(), x.detach(), w, x).requires_grad
    loss = qf.dpo_loss(w, x, D_F, D_R)
    first = torch.autograd.grad(loss, (w, x), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (w, x), create_graph=True)
    for one, three in zip(first, again, strict=True):
        torch.testing.assert_close(3 * one, three, rtol=1e-14, atol=0)
    # The coefficients are numbers to autograd: a second derivative must not come out as 0.
    weight = torch.ones((), dtype=D, requires_grad=True)
    (grad,) = torch.autograd.grad(weight * qf.dpo_loss(w, x, D_F, D_R), w, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_wild_offsets_are_refused_before_anything_is_read() -> None:
    values = (draw(6), draw(6, seed=1), draw(6, seed=2))
    for bad in ([0, 2, 2**40, 6], [0, -(2**62), 6], [0, 4, 2, 6], [1, 6], [0, 5]):
        with pytest.raises(ValueError, match="offsets: wanted"):
            qf.spl_loss(*values, alpha=0.1, beta=0.1, offsets=torch.tensor(bad))
        with pytest.raises(ValueError, match="offsets: wanted"):
            qf.group_advantages(values[2], offsets=torch.tensor(bad))
        with pytest.raises(ValueError, match="offsets: wanted"):
            qf.rspo_loss(values[0], values[2], k=2, offsets=torch.tensor(bad))
        with pytest.raises(ValueError, match="cu_seqlens: wanted"):
            qf.grpo_loss(values[0], values[1], draw(len(bad) - 1), torch.tensor(bad))


@pytest.mark.parametrize("baseline", ["mean", "loo"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("layout", [8, 5, offsets(*RAGGED)])
def test_group_advantages(layout: Any, scale: str, baseline: str) -> None:
    n = N if isinstance(layout, torch.Tensor) else 40
    kw = {"offsets": layout} if isinstance(layout, torch.Tensor) else {"group_size": layout}
    reference = _backends.kernel("group_advantages", torch.device("cpu"), "reference")
    for size in (1.0, 1e8, 1e-8):
        rewards = draw(n, scale=size)
        truth = reference(rewards, **kw, scale=scale, baseline=baseline)
        for dtype in (torch.float32, D):
            mine = qf.group_advantages(rewards.to(dtype), **kw, scale=scale, baseline=baseline)
            plain = reference(rewards.to(dtype), **kw, scale=scale, baseline=baseline)
            assert_as_good("advantages", mine, plain, truth, dtype)
