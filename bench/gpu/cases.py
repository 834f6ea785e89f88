"""What is timed on a GPU: cases and providers of suite/logps, suite/dpp and suite/losses, one line of results each.

Every row has GPU time (events behind a spin, median of a few runs after one), wall time with the host in it, errors
against float64 and peak memory.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import qempo_fast as qf
from gpu.env import card
from gpu.lines import read
from gpu.steps import Run, Settings
from suite import dpp, interleave, logps, losses, machine, memory
from suite.logps import GEMMA, GPU, SMOLLM2, TEXT
from suite.ops import load
from suite.provider import Provider

CHOSEN = "qempo_fast sampled, tau chosen"


def _liger_fallback(case: Any, device: str) -> logps.Logps:
    """Liger's chunks in plain torch. By name: on Hopper its front door wants a compiler of 92 MB, too much to carry."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import _FusedLinearPPOFallbackFunction

    return lambda h, w, t: -_FusedLinearPPOFallbackFunction.apply(h, w, t, 1.0, -100, False)


FALLBACK = "Liger fallback"
logps.PROVIDERS[FALLBACK] = Provider("peer", _liger_fallback)

SAMPLED = ("qempo_fast sampled 2^-7", "qempo_fast sampled", "qempo_fast sampled 2^-11")
PEERS = (
    "plain torch", "TRL ChunkedLogProbFunction", "cut-cross-entropy cce", FALLBACK, "Liger native",
)  # fmt: skip
KNOWN = "qempo_fast known weights"
HEADLINE = ("qempo_fast exact", "qempo_fast exact, logits kept", KNOWN, *SAMPLED, CHOSEN, *PEERS)
OURS_AND_PLAIN = ("qempo_fast exact", KNOWN, CHOSEN, "plain torch")


class Group(NamedTuple):
    """Cases of one op that are timed alike."""

    op: str
    cases: tuple[Any, ...]
    providers: tuple[str, ...]
    runs: int = 5
    wall: int = 3
    need: float = 3.0


LLAMA = tuple(logps.Case(f"{TEXT} Llama-3-8B head", n, 4096, 128256, "bfloat16") for n in (64, 256))
DPP = tuple(dpp.Case(4096, k, d) for k in (8, 16) for d in (384, 1024))
LOSSES = (*(losses.Case(name, 4096, 8) for name in ("dpo", "qempo", "grpo")), losses.Case("rspo", 4096, 8))
SMALL = logps.Case(f"{TEXT} small", 64, 32, 512, "bfloat16")


def groups(rehearse: bool) -> dict[str, Group]:
    if rehearse:
        capped = SMALL._replace(softcap=5.0)
        few = tuple(c._replace(size=16) for c in LOSSES)
        return {
            "headline": Group("logps", (SMALL,), HEADLINE, 1, 1, 1.0),
            "shapes": Group("logps", (capped, capped._replace(frozen=True)), OURS_AND_PLAIN, 1, 1, 1.0),
            "dpp": Group("dpp", (dpp.Case(8, 4, 24),), ("qempo_fast cpu", "qempo_fast cuda", "eager inv"), 1, 1, 1.0),
            "losses": Group("losses", few, ("qempo_fast cpu", "eager"), 1, 1, 1.0),
        }
    return {
        "headline": Group("logps", (GPU,), HEADLINE),
        "shapes": Group("logps", (GEMMA, *LLAMA, SMOLLM2, GPU._replace(frozen=True)), OURS_AND_PLAIN, 5, 5),
        "dpp": Group("dpp", DPP, ("qempo_fast cuda", "qempo_fast triton", "eager inv"), 20, 20),
        "losses": Group("losses", LOSSES, ("qempo_fast triton", "eager"), 20, 20),
    }


def peak_mib(step: interleave.Step) -> float | None:
    """MiB above the inputs and the gradients at a step's peak; None away from a GPU."""
    if step.device != "cuda":
        return None
    taken = memory.on_gpu(lambda: torch.autograd.grad(step.function(), step.leaves, step.incoming))
    return taken["memory_mib"]


def summary(samples: list[list[float]]) -> dict[str, Any]:
    """Median of each mode, and the extremes of the whole step, in milliseconds."""
    modes = interleave.MODES[: len(samples[0])]
    out: dict[str, Any] = {f"{mode}_ms": statistics.median(s[i] for s in samples) for i, mode in enumerate(modes)}
    last = [s[-1] for s in samples]
    return out | {"low_ms": min(last), "high_ms": max(last), "runs": len(samples)}


def _checked(op: str, name: str, case: Any, made: Any) -> tuple[interleave.Step, dict[str, Any]]:
    module = load(op)
    try:
        return module.checked(name, case, made)
    except interleave.Inaccurate as error:
        # Of a peer no time is told. Of ours it is, beside what is wrong: there may be no second run to tell it.
        if module.PROVIDERS[name].kind == "peer" or not hasattr(module, "unchecked"):
            raise
        return module.unchecked(name, case, made)[1], {**error.errors, "inaccurate": str(error)}


