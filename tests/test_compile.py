"""torch.compile takes every op and loss in one graph, with the eager results, gradients and errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
import torch.distributed as dist

import qempo_fast as qf
from qempo_fast._operator import scalar
from qempo_fast.logps.op import chunk_rows

Tensors = tuple[torch.Tensor, ...]
DPP, LINEAR = torch.ops.qempo_fast.dpp_fwd, torch.ops.qempo_fast.linear_logps_fwd
ROWS = chunk_rows(torch.device("cpu"), "cpu")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(function: Callable[..., torch.Tensor], args: Tensors) -> list[torch.Tensor]:
    """The scalar and its gradient with respect to every floating argument that reaches it."""
    own = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in args]
    torch.manual_seed(3)
    out = function(*own)
    grads = torch.autograd.grad(out, [a for a in own if a.requires_grad], allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


def assert_same(mine: list[torch.Tensor], eager: list[torch.Tensor], bitwise: bool) -> None:
    assert len(eager) == len(mine) > 1
    for number, (value, truth) in enumerate(zip(mine, eager, strict=True)):
        assert value.dtype == truth.dtype
        assert value.device == truth.device
        assert truth.isfinite().all()
        if bitwise:
            # The same kernels on the same numbers.
            assert torch.equal(value, truth), number
        else:
            # Inductor sums in another order and keeps half precision in float32 between its own steps.
            eps = torch.finfo(truth.dtype).eps
            torch.testing.assert_close(value, truth, rtol=16 * eps, atol=16 * eps * float(truth.abs().max()))


def assert_compiles(function: Callable[..., torch.Tensor], args: Tensors, backend: str) -> None:
    compiled = results(torch.compile(function, fullgraph=True, backend=backend), args)
    assert_same(compiled, results(function, args), backend == "aot_eager")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tokens(n: int, vocabulary: int, ignored: int = 5) -> torch.Tensor:
    out = torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(1))
    out[::ignored] = -100
    return out


def diversity(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """rest: log_quality, then offsets."""
    named = {"offsets" if r.dtype == torch.int64 else "log_quality": r for r in rest}
    out = qf.dpp_gains(x, **named, ridge=0.7)
    return (out.gains * out.baselines).sum() + out.logdet.square().sum()


def scored(out: Any) -> torch.Tensor:
    """A scalar in which every row's log-prob and entropy has its own weight."""
    # arange: linspace makes a constant of its length, and a graph for each.
    total = (out.logps * (torch.arange(out.logps.shape[0], device=out.logps.device) % 7 - 3)).sum()
    return total if out.entropy is None else total + out.entropy.square().sum()


