"""The edges of the distributed calls on two gloo processes, all in one start of them, without NumPy.

Shards that keep no column, ranks that disagree, results of collectives that nobody waited for, DTensors, heads that
were gathered.
"""

from __future__ import annotations

import inspect
import sys

if __name__ == "__main__":
    # The library does not depend on it, and a plain install of torch comes without it.
    sys.modules["numpy"] = None  # type: ignore[assignment]

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Check, Ended, close, join, passed, raises, run, two_ranks

import qempo_fast as qf
from qempo_fast.distributed import sequence_parallel_logps, sum_over_ranks

INF = float("inf")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def same_error(error: type[Exception], words: str, call: Callable[[], object]) -> None:
    """Both ranks raise it, with one text."""
    with pytest.raises(error, match=words) as caught:
        call()
    mine = torch.tensor([zlib.crc32(str(caught.value).encode())])
    texts = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(texts, mine)
    assert torch.equal(*texts), caught.value


# --- shards of a vocabulary

LEFT, RIGHT, BOTH = (torch.arange(a, b, 20) for a, b in ((0, 200), (200, 400), (0, 400)))
TARGETS = LEFT[:6]
# Columns that have any probability, sizes of the two shards, targets.
SHARDS: dict[str, tuple[torch.Tensor, tuple[int, int], torch.Tensor]] = {
    "the second keeps none": (LEFT, (200, 200), TARGETS),
    "the first keeps none": (RIGHT, (200, 200), TARGETS + 200),
    "the second keeps a target alone": (LEFT, (200, 200), TARGETS + 201),
    "one column, never kept": (LEFT, (399, 1), TARGETS),
    "one column first": (BOTH, (1, 399), TARGETS),
    "uneven": (BOTH, (33, 367), TARGETS * 3),
    "targets in the first alone": (BOTH, (200, 200), TARGETS),
    "targets in the second alone": (BOTH, (200, 200), TARGETS + 200),
    "some ignored": (LEFT, (200, 200), TARGETS.where(TARGETS % 40 == 0, -100)),
    "all ignored": (BOTH, (200, 200), torch.full((6,), -100)),
    "no rows": (BOTH, (200, 200), TARGETS[:0]),
}


def one_step(
    head: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], targets: torch.Tensor, entropy: bool, **how: Any
) -> list[torch.Tensor]:
    leaves = [None if x is None else x.clone().requires_grad_() for x in head]
    out = qf.linear_logps(*leaves[:2], targets, bias=leaves[2], entropy=entropy, **how)
    slope = torch.linspace(-1, 1, len(targets), dtype=torch.float64)
    loss = (out.logps * slope).sum()
    if entropy:
        loss = loss + (out.entropy * slope.flip(0)).sum()
    loss.backward()
    return [out.logps.detach(), *(x.grad for x in leaves if x is not None)]


def shard_case(name: str, masked: bool) -> tuple[tuple[Any, ...], torch.Tensor, tuple[int, int]]:
    """(hidden, weight, bias or None), targets, sizes: dead columns by a bias of -inf, or by logits of -700."""
    live, sizes, targets = SHARDS[name]
    weight, bias = 0.1 * draw(400, 9, seed=1), None
    if masked:
        bias = torch.full((400,), -INF, dtype=torch.float64).index_copy(0, live, 0.1 * draw(len(live), seed=2))
    else:
        weight[:, -1] = -700.0 * ~torch.isin(torch.arange(400), live)
    hidden = draw(len(targets), 9, seed=3)
    hidden[:, -1] = 1.0
    return (hidden, weight, bias), targets, sizes


def shards_that_keep_little(rank: int, world: int) -> None:
    """Columns are kept for certain or have a probability that rounds to 0, so the sampled gradient is the exact one.

    A shard that was masked whole keeps none on the CPU: that ended its rank with an IndexError, and so the others.
    """
    cases = [(name, masked) for name in SHARDS for masked in (False, True) if not (masked and "a target" in name)]
    for name, masked in cases:
        head, targets, sizes = shard_case(name, masked)
        mine = slice(sizes[0] * rank, sizes[0] + sizes[1] * rank)
        part = tuple(x if i == 0 or x is None else x[mine] for i, x in enumerate(head))
        for entropy in (False, True):
            truth = one_step(head, targets, entropy, grad="exact", backend="reference")
            truth[2:] = [x[mine] for x in truth[2:]]
            for backend in ("cpu", "reference"):
                how = {"grad": "sampled", "tau": 1e-3, "process_group": dist.group.WORLD, "backend": backend}
                got = one_step(part, targets, entropy, **how)
                stats = qf.last_stats()
                assert stats is not None
                if "second keeps none" in name and masked and backend == "cpu":
                    # Sampled indeed: the exact path is taken where most columns are to be kept.
                    assert stats.kept_columns == ((10,), (0,))[rank], stats
                for label, a, b in zip(("logps", "dhidden", "dweight", "dbias"), got, truth, strict=False):
                    close(f"{backend}, {name}, bias {masked}, {label}", a, b, 1e-9)


