"""Heads, groups and sequences over ranks on 2 and 4 gloo processes: same numbers as one process, and loud failures."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Check, Ended, close, join, launch, passed, raises, run

import qempo_fast as qf
from qempo_fast.distributed import sequence_parallel_logps


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tokens(n: int = 24, d: int = 5, v: int = 403) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, weight, bias, targets; one target ignored, one the last of the vocabulary."""
    targets = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(1))
    targets[3], targets[5] = -100, v - 1
    return draw(n, d), draw(v, d, seed=1), draw(v, seed=2), targets


def backward(out: qf.TokenLogps) -> None:
    weights = torch.linspace(-1, 1, len(out.logps), dtype=torch.float64)
    ((out.logps * weights).sum() + (out.entropy * weights.flip(0)).sum()).backward()


def dtensor_heads(rank: int, world: int) -> None:
    """A Shard(0) head is vocabulary-parallel; a replicated one is local. Gradients come back placed as they were."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    hidden, weight, bias, targets = tokens()
    plain = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    head = {"softcap": 9.0, "temperature": 0.8, "entropy": True}
    truth = qf.linear_logps(plain[0], plain[1], targets, bias=plain[2], **head)
    backward(truth)
    for placement in (Shard(0), Replicate()):
        mine = hidden.clone().requires_grad_()
        placed = [distribute_tensor(x, mesh, [placement]).requires_grad_() for x in (weight, bias)]
        out = qf.linear_logps(mine, placed[0], targets, bias=placed[1], **head)
        backward(out)
        close("logps", out.logps.detach(), truth.logps.detach())
        close("dhidden", mine.grad, plain[0].grad)
        for name, x, wanted in zip(("dweight", "dbias"), placed, plain[1:], strict=True):
            assert tuple(x.grad.placements) == (placement,)
            close(name, x.grad.full_tensor(), wanted.grad)
    shard = distribute_tensor(weight, mesh, [Shard(0)])
    sums = qf.sequence_logps(hidden, shard, targets, torch.tensor([0, 10, 24]))
    close("sequences", sums.logps, qf.sequence_logps(hidden, weight, targets, torch.tensor([0, 10, 24])).logps)


def dtensor_heads_refused(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    hidden, weight, bias, targets = tokens()
    bad = [distribute_tensor(weight, mesh, [Shard(1)]), DTensor.from_local(weight, mesh, [Partial()])]
    if world == 4:
        square = init_device_mesh("cpu", (2, 2))
        bad += [distribute_tensor(weight, square, places) for places in ([Replicate(), Shard(0)], [Shard(0), Shard(0)])]
    for weights in bad:
        raises(ValueError, "^weight: .*full_tensor", lambda w=weights: qf.linear_logps(hidden, w, targets))
    good = distribute_tensor(weight, mesh, [Shard(0)])
    raises(
        ValueError, "^process_group: ", lambda: qf.linear_logps(hidden, good, targets, process_group=dist.group.WORLD)
    )
    other = distribute_tensor(bias, mesh, [Replicate()])
    raises(ValueError, "^bias: wanted the mesh", lambda: qf.linear_logps(hidden, good, targets, bias=other))
    rows = distribute_tensor(hidden, mesh, [Shard(0)])
    raises(TypeError, "^hidden: wanted a plain", lambda: qf.linear_logps(rows, weight, targets))
    # What an FSDP2 head looks like outside its module: a vocabulary shard, but every rank with tokens of its own.
    own = targets.roll(rank)
    raises(ValueError, "^targets: .*other targets", lambda: qf.linear_logps(hidden, good, own))
    raises(ValueError, "^targets: .*rows", lambda: qf.linear_logps(hidden[rank:], good, targets[rank:]))


def a_bad_argument_on_one_rank(rank: int, world: int) -> None:
    """The rank at fault names it, the others say that a rank failed, and nobody is left waiting."""
    hidden, weight, _, targets = tokens()
    last = rank == world - 1
    ids, scores = torch.arange(len(hidden)), draw(24)
    cu = torch.tensor([0, 24 * world])
    parallel = {"process_group": dist.group.WORLD}
    w, h = weight.float() if last else weight, hidden[:, :-1] if last else hidden
    cut, whole = torch.tensor([0, 23 if last else 24]), torch.tensor([0, 24])
    wrong: list[tuple[str, Callable[[], object]]] = [
        ("weight", lambda: qf.linear_logps(hidden, w, targets, **parallel)),
        ("weight", lambda: qf.sequence_logps(h, weight, targets, whole, **parallel)),
        ("hidden", lambda: qf.linear_logps(None if last else hidden, weight, targets, **parallel)),
        ("cu_seqlens", lambda: qf.sequence_logps(hidden, weight, targets, cut, **parallel)),
        (r"tensors\[0\]", lambda: qf.gather_groups(ids, scores[:-1] if last else scores)),
        ("targets", lambda: sequence_parallel_logps(hidden, weight, targets.float() if last else targets, cu)),
        ("targets", lambda: sequence_parallel_logps(hidden, weight, targets + 400 * last, cu, entropy=True)),
    ]
    for name, call in wrong:
        if last:
            raises((TypeError, ValueError), f"^{name}: ", call)
        else:
            raises(RuntimeError, "refused its arguments", call)
    # Values that no rank could have refused alone: all raise the same error.
    temperature = 0.0 if last else 1.0
    hot = torch.full((24,), 1.0, dtype=torch.float64).index_fill(0, torch.tensor([2]), temperature)
    call = partial(qf.linear_logps, hidden, weight, targets, temperature=hot, **parallel)
    raises(ValueError, "^targets: .*temperatures", call)
    extra = (scores,) if last else ()
    raises(ValueError, f"^tensors: .*rank {world - 1}", lambda: qf.gather_groups(ids, scores, *extra))
    uneven = torch.tensor([0, 20 + rank, 24 * world])
    raises(ValueError, "^cu_seqlens: .*every rank", lambda: sequence_parallel_logps(hidden, weight, targets, uneven))


def owners(n: int, world: int) -> torch.Tensor:
    """The rank of each row: groups of 4 over all ranks but the last, which has none."""
    return torch.arange(n) * 7 % 5 % (world - 1)


def gathered_groups(rank: int, world: int) -> None:
    """Groups over ranks: same loss, and each rank the gradients of its own rows; exact. The last rank has no rows."""
    n = 20
    logps, ref = draw(n), draw(n, seed=1)
    rewards, embeddings = draw(n, seed=2).float(), draw(n, 3, 2, seed=3).half()
    ids = torch.arange(n) // 4 * 10
    mine = owners(n, world) == rank

    def dqo(all_logps: torch.Tensor, r: torch.Tensor, e: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return qf.dqo_loss(all_logps, r, e.flatten(1).float(), offsets=offsets)

    whole, offsets = logps.clone().requires_grad_(), torch.arange(0, n + 1, 4)
    truth = dqo(whole, rewards, embeddings, offsets)
    truth.backward()
    # In another order on each rank, and a tensor that is not contiguous.
    turn = mine.nonzero().flatten().flip(0)
    leaf = logps[turn].requires_grad_()
    strided = torch.stack([ref, -ref], 1)[turn][:, 0]
    wide = embeddings[turn].transpose(1, 2).contiguous().transpose(1, 2)
    g = qf.gather_groups(ids[turn], leaf * 1.0, strided, rewards[turn], wide)
    assert g.groups.tolist() == [0, 10, 20, 30, 40]
    assert torch.equal(g.offsets, offsets)
    assert [x.dtype for x in g.tensors] == [torch.float64, torch.float64, torch.float32, torch.float16]
    loss = dqo(g.tensors[0], g.tensors[2], g.tensors[3], g.offsets)
    loss.backward()
    close("loss", loss.detach(), truth.detach())
    close("gradient", leaf.grad, whole.grad[turn])
    for full, part in zip(g.tensors, (leaf, strided, rewards[turn], wide), strict=True):
        assert torch.equal(full[g.own], part)
    scores = (g.tensors[0], g.tensors[2], g.tensors[3], g.offsets)
    close("coefficients", qf.coefficients(dqo, *scores)[1][g.own], whole.grad[turn])


def groups_larger_than_one_message(rank: int, world: int) -> None:
    """16 KiB go in the first all-gather; what does not fit, on rank 0 alone, follows, and nothing is rounded."""
    rows = 900 if rank == 0 else 3
    ids = torch.arange(rows, dtype=torch.int32) % 7
    x = draw(rows, 4, seed=rank)
    g = qf.gather_groups(ids, x, ids.bool())
    counts = [900, *[3] * (world - 1)]
    everything = torch.cat([draw(c, 4, seed=r) for r, c in enumerate(counts)])
    every_id = torch.cat([torch.arange(c) % 7 for c in counts])
    order = every_id.argsort(stable=True)
    assert torch.equal(g.tensors[0], everything[order])
    assert torch.equal(g.tensors[1], every_id[order] > 0)
    assert torch.equal(g.tensors[0][g.own], x)
    empty = qf.gather_groups(ids[:0], x[:0])
    assert (empty.offsets.tolist(), empty.tensors[0].shape, empty.own.shape) == ([0], (0, 4), (0,))


def sequence_shards(rank: int, world: int) -> None:
    """A token axis cut inside sequences, one rank without tokens: same sums, and gradients of own tokens."""
    hidden, weight, _, targets = tokens()
    cu = torch.tensor([0, 10, 10, 17, 24])
    cuts = {2: [0, 13, 24], 4: [0, 3, 3, 20, 24]}[world]
    mine = slice(cuts[rank], cuts[rank + 1])
    coefficients = torch.tensor([1.0, 5.0, -2.0, 0.5], dtype=torch.float64)
    for average, entropy in ((False, True), (True, False)):
        whole = [x.clone().requires_grad_() for x in (hidden, weight)]
        truth = qf.sequence_logps(*whole, targets, cu, average=average, entropy=entropy)
        part = [hidden[mine].clone().requires_grad_(), weight.clone().requires_grad_()]
        out = sequence_parallel_logps(*part, targets[mine], cu, average=average, entropy=entropy)
        for result in (truth, out):
            extra = (result.entropy * coefficients.flip(0)).sum() if entropy else 0.0
            ((result.logps * coefficients).sum() + extra).backward()
        close("sums", out.logps.detach(), truth.logps.detach())
        assert torch.equal(out.lengths, truth.lengths)
        close("tokens", out.token_logps.detach(), truth.token_logps[mine].detach())
        close("dhidden", part[0].grad, whole[0].grad[mine])
        dist.all_reduce(part[1].grad)
        close("dweight", part[1].grad, whole[1].grad)


def a_masked_shard_in_triton(rank: int, world: int) -> None:
    """The last shard has no column of any probability: the sampled gradient is the exact one of a single process."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return  # compiled kernels do not run on CPU tensors
    hidden, weight, targets = draw(3, 4), 0.1 * draw(40, 4, seed=1), torch.tensor([0, 3, 9])
    bias = torch.zeros(40, dtype=torch.float64).index_fill(0, torch.arange(10, 40), -torch.inf)
    mine = slice(20 * rank, 20 * rank + 20)
    whole, part = ([x.clone().requires_grad_() for x in y] for y in ((hidden, weight), (hidden, weight[mine])))
    truth = qf.linear_logps(*whole, targets, bias=bias)
    how = {"grad": "sampled", "tau": 1e-3, "backend": "triton", "process_group": dist.group.WORLD}
    out = qf.linear_logps(*part, targets, bias=bias[mine], **how)
    for logps in (truth.logps, out.logps):
        (logps * torch.linspace(-1, 1, 3)).sum().backward()
    close("logps", out.logps.detach(), truth.logps.detach())
    close("dhidden", part[0].grad, whole[0].grad)
    close("dweight", part[1].grad, whole[1].grad[mine])