def head(**keywords: Any) -> Callable[..., torch.Tensor]:
    def run(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        return scored(qf.linear_logps(h, w, t, bias=bias[0] if bias else None, **keywords))

    return run


def sequences(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
    out = qf.sequence_logps(h, w, t, cu, average=True, entropy=True)
    return (out.logps * out.lengths).sum() + out.entropy.sum()


def over_sets(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    support = qf.Support(ids, ends)
    return scored(qf.linear_logps(h, w, t, support=support, entropy=True, softcap=5.0, temperature=0.8))


def kept(targets: torch.Tensor) -> Tensors:
    """ids and offsets of sets that hold the target and two tokens more."""
    return tuple(qf.Support.from_lists([sorted({max(t, 0), 0, 7}) for t in targets.tolist()]))


RAGGED = torch.tensor([0, 2, 5, 9])
CU = torch.tensor([0, 3, 3, 40, 60])
OPS: dict[str, tuple[Callable[..., torch.Tensor], Tensors]] = {
    "dpp": (diversity, (draw(5, 4, 8),)),
    "dpp, float64 and quality": (
        diversity,
        (draw(5, 4, 8, dtype=torch.float64), draw(5, 4, seed=1, dtype=torch.float64)),
    ),
    "dpp, ragged and quality": (diversity, (draw(9, 8), draw(9, seed=1), RAGGED)),
    "dpp, bfloat16, ragged": (diversity, (draw(9, 8, dtype=torch.bfloat16), RAGGED)),
    "dpp, a group beyond the native kernel": (diversity, (draw(2, 70, 80),)),
    "dpp_logdet": (lambda x: qf.dpp_logdet(x, normalize=False).sum(), (draw(3, 4, 8),)),
    "head, exact": (head(), (draw(37, 8), draw(101, 8, seed=1), tokens(37, 101), draw(101, seed=2))),
    "head, entropy, softcap, temperature": (
        head(entropy=True, sum_sq=True, softcap=5.0, logit_scale=0.7, temperature=0.8),
        (draw(37, 8), draw(101, 8, seed=1), tokens(37, 101), draw(101, seed=2)),
    ),
    # Few columns are targets, which are always kept, and few rows reach tau.
    "head, sampled, three row chunks": (
        head(grad="sampled", tau=0.9),
        (draw(1300, 4), draw(257, 4, seed=1), tokens(1300, 20)),
    ),
    "head, sampled, entropy": (
        head(grad="sampled", tau=0.9, entropy=True),
        (draw(600, 4), draw(257, 4, seed=1), tokens(600, 20)),
    ),
    "head, bfloat16, threshold chosen": (
        head(grad="sampled"),
        (draw(37, 8, dtype=torch.bfloat16), draw(101, 8, seed=1, dtype=torch.bfloat16), tokens(37, 101)),
    ),
    "head, float32 logits": (
        head(logits_dtype=torch.float32, entropy=True),
        (draw(37, 8, dtype=torch.bfloat16), draw(101, 8, seed=1, dtype=torch.bfloat16), tokens(37, 101)),
    ),
    "head, all rows ignored": (head(entropy=True), (draw(4, 8), draw(11, 8, seed=1), tokens(4, 11, 1))),
    "logits": (lambda z, t: scored(qf.logps_from_logits(z, t)), (draw(13, 29), tokens(13, 29))),
    "logits, entropy, temperature": (
        lambda z, t, u: scored(qf.logps_from_logits(z, t, entropy=True, temperature=u.detach().exp())),
        (draw(13, 29), tokens(13, 29), draw(13, seed=1)),
    ),
    "head, kept sets": (over_sets, (draw(37, 8), draw(101, 8, seed=1), tokens(37, 101), *kept(tokens(37, 101)))),
    "logits, kept sets": (
        lambda z, t, i, o: scored(qf.logps_from_logits(z, t, support=qf.Support(i, o), entropy=True)),
        (draw(13, 29), tokens(13, 29), *kept(tokens(13, 29))),
    ),
    "segment_sum, an empty segment": (lambda v, cu: qf.segment_sum(v, cu).square().sum(), (draw(60), CU)),
    "weighted_sequence_logps": (
        lambda h, w, t, cu: qf.weighted_sequence_logps(h, w, t, cu, torch.ones(len(cu) - 1), average=True).loss,
        (draw(60, 8), draw(31, 8, seed=1), tokens(60, 31), CU),
    ),
    "sequence_logps": (sequences, (draw(60, 8), draw(31, 8, seed=1), tokens(60, 31), CU)),
}
# Inductor builds C++ for each graph: one of each op.
INDUCTOR = [
    "dpp, ragged and quality",
    "head, sampled, entropy",
    "head, kept sets",
    "logits",
    "segment_sum, an empty segment",
]


@pytest.mark.parametrize(("name", "backend"), [(n, "aot_eager") for n in OPS] + [(n, "inductor") for n in INDUCTOR])
def test_ops_in_one_graph(name: str, backend: str) -> None:
    # Inductor has a generator of its own; the sampled columns are the eager ones only where it takes torch's.
    with torch._inductor.config.patch(fallback_random=True):
        assert_compiles(*OPS[name], backend)


def test_a_seed_repeats_a_compiled_step() -> None:
    function, args = OPS["head, sampled, entropy"]
    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    first, second = results(compiled, args), results(compiled, args)
    assert all(map(torch.equal, first, second))


def test_the_sampled_case_samples() -> None:
    function, args = OPS["head, sampled, three row chunks"]
    exact = results(head(grad="exact"), args)
    sampled = results(function, args)
    assert torch.equal(exact[0], sampled[0])
    assert not torch.allclose(exact[2], sampled[2], rtol=1e-3)


SCORES = (draw(12), draw(12, seed=1), draw(12, seed=2))
LOSSES: dict[str, tuple[Callable[..., torch.Tensor], Tensors]] = {
    "spl": (lambda p, f, r: qf.spl_loss(p, f, r, group_size=4, alpha=0.2, beta=0.1), SCORES),
    "qempo": (lambda p, f, r: qf.qempo_loss(p, r, group_size=4, lam=2.0), SCORES),
    "qempo_kl": (lambda p, f, r: qf.qempo_kl_loss(p, f, r, group_size=4, lam=2.0, mu=0.3, baseline="mean"), SCORES),
    "gvpo": (lambda p, f, r: qf.gvpo_loss(p, f, r, group_size=4), SCORES),
    "rspo": (lambda p, f, r: qf.rspo_loss(p, r, k=2, group_size=4), SCORES),
    "dqo": (lambda p, r, e: qf.dqo_loss(p, r, e, group_size=4), (*SCORES[:2], draw(12, 6))),
    "qempo, ragged": (lambda p, r, o: qf.qempo_loss(p, r, offsets=o, lam=2.0), (*SCORES[:2], torch.tensor([0, 5, 12]))),
    "dqo, ragged": (
        lambda p, r, e, o: qf.dqo_loss(p, r, e, offsets=o),
        (*SCORES[:2], draw(12, 6), torch.tensor([0, 5, 12])),
    ),
    "dpo": (lambda p, f, r: qf.dpo_loss(p, f, r, f * 2), SCORES),
    "poft": (lambda p, a: qf.poft_loss(p, torch.full((12,), 7, device=p.device), a), (SCORES[0], draw(12, 3))),
    "grpo": (
        lambda p, o, a, cu: qf.grpo_loss(p, o, a, cu, ref_token_logps=o * 0.5, kl=0.1, ratio="sequence"),
        (*SCORES[:2], draw(2), torch.tensor([0, 5, 12])),
    ),
}


@pytest.mark.parametrize(("name", "backend"), [(n, "aot_eager") for n in LOSSES] + [("dqo", "inductor")])
def test_losses_in_one_graph(name: str, backend: str) -> None:
    assert_compiles(*LOSSES[name], backend)


@dataclass(frozen=True)
class Op:
    """One call of a registered operator."""

    op: Any
    args: tuple[Any, ...]


def linear(dtype: torch.dtype, tau: float | None, entropy: bool, *flags: bool) -> Op:
    """flags: slopes, wide, fixed."""
    slopes, wide, fixed = (*flags, *[False] * (3 - len(flags)))
    h, w, b = (draw(*s, dtype=dtype).requires_grad_(not (i and slopes)) for i, s in enumerate(((9, 4), (31, 4), (31,))))
    seed = None if tau is None else torch.tensor(7)
    head = (h, w, b, tokens(9, 31), None, seed, scalar(1.0), None, scalar(tau), None)
    return Op(LINEAR, (*head, -100, entropy, entropy, slopes, wide, fixed, ROWS, "cpu"))


def weighted(dtype: torch.dtype, tau: float | None) -> Op:
    h, w, b = (draw(*s, dtype=dtype).requires_grad_() for s in ((9, 4), (31, 4), (31,)))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    rows = (tokens(9, 31), None, draw(9, dtype=acc), None if tau is None else draw(9, dtype=acc))
    numbers = (None if tau is None else torch.tensor(7), scalar(1.0), None, scalar(tau), None)
    return Op(
        torch.ops.qempo_fast.weighted_logps, (h, w, b, *rows, *numbers, -100, False, False, True, True, True, "cpu")
    )


def grad(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return draw(*shape, dtype=dtype).requires_grad_()


CHECKED = {
    "dpp": lambda: Op(DPP, (grad(5, 4, 8), None, None, scalar(1.0), True, "cpu")),
    "dpp, reference": lambda: Op(DPP, (grad(5, 4, 8), grad(5, 4), None, scalar(1.0), True, "reference")),
    "dpp, ragged float64": lambda: Op(
        DPP, (grad(9, 8, dtype=torch.float64), grad(9), RAGGED, scalar(0.5), False, "cpu")
    ),
    "dpp, ragged reference": lambda: Op(DPP, (grad(9, 8), None, RAGGED.int(), scalar(0.5), True, "reference")),
    "dpp_select": lambda: Op(torch.ops.qempo_fast.dpp_select, (draw(9, 8), 2, None, RAGGED, scalar(1.0), "reference")),
    "linear_logps, exact": lambda: linear(torch.float32, None, False),
    "linear_logps, exact entropy": lambda: linear(torch.float64, None, True),
    "linear_logps, frozen head": lambda: linear(torch.float16, None, True, True),
    "linear_logps, float32 logits": lambda: linear(torch.bfloat16, None, True, False, True),
    "linear_logps, float32 logits, sampled": lambda: linear(torch.bfloat16, 0.1, True, False, True),
    "linear_logps, float32 logits, frozen head": lambda: linear(torch.bfloat16, None, True, True, True),
    "linear_logps, batch invariant": lambda: linear(torch.float32, None, True, False, False, True),
    "linear_logps, sampled": lambda: linear(torch.float32, 0.1, True),
    "weighted_logps": lambda: weighted(torch.float32, None),
    "weighted_logps, float16": lambda: weighted(torch.float16, None),
    "weighted_logps, sampled": lambda: weighted(torch.float32, 0.1),
    "logps_from_logits": lambda: Op(
        torch.ops.qempo_fast.logps_from_logits_fwd, (grad(9, 31), tokens(9, 31), None, -100, True, "cpu")
    ),
    "support_logps": lambda: Op(
        torch.ops.qempo_fast.support_logps_fwd,
        (
            grad(9, 4),
            grad(31, 4),
            grad(31),
            *kept(tokens(9, 31)),
            tokens(9, 31),
            None,
            scalar(1.0),
            None,
            -100,
            True,
            True,
            False,
            "cpu",
        ),
    ),
    "support_from_logits": lambda: Op(
        torch.ops.qempo_fast.support_from_logits_fwd,
        (grad(9, 31), *kept(tokens(9, 31)), tokens(9, 31), None, -100, True, "cpu"),
    ),
    "segment_sum": lambda: Op(torch.ops.qempo_fast.segment_sum, (grad(60), CU, "reference")),
    "values": lambda: Op(torch.ops.qempo_fast.values, ("rewards", draw(4), "finite")),
    "groups": lambda: Op(torch.ops.qempo_fast.groups, (9, RAGGED, 2, None)),
    "offsets": lambda: Op(torch.ops.qempo_fast.offsets, ("cu_seqlens", CU, 60)),
}


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name: str) -> None:
    call = CHECKED[name]()
    assert set(torch.library.opcheck(call.op, call.args).values()) == {"SUCCESS"}


NAN = torch.full((2, 3, 4), torch.nan)
ERRORS: dict[str, tuple[Callable[..., Any], Tensors, str]] = {
    "embeddings": (qf.dpp_gains, (NAN,), "embeddings: wanted finite values, got 24"),
    "offsets": (lambda x, o: qf.dpp_gains(x, offsets=o), (draw(6, 4), torch.tensor([0, 4, 7])), "offsets: .* 0 to 6"),
    "n": (
        lambda x, o: qf.dpp_select(x, 3, offsets=o),
        (draw(6, 4), torch.tensor([0, 2, 6])),
        "n: wanted .* at most 2, got 3",
    ),
    "targets": (
        qf.linear_logps,
        (draw(3, 4), draw(5, 4), torch.tensor([0, 5, 1])),
        r"targets: wanted tokens in \[0, 5",
    ),
    "targets out of their sets": (
        lambda h, w, t: qf.linear_logps(h, w, t, support=qf.Support.from_lists([[0], [1], [2, 3]])),
        (draw(3, 4), draw(5, 4), torch.tensor([0, 1, 4])),
        "targets: wanted tokens of their sets in support, got 4 at position 2",
    ),
    "targets of logits": (qf.logps_from_logits, (draw(3, 5), torch.tensor([0, -1, 1])), "targets: wanted .*got -1"),
    "temperature": (
        lambda z, t, u: qf.logps_from_logits(z, t, temperature=u),
        (draw(3, 5), tokens(3, 5), torch.tensor([1.0, 0.0, 1.0])),
        "temperature: wanted positive",
    ),
    "cu_seqlens": (qf.segment_sum, (draw(6), torch.tensor([0, 4, 2, 6])), "cu_seqlens: wanted offsets that never fall"),
    "rewards": (
        lambda p, r: qf.qempo_loss(p, r, lam=1.0, group_size=2),
        (draw(4), torch.tensor([0, 1, torch.nan, 1])),
        "rewards: wanted finite values, got 1",
    ),
    "ragged groups": (
        lambda p, r, o: qf.qempo_loss(p, r, offsets=o, lam=2.0),
        (*SCORES[:2], torch.tensor([0, 5, 13])),
        "offsets: wanted offsets from 0 to 12",
    ),
    "lengths": (
        qf.poft_loss,
        (draw(2), torch.tensor([3, 0]), draw(2, 1)),
        "lengths: wanted lengths above 0, got 0",
    ),
    "token offsets": (
        qf.grpo_loss,
        (draw(6), draw(6), draw(1), torch.tensor([0, 900])),
        "cu_seqlens: wanted offsets from 0 to 6",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_values_are_checked_where_the_graph_runs(name: str) -> None:
    function, args, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        torch.compile(function, fullgraph=True, backend="aot_eager")(*args)


def test_a_process_group_breaks_the_graph_openly(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        function, args = head(process_group=dist.group.WORLD), OPS["head, exact"][1]
        with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
            torch.compile(function, fullgraph=True, backend="aot_eager")(*args)
        torch._dynamo.reset()
        broken = torch.compile(function, backend="aot_eager")
        assert all(map(torch.equal, results(broken, args), results(head(), args)))
        with pytest.raises(ValueError, match=r"targets: wanted tokens in \[0, 101"):
            broken(*args[:2], torch.full((37,), 101))
    finally:
        dist.destroy_process_group()


def test_selection_in_one_graph() -> None:
    x = draw(3, 6, 4)
    compiled = torch.compile(lambda x: qf.dpp_select(x, 4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), qf.dpp_select(x, 4))


@pytest.mark.parametrize(
    ("name", "sizes", "most"),
    [
        # The first graph has its size for a constant, the second any size.
        ("dpp", (5, 7, 9, 64, 90), 2),
        # A third for more than one row chunk: torch gives a dimension of 1 a graph of its own.
        ("head", (5, 7, 9, 513, 1030, 1700), 3),
    ],
)
def test_a_new_size_is_not_a_new_graph(name: str, sizes: tuple[int, ...], most: int) -> None:
    def run(*args: torch.Tensor) -> torch.Tensor:
        return diversity(*args) if name == "dpp" else head(grad="sampled")(*args)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for n in sizes:
        args = (draw(n, 4, 6),) if name == "dpp" else (draw(n, 6), draw(50, 6, seed=1), tokens(n, 50))
        assert all(map(torch.equal, results(compiled, args), results(run, args))), n
    assert counter.frame_count <= most