def a_shard_without_rows(rank: int, world: int) -> None:
    call = partial(
        qf.linear_logps, draw(3, 4), draw(5 * (1 - rank), 4), torch.arange(3), process_group=dist.group.WORLD
    )
    if rank:
        raises(ValueError, "^weight: wanted at least one row", call)
    else:
        raises(RuntimeError, "^process_group: rank 1 of 2 refused", call)


def ranks_that_disagree(rank: int, world: int) -> None:
    """Every difference from which another collective, or another loss, would follow: one error, the same on both."""
    group = {"process_group": dist.group.WORLD}
    hidden, weight, bias, targets = draw(6, 4), draw(9, 4), draw(9), torch.arange(6)
    odd = rank == 1

    def logps(h: Any = hidden, w: Any = weight, t: Any = targets, **how: Any) -> object:
        return qf.linear_logps(h, w, t, **group, **how)

    narrow = (hidden[:, :3], weight[:, :3]) if odd else (hidden, weight)
    single = (hidden.float(), weight.float()) if odd else (hidden, weight)
    wrong: list[tuple[str, Callable[[], object]]] = [
        ("bias", lambda: logps(bias=None if odd else bias)),
        ("bias", lambda: logps(bias=bias if odd else None)),
        ("hidden", lambda: logps(*single)),
        ("hidden", lambda: logps(*narrow)),
        ("hidden", lambda: logps(hidden.clone().requires_grad_(odd))),
        ("entropy", lambda: logps(entropy=odd)),
        ("sum_sq", lambda: logps(sum_sq=odd)),
        ("softcap", lambda: logps(softcap=9.0 if odd else None)),
        ("softcap", lambda: logps(softcap=9.0 + odd)),
        ("logit_scale", lambda: logps(logit_scale=1.0 + odd)),
        ("ignore_index", lambda: logps(ignore_index=-100 - odd)),
        ("grad", lambda: logps(hidden.clone().requires_grad_(), grad="sampled" if odd else "exact")),
        ("grad", lambda: logps(hidden.clone().requires_grad_(), grad="sampled", tau=0.1 if odd else None)),
        ("targets", lambda: logps(temperature=1.0 + odd)),
        ("targets", lambda: logps(hidden[rank:], weight, targets[rank:])),
        ("targets", lambda: logps(t=targets.roll(rank))),
        ("groups", lambda: qf.gather_groups(targets.int() if odd else targets, bias[:6])),
        ("tensors", lambda: qf.gather_groups(targets, bias[:6].float() if odd else bias[:6])),
        ("tensors", lambda: qf.gather_groups(targets, hidden[:, : 4 - rank])),
        ("tensors", lambda: qf.gather_groups(targets, *[bias[:6]] * (1 + odd))),
        ("x", lambda: sum_over_ranks(bias[rank:])),
        ("x", lambda: sum_over_ranks(bias.float() if odd else bias)),
        ("entropy", lambda: sequence_parallel_logps(hidden, weight, targets, torch.tensor([0, 12]), entropy=odd)),
        ("average", lambda: sequence_parallel_logps(hidden, weight, targets, torch.tensor([0, 12]), average=odd)),
        (
            "cu_seqlens",
            lambda: sequence_parallel_logps(hidden, weight, targets, torch.tensor([0, 12, 12][rank:])),
        ),
    ]
    for name, call in wrong:
        same_error(ValueError, f"^{name}: wanted", call)
    # Without a gradient it does not matter whether hidden could have one.
    with torch.no_grad():
        assert logps(hidden.clone().requires_grad_(odd)).logps.shape == (6,)


