"""Every GPU kernel once at small, awkward sizes, compared with float64: the program that compute-sanitizer watches.

    compute-sanitizer --tool racecheck python -P bench/gpu/sanitize.py --op dpp --backend cuda
    TRITON_INTERPRET=1 python -P bench/gpu/sanitize.py --backend triton --device cpu      (a rehearsal without a GPU)

Exit status 1 where a result is off by more than rounding; compute-sanitizer's own status says what it found.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import qempo_fast as qf
from gpu.lines import Lines, die_with_parent, gpu_is_lost, reason

# Relative Frobenius error. Rounding of float32 inputs stays under 1e-5, of bfloat16 ones near 5e-3 (a gain near its
# lower bound loses a digit more); a wrong index or a missing barrier is of order 1.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
Checks = Iterator[tuple[str, Callable[[], float]]]


def error(out: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The largest relative error of any tensor of out; NaN counts as infinite."""
    worst = 0.0
    for x, y in zip(out, truth, strict=True):
        e = float((x.detach().double().cpu() - y.detach().cpu()).norm() / y.detach().norm().cpu().clamp(min=1e-6))
        worst = max(worst, e if e == e else float("inf"))
    return worst


def compare(
    run: Callable[..., tuple[Tensor, ...]], reference: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
) -> float:
    """Error of run's outputs and of its gradients in inputs against reference's in float64 on the CPU."""
    results = []
    for function, leaves in (
        (run, [x.detach().clone().requires_grad_() for x in inputs]),
        (reference, [x.detach().double().cpu().requires_grad_() for x in inputs]),
    ):
        outputs = function(*leaves)
        # Another weight for each output and entry, so that no two gradients can stand in for each other.
        total = sum(
            (o * torch.linspace(0.5, 1.5 + i, o.numel(), dtype=o.dtype, device=o.device).view_as(o)).sum()
            for i, o in enumerate(outputs)
        )
        results.append((*outputs, *torch.autograd.grad(total, leaves)))
    return error(results[0], results[1])


def dpp(device: torch.device, backend: str) -> Checks:
    draw = torch.Generator().manual_seed(0)
    for k, d, dtype in (
        (1, 5, torch.float32), (3, 33, torch.float32), (4, 64, torch.bfloat16), (8, 40, torch.float32),
        (16, 65, torch.bfloat16), (17, 31, torch.float32), (33, 48, torch.float32), (64, 70, torch.float32),
    ):  # fmt: skip
        x = torch.randn(3, k, d, generator=draw).to(dtype).to(device)
        q = torch.randn(3, k, generator=draw).to(device)
        yield f"k={k} d={d} {dtype}", lambda x=x, q=q: compare(
            lambda a, b: qf.dpp_gains(a, log_quality=b, backend=backend)[:2],
            lambda a, b: qf.reference.dpp_gains(a, log_quality=b)[:2], x, q)  # fmt: skip
    offsets = torch.tensor([0, 2, 7, 8, 40])
    x = torch.randn(40, 24, generator=draw).to(device)
    yield "ragged", lambda: compare(
        lambda a: qf.dpp_gains(a, offsets=offsets.to(device), backend=backend)[:2],
        lambda a: qf.reference.dpp_gains(a, offsets=offsets)[:2], x)  # fmt: skip
    # Duplicates at a large quality leave float32: the careful kernel.
    twins = torch.randn(2, 4, 24, generator=draw).repeat(1, 2, 1).to(device)
    large = torch.full((2, 8), 40.0, device=device)
    yield "duplicates of large quality", lambda: compare(
        lambda a, b: qf.dpp_gains(a, log_quality=b, backend=backend)[:2],
        lambda a, b: qf.reference.dpp_gains(a, log_quality=b)[:2], twins, large)  # fmt: skip

    def select() -> float:
        y = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(1)).to(device)
        return float((qf.dpp_select(y, 5).cpu() != qf.reference.dpp_select(y.cpu().double(), 5)).sum())

    yield "selection", select


