"""TRL's kernel seam at its edges: quantised heads, autocast, edits in place, and a head that FSDP2 shards apart."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import trl.trainer.utils as trl_utils
from ranks import close, join, passed, run, two_ranks

import qempo_fast as qf
from qempo_fast.integrations.trl import use_fused_logps

STOCK = trl_utils._ChunkedLogProbFunction
ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def call(hidden: Any, weight: Any, targets: Any, *, bias: Any = None, softcap: Any = None, kernel: Any = None) -> Any:
    with use_fused_logps(grad="exact"):
        kernel = kernel or trl_utils._ChunkedLogProbFunction
        return kernel.apply(hidden, weight, bias, targets, 0.7, 64, softcap, 1.0, ALL)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_a_quantised_head_is_refused(dtype: torch.dtype) -> None:
    """Its integers were taken for weights of 1, 2, 3: log-probs of -750, as under TRL's own kernel."""
    hidden, targets = torch.randn(5, 8), torch.arange(5)
    weight = torch.randint(0, 100, (20, 8)).to(dtype)
    with pytest.raises(
        TypeError, match=r"^weight: wanted .*leave the output head out of the quantisation.*, got torch"
    ):
        call(hidden, weight, targets)
    with pytest.raises(TypeError, match=r"^bias: wanted .*leave the output head out"):
        call(hidden, torch.randn(20, 8), targets, bias=weight[:, 0])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"^weight: wanted "):
        call(hidden, weight, targets)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_mean_logit_under_autocast_is_no_coarser_than_trls(softcap: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = 3 * torch.randn(64, 32, generator=g), torch.randn(200, 32, generator=g) + 0.5
    bias, targets = torch.randn(200, generator=g), torch.arange(64)
    # Of the numbers that both see: the inputs rounded to bfloat16.
    h, w, b = (x.bfloat16().double() for x in (hidden, weight, bias))
    z = h @ w.t() + b
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.7
    errors = []
    for kernel in (None, STOCK):
        with torch.autocast("cpu", torch.bfloat16):
            mean = call(hidden, weight, targets, bias=bias, softcap=softcap, kernel=kernel)[3]
        assert mean.dtype == torch.float32
        errors.append(float((mean.double() - z.mean(1)).abs().max()))
    assert errors[0] <= 2 * errors[1] + 1e-6, errors
    if softcap is None:
        assert errors[0] < 1e-4, errors  # no logits, so no rounding of logits


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("seam", [False, True])
def test_what_is_returned_may_be_edited_in_place(ignored: bool, seam: bool) -> None:
    """The entropy is logged after an edit in some trainers; its backward raised, but only where no row was ignored."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, targets = torch.randn(6, 8, generator=g), torch.randn(30, 8, generator=g), torch.arange(6)
    if ignored:
        targets[2] = -100
    grads = []
    for edit in (False, True):
        leaf = hidden.clone().requires_grad_()
        if seam:
            out = call(leaf, weight, targets.clamp(min=0))[:3]
        else:
            out = qf.linear_logps(leaf, weight, targets, entropy=True, sum_sq=True)
        loss = (out[0] * torch.linspace(1, 2, 6)).sum() + (out[1] * torch.linspace(-1, 2, 6)).sum()
        if edit:
            with torch.no_grad():
                for x in out:
                    x.zero_()
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("op", ["linear_logps", "logps_from_logits"])
def test_compiled_too(op: str) -> None:
    """There the edit reached the saved entropy without an error, and the gradient was another."""

    def scores(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> Any:
        if op == "linear_logps":
            return qf.linear_logps(h, w, t, entropy=True)[:2]
        return qf.logps_from_logits(h @ w.t(), t, entropy=True)[:2]

    compiled = torch.compile(scores, backend="aot_eager", fullgraph=True)
    g = torch.Generator().manual_seed(0)
    hidden, weight, targets = torch.randn(6, 8, generator=g), torch.randn(30, 8, generator=g), torch.arange(6)
    grads = []
    for edit in (False, True):
        leaf = hidden.clone().requires_grad_()
        logps, entropy = compiled(leaf, weight, targets)
        loss = logps.sum() + (entropy * torch.linspace(-1, 2, 6)).sum()
        if edit:
            with torch.no_grad():
                entropy.zero_()
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def a_head_that_fsdp2_shards_apart(rank: int, world: int) -> None:
    """A tiny model with TRL's fused head: gradients of one process, wherever the head lies and whoever scores."""
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = torch.randint(0, 37, (2, 3, 9), generator=torch.Generator().manual_seed(2))

    def model() -> Any:
        torch.manual_seed(0)
        m = LlamaForCausalLM(LlamaConfig(vocab_size=37, num_key_value_heads=1, **sizes))
        m.lm_head = torch.nn.Linear(8, 37, bias=True)
        return m.double()

    def loss(m: Any, rows: torch.Tensor) -> torch.Tensor:
        scored: torch.Tensor = m(input_ids=rows, labels=rows, fused_lm_head=True).log_probs
        return -(scored.double() * torch.linspace(0.5, 1.5, scored.shape[1], dtype=torch.float64)).sum()

    with use_fused_logps(grad="exact"):
        whole = model()
        trl_utils.add_fused_lm_head(whole)
        (sum(loss(whole, ids[r]) for r in range(world)) / world).backward()
        truth = {name: p.grad for name, p in whole.named_parameters()}
        for apart in (True, False):
            sharded = model()
            trl_utils.add_fused_lm_head(sharded)
            for layer in sharded.model.layers:
                fully_shard(layer)
            if apart:
                fully_shard(sharded.lm_head)
            fully_shard(sharded)
            loss(sharded, ids[rank]).backward()
            for name, p in sharded.named_parameters():
                close(f"{name}, apart {apart}", p.grad.full_tensor(), truth[name], 1e-9)


def test_a_head_that_fsdp2_shards_apart() -> None:
    ended = two_ranks(__file__)
    passed("a_head_that_fsdp2_shards_apart", ended)
    assert [code for code, *_ in ended] == [0, 0]


if __name__ == "__main__":
    number, count, _, folder = sys.argv[1:]
    join(int(number), int(count), f"{folder}/store")
    run([("a_head_that_fsdp2_shards_apart", a_head_that_fsdp2_shards_apart)], int(number), int(count))
