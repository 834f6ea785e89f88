"""Hidden states to loss to gradients through the fused log-probs, against the logits in plain torch; and its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import qempo_fast as qf

D = torch.float64
WIDTH, VOCABULARY = 6, 600
CU = torch.tensor([0, 4, 5, 9, 14, 16, 19, 26, 29, 31, 36, 40, 47])
N, S = int(CU[-1]), len(CU) - 1
_RNG = torch.Generator().manual_seed(11)


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=D, generator=_RNG)


HIDDEN, WEIGHT, BIAS = draw(N, WIDTH), draw(VOCABULARY, WIDTH), draw(VOCABULARY)
TARGETS = torch.randint(0, VOCABULARY, (N,), generator=_RNG)
# Prompt tokens inside the sequences count nowhere.
TARGETS[[0, 5, 6, 20, 36]] = -100
F, R, E = draw(S, scale=2.0) - 10, draw(S), draw(S, 5)
OLD, ADVANTAGES = draw(N, scale=0.1) - 3.5, draw(S)
OFFSETS = torch.tensor([0, 2, 7, 12])

Pieces = tuple[torch.Tensor, torch.Tensor]  # sequence log-probs (S,), token log-probs (N,)
# name: loss of (sequence sums, token log-probs); one of each way in: groups, pairs, contrasts, tokens.
LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "spl": lambda s, _: qf.spl_loss(s, F, R, alpha=0.3, beta=0.1, group_size=4),
    "qempo_kl, ragged": lambda s, _: qf.qempo_kl_loss(s, F, R, lam=5.0, mu=0.5, offsets=OFFSETS),
    "gvpo": lambda s, _: qf.gvpo_loss(s, F, R, group_size=4),
    "dqo": lambda s, _: qf.dqo_loss(s, R, E, ref_logps=F, beta=0.1, offsets=OFFSETS),
    "rspo": lambda s, _: qf.rspo_loss(s, R, k=2, group_size=4),
    "dpo": lambda s, _: qf.dpo_loss(s[::2], s[1::2], F[::2], F[1::2]),
    "qempo pairs": lambda s, _: qf.qempo_pair_loss(s[:6], s[6:], lam=5.0),
    "epa": lambda s, _: qf.epa_loss(s[:3], s[3:9].reshape(3, 2), s[9:, None], F[:3], F[3:9].reshape(3, 2), F[9:, None]),
    "poft": lambda s, _: qf.poft_loss(s, (CU[1:] - CU[:-1]), F[:, None] / 5),
    "grpo": lambda _, w: qf.grpo_loss(w, OLD, ADVANTAGES, CU, ref_token_logps=OLD - 0.1, kl=0.05),
    "gspo": lambda _, w: qf.grpo_loss(w, OLD, ADVANTAGES, CU, ratio="sequence"),
}
ALL = pytest.mark.parametrize("name", LOSSES)


def leaves() -> list[torch.Tensor]:
    return [x.clone().requires_grad_() for x in (HIDDEN, WEIGHT, BIAS)]


def fused(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Pieces:
    out = qf.sequence_logps(hidden, weight, TARGETS, CU, bias=bias, temperature=0.8, grad="exact")
    return out.logps, out.token_logps


def plain(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Pieces:
    """The same by all the logits and torch's own log_softmax, a sequence at a time."""
    logps = torch.log_softmax((hidden @ weight.T + bias) / 0.8, 1)
    counted = TARGETS != -100
    token = torch.where(counted, logps[torch.arange(N), TARGETS.clamp(min=0)], 0.0)
    return torch.stack([part.sum() for part in token.split(CU.diff().tolist())]), token


@ALL
def test_gradients(name: str) -> None:
    mine, truth = leaves(), leaves()
    loss, want = LOSSES[name](*fused(*mine)), LOSSES[name](*plain(*truth))
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    for label, a, b in zip(("hidden", "weight", "bias"), mine, truth, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert float(b.grad.abs().max()) > 1e-4, label
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-13, msg=lambda m, at=label: f"{at}: {m}")