def fsdp2(rank: int, world: int) -> None:
    """A fully sharded Llama with the fused head inside its forward: loss and gradients of one process."""
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    class Scorer(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            hidden = self.model(input_ids).last_hidden_state[:, :-1].flatten(0, 1)
            targets = input_ids[:, 1:].flatten()
            cu = torch.arange(len(input_ids) + 1) * (input_ids.shape[1] - 1)
            return qf.sequence_logps(hidden, self.lm_head.weight, targets, cu).logps

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(2))
    rewards, prompts = torch.tensor([1.0, 0.0, 0.5, 0.2]), torch.tensor([0, 0, 1, 1])
    mine = torch.tensor([[0, 2], [1, 3]])[rank]  # each group on both ranks
    for tied in (True, False):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=61, tie_word_embeddings=tied, num_key_value_heads=1, **sizes)
        model = Scorer(config).double()
        truth = qf.qempo_loss(model(ids, None), rewards, lam=2.0, group_size=2)
        truth.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        g = qf.gather_groups(prompts[mine], model(ids[mine], None), rewards[mine])
        loss = qf.qempo_loss(*g.tensors, lam=2.0, offsets=g.offsets)
        close("loss", loss.detach(), truth.detach())
        (loss * world).backward()  # FSDP averages over ranks
        for name, p in model.named_parameters():
            close(name, p.grad.full_tensor(), grads[name])


