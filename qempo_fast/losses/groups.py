"""Groups of responses with rewards: the (alpha, beta) family's online and variance losses."""

from __future__ import annotations

from typing import Any

import torch

from .. import _check
from ..reference.family import AlphaBeta
from . import _function, _inputs, _values

_NAMES = ("logps", "rewards", "ref_logps")


def _group_loss(
    logps: Any, ref_logps: Any, rewards: Any, ab: AlphaBeta, group_size: Any, offsets: Any, baseline: Any
) -> torch.Tensor:
    _check.choice("baseline", baseline, _inputs.BASELINES)
    tensors, settings = _grouped(logps, ref_logps, rewards, ab, group_size, offsets, _values.least(baseline))
    return _function.loss("group_loss", tensors, {**settings, "baseline": baseline, "bonus": None})


def _variance_loss(
    logps: Any, ref_logps: Any, rewards: Any, ab: AlphaBeta, group_size: Any, offsets: Any
) -> torch.Tensor:
    return _function.loss("variance_loss", *_grouped(logps, ref_logps, rewards, ab, group_size, offsets, 2))


def _grouped(
    logps: Any, ref_logps: Any, rewards: Any, ab: AlphaBeta, group_size: Any, offsets: Any, at_least: int
) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    _inputs.given("rewards", rewards)
    policy, fixed, reference = _inputs.scores(_NAMES, (logps, rewards, ref_logps))
    offsets = _inputs.group_layout(policy.shape[0], group_size, offsets, policy.device, at_least=at_least)
    settings = {"alpha": ab.alpha, "beta": ab.beta, "group_size": group_size, "offsets": offsets}
    return (policy, reference, fixed), settings


def spl_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    rewards: torch.Tensor,
    *,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    alpha: float,
    beta: float,
    baseline: str = "loo",
) -> torch.Tensor:
    """Policy gradient of E[r] + alpha H(pi) + beta E[log pi_ref]: the family's online loss, SPL's RLHF form.

        S_i = r_i - alpha sg(l_i) + beta f_i,   L = -mean_i (S_i - b_i) l_i
        optimum pi_ref^(beta / alpha) exp(r / alpha) / Z

    The objective is SPL's (2511.08594, read in third-party summaries); this estimator is derived. It is
    unbiased for samples of the current policy with baseline "loo" or "none"; "mean" shrinks the gradient by
    (k - 1) / k.

    Args:
        logps: (S,) float, log-prob of each response, summed over its tokens.
        ref_logps: (S,) float, the reference model's, detached; None is allowed where beta = 0.
        rewards: (S,) float, finite. Detached.
        group_size: responses per prompt, where equal; exactly one of group_size and offsets.
        offsets: (G + 1,) int, group g is offsets[g]:offsets[g + 1].
        alpha: weight of the entropy, > 0.
        beta: weight of the cross-entropy to the reference, >= 0; it may exceed alpha.
        baseline: b_i: "loo", the mean of the others; "mean", of the group; "none".

    Returns:
        A scalar, the mean over all S samples; its value is a surrogate, only its gradient means something.

    Raises:
        TypeError, ValueError: a tensor of another type, shape or device; rewards not finite; groups that do
            not cover the samples; a group of one, unless baseline is "none"; a hyperparameter out of range.
    """
    _check.positive("alpha", alpha)
    _check.number("beta", beta, low=0.0)
    _inputs.needs_reference("ref_logps", ref_logps, beta)
    ref_logps = ref_logps if beta > 0 else None
    return _group_loss(logps, ref_logps, rewards, AlphaBeta(alpha, beta), group_size, offsets, baseline)


