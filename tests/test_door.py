"""The door to native code: nothing takes an address but _door.py, and nothing that it lets through reads elsewhere."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fuzz.kinds import Plain, Wrapper

import qempo_fast as qf
from qempo_fast import _C, _door

# MaskedTensor and nested tensors say that they are prototypes.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API")
ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted(
    p for folder in ("qempo_fast", "kernels") for p in (ROOT / folder).rglob("*.py") if "kernels" not in p.parts[:-2]
)
# What makes a tensor whose dtype or device is the process's default where it is not told. Of numbers that are there
# already, torch.tensor and arange of ints have a dtype of their own; the device is the default one all the same.
FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "eye", "linspace", "logspace", "tensor", "arange")
FACTORIES += ("randint", "randperm", "scalar_tensor")


def calls(path: Path) -> Iterator[ast.Call]:
    return (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call))


def test_addresses_are_taken_in_one_place() -> None:
    takers = {p.relative_to(ROOT).as_posix() for p in LIBRARY if "data_ptr" in p.read_text(encoding="utf-8")}
    assert takers == {"qempo_fast/_door.py"}


def test_no_tensor_is_made_of_the_defaults_of_the_process() -> None:
    wrong = []
    for path in LIBRARY:
        for call in calls(path):
            made = ast.unparse(call.func)
            given = {k.arg for k in call.keywords}
            if not made.startswith("torch.") or made.removeprefix("torch.") not in FACTORIES or None in given:
                continue
            if missing := {"dtype", "device"} - given:
                wrong.append(f"{path.relative_to(ROOT)}:{call.lineno}: {made} without {' and '.join(sorted(missing))}")
    assert not wrong, "\n".join(wrong)


def freed(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out.untyped_storage().resize_(0)
    return out


def mask(x: torch.Tensor) -> torch.Tensor:
    return torch.masked.masked_tensor(x, torch.ones(x.shape, dtype=torch.bool))


def apart(x: torch.Tensor) -> torch.Tensor:
    """Every second entry of a tensor twice as wide."""
    return torch.stack([x, torch.full_like(x, 7)], -1).flatten(-2)[..., ::2]


# The same values, lying otherwise.
SAME: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "apart": apart,
    "transposed": lambda x: x.t().contiguous().t() if x.ndim == 2 else apart(x),
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "negated": lambda x: torch._neg_view(-x) if x.is_floating_point() else x,
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=x.is_floating_point()),
    "subclass": lambda x: x.as_subclass(Plain),
    "inference": lambda x: torch.inference_mode()(x.clone)(),
}
# Not values that can be read.
REFUSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "wrapper": Wrapper,
    "masked": mask,
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x.flatten(), x.flatten()[:1]]),
    "freed": freed,
    "number": lambda x: 1.0,  # type: ignore[dict-item,return-value]
}
G = torch.Generator().manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=G)


OFFSETS, CU = torch.tensor([0, 3, 4, 8]), torch.tensor([0, 2, 2, 8], dtype=torch.int32)
REWARDS = draw(8)
# Public functions of tensors alone: (function, arguments by name).
CASES: dict[str, tuple[Callable[..., object], dict[str, torch.Tensor]]] = {
    "dpo_loss": (qf.dpo_loss, dict(zip(("chosen", "rejected", "ref_chosen", "ref_rejected"), draw(4, 6), strict=True))),
    "gvpo_loss": (
        lambda **kw: qf.gvpo_loss(**kw, group_size=4),
        {"logps": draw(8), "ref_logps": draw(8), "rewards": REWARDS},
    ),
    "qempo_loss, baseline none": (
        lambda **kw: qf.qempo_loss(**kw, lam=2.0, baseline="none"),
        {"logps": draw(8), "rewards": REWARDS, "offsets": OFFSETS},
    ),
    "rspo_loss": (lambda **kw: qf.rspo_loss(**kw, k=2, group_size=4), {"logps": draw(8), "rewards": REWARDS}),
    "epa_loss": (
        qf.epa_loss,
        {"positive": draw(3), "strong": draw(3, 4), "weak": draw(3, 2)}
        | {"ref_positive": draw(3), "ref_strong": draw(3, 4), "ref_weak": draw(3, 2)},
    ),
    "poft_loss": (
        qf.poft_loss,
        {"logps": draw(5), "lengths": draw(5).abs() + 1, "aligned_mean_logps": draw(5, 2)},
    ),
    "grpo_loss": (
        lambda **kw: qf.grpo_loss(**kw, kl=0.1),
        {"token_logps": draw(8), "old_token_logps": draw(8), "advantages": draw(3), "cu_seqlens": CU}
        | {"ref_token_logps": draw(8)},
    ),
    "dqo_loss": (
        lambda **kw: qf.dqo_loss(**kw, group_size=4, beta=0.1),
        {"logps": draw(8), "rewards": REWARDS, "embeddings": draw(8, 5), "ref_logps": draw(8)},
    ),
    "group_advantages": (lambda **kw: qf.group_advantages(**kw, group_size=4), {"rewards": REWARDS}),
    "dpp_gains": (
        lambda **kw: qf.dpp_gains(**kw).gains,
        {"embeddings": draw(8, 5), "log_quality": draw(8), "offsets": OFFSETS},
    ),
    "dpp_select": (lambda **kw: qf.dpp_select(**kw, n=1), {"embeddings": draw(8, 5), "offsets": OFFSETS}),
    "linear_logps": (
        lambda **kw: qf.linear_logps(**kw).logps,
        {"hidden": draw(6, 8), "weight": draw(40, 8), "targets": torch.arange(6), "bias": draw(40)}
        | {"temperature": draw(6).abs() + 0.5},
    ),
    "linear_logps, sampled": (
        lambda **kw: qf.linear_logps(**kw, grad="sampled").logps,
        {"hidden": draw(6, 8), "weight": draw(40, 8), "targets": torch.arange(6), "bias": draw(40)},
    ),
    "logps_from_logits": (
        lambda **kw: qf.logps_from_logits(**kw, entropy=True).entropy,
        {"logits": draw(6, 20), "targets": torch.arange(6), "temperature": draw(6).abs() + 0.5},
    ),
    "segment_sum": (qf.segment_sum, {"values": draw(8), "cu_seqlens": CU}),
}
EACH = [(case, name) for case, (_, args) in CASES.items() for name in args]


def outcome(function: Callable[..., object], args: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The result, and its gradients by every argument that can have one."""
    leaves = {n: x for n, x in args.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    torch.manual_seed(1)
    out = function(**args)
    assert isinstance(out, torch.Tensor)
    if not leaves or not out.requires_grad:
        return [out.detach()]
    grads = torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True)
    return [out.detach(), *[torch.zeros(()) if g is None else g for g in grads]]


