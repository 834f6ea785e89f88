"""What only a GPU can say, beside times: kernels of a step by name, compiled and captured graphs, other streams."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

import qempo_fast as qf
from gpu import cases
from gpu.steps import Refused, Run, Settings
from gpu.stress import stress as repeated
from suite import interleave, logps

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., torch.Tensor]
# Rows of the profile's table: the rest is under a hundredth of a step.
_KERNELS = 18
# Seconds that the last part, repeats, is to have.
_REPEATS = 15.0


def profile(name: str, case: logps.Case, device: str) -> list[dict[str, Any]]:
    """Time on the GPU by kernel name over one step, in microseconds, and the number of launches."""
    made = logps.inputs(case, device)
    step = logps.unchecked(name, case, made)[1]
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    interleave.wall_ms(step, 1)
    with torch.profiler.profile(activities=activities) as taken:
        wall = interleave.wall_ms(step, 1)
    events = taken.key_averages()
    if device == "cuda":
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        times = {e.key: (e.self_device_time_total, e.count) for e in kernels}
    else:
        times = {e.key: (e.self_cpu_time_total, e.count) for e in events}
    total = sum(t for t, _ in times.values())
    launches = sum(n for _, n in times.values())
    rows = [{"kernel": "all", "us": total, "count": launches, "wall_ms": wall}]
    largest = sorted(times.items(), key=lambda kv: -kv[1][0])[:_KERNELS]
    return rows + [{"kernel": key[:120], "us": us, "count": count, "share": us / total} for key, (us, count) in largest]


def _draw(device: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def ops(device: str) -> dict[str, tuple[Function, Tensors]]:
    """One small call of each op: a scalar of tensors, all of which want a gradient."""
    n, d, v = 40, 32, 520
    targets = torch.randint(v, (n,), generator=torch.Generator().manual_seed(1)).to(device)
    head = _draw(device, n, d), _draw(device, v, d, seed=1)
    cu = torch.tensor([0, 7, 7, 30, n], device=device)
    rewards, old = _draw(device, n, seed=2), _draw(device, n, seed=3)
    weights = torch.arange(1, n + 1, device=device) / n

    def linear(h: torch.Tensor, w: torch.Tensor, **mode: Any) -> torch.Tensor:
        return (qf.linear_logps(h, w, targets, **mode).logps * weights).sum()

    def columns(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = qf.linear_logps(
            h, w, targets, columns=targets.unsqueeze(1) // torch.arange(1, 4, device=device), lse=True, mean_logits=True
        )
        return out.columns.sum() + out.lse.square().sum() + out.mean_logits.square().sum()

    halves = tuple(x.to(torch.bfloat16) for x in head)
    sets = qf.Support.from_mask(
        (torch.arange(v) % 7 == 0).to(device) | (targets.unsqueeze(1) == torch.arange(v).to(device))
    )

    def dpp(x: torch.Tensor) -> torch.Tensor:
        out = qf.dpp_gains(x)
        return out.gains.square().sum() + out.logdet.sum()

    return {
        "linear_logps exact": (functools.partial(linear, grad="exact"), head),
        "linear_logps frozen head": (lambda h: linear(h, head[1]), head[:1]),
        # Under every column's bound: the sampled kernels with the exact answer.
        "linear_logps sampled": (functools.partial(linear, grad="sampled", tau=1e-30), head),
        "linear_logps float32 logits": (functools.partial(linear, logits_dtype=torch.float32), halves),
        "linear_logps batch invariant": (functools.partial(linear, batch_invariant=True), head),
        "linear_logps columns": (columns, head),
        "linear_logps kept sets": (functools.partial(linear, support=sets), head),
        "weighted_logps": (lambda h, w: qf.weighted_logps(h, w, targets, weights, coef_entropy=old).loss, head),
        "logps_from_logits": (
            lambda z: (qf.logps_from_logits(z * 1.0, targets)[0] * weights).sum(),
            (_draw(device, n, v, seed=4),),
        ),
        "dpp_gains": (dpp, (_draw(device, 6, 8, 24, seed=5),)),
        "qempo_loss": (lambda x: qf.qempo_loss(x, rewards, lam=2.0, group_size=8), (_draw(device, n, seed=6),)),
        "rspo_loss": (lambda x: qf.rspo_loss(x, rewards, k=3, group_size=8), (_draw(device, n, seed=6),)),
        "grpo_loss": (lambda x: qf.grpo_loss(x, old, rewards[:4], cu), (_draw(device, n, seed=7) * 0.1,)),
        "segment_sum": (lambda x: qf.segment_sum(x, cu).square().sum(), (_draw(device, n, seed=8),)),
    }


def results(function: Function, args: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [a.detach().clone().requires_grad_() for a in args]
    torch.manual_seed(3)
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves)]


def _difference(mine: list[torch.Tensor], truth: list[torch.Tensor], limit: float) -> dict[str, float]:
    worst = max(interleave.relative(a, b.double()) for a, b in zip(mine, truth, strict=True))
    interleave.require("against eager", {"error": worst}, {"error": limit})
    return {"error": worst}


def compiled(name: str, chosen: Settings) -> dict[str, Any]:
    """One graph, with eager's numbers; without a GPU it is traced, not compiled."""
    function, args = ops(chosen.device)[name]
    backend = "aot_eager" if chosen.rehearse else "inductor"
    torch.compiler.reset()
    return {"backend": backend} | _difference(
        results(torch.compile(function, fullgraph=True, backend=backend), args), results(function, args), 1e-4
    )