def one_rank_refuses(rank: int, world: int) -> None:
    """What one rank cannot take it names; the other hears that it did, and does not wait."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    group = {"process_group": dist.group.WORLD}
    hidden, weight, bias, targets = draw(6, 4), draw(8, 4), draw(8), torch.arange(6)
    odd, cu = rank == 1, torch.tensor([0, 12])
    whole, shard = (distribute_tensor(bias, mesh, [p]) for p in (Replicate(), Shard(0)))
    head = distribute_tensor(weight, mesh, [Shard(0)])
    empty = torch.zeros(6, 0, dtype=torch.float64)
    wrong: list[tuple[str, Callable[[], object]]] = [
        ("bias", lambda: qf.linear_logps(hidden, weight, targets, bias=whole if odd else bias, **group)),
        ("bias", lambda: qf.linear_logps(hidden, head, targets, bias=whole if odd else shard)),
        ("bias", lambda: qf.linear_logps(hidden, weight, targets, bias=bias[:3] if odd else bias, **group)),
        ("process_group", lambda: qf.linear_logps(hidden, head if odd else weight, targets, **group)),
        ("targets", lambda: qf.linear_logps(hidden, weight, 3 if odd else targets, **group)),
        ("hidden", lambda: qf.linear_logps(empty if odd else hidden, empty[:5] if odd else weight, targets, **group)),
        ("temperature", lambda: qf.linear_logps(hidden, weight, targets, temperature=0.0 if odd else 1.0, **group)),
        ("grad", lambda: qf.linear_logps(hidden, weight, targets, grad="all" if odd else "auto", **group)),
        ("groups", lambda: qf.gather_groups([1] if odd else targets, hidden)),
        ("x", lambda: sum_over_ranks(targets if odd else bias)),
        ("x", lambda: sum_over_ranks(whole if odd else bias)),
        ("cu_seqlens", lambda: sequence_parallel_logps(hidden, weight, targets, cu.double() if odd else cu)),
        ("weight", lambda: sequence_parallel_logps(hidden, weight.int() if odd else weight, targets, cu)),
        ("softcap", lambda: sequence_parallel_logps(hidden, weight, targets, cu, softcap=-1.0 if odd else None)),
    ]
    for name, call in wrong:
        if odd:
            raises((TypeError, ValueError), f"^{name}: wanted", call)
        else:
            raises(RuntimeError, "refused its arguments", call)


def groups_that_are_none(rank: int, world: int) -> None:
    """A group of other ranks, or no group at all, is named by every function that takes one."""
    alone = dist.new_group([0])
    hidden, weight, targets, cu = draw(4, 3), draw(7, 3), torch.arange(4), torch.tensor([0, 4])
    calls: list[tuple[str, Callable[[Any], object]]] = [
        ("process_group", lambda g: qf.linear_logps(hidden, weight, targets, process_group=g)),
        ("process_group", lambda g: qf.sequence_logps(hidden, weight, targets, cu, process_group=g)),
        ("process_group", lambda g: qf.gather_groups(targets, hidden, process_group=g)),
        ("process_group", lambda g: sum_over_ranks(hidden, process_group=g)),
        ("token_group", lambda g: sequence_parallel_logps(hidden, weight, targets, cu, token_group=g)),
    ]
    for name, call in calls:
        raises(TypeError, f"^{name}: wanted a torch.distributed.ProcessGroup", partial(call, "world"))
        raises(TypeError, f"^{name}: wanted a torch.distributed.ProcessGroup", partial(call, 3))
        if rank == 0:
            call(alone)
        else:
            raises(ValueError, f"^{name}: wanted a group that this rank is in", partial(call, alone))


# --- gather_groups


def widths_and_views(rank: int, world: int) -> None:
    """Rows of no width, of every dtype, and views whose bits say something else than their values."""
    ids = torch.tensor([3, 1, 3]) + rank
    c = draw(3, 2, seed=rank).to(torch.complex64)
    gone = torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.complex64).conj()
    sent = [torch.zeros(3, 0), torch.zeros(3, 2, 0), c.conj(), gone.imag, torch.tensor([True, False, True])]
    sent += [draw(2, 3, seed=rank).t(), torch.arange(3.0)[:, None].expand(3, 4), torch.arange(6)[::2].to(torch.uint8)]
    assert sent[2].is_conj()
    assert sent[3].is_neg()
    g = qf.gather_groups(ids, *sent)
    assert g.groups.tolist() == [1, 2, 3, 4]
    for mine, all_ in zip(sent, g.tensors, strict=True):
        assert all_.shape == (6, *mine.shape[1:])
        assert all_.dtype == mine.dtype
        assert torch.equal(all_[g.own], mine)
    empty = qf.gather_groups(ids, torch.zeros(3, 0))
    assert empty.tensors[0].shape == (6, 0)


# --- results of collectives that nobody waited for, and DTensors


def public_calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """One call of each public function that takes tensors."""
    x = {name: draw(8, seed=i) for i, name in enumerate(("chosen", "rejected", "ref_chosen", "ref_rejected"))}
    s = {"logps": draw(8, seed=5), "ref_logps": draw(8, seed=6), "rewards": draw(8, seed=7)}
    two = {"offsets": torch.tensor([0, 4, 8])}
    free = {"logps": s["logps"], "rewards": s["rewards"], **two}
    vectors = draw(8, 3, seed=8)
    epa = {"positive": draw(4), "strong": draw(4, 2), "weak": draw(4, 2)}
    epa |= {f"ref_{name}": draw(*y.shape, seed=9) for name, y in epa.items()}
    cu, values = torch.tensor([0, 2, 6]), {name: draw(6, seed=i) for i, name in enumerate(("new", "old", "ref"))}
    head = {"hidden": draw(6, 4), "weight": draw(10, 4, seed=1), "targets": torch.arange(6)}
    more = {"bias": draw(10, seed=2), "temperature": draw(6, seed=3).abs() + 0.5, "entropy": True}
    tokens = {"token_logps": values["new"], "old_token_logps": values["old"], "ref_token_logps": values["ref"]}
    pool = {"embeddings": vectors.view(2, 4, 3)}
    return {
        "dpo_loss": (qf.dpo_loss, x),
        "spl_pair_loss": (qf.spl_pair_loss, x | {"alpha": 0.2}),
        "hdpo_loss": (qf.hdpo_loss, x | {"alpha": 0.2}),
        "qempo_kl_pair_loss": (qf.qempo_kl_pair_loss, x | {"lam": 2.0, "mu": 1.0}),
        "qempo_pair_loss": (qf.qempo_pair_loss, {k: x[k] for k in ("chosen", "rejected")} | {"lam": 2.0}),
        "spl_loss": (qf.spl_loss, s | two | {"alpha": 0.2, "beta": 0.1}),
        "qempo_kl_loss": (qf.qempo_kl_loss, s | two | {"lam": 2.0, "mu": 1.0}),
        "variance_loss": (qf.variance_loss, s | two | {"alpha": 0.2, "beta": 0.1}),
        "gvpo_loss": (qf.gvpo_loss, s | two),
        "qempo_loss": (qf.qempo_loss, free | {"lam": 2.0}),
        "rspo_loss": (qf.rspo_loss, free | {"k": 2}),
        "dqo_loss": (qf.dqo_loss, free | {"embeddings": vectors, "ref_logps": s["ref_logps"], "beta": 0.1}),
        "group_advantages": (qf.group_advantages, {"rewards": s["rewards"], **two}),
        "policy_gradient_loss": (qf.policy_gradient_loss, {"logps": s["logps"], "advantages": s["rewards"]}),
        "epa_loss": (qf.epa_loss, epa),
        "poft_loss": (
            qf.poft_loss,
            {"logps": -draw(4).abs(), "lengths": torch.arange(1, 5), "aligned_mean_logps": -draw(4, 2, seed=1).abs()},
        ),
        "grpo_loss": (qf.grpo_loss, tokens | {"advantages": draw(2), "cu_seqlens": cu, "kl": 0.1}),
        "segment_sum": (qf.segment_sum, {"values": values["new"], "cu_seqlens": cu}),
        "dpp_gains": (qf.dpp_gains, pool | {"log_quality": draw(2, 4)}),
        "dpp_gains, offsets": (qf.dpp_gains, {"embeddings": vectors, "log_quality": draw(8), **two}),
        "dpp_logdet": (qf.dpp_logdet, pool | {"log_quality": draw(2, 4)}),
        "dpp_select": (qf.dpp_select, pool | {"log_quality": draw(2, 4), "n": 2}),
        "linear_logps": (qf.linear_logps, head | more),
        "linear_logps, sampled": (qf.linear_logps, head | more | {"grad": "sampled"}),
        "sequence_logps": (qf.sequence_logps, head | {"cu_seqlens": cu}),
        "weighted_logps": (qf.weighted_logps, head | {"coef": draw(6, seed=4)}),
        "weighted_sequence_logps": (qf.weighted_sequence_logps, head | {"cu_seqlens": cu, "coef": draw(2)}),
        "logps_from_logits": (
            qf.logps_from_logits,
            {"logits": draw(6, 10), "targets": head["targets"], "temperature": more["temperature"]},
        ),
        "target_distribution": (
            qf.target_distribution,
            {"rewards": s["rewards"], "ref_logps": s["ref_logps"], "alpha": 0.2, "beta": 0.1},
        ),
        "solve_qempo": (qf.solve_qempo, {"rewards": s["rewards"], "min_reward": 0.1}),
        "coefficients": (
            lambda logps, rewards: qf.coefficients(qf.rspo_loss, logps, rewards, k=2, group_size=4),
            {"logps": s["logps"], "rewards": s["rewards"]},
        ),
        "gather_groups": (
            lambda groups, tensors: qf.gather_groups(groups, tensors),
            {"groups": torch.arange(6) % 3, "tensors": draw(6, 2)},
        ),
        "sequence_parallel_logps": (sequence_parallel_logps, head | {"cu_seqlens": torch.tensor([0, 3, 12])}),
        "sum_over_ranks": (sum_over_ranks, {"x": draw(3)}),
        "vendi": (qf.metrics.vendi, {"embeddings": vectors}),
        "embedding_cosine": (qf.metrics.embedding_cosine, {"embeddings": vectors}),
        "ece": (qf.metrics.ece, {"probabilities": s["logps"].sigmoid(), "outcomes": torch.arange(8) % 2}),
        "brier": (qf.metrics.brier, {"probabilities": s["logps"].sigmoid(), "outcomes": torch.arange(8) % 2}),
        "max_at_k": (qf.metrics.max_at_k, {"rewards": s["rewards"].view(2, 4), "k": 2}),
        "pass_at_k": (qf.metrics.pass_at_k, {"n": torch.full((4,), 8), "c": torch.arange(4), "k": 2}),
        "update": (lambda rewards: qf.QualityConstraint(0.5, lam=2.0).update(rewards).lam, {"rewards": s["rewards"]}),
    }


# What takes no tensor, and the one that a test of its own has.
NO_TENSORS = {"backends", "last_stats"}


def flat(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x.detach()]
    if isinstance(x, float):
        return [torch.tensor([x], dtype=torch.float64)]
    return [y for part in x for y in flat(part)] if isinstance(x, tuple) else []


def unwaited(x: torch.Tensor) -> torch.Tensor:
    """x as a collective gives it before it is waited for."""
    from torch.distributed import _functional_collectives as collectives

    out = collectives.all_gather_tensor(x.contiguous(), 0, dist.group.WORLD)[: len(x)]
    assert isinstance(out, collectives.AsyncCollectiveTensor)
    return out


def results_of_collectives(rank: int, world: int) -> None:
    """Each tensor argument of each public function as it comes out of a collective: the same result and gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for name, (function, arguments) in public_calls().items():
        torch.manual_seed(0)
        truth = flat(function(**arguments))
        for key, x in arguments.items():
            if not isinstance(x, torch.Tensor):
                continue
            torch.manual_seed(0)
            got = flat(function(**arguments | {key: unwaited(x)}))
            for a, b in zip(got, truth, strict=True):
                close(f"{name}, {key}", a, b)
    hidden, weight, targets = draw(6, 4), draw(3000, 4, seed=1), torch.arange(6)
    for grad in ("exact", "sampled"):
        results = []
        for wrap in (torch.clone, unwaited):
            torch.manual_seed(0)
            leaf = hidden.clone().requires_grad_()
            qf.linear_logps(leaf, wrap(weight), targets, grad=grad).logps.sum().backward()
            results.append(leaf.grad)
        close(f"dhidden, {grad}", *results)
    # A DTensor's own part may be one as well.
    mesh = init_device_mesh("cpu", (2,))
    placed = distribute_tensor(weight, mesh, [Shard(0)]).redistribute(placements=[Replicate()], async_op=True)
    assert hasattr(placed.to_local(), "trigger_wait")
    close(
        "redistributed", qf.linear_logps(hidden, placed, targets).logps, qf.linear_logps(hidden, weight, targets).logps
    )