def differentiable(args: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in args.items()}


@pytest.mark.parametrize(("case", "name"), EACH)
def test_how_a_tensor_lies_does_not_matter(case: str, name: str) -> None:
    function, args = CASES[case]
    right = outcome(function, differentiable(args))
    for how, lie in SAME.items():
        if how == "inference":
            given = args | {name: lie(args[name])}
            assert torch.equal(outcome(function, given)[0], right[0]), how
            continue
        given = differentiable(args)
        given[name] = lie(given[name])
        if given[name].is_floating_point() and not given[name].is_leaf:
            given[name].retain_grad()
        for got, want in zip(outcome(function, given), right, strict=True):
            torch.testing.assert_close(got.as_subclass(torch.Tensor), want, rtol=1e-5, atol=1e-6, msg=how)


@pytest.mark.parametrize(("case", "name"), EACH)
def test_what_cannot_be_read_is_refused_by_name(case: str, name: str) -> None:
    function, args = CASES[case]
    for how, spoil in REFUSED.items():
        if name == "temperature" and how == "number":
            continue
        with pytest.raises((TypeError, ValueError)) as error:
            function(**{**args, name: spoil(args[name])})
        assert str(error.value).startswith(f"{name}:"), (how, str(error.value))


@pytest.mark.parametrize("case", CASES)
def test_the_defaults_of_the_process_do_not_matter(case: str) -> None:
    function, args = CASES[case]
    right = outcome(function, differentiable(args))
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            got = outcome(function, differentiable(args))
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True)), dtype
    given = differentiable(args)
    torch.set_default_device("meta")
    try:
        got = function(**given)
    finally:
        torch.set_default_device(None)
    torch.manual_seed(1)
    assert isinstance(got, torch.Tensor)
    assert torch.equal(got.detach(), right[0])


def test_a_half_precision_step_under_another_default_dtype() -> None:
    # The float32 sums of dweight were made in the default dtype: half the bytes that native code writes.
    w = (draw(4000, 64) / 8).half().requires_grad_()
    h = w[:64].detach().requires_grad_()

    def dweight(default: torch.dtype) -> torch.Tensor:
        torch.set_default_dtype(default)
        try:
            torch.manual_seed(1)
            out = qf.linear_logps(h, w, torch.arange(64), grad="sampled").logps.sum()
            return torch.autograd.grad(out, w)[0]
        finally:
            torch.set_default_dtype(torch.float32)

    right = dweight(torch.float32)
    assert torch.equal(dweight(torch.float64), right)
    assert torch.equal(dweight(torch.bfloat16), right)