def timed(group: Group, case: Any, name: str, device: str, gemm_gflops: float | None) -> dict[str, Any]:
    """A provider's row: errors once, then GPU time, wall time and memory."""
    module = load(group.op)
    made = module.inputs(case, device)
    step, extra = _checked(group.op, name, case, made)
    row = {**extra, **summary([step.run()[2] for _ in range(group.runs)])}
    row["wall_ms"] = interleave.wall_ms(step, group.wall)
    row["memory_mib"] = peak_mib(step)
    if group.op == "logps":
        if name.startswith("qempo_fast"):
            stats = qf.last_stats()
            if stats is not None:
                row |= {"f": stats.kept_share, "exact_chunks": stats.exact_chunks, "chunk_rows": stats.chunk_rows}
                row["kept_logits"] = stats.kept_logits
        if gemm_gflops:
            # 8NDV are 4 of them, 6NDV 3: how far it is from the tensor cores' limit.
            one = 2 * case.n * case.d * case.v / gemm_gflops / 1e6
            row["gemms"] = row["full_ms"] / one
    return row


def forward_alone(case: Any, device: str, runs: int) -> dict[str, Any]:
    """The exact mode's forward where no gradient is wanted."""
    made = logps.inputs(case, device)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return qf.linear_logps(made.hidden, made.weight, made.targets, softcap=case.softcap, grad="exact").logps

    step = interleave.Step(run, device=device)
    step.run()
    return summary([step.run()[2] for _ in range(runs)])


def gemm_gflops(run: Run) -> float | None:
    """The ceiling that this run has measured."""
    for row in read(run.lines.path):
        if row["kind"] == "ceiling" and row.get("what") == "gemm bfloat16":
            return float(row["gflops"])
    return None


def ceilings(chosen: Settings) -> list[dict[str, Any]]:
    """GEMM rates, the copy, and the GEMMs of one tile of the exact and of the sampled mode at the headline's width."""
    sizes = {"cpu": ((64, 64, 64), 2**16)} if chosen.rehearse else machine.SIZES
    found = machine.measured(chosen.device, sizes)
    rows: list[dict[str, Any]] = [
        {"what": f"gemm {dtype}", "gflops": rate, "size": sizes[chosen.device][0]}
        for dtype, rate in found.gemm_gflops.items()
    ]
    rows.append({"what": "copy", "gbs": found.copy_gbs, "bytes": sizes[chosen.device][1]})
    shrink = 128 if chosen.rehearse else 1
    for what, n, c, d in (
        ("tile, 4096 rows", 4096, 4096, 4096), ("tile, 8192 rows", 8192, 4096, 4096), ("chunk", 1024, 16384, 4096),
    ):  # fmt: skip
        rate = machine.gemm_gflops(n // shrink, c // shrink, d // shrink, "bfloat16", chosen.device)
        rows.append({"what": f"gemm of a {what}", "gflops": rate, "size": (n // shrink, c // shrink, d // shrink)})
    # At work: what was found at the start were the clocks of an idle card.
    return [*rows, {"what": "card", **card()}]


def published(name: str) -> dict[str, Any]:
    """What a peer's own project says of a provider that may not run here."""
    if name != "Liger native":
        return {}
    from suite import liger_native

    return {"published": liger_native.PUBLISHED}


def measure(run: Run, title: str) -> None:
    """Every case and provider of a group, in order."""
    measure_group(run, title, groups(run.settings.rehearse)[title])


def measure_group(run: Run, title: str, group: Group) -> None:
    device, rate = run.settings.device, gemm_gflops(run)
    for case in group.cases:
        if title == "headline":
            columns = {"op": "logps", "case": str(case), "provider": "qempo_fast exact, forward alone"}
            run.do(
                "time", f"{title}/forward alone", functools.partial(forward_alone, case, device, group.runs), **columns
            )
        for name in group.providers:
            columns = {"op": group.op, "case": str(case), "provider": name}
            function: Callable[[], Any] = functools.partial(timed, group, case, name, device, rate)
            known = published(name) if title == "headline" else {}
            run.do("time", f"{title}/{case}/{name}", function, need=group.need, **columns, **known)
    forget(group.op)


def forget(op: str) -> None:
    """Free the inputs and the truth of the last case."""
    module = load(op)
    for function in (module.inputs, getattr(module, "exact", None)):
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    interleave.free("cuda" if torch.cuda.is_available() else "cpu")


def prepare(run: Run) -> None:
    """The headline's inputs and truth, while the tests have the GPU too: 30 TFLOP of float64."""

    def made() -> dict[str, Any]:
        case = groups(run.settings.rehearse)["headline"].cases[0]
        logps.inputs(case, run.settings.device)
        # Torch alone: a kernel of ours that fails here would take the tests along.
        *_, entropy = logps.exact(case, run.settings.device)
        return {"case": str(case), "entropy_nats": entropy}

    run.do("prepare", "prepare", made, most=60)
