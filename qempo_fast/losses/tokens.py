"""The GRPO family: clipped importance ratios, token by token or sequence by sequence."""

from __future__ import annotations

import torch

from .. import _check
from . import _function, _inputs

_NAMES = ("token_logps", "old_token_logps", "ref_token_logps")


def grpo_loss(
    token_logps: torch.Tensor,
    old_token_logps: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    ref_token_logps: torch.Tensor | None = None,
    kl: float = 0.0,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    ratio: str = "token",
    normalize: str | float = "sequence",
) -> torch.Tensor:
    """GRPO's clipped surrogate with a KL penalty; Dr.GRPO, DAPO and GSPO are settings of it.

        rho_it = exp(l_it - old_it), or for ratio "sequence" exp(mean_t (l_it - old_it))
        L = sum_it norm_i ( -min(rho A_i, clip(rho, 1 - eps_low, 1 + eps_high) A_i) + kl (e^d - d - 1) )
        d = ref_it - l_it

    ========  ==========================  ==========================  ==========  ===================
    method    group_advantages(r, ...)    normalize                   ratio       eps_low / eps_high
    ========  ==========================  ==========================  ==========  ===================
    GRPO      scale="std"                 "sequence": 1 / (S T_i)     "token"     0.2 / 0.2
    Dr.GRPO   scale="none"                a number: 1 / (S T_max)     "token"     0.2 / 0.2
    DAPO      scale="std"                 "token": 1 / sum_i T_i      "token"     0.2 / 0.28
    GSPO      scale="std"                 "sequence"                  "sequence"  3e-4 / 4e-4, no KL
    ========  ==========================  ==========================  ==========  ===================

    2402.03300, 2503.20783, 2503.14476 and 2507.18071, as TRL writes them. DAPO's sum is over the global
    batch: in micro-batches scale the loss yourself.

    Args:
        token_logps: (N,) float, the policy's log-prob of each response token.
        old_token_logps: (N,) float, of the policy that sampled. Detached.
        advantages: (S,) float, finite. Detached.
        cu_seqlens: (S + 1,) int, sequence i is tokens cu_seqlens[i]:cu_seqlens[i + 1]; it may be empty, and
            then contributes 0.
        ref_token_logps: (N,) float, the reference model's; needed where kl > 0. Detached.
        kl: coefficient of the k3 estimate of KL(pi || pi_ref), >= 0.
        eps_low: the ratio is clipped below at 1 - eps_low, >= 0.
        eps_high: the ratio is clipped above at 1 + eps_high, >= 0.
        ratio: "token" or "sequence".
        normalize: "sequence", "token", or a number T_max > 0.

    Returns:
        A scalar; float32, or float64 for float64 log-probs.

    Raises:
        TypeError, ValueError: a tensor of another type, shape or device; advantages not finite; cu_seqlens
            that do not cover the tokens; a hyperparameter out of range.
    """
    return _token_loss(
        "clip",
        token_logps,
        old_token_logps,
        advantages,
        cu_seqlens,
        ref_token_logps=ref_token_logps,
        kl=kl,
        eps_low=eps_low,
        eps_high=eps_high,
        ratio=ratio,
        normalize=normalize,
    )


def _token_loss(
    surrogate: str,
    token_logps: torch.Tensor,
    old_token_logps: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    normalize: str | float,
    eps_low: float = 0.0,
    eps_high: float = 0.0,
    ratio: str = "token",
    ref_token_logps: torch.Tensor | None = None,
    kl: float = 0.0,
) -> torch.Tensor:
    """The op of arguments that are not checked yet, by whichever surrogate."""
    _check.number("kl", kl, low=0.0)
    _check.number("eps_low", eps_low, low=0.0)
    _check.number("eps_high", eps_high, low=0.0)
    _check.choice("ratio", ratio, ("token", "sequence"))
    if isinstance(normalize, str):
        _check.choice("normalize", normalize, ("sequence", "token"))
    else:
        _check.positive("normalize", normalize)
    _inputs.needs_reference("ref_token_logps", ref_token_logps, kl, "kl")
    _inputs.given("old_token_logps", old_token_logps)
    policy, old, reference = _inputs.scores(_NAMES, (token_logps, old_token_logps, ref_token_logps if kl > 0 else None))
    device = policy.device
    cu_seqlens = _inputs.offsets_like("cu_seqlens", cu_seqlens, device)
    _check.tensor("advantages", advantages, shape=(cu_seqlens.shape[0] - 1,), device=device)
    settings = {
        "ref_token_logps": None if reference is None else reference.detach(),
        "kl": kl,
        "eps_low": eps_low,
        "eps_high": eps_high,
        "ratio": ratio,
        "normalize": normalize,
        "surrogate": surrogate,
    }
    return _function.loss("token_loss", (policy, old, advantages.to(policy.dtype), cu_seqlens), settings)