@ALL
def test_coefficients_then_shuffled_micro_batches(name: str) -> None:
    """Coefficients once without a graph, then the head backward in two halves of shuffled sequences."""
    truth = leaves()
    sums, token = plain(*truth)
    LOSSES[name](sums, token).backward()
    mine = leaves()
    with torch.no_grad():
        sums, token = fused(*mine)
        if name in ("grpo", "gspo"):
            _, coef = qf.coefficients(lambda w: LOSSES[name](sums, w), token)
        else:
            _, coef = qf.coefficients(lambda s: LOSSES[name](s, token), sums)
            coef = coef.repeat_interleave(CU.diff())
    order = torch.randperm(S, generator=torch.Generator().manual_seed(1))
    for half in order.split(S // 2):
        rows = torch.cat([torch.arange(int(CU[i]), int(CU[i + 1])) for i in half])
        logps = qf.linear_logps(
            mine[0][rows], mine[1], TARGETS[rows], bias=mine[2], temperature=0.8, grad="exact"
        ).logps
        (coef[rows] * logps).sum().backward()
    for label, a, b in zip(("hidden", "weight", "bias"), mine, truth, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-13, msg=lambda m, at=label: f"{at}: {m}")


def test_sampled_gradient_is_unbiased_through_a_loss() -> None:
    """400 draws of the compacted vocabulary: their mean is within five standard errors of the exact gradient."""
    truth = leaves()
    LOSSES["spl"](*plain(*truth)).backward()
    total, square, draws = torch.zeros_like(HIDDEN), torch.zeros_like(HIDDEN), 400
    for _ in range(draws):
        hidden, weight, bias = leaves()
        out = qf.sequence_logps(hidden, weight, TARGETS, CU, bias=bias, temperature=0.8, grad="sampled", tau=0.1)
        (grad,) = torch.autograd.grad(LOSSES["spl"](out.logps, out.token_logps), hidden)
        total, square = total + grad, square + grad.square()
    mean = total / draws
    error = ((square / draws - mean.square()).clamp(min=0) / draws).sqrt()
    assert float(error.max()) > 0.0
    want = truth[0].grad
    assert want is not None
    assert bool(((mean - want).abs() <= 5 * error + 1e-10).all())


MEMORY = """
import gc, sys, torch
import qempo_fast as qf
torch.set_num_threads(1)
name, grad = sys.argv[1:]
s, length, d, v, k = 128, 32, 16, 32768, 8
n = s * length
g = torch.Generator().manual_seed(0)
hidden, weight = (torch.randn(*x, generator=g).requires_grad_() for x in ((n, d), (v, d)))
targets, cu = torch.randint(0, v, (n,), generator=g), torch.arange(0, n + 1, length)
ref, rewards, rows = torch.randn(s, generator=g) - 300, torch.randn(s, generator=g), torch.randn(s, 8, generator=g)

def step(hidden, targets, cu, ref, rewards, rows):
    out = qf.sequence_logps(hidden, weight, targets, cu, grad=grad)
    return {
        "spl": lambda: qf.spl_loss(out.logps, ref, rewards, alpha=0.3, beta=0.1, group_size=k),
        "gvpo": lambda: qf.gvpo_loss(out.logps, ref, rewards, group_size=k),
        "dqo": lambda: qf.dqo_loss(out.logps, rewards, rows, group_size=k),
        "rspo": lambda: qf.rspo_loss(out.logps, rewards, k=4, group_size=k),
        "dpo": lambda: qf.dpo_loss(out.logps[::2], out.logps[1::2], ref[::2], ref[1::2]),
        "grpo": lambda: qf.grpo_loss(out.token_logps, out.token_logps.detach(), rewards, cu),
    }[name]()

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1024

def live():
    gc.collect()
    out = {}
    for x in gc.get_objects():
        if issubclass(type(x), torch.Tensor) and x.numel():
            out[x.untyped_storage().data_ptr()] = x
    return out

# Buffers that stay for the life of the process (compiled kernels, work space) come with the first step.
few = k * length
step(hidden[:few], targets[:few], cu[: k + 1], ref[:k], rewards[:k], rows[:k]).backward()
hidden.grad = weight.grad = None
before = live()
saved = []
def pack(x):
    saved.append((x.untyped_storage().data_ptr(), x.numel()))
    return x
# Resets the high-water mark, which importing torch has set far above what is in use.
open("/proc/self/clear_refs", "w").write("5")
start = status("VmRSS")
with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
    loss = step(hidden, targets, cu, ref, rewards, rows)
kept = [numel for pointer, numel in saved if pointer not in before]
kept += [x.numel() for pointer, x in live().items() if pointer not in before]
before = None
loss.backward()
print(max(kept), len(kept), n, status("VmHWM") - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize(
    ("name", "grad"),
    [(name, "exact") for name in ("spl", "gvpo", "dqo", "rspo", "dpo", "grpo")] + [("spl", "sampled")],
)
def test_nothing_larger_than_the_tokens_is_kept(name: str, grad: str) -> None:
    """Between forward and backward the whole chain keeps two numbers a token at most, besides its inputs.

    Two, as a log-sum-exp is its largest logit and the log of the sum of the rest.

    Seen by hooks on what autograd saves and by walking all live tensors, so context attributes count too. The peak of
    the step is then its gradients (dW 2 MiB, dH 0.1) and the tile buffers; the logits alone would be 512 MiB.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-P", "-c", MEMORY, name, grad], capture_output=True, text=True, timeout=240, env=env
    )
    assert out.returncode == 0, out.stderr
    largest, count, n, grown = (float(x) for x in out.stdout.split()[-4:])
    assert count >= 2, "the hooks saw nothing"
    # The sampled gradient also keeps the columns of each chunk of rows, at most V of them: 32768 here.
    limit = 2 * n if grad == "exact" else 32768
    assert largest <= limit, f"{largest:.0f} elements kept, two a token are {2 * n:.0f}"
    assert grown < 128, f"{grown:.0f} MiB more in a step"
