"""Log-probs from hidden states, forward and backward, against what public libraries do: qempo-fast bench --op logps.

Real hidden states of SmolLM2-135M, and synthetic heads at the shapes of larger models (heads.py): "synthetic", on a GPU
"flat", keeps most columns at any threshold; "text-like" keeps what text does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

import qempo_fast as qf
from qempo_fast.integrations.known import known_coefficients, scored
from qempo_fast.logps._gemm import linear
from qempo_fast.logps.cpu import CpuPass
from suite import heads
from suite.interleave import Step, relative, require
from suite.provider import Provider, Set, gpu_set

SYNTHETIC, FLAT, TEXT = "synthetic", "flat", "text-like"
# Relative Frobenius errors of dHidden and dWeight. Sampling at 2^-9 costs 0.006 on text (docs/linear_logps.md), more
# where the policy is sure and the gradient small; bfloat16 0.016.
LIMITS = {
    ("float32", False): 1e-4,
    ("float32", True): 0.05,
    ("bfloat16", False): 0.04,
    ("bfloat16", True): 0.05,
}
# Errors in dWeight are taken on every n-th vocabulary row: the whole truth in float64 is 5 GB for Gemma 2's head.
EVERY = 8


class Case(NamedTuple):
    """N rows of a source at width D and vocabulary V; the logits are capped, and divided by temperature.

    frozen: only hidden wants a gradient, as where a model is trained by LoRA.
    """

    source: str
    n: int
    d: int
    v: int
    dtype: str
    temperature: float = 1.0
    softcap: float | None = None
    frozen: bool = False

    def __str__(self) -> str:
        hot = "" if self.temperature == 1 else f" T={self.temperature:g}"
        capped = "" if self.softcap is None else f" softcap={self.softcap:g}"
        frozen = " frozen head" * self.frozen
        return f"{self.source} N={self.n} D={self.d} V={self.v} {self.dtype}{hot}{capped}{frozen}"


class Inputs(NamedTuple):
    """hidden (N, D), weight (V, D), targets (N,), coefficients (N,)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    incoming: torch.Tensor


def _smollm2(source: str, n: int, dtype: str, temperature: float = 1.0) -> Case:
    return Case(source, n, 576, 49152, dtype, temperature)


def _model(name: str, n: int, d: int, v: int) -> Case:
    return Case(f"{SYNTHETIC} {name}", n, d, v, "bfloat16")


QUICK = _smollm2(heads.ENGLISH, 256, "float32")
MAIN = [_smollm2(heads.ENGLISH, 2048, dtype) for dtype in ("float32", "bfloat16")]
FROZEN = [case._replace(n=n, frozen=True) for case in MAIN for n in (256, 2048)]
# Few rows: on a CPU these heads cost seconds for each hundred.
MODELS = [
    _model("Llama-3-8B head", 64, 4096, 128256),
    _model("Qwen3-8B head", 64, 4096, 151936),
    _model("Gemma-2-2B head", 64, 2304, 256000),
]
COMPLETIONS = [_smollm2(source, 1024, "float32") for source in (heads.SAMPLED, heads.TRAINED)]
BY_N = [_smollm2(heads.ENGLISH, n, "float32") for n in (128, 512)]
BY_TEMPERATURE = [_smollm2(heads.ENGLISH, 512, "float32", t) for t in (0.5, 0.7, 1.4, 2.0)]
BY_V = [Case(SYNTHETIC, 512, 576, v, "float32") for v in (16384, 49152, 131072)]
BY_D = [Case(SYNTHETIC, 512, d, 49152, "float32") for d in (256, 2048)]
BY_V_MEMORY = [Case(SYNTHETIC, 1024, 576, v, "bfloat16") for v in (16384, 65536, 262144)]
# The shape that the goals for a GPU name.
GPU = Case(TEXT, 8192, 4096, 131072, "bfloat16")
GEMMA = Case(f"{TEXT} Gemma-2-2B head", 2048, 2304, 256000, "bfloat16", softcap=30.0)
SMOLLM2 = Case(f"{TEXT} SmolLM2-135M head", 2048, 576, 49152, "bfloat16")
GPU_CASES = [
    GPU,
    GPU._replace(source=FLAT),
    GEMMA,
    Case(f"{TEXT} Llama-3-8B head", 4096, 4096, 128256, "bfloat16"),
    Case(f"{TEXT} Qwen3-8B head", 4096, 4096, 151936, "bfloat16"),
    SMOLLM2,
]
# What a reader would take instead: the rest costs minutes for these cases and is in the main ones.
OTHERS = ("TRL ChunkedLogProbFunction", "Liger scaled cross-entropy", "cut-cross-entropy torch_compile")
FEW = ("qempo_fast sampled", "qempo_fast exact", "plain torch", "cut-cross-entropy torch_compile")
KNOWN = ("qempo_fast known weights", "qempo_fast known weights, sampled", "qempo_fast exact, none kept", FEW[1])

