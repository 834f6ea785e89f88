"""torch.func's gradients of every public function are those of torch.autograd, and a second derivative is refused.

The calls are the fuzzer's, so that a new function is tested here without a line; those of one tensor, vmap and jacrev
are in test_traced.py.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fuzz.functions import FUNCTIONS
from fuzz.modes import tensors

import qempo_fast as qf

Arguments = dict[str, Any]
POLICIES = {name: function for name, function in FUNCTIONS.items() if function.policy}
WIDE = (torch.float32, torch.float64)
CALLS = 4


def leaves(name: str, arguments: Arguments) -> dict[str, torch.Tensor]:
    given = ((key, arguments.get(key)) for key in POLICIES[name].policy)
    return {key: x for key, x in given if isinstance(x, torch.Tensor)}


def draws(name: str) -> Iterator[Arguments]:
    """Calls in float32 and float64 whose policy is not empty."""
    for seed in itertools.count():
        arguments = POLICIES[name].make(seed)
        if all(x.numel() and x.dtype in WIDE for x in leaves(name, arguments).values()):
            yield arguments


def scalar(name: str, arguments: Arguments, keys: tuple[str, ...]) -> Callable[..., torch.Tensor]:
    """A sum of all that the call gives, each entry with a weight of its own, as a function of the arguments keys."""

    def total(*given: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():  # Dynamo traces no seed
            torch.manual_seed(7)  # what grad="sampled" draws
        values = tensors(POLICIES[name].call(**{**arguments, **dict(zip(keys, given, strict=True))}))
        return sum(((v * torch.arange(1.0, v.numel() + 1, dtype=v.dtype).view_as(v).cos()).sum() for v in values
                    if v.is_floating_point()), torch.zeros((), dtype=torch.float64))  # fmt: skip

    return total


def choices(name: str, arguments: Arguments) -> set[tuple[str, ...]]:
    """Each tensor of the policy alone, and all of them."""
    every = leaves(name, arguments)
    return {*((key,) for key in every), tuple(every)}


def problem(name: str, arguments: Arguments, keys: tuple[str, ...]) -> tuple[Any, tuple[torch.Tensor, ...], Any]:
    """The scalar, where it is taken, and argnums."""
    return scalar(name, arguments, keys), tuple(arguments[key] for key in keys), tuple(range(len(keys)))


def wanted(total: Callable[..., torch.Tensor], given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    fresh = [x.clone().requires_grad_() for x in given]
    return torch.autograd.grad(total(*fresh), fresh, materialize_grads=True)


def same(found: Any, want: Any) -> None:
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


def compare(name: str, arguments: Arguments) -> bool:
    """By each tensor alone, where other kernels may run, and by all at once; whether a gradient is other than 0."""
    some = False
    for keys in choices(name, arguments):
        total, given, which = problem(name, arguments, keys)
        want, value = wanted(total, given), total(*given)
        same(torch.func.grad(total, argnums=which)(*given), want)
        same(torch.func.grad_and_value(total, argnums=which)(*given), (want, value))
        found, pull = torch.func.vjp(total, *given)
        same((pull(torch.ones_like(found)), found), (want, value))
        if len(keys) == 1:
            same(torch.func.grad(total)(*given), want[0])
        some = some or any(bool(g.any()) for g in want)
    return some


@pytest.mark.parametrize("name", POLICIES)
def test_gradients(name: str) -> None:
    assert any([compare(name, arguments) for arguments in itertools.islice(draws(name), CALLS)])


def sampled(x: Arguments) -> bool:
    return x["grad"] == "sampled" and x.get("tau") is not None and x["weight"].shape[0] >= 200


FEATURES: dict[str, tuple[str, Callable[[Arguments], Any]]] = {
    "entropy": ("linear_logps", lambda x: x["grad"] == "exact" and x["entropy"] and x["sum_sq"]),
    "columns": ("linear_logps", lambda x: "columns" in x and x["lse"]),
    "sampled": ("linear_logps", sampled),
    "sampled sequences": ("sequence_logps", sampled),
    "bias": ("linear_logps", lambda x: "bias" in x and x["softcap"] and isinstance(x["temperature"], torch.Tensor)),
    "batch_invariant": ("linear_logps", lambda x: x["batch_invariant"]),
    "logits_dtype": ("linear_logps", lambda x: "logits_dtype" in x),
    "kept sets": ("Support", lambda x: x["entropy"]),
    "weights of entropy": ("weighted_logps", lambda x: "coef_entropy" in x),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_of_options(feature: str) -> None:
    """What the first calls of test_gradients may have left out."""
    name, has = FEATURES[feature]
    assert any(compare(name, x) for x in itertools.islice(filter(has, draws(name)), CALLS))


def test_gradients_of_logits_over_sets() -> None:
    z = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    support = qf.Support.from_logits(z, 0.8)
    targets = z.argmax(1)

    def total(z: torch.Tensor) -> torch.Tensor:
        out = qf.logps_from_logits(z, targets, support=support, entropy=True)
        return (out.logps * torch.arange(1, 6)).sum() + out.entropy.square().sum()

    same(torch.func.grad_and_value(total)(z), (*wanted(total, (z,)), total(z)))
    assert torch.func.grad(total)(z).any()


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "segment_sum"])
def test_a_second_derivative_is_refused(name: str) -> None:
    for arguments in itertools.islice(draws(name), CALLS):
        for keys in choices(name, arguments):
            total, given, which = problem(name, arguments, keys)

            def squares(*x: torch.Tensor, total: Any = total, which: tuple[int, ...] = which) -> torch.Tensor:
                return sum((g.square().sum() for g in torch.func.grad(total, argnums=which)(*x)), torch.zeros(()))

            with pytest.raises(RuntimeError, match="differentiable once, and a second derivative was asked for"):
                torch.func.grad(squares, argnums=which)(*given)


def test_a_second_derivative_of_a_sum_is_zero() -> None:
    x, offsets = torch.arange(5.0), torch.tensor([0, 2, 5])

    def powers(x: torch.Tensor, n: int) -> torch.Tensor:
        return (qf.segment_sum(x, offsets) ** n).sum()

    twice = (torch.func.jacrev(torch.func.jacrev(functools.partial(powers, n=n))) for n in (2, 1))
    block = torch.block_diag(torch.full((2, 2), 2.0), torch.full((3, 3), 2.0))
    same([f(x) for f in twice], [block, torch.zeros(5, 5)])


def test_gradients_through_vmap() -> None:
    """vmap says of its tensors that they require no gradient, whatever the transform around it wants."""
    draw = torch.Generator().manual_seed(3)
    hidden, weight, coef = (torch.randn(*n, generator=draw, dtype=torch.float64) for n in ((3, 4, 8), (20, 8), (4,)))
    targets, columns = torch.arange(4), torch.arange(8).view(4, 2)

    def weighted(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return qf.weighted_logps(h, w, targets, coef).loss

    def scores(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = qf.linear_logps(h, w, targets, columns=columns, lse=True, mean_logits=True, label_smoothing=0.1)
        return sum((x.square().sum() for x in out if x is not None), torch.zeros(()))

    for one in (weighted, scores):

        def total(h: torch.Tensor, w: torch.Tensor, one: Any = one) -> torch.Tensor:
            return torch.vmap(one, (0, None))(h, w).sum()

        want = wanted(lambda h, w, one=one: sum((one(x, w) for x in h), torch.zeros(())), (hidden, weight))
        torch.testing.assert_close(torch.func.grad(total, argnums=(0, 1))(hidden, weight), want)
        torch.testing.assert_close(torch.vmap(torch.func.grad(one), (0, None))(hidden, weight), want[0])


# One for each way to an operator.
COMPILED = ("linear_logps", "weighted_logps", "Support", "logps_from_logits", "segment_sum", "dpp_gains", "dpo_loss",
            "qempo_loss", "variance_loss", "grpo_loss")  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str) -> None:
    """The transform within what is compiled, as Liger's losses have it."""
    torch._dynamo.reset()
    arguments = next(draws(name))
    total, given, which = problem(name, arguments, tuple(leaves(name, arguments)))
    function = torch.func.grad_and_value(total, argnums=which)
    same(torch.compile(function, fullgraph=True, backend="aot_eager")(*given), function(*given))
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"entropy": True}, {"grad": "sampled", "tau": 0.05}], ids=str)
def test_compiled_by_one_tensor_of_a_head(options: Arguments) -> None:
    draw = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(rows, 8, generator=draw, dtype=torch.float64) for rows in (2 * 20, 300))

    def total(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = qf.linear_logps(hidden.view(2, 20, 8), weight, torch.arange(40).view(2, 20), **options)
        return (out.logps if out.entropy is None else out.logps + out.entropy.square()).square().sum()

    for which in (0, 1):
        function = torch.func.grad_and_value(total, argnums=which)
        results = []
        for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            torch._dynamo.reset()
            torch.manual_seed(7)
            results.append(run(hidden, weight))
        torch.testing.assert_close(*results)
        assert results[0][0].any()


@pytest.mark.parametrize("name", ["linear_logps", "qempo_loss"])
def test_a_second_derivative_is_refused_where_compiled(name: str) -> None:
    torch._dynamo.reset()
    arguments = next(draws(name))
    total, given, _ = problem(name, arguments, tuple(leaves(name, arguments)))
    outer = torch.func.grad(lambda *x: torch.func.grad(total)(*x).square().sum())
    with pytest.raises(Exception, match="differentiable once, and a second derivative was asked for"):
        torch.compile(outer, fullgraph=True, backend="aot_eager")(*given)
    torch._dynamo.reset()
