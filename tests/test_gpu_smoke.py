"""Each op as users run it on a GPU: under torch.compile, in a captured graph, on another stream, on another device.

The calls are those of tests/test_compile.py. Only the last test has anything to say without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import test_compile as cases
import torch
import torch._inductor.config
from test_compile import _fresh_compiler as _fresh_compiler

pytest.importorskip("triton", reason="Triton runs on Linux only")

import test_logps
from test_logps_triton import place

import qempo_fast as qf

# Triton's interpreter computes both sides of a `where`, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Function = Callable[..., torch.Tensor]
CASES = cases.OPS | cases.LOSSES
INDUCTOR = [*cases.INDUCTOR, "dqo", "grpo"]
# Not the head, whose column and row counts are read, and not what plain torch runs.
CAPTURED = [
    *("dpp", "dpp, ragged and quality", "dpp, bfloat16, ragged", "dpp_logdet"),
    *("logits", "logits, entropy, temperature", "segment_sum, an empty segment"),
    *cases.LOSSES,
]


def on(device: torch.device, name: str) -> tuple[Function, cases.Tensors]:
    function, args = CASES[name]
    return function, tuple(x.to(device) for x in args)


def step(function: Function, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The scalar and its gradients, with nothing between that a captured graph could not hold."""
    out = function(*leaves)
    grads = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


@needs_gpu
@pytest.mark.parametrize(("name", "backend"), [(n, "aot_eager") for n in CASES] + [(n, "inductor") for n in INDUCTOR])
def test_one_graph(name: str, backend: str, device: torch.device) -> None:
    with torch._inductor.config.patch(fallback_random=True):
        cases.assert_compiles(*on(device, name), backend)


@needs_gpu
def test_selection_in_one_graph(device: torch.device) -> None:
    x = cases.draw(3, 6, 4).to(device)
    compiled = torch.compile(lambda x: qf.dpp_select(x, 4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), qf.dpp_select(x, 4))


@needs_gpu
@pytest.mark.parametrize("name", ["head, exact", "head, sampled, entropy", "sequence_logps"])
def test_reduce_overhead_leaves_the_head_out_of_its_graphs(name: str, device: torch.device) -> None:
    """A capture would fail where the head reads how many rows count; the rest is captured in the second call."""
    function, args = on(device, name)
    eager = cases.results(function, args)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            # A later call writes over what an earlier one gave.
            cases.assert_same([x.clone() for x in cases.results(compiled, args)], eager, bitwise=False)


@needs_gpu
@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_graph_is_the_eager_step(name: str, device: torch.device) -> None:
    function, args = on(device, name)
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in args]
    # A kernel is loaded at its first launch, which no capture allows.
    step(function, leaves)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(function, leaves)
    # Other numbers show what was captured by value.
    for scale in (1.0, 1.25):
        for leaf, x in zip(leaves, args, strict=True):
            leaf.detach().copy_(x * scale if x.is_floating_point() else x)
        graph.replay()
        cases.assert_same(captured, step(function, leaves), bitwise=True)


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_another_stream(name: str, device: torch.device) -> None:
    function, args = on(device, name)
    eager = cases.results(function, args)
    late = [torch.zeros_like(x) for x in args]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Some 10 ms, for which a launch on any other stream reads the zeros.
        torch.cuda._sleep(20_000_000)
        for x, value in zip(late, args, strict=True):
            x.copy_(value)
        mine = cases.results(function, tuple(late))
    stream.synchronize()
    cases.assert_same(mine, eager, bitwise=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", CASES)
def test_a_device_that_is_not_the_current_one(name: str) -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    with torch.cuda.device(first):
        here, there = (cases.results(*on(device, name)) for device in (first, second))
        assert torch.cuda.current_device() == 0
    assert all(x.device == second for x in there)
    cases.assert_same([x.to(first) for x in there], here, bitwise=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sampled_step_repeats_outside_deterministic_mode(dtype: torch.dtype, device: torch.device) -> None:
    """As users run it. In deterministic mode, where every other test runs, torch adds rows of dweight another way."""
    torch.use_deterministic_algorithms(False)
    big = device.type == "cuda"
    size = (2500, 64, 20_000) if big else (50, 4, 150)
    x = place(test_logps.make(test_logps.Case("", *size, entropy=True, spread=4.0), dtype), device)
    runs = []
    for _ in range(20 if big else 3):
        torch.manual_seed(3)
        runs.append(test_logps.run(qf.linear_logps, x, dtype, grad="sampled", tau=0.9, backend="triton"))
    stats = qf.last_stats()
    assert stats is not None
    assert stats.exact_chunks < len(stats.kept_columns)
    for again in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(value, again[name]), name
