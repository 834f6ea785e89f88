"""Losses, forward and backward through the public functions, against plain torch: qempo-fast bench --op losses.

"eager" is the reference function itself through torch's autograd, without the public functions' argument checks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import qempo_fast as qf
from suite.interleave import Step, relative, require
from suite.provider import Provider, Set, gpu_set


class Case(NamedTuple):
    """S samples in groups of k, S pairs, S prompts or S sequences of 32 tokens; embeddings are 384 wide. float32."""

    loss: str
    size: int
    k: int

    def __str__(self) -> str:
        return f"{self.loss} S={self.size} k={self.k}"


TOKENS, WIDTH, STRONG, WEAK, MODELS = 32, 384, 1, 4, 2
Tensors = dict[str, torch.Tensor]


def _pair(name: str, references: bool = True, **settings: Any) -> Callable[..., torch.Tensor]:
    def run(api: Any, d: Tensors, case: Case) -> torch.Tensor:
        fixed = (d["f"], d["f2"]) if references else ()
        return getattr(api, name)(d["l"], d["l2"], *fixed, **settings)

    return run


def _group(name: str, *fixed: str, ragged: bool = False, **settings: Any) -> Callable[..., torch.Tensor]:
    def run(api: Any, d: Tensors, case: Case) -> torch.Tensor:
        layout = {"offsets": d["offsets"]} if ragged else {"group_size": case.k}
        return getattr(api, name)(d["l"], *(d[key] for key in fixed), **layout, **settings)

    return run


def _tokens(kl: float = 0.0, **settings: Any) -> Callable[..., torch.Tensor]:
    def run(api: Any, d: Tensors, case: Case) -> torch.Tensor:
        ref = {"ref_token_logps": d["tref"], "kl": kl} if kl else {}
        return api.grpo_loss(d["tl"], d["told"], d["advantages"], d["cu"], **ref, **settings)

    return run


def _epa(api: Any, d: Tensors, case: Case) -> torch.Tensor:
    return api.epa_loss(d["l"], d["strong"], d["weak"], d["f"], d["fs"], d["fw"], beta=0.1)


# name: (call, inputs with a gradient, floats that a sample or token reads, that it writes)
LOSSES: dict[str, tuple[Callable[..., torch.Tensor], str, float, float]] = {
    "dpo": (_pair("dpo_loss", beta=0.1), "l l2", 4, 2),
    "dpo smoothed": (_pair("dpo_loss", beta=0.1, label_smoothing=0.1), "l l2", 4, 2),
    "spl_pair": (_pair("spl_pair_loss", alpha=0.3, beta=0.1), "l l2", 4, 2),
    "hdpo": (_pair("hdpo_loss", alpha=1.2, beta=0.1), "l l2", 4, 2),
    "qempo_pair": (_pair("qempo_pair_loss", references=False, lam=4.0), "l l2", 2, 2),
    "qempo_kl_pair": (_pair("qempo_kl_pair_loss", lam=4.0, mu=0.5), "l l2", 4, 2),
    "epa": (_epa, "l strong weak", 2 * (1 + STRONG + WEAK), 1 + STRONG + WEAK),
    "poft": (lambda api, d, case: api.poft_loss(d["l"], d["lengths"], d["aligned"]), "l", 3 + MODELS, 1),
    "spl": (_group("spl_loss", "f", "r", alpha=0.3, beta=0.1), "l", 3, 1),
    "spl ragged": (_group("spl_loss", "f", "r", ragged=True, alpha=0.3, beta=0.1), "l", 3, 1),
    "qempo": (_group("qempo_loss", "r", lam=4.0), "l", 2, 1),
    "qempo_kl": (_group("qempo_kl_loss", "f", "r", lam=4.0, mu=0.5), "l", 3, 1),
    "gvpo": (_group("gvpo_loss", "f", "r"), "l", 3, 1),
    "variance": (_group("variance_loss", "f", "r", alpha=0.3, beta=0.1), "l", 3, 1),
    "variance ragged": (_group("variance_loss", "f", "r", ragged=True, alpha=0.3, beta=0.1), "l", 3, 1),
    "rspo": (lambda api, d, case: api.rspo_loss(d["l"], d["r"], k=case.k // 2, group_size=case.k), "l", 2, 1),
    "dqo": (lambda api, d, case: api.dqo_loss(d["l"], d["r"], d["e"]), "l", 2 + WIDTH, 1),
    "grpo": (_tokens(), "tl", 2 * TOKENS, TOKENS),
    "grpo kl": (_tokens(kl=0.1), "tl", 3 * TOKENS, TOKENS),
    "dapo": (_tokens(normalize="token", eps_high=0.28), "tl", 2 * TOKENS, TOKENS),
    "gspo": (_tokens(ratio="sequence", eps_low=3e-4, eps_high=4e-4), "tl", 2 * TOKENS, TOKENS),
}
# float32 rounding. A surrogate's value is a sum of terms of both signs, whose rounding does not shrink with the sum.
LIMITS = {"error_loss": 1e-3, "error_grad": 1e-5}


class Inputs(NamedTuple):
    """Tensors of the losses, float32, and the number that the loss is differentiated by."""

    tensors: Tensors
    incoming: torch.Tensor


def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    size, n = case.size, case.size * TOKENS

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator) + shift

    d = {name: draw(size, scale=3, shift=-20) for name in ("l", "l2", "f", "f2")} | {"r": draw(size)}
    d |= {name: draw(size, STRONG, scale=3, shift=-20) for name in ("strong", "fs")}
    d |= {name: draw(size, WEAK, scale=3, shift=-20) for name in ("weak", "fw")}
    d |= {"aligned": draw(size, MODELS, shift=-2), "lengths": torch.randint(1, 64, (size,), generator=generator)}
    d |= {"offsets": torch.arange(0, size + 1, case.k), "e": draw(size // case.k, case.k, WIDTH)}
    d |= {"tl": draw(n, scale=0.3, shift=-2), "advantages": draw(size), "cu": torch.arange(0, n + 1, TOKENS)}
    d |= {"told": d["tl"] + draw(n, scale=0.2), "tref": d["tl"] + draw(n, scale=0.2)}
    return Inputs({name: x.to(device) for name, x in d.items()}, torch.ones((), device=device))


Function = Callable[[Tensors], torch.Tensor]


def _call(api: Any, case: Case) -> Function:
    return lambda d: LOSSES[case.loss][0](api, d, case)


def _ours(device: str) -> Provider:
    def make(case: Case, on: str) -> Function:
        if on != device:
            raise RuntimeError(f"this backend does not run on {on} tensors")
        return _call(qf, case)

    return Provider("ours", make)


def _absent(package: str, why: str, case: Case, device: str) -> Function:
    __import__(package)
    raise RuntimeError(why)


PROVIDERS: dict[str, Provider] = {
    "qempo_fast cpu": _ours("cpu"),
    "qempo_fast triton": _ours("cuda"),
    "eager": Provider("peer", lambda case, device: _call(qf.reference, case)),
    "compile": Provider("peer", lambda case, device: torch.compile(_call(qf.reference, case), dynamic=False)),
    "TRL": Provider(
        "peer", functools.partial(_absent, "trl", "its losses are inside its trainers: no function of log-probs")
    ),
    "Liger": Provider(
        "peer", functools.partial(_absent, "liger_kernel", "its losses start at hidden states or logits, not log-probs")
    ),
}
SETS = {
    # Each case compiles a function: three of them leave --quick under a minute.
    "quick": Set([Case(name, 4096, 8) for name in ("dpo", "gvpo", "grpo kl")]),
    "main": Set([*(Case(name, 4096, 8) for name in LOSSES), Case("rspo", 4096, 1024)], threads=("one", "all")),
    # A group takes what its samples take; a call takes the same for any S.
    "scaling": Set([Case(name, size, 8) for name in ("dpo", "spl", "gvpo") for size in (512, 32768, 262144)]),
    "tiny": Set([Case(name, 16, 4) for name in LOSSES], threads=("one",)),
    "gpu": gpu_set([*(Case(name, 4096, 8) for name in LOSSES), Case("rspo", 4096, 1024)], PROVIDERS),
}


def checked(name: str, case: Case, made: Inputs) -> tuple[Step, dict[str, float]]:
    """The provider's step, run once, and its errors against the reference in float64."""
    keys = LOSSES[case.loss][1].split()
    leaves = {key: made.tensors[key].detach().requires_grad_() for key in keys}
    given = made.tensors | leaves
    function = PROVIDERS[name].make(case, made.incoming.device.type)
    step = Step(lambda: function(given), tuple(leaves.values()), made.incoming, made.incoming.device.type)
    loss, grads, _ = step.run()
    exact = {key: x.double() if x.is_floating_point() else x for key, x in made.tensors.items()}
    exact |= {key: exact[key].requires_grad_() for key in keys}
    truth = _call(qf.reference, case)(exact)
    truth_grads = torch.autograd.grad(truth, [exact[key] for key in keys])
    errors = {
        "error_loss": relative(loss, truth.detach()),
        "error_grad": max(relative(g, t) for g, t in zip(grads, truth_grads, strict=True)),
    }
    require(f"{name}, {case}", errors, LIMITS)
    return step, errors