def captured(name: str, chosen: Settings) -> dict[str, Any]:
    """A CUDA graph of forward and backward, replayed on other numbers, bitwise as eager."""
    if chosen.device != "cuda":
        raise Refused("no GPU: a CUDA graph cannot be captured")
    function, args = ops(chosen.device)[name]
    leaves = [a.detach().clone().requires_grad_() for a in args]

    def step() -> list[torch.Tensor]:
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    other = [a * 0.5 for a in args]
    with torch.no_grad():
        for leaf, x in zip(leaves, other, strict=True):
            leaf.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    return _difference([x.detach() for x in made], results(function, other), 0.0)


def second_stream(name: str, chosen: Settings) -> dict[str, Any]:
    """Inputs made and used on another stream than the current one, bitwise as on that."""
    if chosen.device != "cuda":
        raise Refused("no GPU: a CPU has no streams")
    function, args = ops(chosen.device)[name]
    truth = results(function, args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        mine = results(function, [a * 1.0 for a in args])
    side.synchronize()
    return _difference(mine, truth, 0.0)


def sampled_repeats(chosen: Settings, times: int) -> dict[str, Any]:
    """A sampled step at a real width as users run it, outside deterministic mode: bitwise the same each time."""
    case = cases.SMALL if chosen.rehearse else cases.SMOLLM2
    made = logps.inputs(case, chosen.device)
    step = logps.unchecked("qempo_fast sampled", case, made)[1]

    def once() -> list[torch.Tensor]:
        torch.manual_seed(0)
        out, grads, _ = step.run()
        return [out.detach(), *grads]

    first = once()
    different = [i for i in range(times) if not all(map(torch.equal, first, once()))]
    if different:
        raise interleave.Inaccurate(f"{len(different)} of {times} runs differ, the first is {different[0]}", {})
    return {"what": "sampled step", "times": times, "different": 0}


def loss_repeats(chosen: Settings, launches: int) -> list[dict[str, Any]]:
    """RSPO's exchange and the losses' sums through global memory, bitwise."""
    rows = []
    for row in repeated(torch.device(chosen.device), launches, small=chosen.device == "cpu"):
        different = row["different_alone"] + row["different_among"]
        told = {"reason": f"{different} launches differ from the first"} if different else {}
        rows.append({"what": row.pop("stress"), **row, "different": different, **told})
    return rows


def stress(run: Run) -> None:
    launches, times = (1, 2) if run.settings.rehearse else (2000, 20)
    run.do("stress", "stress/losses", functools.partial(loss_repeats, run.settings, launches), need=8.0)
    run.do("stress", "stress/sampled step", functools.partial(sampled_repeats, run.settings, times))


def smoke(run: Run) -> None:
    for what, function in (("graph", captured), ("stream", second_stream)):
        for name in ("dpp_gains", "qempo_loss", "grpo_loss"):
            run.do("smoke", f"{what}/{name}", functools.partial(function, name, run.settings), op=name, what=what)
    run.do(
        "smoke", "stream/linear_logps", functools.partial(second_stream, "linear_logps exact", run.settings),
        op="linear_logps exact", what="stream",
    )  # fmt: skip
    for name in ops("cpu"):
        function = functools.partial(compiled, name, run.settings)
        # Seconds each: what comes after has to have its time too.
        run.do("smoke", f"compile/{name}", function, need=_REPEATS, op=name, what="fullgraph")


def profiles(run: Run) -> None:
    case = cases.SMALL if run.settings.rehearse else logps.GPU
    for name in ("qempo_fast exact", "qempo_fast sampled"):
        function = functools.partial(profile, name, case, run.settings.device)
        run.do("profile", f"profile/{name}", function, need=4.0, provider=name, case=str(case))
    cases.forget("logps")