def qempo_loss(
    logps: torch.Tensor,
    rewards: torch.Tensor,
    *,
    lam: float,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    baseline: str = "loo",
) -> torch.Tensor:
    """QEMPO online: policy gradient of the most entropy at a held quality, with no reference model.

        S_i = r_i - sg(l_i) / lam,   L = -mean_i (S_i - b_i) l_i;   optimum exp(lam r) / Z

    Derived from the abstract and reviews of 2602.15894; its symbols and constants were not available. The
    optimum can be normalised only on a finite response set, and entropy rewards length: cap it, or use
    ``qempo_kl_loss``.

    Args:
        logps: (S,) float, log-prob of each response, summed over its tokens.
        rewards: (S,) float, finite. Detached.
        lam: Lagrange multiplier of E[r] >= R, > 0. ``QualityConstraint`` finds it during training.
        group_size: responses per prompt, where equal; exactly one of group_size and offsets.
        offsets: (G + 1,) int, group g is offsets[g]:offsets[g + 1].
        baseline: b_i: "loo", the mean of the others; "mean", of the group; "none".

    Returns:
        A scalar, the mean over all S samples.

    Raises:
        TypeError, ValueError: as ``spl_loss``.
    """
    _check.positive("lam", lam)
    return _group_loss(logps, None, rewards, AlphaBeta.of_qempo(lam), group_size, offsets, baseline)


def qempo_kl_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    rewards: torch.Tensor,
    *,
    lam: float,
    mu: float,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    baseline: str = "loo",
) -> torch.Tensor:
    """QEMPO-KL online: QEMPO that also holds KL(pi || pi_ref) under a cap.

        S_i = r_i - alpha sg(l_i) + beta f_i,  alpha = (1 + mu) / lam,  beta = mu / lam
        L = -mean_i (S_i - b_i) l_i

    Derived from the abstract and reviews of 2602.15894; its symbols and constants were not available.

    Args:
        logps: (S,) float, log-prob of each response, summed over its tokens.
        ref_logps: (S,) float, the reference model's, detached; None is allowed where mu = 0.
        rewards: (S,) float, finite. Detached.
        lam: multiplier of E[r] >= R, > 0.
        mu: multiplier of KL <= K, >= 0; 0 is QEMPO, and mu to infinity at constant lam / mu is KL-RLHF.
        group_size: responses per prompt, where equal; exactly one of group_size and offsets.
        offsets: (G + 1,) int, group g is offsets[g]:offsets[g + 1].
        baseline: b_i: "loo", the mean of the others; "mean", of the group; "none".

    Returns:
        A scalar, the mean over all S samples.

    Raises:
        TypeError, ValueError: as ``spl_loss``.
    """
    _check.positive("lam", lam)
    _check.number("mu", mu, low=0.0)
    _inputs.needs_reference("ref_logps", ref_logps, mu, "mu")
    ref_logps = ref_logps if mu > 0 else None
    return _group_loss(logps, ref_logps, rewards, AlphaBeta.of_qempo(lam, mu), group_size, offsets, baseline)


def variance_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    rewards: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """The family's squared form: the variance, within a group, of implicit minus true reward.

        d_i = (alpha l_i - beta f_i - r_i) minus its group mean
        L = mean over groups of sum_i d_i^2 / (2 (k - 1))

    Derived; alpha = beta is GVPO (2504.19599), and alpha = 1 / lam, beta = 0 the squared form of QEMPO. Its
    optimum is the family's for samples of any policy with full support, so old samples stay usable.

    Args:
        logps: (S,) float, log-prob of each response, summed over its tokens.
        ref_logps: (S,) float, the reference model's, detached; None is allowed where beta = 0.
        rewards: (S,) float, finite. Detached.
        alpha: weight of the entropy, > 0.
        beta: weight of the cross-entropy to the reference, >= 0.
        group_size: responses per prompt, where equal, at least 2; exactly one of group_size and offsets.
        offsets: (G + 1,) int, group g is offsets[g]:offsets[g + 1].

    Returns:
        A scalar, the mean over groups.

    Raises:
        TypeError, ValueError: as ``spl_loss``; a group of one.
    """
    _check.positive("alpha", alpha)
    _check.number("beta", beta, low=0.0)
    _inputs.needs_reference("ref_logps", ref_logps, beta)
    ref_logps = ref_logps if beta > 0 else None
    return _variance_loss(logps, ref_logps, rewards, AlphaBeta(alpha, beta), group_size, offsets)