def dtensors(rank: int, world: int) -> None:
    """A DTensor is named by whatever cannot take it; heads are in test_distributed.py."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    for name, (function, arguments) in public_calls().items():
        for key, x in arguments.items():
            if not isinstance(x, torch.Tensor) or key == "weight":
                continue
            for placement in (Replicate(), Shard(0)):
                placed = distribute_tensor(x, mesh, [placement])
                print("#", name, key, file=sys.stderr)  # what failed, where it is no error of ours
                raises(TypeError, rf"^{key}(\[0\])?: wanted", partial(function, **arguments | {key: placed}))


# --- heads that were gathered


def gathered_heads(rank: int, world: int) -> None:
    """full_tensor() of an FSDP2 unit of its own: the mean of the ranks' gradients, as FSDP gives it; a tensor-parallel
    head, whose ranks have the same tokens, keeps its own.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial

    from qempo_fast.integrations.gathered import averaged

    hidden, weight, bias = draw(2, 6, 4), draw(11, 4, seed=1), draw(11, seed=2)
    targets = torch.arange(12).view(2, 6) % 11

    def losses(w: Any, b: Any, r: int) -> Any:
        return qf.linear_logps(hidden[r], w, targets[r], bias=b).logps.sum()

    whole = [x.clone().requires_grad_() for x in (weight, bias)]
    (sum(losses(*whole, r) for r in range(2)) / 2).backward()
    alone = [x.clone().requires_grad_() for x in (weight, bias)]
    losses(*alone, 0).backward()
    for scale, tokens, truth in ((1.0, rank, whole), (1.0, 0, alone)):
        for told in (None, [Partial("avg")]):
            head = torch.nn.Linear(4, 11).double()
            with torch.no_grad():
                head.weight.copy_(weight)
                head.bias.copy_(bias)
            fully_shard(head)
            full = [x.full_tensor(grad_placements=told) for x in (head.weight, head.bias)]
            (losses(averaged(full[0]), averaged(full[1]), tokens) * scale).backward()
            close("dweight", head.weight.grad.full_tensor(), truth[0].grad)
            close("dbias", head.bias.grad.full_tensor(), truth[1].grad)
    # What the message of linear_logps tells to do.
    head.zero_grad()
    raises(
        ValueError, r'^targets: .*Partial\("avg"\)', lambda: qf.linear_logps(hidden[rank], head.weight, targets[rank])
    )
    full = [x.full_tensor(grad_placements=[Partial("avg")]) for x in (head.weight, head.bias)]
    losses(*full, rank).backward()
    close("dweight as told", head.weight.grad.full_tensor(), whole[0].grad)
    # Frozen, a product of two, a plain parameter: as they are.
    plain = weight.clone().requires_grad_()
    for x in (weight, plain, plain * plain, head.weight.full_tensor().detach()):
        assert averaged(x) is x


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        shards_that_keep_little,
        a_shard_without_rows,
        ranks_that_disagree,
        one_rank_refuses,
        groups_that_are_none,
        widths_and_views,
        results_of_collectives,
        dtensors,
        gathered_heads,
    )
}