CHECKS: dict[str, tuple[Check, tuple[int, ...]]] = {
    "dtensor_heads": (dtensor_heads, (2, 4)),
    "dtensor_heads_refused": (dtensor_heads_refused, (2, 4)),
    "a_bad_argument_on_one_rank": (a_bad_argument_on_one_rank, (2, 4)),
    "gathered_groups": (gathered_groups, (2, 4)),
    "groups_larger_than_one_message": (groups_larger_than_one_message, (2, 4)),
    "sequence_shards": (sequence_shards, (2, 4)),
    "a_masked_shard_in_triton": (a_masked_shard_in_triton, (2,)),
    "fsdp2": (fsdp2, (2,)),
}


def worker(rank: int, world: int, what: str, folder: str) -> None:
    join(rank, world, f"{folder}/{what}-{world}", 3 if what == "silent" else 60)
    if what in ("dead", "silent"):
        joined = Path(folder) / "joined"
        if rank == 1:
            # Not before the other has a group too: it would be lost in joining, which is another error.
            until = time.monotonic() + 50
            while not joined.exists() and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(0 if what == "dead" else 8)
            os._exit(7)
        joined.touch()
        qf.gather_groups(torch.tensor([0]), torch.zeros(1))
        return
    run(((name, check) for name, (check, worlds) in CHECKS.items() if world in worlds), rank, world)