def logps(device: torch.device, backend: str) -> Checks:
    draw = torch.Generator().manual_seed(0)
    n, d, v = 37, 24, 515
    targets = torch.randint(v, (n,), generator=draw)
    targets[5] = -100
    bias = torch.randn(v, generator=draw)
    temperature = torch.rand(n, generator=draw) + 0.5
    heads = {
        "plain": {},
        "softcap, scale": {"softcap": 5.0, "logit_scale": 0.7, "temperature": 0.8},
        "temperature by token": {"temperature": temperature},
        "bias": {"bias": bias},
    }
    for dtype in (torch.float32, torch.bfloat16):
        h = torch.randn(n, d, generator=draw).to(dtype).to(device)
        w = (torch.randn(v, d, generator=draw) / 2).to(dtype).to(device)
        for name, keywords in heads.items():

            def run(a: Tensor, b: Tensor, k: dict = keywords) -> tuple[Tensor, ...]:
                k = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in k.items()}
                if "bias" in k:
                    k["bias"] = k["bias"].to(a.dtype)
                out = qf.linear_logps(a, b, targets.to(device), entropy=True, grad="exact", backend=backend, **k)
                return out.logps, out.entropy

            def truth(a: Tensor, b: Tensor, k: dict = keywords, dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
                k = {key: x.to(dtype).double() if key == "bias" else x for key, x in k.items()}
                out = qf.reference.linear_logps(a, b, targets, entropy=True, **k)
                return out.logps, out.entropy

            yield f"{name} {dtype}", lambda run=run, truth=truth, h=h, w=w: compare(run, truth, h, w)

        def sampled(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            # A tau under every column's bound keeps them all: the sampled kernels with the exact answer.
            return (qf.linear_logps(a, b, targets.to(device), grad="sampled", tau=1e-30, backend=backend).logps,)

        def exact(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            return (qf.reference.linear_logps(a, b, targets).logps,)

        yield f"sampled {dtype}", lambda h=h, w=w, f=sampled, g=exact: compare(f, g, h, w)
        yield f"compacted {dtype}", lambda h=h, w=w: _compacted(h, w, targets.to(device), backend)
    z = torch.randn(n, v, generator=draw).to(device)
    yield "from logits", lambda: compare(
        lambda a: qf.logps_from_logits(a.clone(), targets.to(device), entropy=True, backend=backend)[:2],
        lambda a: qf.reference.logps_from_logits(a, targets, entropy=True)[:2], z)  # fmt: skip


def _compacted(h: Tensor, w: Tensor, targets: Tensor, backend: str) -> float:
    """Compaction for real: few columns kept; forward exact, gradients finite."""
    a, b = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    out = qf.linear_logps(a, b, targets, grad="sampled", tau=0.5, backend=backend).logps
    grads = torch.autograd.grad(out.sum(), (a, b))
    truth = qf.reference.linear_logps(h.double().cpu(), w.double().cpu(), targets.cpu()).logps
    finite = all(bool(g.isfinite().all()) for g in grads)
    return error((out,), (truth,)) if finite else float("inf")


def losses(device: torch.device, backend: str) -> Checks:
    draw = torch.Generator().manual_seed(0)

    def scores(*shape: int) -> Tensor:
        return (5 * torch.randn(*shape, generator=draw)).to(device)

    a, b, c, d = (scores(37) for _ in range(4))
    yield "pairs", lambda: compare(
        lambda x, y: (qf.spl_pair_loss(x, y, *_like(x, c, d), alpha=0.3, beta=0.1, label_smoothing=0.1),),
        lambda x, y: (qf.reference.spl_pair_loss(x, y, *_like(x, c, d), alpha=0.3, beta=0.1, label_smoothing=0.1),),
        a, b)  # fmt: skip
    strong, weak, ref_strong, ref_weak = scores(37, 2), scores(37, 5), scores(37, 2), scores(37, 5)
    yield "epa", lambda: compare(
        lambda x, y, z: (qf.epa_loss(x, y, z, *_like(x, c, ref_strong, ref_weak)),),
        lambda x, y, z: (qf.reference.epa_loss(x, y, z, *_like(x, c, ref_strong, ref_weak)),),
        a, strong, weak)  # fmt: skip
    lengths, aligned = torch.arange(1, 38, device=device), scores(37, 3)
    yield "poft", lambda: compare(
        lambda x: (qf.poft_loss(x, lengths, *_like(x, aligned)),),
        lambda x: (qf.reference.poft_loss(x, *_like(x, lengths), *_like(x, aligned)),), a)  # fmt: skip
    s, f, r = scores(40), scores(40), scores(40)
    offsets = torch.tensor([0, 2, 9, 25, 40], device=device)
    layouts = {"equal": {"group_size": 5}, "ragged": {"offsets": offsets}}
    group_losses = {
        "spl": lambda m, x, k: m.spl_loss(x, *_like(x, f, r), alpha=0.2, beta=0.1, **k),
        "variance": lambda m, x, k: m.variance_loss(x, *_like(x, f, r), alpha=0.2, beta=0.1, **k),
        "rspo": lambda m, x, k: m.rspo_loss(x, *_like(x, r), k=2, **k),
    }
    for layout, keywords in layouts.items():
        for name, loss in group_losses.items():
            yield f"{name}, {layout}", lambda loss=loss, k=keywords: compare(
                lambda x: (loss(qf, x, k),),
                lambda x: (loss(qf.reference, x, {n: _cpu(y) for n, y in k.items()}),), s)  # fmt: skip
    tokens, old = scores(60) / 20, scores(60) / 20
    cu = torch.tensor([0, 7, 7, 30, 60], device=device)
    advantage = scores(4)
    for ratio in ("token", "sequence"):
        keywords = {"kl": 0.1, "ratio": ratio}
        yield f"tokens, {ratio}", lambda k=keywords: compare(
            lambda x: (qf.grpo_loss(x, *_like(x, old, advantage), cu, ref_token_logps=old, **k),),
            lambda x: (
                qf.reference.grpo_loss(x, *_like(x, old, advantage), cu.cpu(), ref_token_logps=_like(x, old)[0], **k),
            ), tokens)  # fmt: skip
    yield (
        "segment_sum",
        lambda: compare(lambda x: (qf.segment_sum(x, cu),), lambda x: (qf.reference.segment_sum(x, cu.cpu()),), tokens),
    )


def _like(x: Tensor, *others: Tensor) -> list[Tensor]:
    return [y.to(device=x.device, dtype=x.dtype) for y in others]


def _cpu(x: object) -> object:
    return x.cpu() if isinstance(x, Tensor) else x


OPS = {"dpp": dpp, "logps": logps, "losses": losses}


def attempt(name: str, run: Callable[[], float]) -> tuple[float | None, str | None]:
    """(relative error, None), or (None, what it raised)."""
    try:
        wrong = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        return None, reason(error)
    limit = LIMITS[torch.bfloat16 if "bfloat16" in name else torch.float32]
    return wrong, None if wrong <= limit else f"relative error {wrong:.2e}, wanted at most {limit:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="*", choices=list(OPS), default=list(OPS))
    parser.add_argument("--backend", default="triton", choices=["cuda", "triton", "cpu"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="a part of the names of the checks to run")
    parser.add_argument("--skip", type=int, default=0, help="the first so many of them are done")
    args = parser.parse_args()
    die_with_parent()
    os.environ["QEMPO_BACKEND"] = args.backend
    # As lines of a run's results too, where run.sh asks for them; under a sanitizer its name is told.
    lines = Lines(os.environ["GPU_RESULTS"]) if "GPU_RESULTS" in os.environ else None
    under = os.environ.get("GPU_SANITIZER")
    device, failed, count = torch.device(args.device), 0, 0
    for op in args.op:
        for name, run in OPS[op](device, args.backend):
            if args.only not in name:
                continue
            count += 1
            if count <= args.skip:
                continue
            wrong, why = attempt(name, run)
            failed += why is not None
            print(f"{'FAIL' if why else 'ok  '} {op}: {name}: {why or f'relative error {wrong:.2e}'}", flush=True)
            if lines is not None:
                columns = {"op": op, "backend": args.backend, "check": name, "under": under}
                lines.write("kernel", **columns, ok=why is None, error=wrong, reason=why, quiet=True)
            if why and under is None and gpu_is_lost():
                again = [w for i, w in enumerate(sys.argv) if "--skip" not in (w, sys.argv[i - 1])]
                os.execv(sys.executable, [sys.executable, "-P", *again, "--skip", str(count)])
    print(f"{count - failed} passed, {failed} failed")
    raise SystemExit(1 if failed or not count else 0)


if __name__ == "__main__":
    main()