def test_the_sampled_gradient_of_a_head_that_lies_otherwise() -> None:
    weight, targets = draw(20000, 24), torch.arange(300)

    def dhidden(w: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        h = weight[:300].clone().requires_grad_()
        return torch.autograd.grad(qf.linear_logps(h, w, targets, grad="sampled").logps.sum(), h)[0]

    right = dhidden(weight)
    for w in (weight.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :24], torch._neg_view(-weight)):
        # From the wrong places it was 14 times as large as it is, or NaN.
        assert float((dhidden(w) - right).norm()) < 1e-5 * float(right.norm())


# Made in the test: to print a freed tensor reads its memory.
WRONG: dict[str, Callable[[], torch.Tensor]] = {
    "strides": lambda: draw(4, 2)[:, 0],
    "dtype": lambda: draw(4).double(),
    "count": lambda: draw(5),
    "freed": lambda: freed(draw(4)),
    "meta": lambda: torch.empty(4, device="meta"),
    "wrapper": lambda: Wrapper(draw(4)),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_address_is_not_taken_of_anything_else(what: str) -> None:
    for take in (_door.address, _door.maybe):
        with pytest.raises(_door.Unreadable, match="native code wants 4 entries"):
            take(WRONG[what](), torch.float32, 4)


def test_absent_is_not_empty() -> None:
    assert _door.maybe(None, torch.float32, 4) is None
    assert _door.maybe(torch.empty(0), torch.float32, 0) is not None
    assert _door.dense("x", None) is None


def test_an_empty_reference_is_not_taken_for_an_absent_one() -> None:
    none = torch.empty(0)
    assert float(qf.dpo_loss(none, none, none, none, reduction="sum")) == 0
    assert math.isfinite(float(qf.dpo_loss(none, none, none, none)))


def test_results_of_a_collective_are_waited_for() -> None:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    for case, (function, args) in CASES.items():
        right = outcome(function, args)[0]
        torch.manual_seed(1)
        got = function(**{n: AsyncCollectiveTensor(x) for n, x in args.items()})
        assert isinstance(got, torch.Tensor)
        assert torch.equal(torch.as_tensor(got + 0), right), case


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_seen_from_c_is_seen_in_python(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a torch without DLPack's exchange table."""
    function, args = CASES[case]
    right = outcome(function, differentiable(args))
    for look in ("fits", "alike", "all_dense"):
        monkeypatch.setattr(_C, look, lambda *_: False)
    assert all(map(torch.equal, outcome(function, differentiable(args)), right))


def test_what_is_seen_from_c() -> None:
    x, floats = draw(4, 6), (torch.float32, torch.float64)
    assert _C.fits(x.t(), floats, 2, (6, -1))
    assert _C.fits(x[:0], floats, None, x[:0].shape)
    assert not any(
        _C.fits(*given)
        for given in (
            (x, (torch.float64,), 2, None),
            (x, floats, 1, None),
            (x, floats, None, (4, 5)),
            (x, floats, None, (4,)),
            (x, floats, None, (4, 2**70)),
            (1.0, floats, None, None),
            (x.to("meta"), floats, None, None),
        )
    )
    assert _C.alike((x, None, x.t()), floats, False)
    assert _C.alike((x[0], None, x[1]), floats, True)
    assert not _C.alike((x[0], x[:, 0]), floats, True)
    assert not _C.alike((x[0], x[0].double()), floats, False)
    assert not _C.alike((None, x), floats, False)
    assert not _C.alike((), floats, False)
    assert _C.all_dense([x, None, x[1:]])
    assert not _C.all_dense([x, x.t()])
    for spoil in REFUSED.values():
        spoilt = spoil(x)
        assert not _C.fits(spoilt, floats, None, None)
        assert not _C.all_dense([spoilt]) or not spoilt.untyped_storage().nbytes()
    for same in ("negated", "parameter", "subclass"):
        assert not _C.all_dense([SAME[same](x)]), same


def test_what_is_seen_from_c_inside_a_transform() -> None:
    """A wrapper there has the type of a plain tensor, and no memory of its own."""
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((_C.fits(x, (torch.float32,), None, None), _C.alike((x,), (torch.float32,), False)))
        seen.append((_C.all_dense([x]), False))
        return x.sum()

    torch.func.vmap(look)(draw(3, 4))
    torch.func.grad(look)(draw(4))
    assert seen == [(False, False)] * 4