Logps = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _capped(z: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _plain(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, softcap: float | None = None) -> torch.Tensor:
    return -F.cross_entropy(_capped(F.linear(h, w), softcap).float(), t, reduction="none")


def _no_softcap(case: Case) -> None:
    if case.softcap is not None:
        raise RuntimeError("takes no softcap")


def _torch_chunked(case: Case, device: str) -> Logps:
    _no_softcap(case)
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    # Its documentation: in chunks where num_batches >= in_features, below that without.
    options = torch.nn.LinearCrossEntropyOptions() if case.n >= case.d and case.v > case.d else None
    return lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none", options=options)


def _trl(case: Case, device: str) -> Logps:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as tile

    return lambda h, w, t: ChunkedLogProbFunction.apply(h, w, None, t, 1.0, tile, case.softcap, 1.0, ())[0]


def _cut(case: Case, device: str, impl: str) -> Logps:
    if impl == "cce" and device != "cuda":
        raise RuntimeError("cut-cross-entropy's cce is Triton code for a GPU, and there is none")
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, w, t: -linear_cross_entropy(h, w, t, reduction="none", impl=impl, softcap=case.softcap)


def _liger(case: Case, device: str) -> Logps:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    _no_softcap(case)
    # Away from Hopper this is Liger's own fallback, in chunks of 512 tokens.
    return lambda h, w, t: -LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, t)


def _liger_native(case: Case, device: str) -> Logps:
    """Liger's own Hopper kernel, out of the kit that `make gpu-kit PEER=liger` builds; KIT names its folder."""
    _no_softcap(case)
    if device != "cuda":
        raise RuntimeError("it is machine code for Hopper, and there is none")
    from suite import liger_native

    return liger_native.load(Path(os.environ.get("KIT") or ".gpu") / "native")


def _verl(case: Case, device: str) -> Logps:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    _no_softcap(case)
    if device != "cuda":
        raise RuntimeError("verl's kernel is Triton code for a GPU, and there is none")
    return lambda h, w, t: linear_cross_entropy(h, w, t, 1.0, "none")[0]


def _ours(**keywords: Any) -> Provider:
    return Provider(
        "ours",
        lambda case, device: lambda h, w, t: qf.linear_logps(h, w, t, softcap=case.softcap, **keywords).logps,
    )