@pytest.fixture(scope="module")
def ended() -> dict[int, list[Ended]]:
    """launch() by world size; all checks share the processes, which take seconds to start."""
    with tempfile.TemporaryDirectory() as folder:
        return {world: launch(__file__, world, "checks", folder) for world in (2, 4)}


@pytest.mark.parametrize(("name", "world"), [(name, world) for name, row in CHECKS.items() for world in row[1]])
def test_ranks_agree(name: str, world: int, ended: dict[int, list[Ended]]) -> None:
    passed(name, ended[world])


def test_ranks_end_well(ended: dict[int, list[Ended]]) -> None:
    assert [code for ranks in ended.values() for code, *_ in ranks] == [0] * 6


@pytest.mark.parametrize(("what", "words"), [("dead", "[Cc]onnection"), ("silent", "[Tt]imed out")])
def test_a_lost_rank_ends_the_others(what: str, words: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        (code, _, error), lost = launch(__file__, 2, what, folder)
    assert lost[0] == 7
    assert code == 1, error
    assert re.search(words, error), error
    assert "process_group: rank 0 of 2 lost another" in error
    assert time.perf_counter() - start < 60


def test_one_process_needs_no_process_group() -> None:
    leaf = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    g = qf.gather_groups(torch.tensor([5, 2, 5]), leaf, torch.tensor([0.1, 0.2, 0.3]))
    assert (g.offsets.tolist(), g.groups.tolist(), g.own.tolist()) == ([0, 1, 3], [2, 5], [1, 0, 2])
    (g.tensors[0] * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert leaf.grad.tolist() == [10.0, 1.0, 100.0]


@pytest.mark.parametrize(
    ("groups", "tensors", "error", "message"),
    [
        ([0, 1], (), TypeError, "^groups: wanted a tensor"),
        (torch.zeros(2), (), TypeError, "^groups: wanted int32 or int64"),
        (torch.tensor([0, 1]), (torch.zeros(3),), ValueError, r"^tensors\[0\]: wanted 2 rows"),
        (torch.tensor([0, 1]), (torch.zeros(2), 3.0), TypeError, r"^tensors\[1\]: wanted a tensor"),
    ],
)
def test_bad_input(groups: object, tensors: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        qf.gather_groups(groups, *tensors)


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