def gvpo_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    rewards: torch.Tensor,
    *,
    beta: float = 0.1,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """GVPO: the group variance of beta times the log-ratio minus the reward.

        d_i = beta (l_i - f_i - mean) - (r_i - mean r),   L = mean over groups of sum_i d_i^2 / (2 (k - 1))

    2504.19599, checked against the authors' code, which sums over the prompts of a micro-batch; this is the
    mean. Rewards are centred, not divided by their deviation.

    Args:
        logps: (S,) float, log-prob of each response, summed over its tokens.
        ref_logps: (S,) float, of the model that the optimum is tilted from: the one that training starts from, or, as
            the authors take it, the policy of the previous step, which sampled. Detached.
        rewards: (S,) float, finite. Detached.
        beta: KL coefficient, > 0; the paper's default, 0.1, is robust in [0.05, 0.2].
        group_size: responses per prompt, where equal, at least 2; exactly one of group_size and offsets.
        offsets: (G + 1,) int, group g is offsets[g]:offsets[g + 1].

    Returns:
        A scalar, the mean over groups.

    Raises:
        TypeError, ValueError: as ``spl_loss``; a group of one.
    """
    _check.positive("beta", beta)
    _inputs.needs_reference("ref_logps", ref_logps, beta)
    return _variance_loss(logps, ref_logps, rewards, AlphaBeta.of_kl(beta), group_size, offsets)


def policy_gradient_loss(logps: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Policy gradient at advantages of your own: what every group method comes to once its advantages are known.

        L = -mean_i A_i l_i,   dL/dl_i = -A_i / S

    REINFORCE (Williams, 1992). ``group_advantages`` makes GRPO's advantages; any number per response will do.

    Args:
        logps: (S,) float, log-prob of each response, summed over its tokens.
        advantages: (S,) float, finite. Detached.

    Returns:
        A scalar, the mean over all S samples; its value is a surrogate, only its gradient means something.

    Raises:
        TypeError, ValueError: a tensor of another type, shape or device; advantages not finite.
    """
    _inputs.given("advantages", advantages)
    policy, fixed = _inputs.scores(("logps", "advantages"), (logps, advantages))
    # The family's online loss with nothing but a reward, which is checked there under another name.
    fixed = _values.values("advantages", fixed.detach())
    settings = {"alpha": 0.0, "beta": 0.0, "group_size": 1, "offsets": None, "baseline": "none", "bonus": None}
    return _function.loss("group_loss", (policy, None, fixed), settings)


def group_advantages(
    rewards: torch.Tensor,
    *,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    scale: str = "std",
    baseline: str = "mean",
) -> torch.Tensor:
    """Advantages of each response over its group, as the GRPO family takes them.

        A_i = (r_i - b_i) / (std + 1e-4)  for scale "std", std with k - 1;   r_i - b_i  for "none"

    2402.03300 and 2503.14476 use "std", 2503.20783 (Dr.GRPO) "none"; the constants are TRL's.

    Args:
        rewards: (S,) float, finite.
        group_size: responses per prompt, where equal, at least 2; exactly one of group_size and offsets.
        offsets: (G + 1,) int, group g is offsets[g]:offsets[g + 1].
        scale: "std" or "none".
        baseline: b_i: "mean" of the group, or "loo", the mean of the others.

    Returns:
        (S,), detached; float32, or float64 for float64 rewards.

    Raises:
        TypeError, ValueError: rewards of another type or not finite; groups that do not cover them; a group
            of one.
    """
    _check.choice("scale", scale, ("std", "none"))
    _check.choice("baseline", baseline, ("mean", "loo"))
    _check.tensor("rewards", rewards, ndim=1)
    offsets = _inputs.group_layout(rewards.shape[0], group_size, offsets, rewards.device, at_least=2)
    values = rewards.detach().to(_inputs.score_dtype(rewards))
    return _function.advantages(values, group_size=group_size, offsets=offsets, scale=scale, baseline=baseline)
