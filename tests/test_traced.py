"""Numbers that change under torch.compile, transforms of torch.func, second derivatives, autocast around backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import qempo_fast as qf
from qempo_fast._operator import scalar

Step = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


H, W, Z, E, L = draw(6, 8), draw(30, 8, seed=1), draw(6, 9), draw(3, 4, 5), draw(12)
T, R, F, G = torch.arange(6), draw(12, seed=2), draw(12, seed=3), draw(12, seed=4)
CU, ADVANTAGES = torch.tensor([0, 5, 12]), draw(2)


def weighted(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.arange(1, x.numel() + 1, device=x.device).reshape(x.shape)).sum()


# Calls with a number that changes from step to step, and the tensor that gets a gradient.
NUMBERS: dict[str, tuple[torch.Tensor, Step]] = {
    "temperature": (H, lambda h, x: weighted(qf.linear_logps(h, W, T, temperature=x).logps)),
    "logit_scale, softcap": (H, lambda h, x: weighted(qf.linear_logps(h, W, T, logit_scale=x, softcap=3 * x).logps)),
    "tau": (H, lambda h, x: weighted(qf.linear_logps(h, W, T, grad="sampled", tau=x / 9).logps)),
    "temperature of logits": (Z, lambda z, x: weighted(qf.logps_from_logits(z, T, temperature=x).logps)),
    "ridge": (E, lambda e, x: weighted(qf.dpp_gains(e, ridge=x).gains)),
    "ridge of a selection": (E, lambda e, x: e.sum() * qf.dpp_select(e, 2, ridge=x).sum()),
    "lam, mu": (L, lambda p, x: qf.qempo_kl_loss(p, F, R, lam=x, mu=x / 2, group_size=4)),
    "alpha, beta": (L, lambda p, x: qf.variance_loss(p, F, R, alpha=x, beta=x / 3, group_size=4)),
    "beta, label_smoothing": (L, lambda p, x: qf.dpo_loss(p, R, F, G, beta=x, label_smoothing=x / 9)),
    "beta, gamma": (L, lambda p, x: qf.poft_loss(p, torch.arange(1, 13), G[:, None], beta=x, gamma=x)),
    "beta of epa": (L, lambda p, x: qf.epa_loss(p, R[:, None], F[:, None], G, F[:, None], R[:, None], beta=x)),
    "kl, eps, normalize": (
        L,
        lambda p, x: qf.grpo_loss(
            p, R, ADVANTAGES, CU, ref_token_logps=F, kl=x, eps_low=x / 9, eps_high=x / 8, normalize=7 * x
        ),
    ),
}
# One of them is 1, which has a path of its own where nothing is traced.
VALUES = [0.5 + 0.125 * i for i in range(10)]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_new_number_is_not_a_new_graph(name: str) -> None:
    """The first graph has the number for a constant, the second takes any; a third value once was a third graph."""
    x, step = NUMBERS[name]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for value in VALUES:
        both = []
        for function in (compiled, step):
            leaf = x.clone().requires_grad_()
            torch.manual_seed(3)
            out = function(leaf, value)
            both.append((out.detach(), *torch.autograd.grad(out, leaf)))
        assert all(map(torch.equal, *both)), value
    assert counter.frame_count == 2


def test_an_int_that_changes() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda p, k: qf.rspo_loss(p, R, k=k, group_size=4), fullgraph=True, backend=counter)
    for k in (1, 2, 3, 4):
        assert torch.equal(step(L, k), qf.rspo_loss(L, R, k=k, group_size=4))
    assert counter.frame_count == 2


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_bad_number_is_named_in_a_graph(bad: float) -> None:
    call = lambda p, lam: qf.qempo_loss(p, R, lam=lam, group_size=4)  # noqa: E731
    with pytest.raises(ValueError, match="lam: wanted a finite number"):
        torch.compile(call, backend="aot_eager")(L, bad)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="lam"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(L, bad)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_temperature_of_one_entry(shape: tuple[int, ...]) -> None:
    one = torch.full(shape, 0.7, dtype=torch.float64)
    for call in (
        lambda u: qf.linear_logps(H, W, T, temperature=u).logps,
        lambda u: qf.logps_from_logits(Z, T, temperature=u).logps,
    ):
        torch.testing.assert_close(call(one), call(0.7), rtol=1e-6, atol=0)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(one), call(one))


def test_a_temperature_whose_inverse_overflows() -> None:
    for bad in (1e-45, torch.tensor(1e-45, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"^temperature: wanted"):
            qf.logps_from_logits(Z, T, temperature=bad)


FUNCTIONS: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]] = {
    "linear_logps": (H, lambda h: weighted(qf.linear_logps(h, W, T, entropy=True).logps)),
    "logps_from_logits": (Z, lambda z: weighted(qf.logps_from_logits(z, T).logps)),
    "dpp_gains": (E, lambda e: weighted(qf.dpp_gains(e).gains)),
    "pair_loss": (L, lambda p: qf.dpo_loss(p, R, F, G)),
    "group_loss": (L, lambda p: qf.qempo_loss(p, R, lam=0.7, group_size=4)),
    "segment_sum": (L, lambda v: weighted(qf.segment_sum(v, CU))),
}
EACH = pytest.mark.parametrize("name", FUNCTIONS)
ONCE = pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "segment_sum"])


def plain(function: Step, x: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


@EACH
def test_transforms(name: str) -> None:
    x, f = FUNCTIONS[name]
    want, two = plain(f, x), torch.stack([x, 2 * x])
    wants = torch.stack([want, plain(f, 2 * x)])
    func = torch.func
    assert torch.equal(func.grad(f)(x), want)
    assert all(map(torch.equal, func.grad_and_value(f)(x), (want, f(x))))
    assert torch.equal(func.vjp(f, x)[1](torch.tensor(1.0))[0], want)
    assert torch.equal(func.jacrev(f)(x), want)
    assert torch.equal(torch.vmap(f)(two), torch.stack([f(x), f(2 * x)]))
    assert torch.equal(torch.vmap(func.grad(f))(two), wants)
    # Under vmap nothing tells that a gradient is wanted, and linear_logps does not make it in the forward.
    torch.testing.assert_close(func.grad(lambda y: torch.vmap(f)(y).sum())(two), wants, rtol=1e-6, atol=1e-6)
    assert torch.equal(func.functionalize(f)(x), f(x))


@EACH
def test_modes(name: str) -> None:
    x, f = FUNCTIONS[name]
    assert torch.equal(make_fx(f)(x)(2 * x), f(2 * x))
    assert torch.equal(torch.jit.trace(f, x, check_trace=False)(2 * x), f(2 * x))
    with FlopCounterMode(display=False):
        assert torch.equal(f(x), f(x.clone()))
    with torch.inference_mode():
        assert torch.equal(f(x.clone()), f(x))


@EACH
def test_forward_mode_is_refused(name: str) -> None:
    x, f = FUNCTIONS[name]
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(f, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        f(forward_ad.make_dual(x, x))


@ONCE
@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_derivative_is_refused(name: str, compiled: bool) -> None:
    x, f = FUNCTIONS[name]
    if compiled:
        f = make_fx(f)(x)  # the operators, without a compiler that refuses second derivatives itself
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    assert torch.equal(grad.detach(), plain(f, x))
    with pytest.raises(RuntimeError, match=f"{name}: differentiable once"):
        grad.square().sum().backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.hvp(f, x, torch.ones_like(x))
    if not compiled:
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.func.grad(lambda z: torch.func.grad(f)(z).sum())(x)


@EACH
@pytest.mark.parametrize("kind", ["reentrant", "plain", "selective"])
def test_checkpointing(name: str, kind: str) -> None:
    x, f = FUNCTIONS[name]
    more: dict[str, Any] = {"use_reentrant": kind == "reentrant"}
    if kind == "selective":
        keep = lambda *_, **__: CheckpointPolicy.MUST_SAVE  # noqa: E731
        more["context_fn"] = lambda: create_selective_checkpoint_contexts(keep)
    leaf = x.clone().requires_grad_()
    checkpoint(f, leaf, **more).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, plain(f, x))


@EACH
def test_saved_tensors_may_move_and_a_graph_runs_twice(name: str) -> None:
    x, f = FUNCTIONS[name]
    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        out = f(leaf)
    first = torch.autograd.grad(out, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, leaf)[0])
    assert torch.equal(first, plain(f, x))


@EACH
def test_a_batch_of_gradients_is_right_or_refused(name: str) -> None:
    x, f = FUNCTIONS[name]
    leaf = x.clone().requires_grad_()
    out = f(leaf)
    call = lambda: torch.autograd.grad(out, leaf, torch.tensor([1.0, 2.0]), is_grads_batched=True)[0]  # noqa: E731
    if name in ("linear_logps", "logps_from_logits", "dpp_gains"):
        with pytest.raises(ValueError, match=r"^grad: wanted one gradient"):
            call()
    else:
        assert torch.equal(call(), torch.stack([plain(f, x), 2 * plain(f, x)]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("keywords", [{"grad": "exact"}, {"grad": "sampled", "tau": 0.02}])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_around_backward_changes_nothing(backend: str, keywords: dict[str, Any], compiled: bool) -> None:
    def step(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return weighted(qf.linear_logps(h, w, T, backend=backend, entropy=True, **keywords).logps)

    for forward in (None, torch.bfloat16):
        torch._dynamo.reset()
        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        results = []
        for around in (None, torch.bfloat16, torch.float16):
            h, w = H.clone().requires_grad_(), W.clone().requires_grad_()
            torch.manual_seed(0)
            with nullcontext() if forward is None else torch.autocast("cpu", forward):
                out = run(h, w)
            with nullcontext() if around is None else torch.autocast("cpu", around):
                results.append(torch.autograd.grad(out, (h, w)))
        assert all(map(torch.equal, results[0], results[1]))
        assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_is_nothing_to_dpp(backend: str, compiled: bool, dtype: torch.dtype) -> None:
    """torch.cat of float16 and of float64 raised "Unexpected floating ScalarType in at::autocast::prioritize"."""

    def step(x: torch.Tensor) -> torch.Tensor:
        out = qf.dpp_gains(x, backend=backend)
        return (out.gains.double() * 0.3).sum() + out.logdet.double().sum()

    torch._dynamo.reset()
    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    results = []
    for autocast in (None, torch.bfloat16, torch.float16):
        x = E.detach().to(dtype).requires_grad_()
        with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            (grad,) = torch.autograd.grad(run(x), x)
            with torch.no_grad():
                results.append((step(x), grad))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


LAYOUTS = {
    "column": lambda x: torch.stack([x, torch.zeros_like(x)], -1)[..., 0],
    "expand": lambda x: x[:1].expand_as(x),
    "negated": lambda x: torch._neg_view(-x) if x.is_floating_point() else torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_takes_any_layout(layout: str) -> None:
    """Targets that were a column gave log-probs 6 nats off."""
    tensors = (H, W, T, W[:, 0], T + 0.5, L, R, ADVANTAGES, F, Z)
    given = [LAYOUTS[layout](x) for x in tensors]

    def step(h: Any, w: Any, t: Any, b: Any, u: Any, p: Any, old: Any, a: Any, f: Any, z: Any) -> torch.Tensor:
        total = qf.linear_logps(h, w, t, bias=b, temperature=u).logps.sum() + qf.logps_from_logits(z, t).logps.sum()
        total = total + qf.grpo_loss(p, old, a, CU, ref_token_logps=f, kl=0.1) + qf.segment_sum(p, CU).square().sum()
        return total + qf.dpp_logdet(h[None]).sum() + qf.dpo_loss(p, old, f, p.detach())

    want = step(*[x.resolve_neg().clone(memory_format=torch.contiguous_format) for x in given])
    torch.testing.assert_close(step(*given), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.compile(step, fullgraph=True, backend="aot_eager")(*given), want, rtol=1e-6, atol=0
    )


ops, ONE, LSE = torch.ops.qempo_fast, scalar(1.0), torch.zeros(6, 2)
_BACKWARD = (
    torch.zeros(0),
    torch.zeros(0, 30),
    torch.zeros(0, dtype=torch.int64),
    torch.zeros(0),
    torch.zeros(0),
    ONE,
    None,
    None,
    None,
    [True, True, False],
    -100,
    False,
    False,
    "cpu",
)
# Operators called by hand with what no public function lets through.
DIRECT: dict[str, tuple[str, Callable[[], Any]]] = {
    "targets short": (
        "targets",
        lambda: ops.linear_logps_fwd(H, W, None, T[:4], *[None] * 2, ONE, *[None] * 3, -100, *[False] * 5, 9, "cpu"),
    ),
    "weight wide": (
        "weight",
        lambda: ops.linear_logps_fwd(H, W[:, :5], None, T, *[None] * 2, ONE, *[None] * 3, -100, *[False] * 5, 9, "cpu"),
    ),
    "a float32 number": (
        "logit_scale",
        lambda: ops.linear_logps_fwd(
            H, W, None, T, *[None] * 2, ONE.float(), *[None] * 3, -100, *[False] * 5, 9, "cpu"
        ),
    ),
    "a seed that is no integer": (
        "seed",
        lambda: ops.linear_logps_fwd(H, W, None, T, None, ONE, ONE, *[None] * 3, -100, *[False] * 5, 9, "cpu"),
    ),
    "wide of float32": (
        "wide",
        lambda: ops.linear_logps_fwd(
            H, W, None, T, *[None] * 2, ONE, *[None] * 3, -100, *[False] * 3, True, False, 9, "cpu"
        ),
    ),
    "lse flat": ("lse", lambda: ops.linear_logps_bwd(torch.ones(6), None, H, W, None, T, None, LSE[:, 0], *_BACKWARD)),
    "grad short": ("grad", lambda: ops.linear_logps_bwd(torch.ones(3), None, H, W, None, T, None, LSE, *_BACKWARD)),
    "targets out": (
        "targets",
        lambda: ops.linear_logps_bwd(torch.ones(6), None, H, W, None, T + 99, None, LSE, *_BACKWARD),
    ),
    "lse of logits": (
        "lse",
        lambda: ops.logps_from_logits_bwd(torch.ones(6), None, Z, T, None, LSE[:4], LSE[:, 0], -100, "cpu"),
    ),
    "log_quality short": ("log_quality", lambda: ops.dpp_fwd(E, E[:, 1:, 0], None, ONE, True, "cpu")),
    "grad_gains": ("grad_gains", lambda: ops.dpp_bwd(None, E[:, 1:, 0], E, None, None, ONE, True, "cpu")),
    "n": ("n", lambda: ops.dpp_select(E, 9, None, None, ONE, "cpu")),
    "ref_chosen": ("ref_chosen", lambda: ops.pair_loss(L, R, F[:3], G, ONE, ONE, ONE, "mean", "cpu")),
    "rejected": ("rejected", lambda: ops.pair_loss(L, R.double(), F, G, ONE, ONE, ONE, "mean", "cpu")),
    "advantages": (
        "advantages",
        lambda: ops.token_loss(L, R, ADVANTAGES[:1], CU, None, *[ONE] * 3, "token", ONE, "clip", "cpu"),
    ),
    "values": ("values", lambda: ops.segment_sum(H, CU, "reference")),
}


@pytest.mark.parametrize("name", DIRECT)
def test_an_operator_names_what_it_cannot_take(name: str) -> None:
    argument, call = DIRECT[name]
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: wanted"):
        call()