def baselines(case: Case, made: Inputs) -> dict[str, Step]:
    """What autograd alone costs on these inputs.

    A function in Python that computes nothing, with one multiply backward, as ours has; and the cheapest of torch's own
    operators that gives each input a gradient, C++ throughout: under it no loss with a gradient can be.
    """
    leaves = [made.tensors[key].detach().requires_grad_() for key in LOSSES[case.loss][1].split()]
    coefs = [torch.empty_like(x) for x in leaves]

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *policy: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*coefs)
            return torch.empty((), device=made.incoming.device)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(coef * grad for coef in ctx.saved_tensors)

    def native() -> torch.Tensor:
        if len(leaves) == 2:
            return torch.nn.functional.mse_loss(*leaves)
        dots = [torch.dot(x.view(-1), coef.view(-1)) for x, coef in zip(leaves, coefs, strict=True)]
        return functools.reduce(torch.add, dots)

    steps = {"empty autograd function": lambda: Nothing.apply(*leaves), "one operator of torch": native}
    return {name: Step(run, leaves, made.incoming, leaves[0].device.type) for name, run in steps.items()}


def floors(case: Case) -> dict[str, dict[str, Any]]:
    """Inputs read and coefficients written forward; coefficients read and gradients written backward."""
    _, _, read, written = LOSSES[case.loss]
    forward, backward = 4 * case.size * (read + written), 8 * case.size * written
    return {
        "forward": {"floor_bytes": forward},
        "backward": {"floor_bytes": backward},
        "full": {"floor_bytes": forward + backward},
    }