@pytest.fixture(scope="module")
def ended() -> list[Ended]:
    return two_ranks(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name: str, ended: list[Ended]) -> None:
    passed(name, ended)


def test_ranks_end_well(ended: list[Ended]) -> None:
    assert [code for code, *_ in ended] == [0, 0]


def test_every_public_function_is_called() -> None:
    functions = {name for name in qf.__all__ if inspect.isfunction(getattr(qf, name))}
    assert functions - NO_TENSORS <= {name.partition(",")[0] for name in public_calls()}


def test_without_a_process_group() -> None:
    hidden, weight, targets, cu = draw(4, 3), draw(7, 3), torch.arange(4), torch.tensor([0, 4])
    for name, call in (
        ("token_group", lambda: sequence_parallel_logps(hidden, weight, targets, cu)),
        ("process_group", lambda: sum_over_ranks(hidden)),
    ):
        raises(ValueError, f"^{name}: wanted torch.distributed.init_process_group", call)
    raises(TypeError, "^process_group: ", lambda: qf.linear_logps(hidden, weight, targets, process_group="world"))
    raises(TypeError, "^process_group: ", lambda: qf.gather_groups(targets, hidden, process_group=3))
    assert qf.gather_groups(targets, torch.zeros(4, 0)).tensors[0].shape == (4, 0)


if __name__ == "__main__":
    number, count, _, folder = sys.argv[1:]
    join(int(number), int(count), f"{folder}/store")
    run(CHECKS.items(), int(number), int(count))