def _kept_logits(case: Case, device: str) -> Logps:
    """6NDV instead of 8NDV at the memory of a peer that keeps its logits."""

    def run(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        size = str(h.shape[0] * w.shape[0] * h.element_size() // 2**20 + 1)
        with mock.patch.dict(os.environ, QEMPO_KEEP_LOGITS=size):
            return qf.linear_logps(h, w, t, softcap=case.softcap, grad="exact").logps

    return run


def _none_kept(case: Case, device: str) -> Logps:
    """8NDV: every logit is made again in the backward."""

    def run(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with mock.patch.dict(os.environ, QEMPO_KEEP_LOGITS="0"):
            return qf.linear_logps(h, w, t, softcap=case.softcap, grad="exact").logps

    return run


def _known(case: Case, device: str, **keywords: Any) -> Logps:
    """weighted_logps, of the coefficients that _step says beforehand."""
    return lambda h, w, t: scored(h, w, t, softcap=case.softcap, **keywords).logps


PROVIDERS: dict[str, Provider] = {
    "qempo_fast sampled": _ours(grad="sampled", tau=2.0**-9),
    "qempo_fast sampled 2^-7": _ours(grad="sampled", tau=2.0**-7),
    # At the threshold that it finds by the error which the draw may add.
    "qempo_fast sampled, tau chosen": _ours(grad="sampled"),
    "qempo_fast sampled 2^-11": _ours(grad="sampled", tau=2.0**-11),
    "qempo_fast exact": _ours(grad="exact"),
    "qempo_fast exact, logits kept": Provider("ours", _kept_logits),
    "qempo_fast exact, none kept": Provider("ours", _none_kept),
    "qempo_fast known weights": Provider("ours", _known),
    "qempo_fast known weights, sampled": Provider("ours", functools.partial(_known, grad="sampled")),
    "plain torch": Provider("peer", lambda case, device: functools.partial(_plain, softcap=case.softcap)),
    "torch.compile of plain": Provider(
        "peer", lambda case, device: torch.compile(functools.partial(_plain, softcap=case.softcap))
    ),
    "torch linear_cross_entropy": Provider("peer", _torch_chunked),
    "TRL ChunkedLogProbFunction": Provider("peer", _trl),
    "Liger scaled cross-entropy": Provider("peer", _liger),
    "Liger native": Provider("peer", _liger_native),
    "cut-cross-entropy torch_compile": Provider("peer", functools.partial(_cut, impl="torch_compile")),
    "cut-cross-entropy cce": Provider("peer", functools.partial(_cut, impl="cce")),
    "verl linear_cross_entropy": Provider("peer", _verl),
}
SETS = {
    "quick": Set([QUICK]),
    "main": Set(MAIN, memory=True),
    "models": Set(MODELS, ("qempo_fast sampled 2^-11", "qempo_fast exact", "plain torch", *OTHERS), rounds=3),
    "completions": Set(COMPLETIONS),
    "frozen": Set(FROZEN, memory=True),
    "known": Set(MAIN, (*KNOWN, "plain torch", *OTHERS), memory=True),
    "scaling": Set([*BY_N, *BY_TEMPERATURE, *BY_V, *BY_D], FEW),
    "threads": Set([QUICK], threads=("one", "all")),
    "memory": Set(BY_V_MEMORY, (*FEW, "TRL ChunkedLogProbFunction"), memory=True, timed=False),
    "tiny": Set([Case("random", 24, 16, 512, dtype) for dtype in ("float32", "bfloat16")], threads=("one",)),
    "gpu": gpu_set(GPU_CASES, PROVIDERS),
    # A process for each provider: ten seconds each.
    "gpu-memory": Set([GPU], memory=True, timed=False),
}  # fmt: skip


def truth(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    incoming: torch.Tensor,
    every: int = EVERY,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """dhidden, every n-th row of dweight and the rows' mean entropy, in float64, a block of the vocabulary at a time.

    z = h W^T, capped as c tanh(z / c); dz_ij = g_i (1[j = t_i] - exp(z_ij - lse_i)), with a cap times 1 - (z_ij / c)^2;
    dh = dz W; dW = dz^T h. qf.reference keeps N x V values of float64 four times over; a test compares the two.
    """
    h, g = hidden.double(), incoming.double()[:, None]
    blocks = weight.split(8192)
    lse = torch.full_like(g, -torch.inf)
    for w in blocks:
        lse = torch.logaddexp(lse, _capped(h @ w.double().T, softcap).logsumexp(1, keepdim=True))
    grad_hidden, grad_weight, start = torch.zeros_like(h), [], 0
    entropy = torch.zeros_like(g)
    for w in blocks:
        wide = w.double()
        z = _capped(h @ wide.T, softcap)
        dz = torch.exp(z - lse)
        entropy += (dz * (lse - z)).sum(1, keepdim=True)
        dz *= -g
        here = ((targets >= start) & (targets < start + len(w))).nonzero()[:, 0]
        dz[here, targets[here] - start] += g[here, 0]
        if softcap is not None:
            dz *= 1 - (z / softcap).square_()
        del z
        grad_hidden += dz @ wide
        grad_weight.append(dz[:, -start % every :: every].T @ h)
        start += len(w)
    return grad_hidden, torch.cat(grad_weight), float(entropy.mean())


@functools.lru_cache(maxsize=1)
def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    if case.source.startswith((SYNTHETIC, FLAT)):
        hidden, weight, targets = heads.synthetic(case.n, case.d, case.v, device)
    elif case.source.startswith(TEXT):
        hidden, weight, targets = heads.text_like(case.n, case.d, case.v, device)
    elif case.source == "random":
        hidden, weight = (torch.randn(rows, case.d, generator=generator) for rows in (case.n, case.v))
        targets = torch.randint(case.v, (case.n,), generator=generator)
    else:
        hidden, weight, targets = heads.real(case.source, case.n)
    dtype = getattr(torch, case.dtype)
    hidden, weight = (x.to(device, dtype).contiguous() for x in (hidden / case.temperature, weight))
    targets = targets.to(device)
    incoming = torch.randn(case.n, generator=generator).to(device)
    return Inputs(hidden, weight, targets, incoming)


@functools.lru_cache(maxsize=1)
def exact(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """truth of the case's inputs."""
    return truth(*inputs(case, device), softcap=case.softcap)


def kept_share(out: torch.Tensor, vocabulary: int) -> float | None:
    """Share of the vocabulary that the sampled backward of out keeps, mean over row chunks; None for another graph."""
    node = out.grad_fn
    while node is not None and not hasattr(node, "kept"):
        node = node.next_functions[0][0] if node.next_functions else None
    if node is None or not node.kept:
        return None
    counts = [vocabulary if k.columns is None else len(k.columns) for k in node.kept]
    return sum(counts) / (len(counts) * vocabulary)


def _step(function: Logps, made: Inputs, rows: int, columns: int, frozen: bool) -> Step:
    hidden, weight = made.hidden[:rows].detach().requires_grad_(), made.weight[:columns].detach()
    head = (hidden, weight.requires_grad_(not frozen))
    leaves = head[: 1 if frozen else 2]
    targets = made.targets[:rows] % columns
    with torch.no_grad():
        try:
            out = function(made.hidden[:2], made.weight[:256], made.targets[:2] % 256)
        except RuntimeError:  # a kernel for large sizes
            out = function(*head, targets)
    incoming = made.incoming[:rows].to(out.dtype)

    def run() -> torch.Tensor:
        with known_coefficients(incoming):  # nobody but _known looks
            return function(*head, targets)

    return Step(run, leaves, incoming, made.hidden.device.type)


def unchecked(name: str, case: Case, made: Inputs) -> tuple[Step, Step]:
    """(a small step of the same width, the step)."""
    function = PROVIDERS[name].make(case, made.hidden.device.type)
    small = _step(function, made, 64, 256, case.frozen)
    return small, _step(function, made, case.n, case.v, case.frozen)


def checked(name: str, case: Case, made: Inputs) -> tuple[Step, dict[str, Any]]:
    """The provider's step, run once; entropy of the case, kept share, and errors of the gradients against float64."""
    sampled = "sampled" in name
    function = PROVIDERS[name].make(case, made.hidden.device.type)
    step = _step(function, made, case.n, case.v, case.frozen)
    torch.manual_seed(0)
    kept = kept_share(step.function(), case.v)
    torch.manual_seed(0)
    _, (grad_hidden, *more), _ = step.run()
    true_hidden, true_weight, entropy = exact(case, made.hidden.device.type)
    errors = {"error_hidden": relative(grad_hidden, true_hidden)}
    if more:
        errors["error_weight"] = relative(more[0][::EVERY], true_weight)
    require(f"{name}, {case}", errors, dict.fromkeys(errors, LIMITS[case.dtype, sampled]))
    return step, {"entropy_nats": entropy, "kept": kept if sampled else None, **errors}


def baselines(case: Case, made: Inputs) -> dict[str, Step]:
    """The forward GEMMs alone, in the tiles and by the GEMM of the op; on a GPU one GEMM."""

    def gemms(rows: int, columns: int) -> Step:
        hidden, weight = made.hidden, made.weight
        out = torch.empty(rows * columns, dtype=hidden.dtype, device=hidden.device)

        def run() -> torch.Tensor:
            for h in hidden.split(rows):
                for w in weight.split(columns):
                    z = linear(h, w, out[: len(h) * len(w)].view(len(h), len(w)))
            return z

        return Step(run, device=hidden.device.type)

    if made.hidden.device.type == "cuda":
        return {"forward GEMM": gemms(case.n, 32768)}
    sizes = {mode: CpuPass().sizes(mode == "sampled") for mode in ("sampled", "exact")}
    return {f"GEMMs of {mode}'s forward": gemms(size.rows, size.columns) for mode, size in sizes.items()}


def floors(case: Case) -> dict[str, dict[str, float]]:
    """One GEMM, 2NDV: forward needs it, and so does forward + backward. Inputs read once, gradients written once."""
    size = getattr(torch, case.dtype).itemsize
    once = (case.n + case.v) * case.d * size
    flops = 2 * case.n * case.d * case.v
    return {
        "forward": {"floor_bytes": once, "floor_flops": flops},
        "full": {"floor_bytes": 2 * once, "floor_flops": flops},
    }
