"""DQO: rewards plus the log-determinant diversity of a group of responses."""

from __future__ import annotations

from typing import Any

import torch

from .. import _check
from ..dpp import dpp_gains
from ..reference.family import AlphaBeta
from . import _function, _inputs, _values


def dqo_loss(
    logps: torch.Tensor,
    rewards: torch.Tensor,
    embeddings: torch.Tensor,
    *,
    alpha: float = 1.0,
    ref_logps: torch.Tensor | None = None,
    beta: float = 0.0,
    baseline: str = "loo",
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """DQO: policy gradient of reward plus alpha log det(L + I), L the Gram matrix of unit embeddings.

        g_i = log det(L + I) - log det(L_{-i} + I),   S_i = r_i - beta (sg(l_i) - f_i)
        A_i = S_i - mean_{j != i} S_j + alpha (g_i - b_i),   L = -mean_i A_i l_i

    The objective is that of 2509.04784, read in third-party summaries; this estimator, its baseline b_i (the
    mean gain of the others in the group without i) and the KL term are derived: the loss's
    gradient is unbiased for that of -(1/k) (E[sum r + alpha log det(L + I)] - beta KL of the k draws).
    S_i is the family's at alpha = beta. Centring g on its group mean instead would be biased, and for k = 2
    would remove the diversity signal exactly.

    Args:
        logps: (S,) float, log-prob of each response, summed over its tokens.
        rewards: (S,) float, finite. Detached.
        embeddings: (S, d) or (G, k, d) float, finite; rows are L2-normalised here. Detached.
        alpha: weight of diversity, >= 0; the paper uses 0.5, 1 and 2, and 1 by default.
        ref_logps: (S,) float, the reference model's; needed where beta > 0. Detached.
        beta: weight of KL(pi || pi_ref), >= 0.
        baseline: "loo", of rewards and gains; "reward", of rewards only, gains raw; "none".
        group_size: responses per prompt, where equal. Exactly one of group_size and offsets, or neither where
            embeddings are (G, k, d).
        offsets: (G + 1,) int, group g is offsets[g]:offsets[g + 1]; embeddings (S, d).

    Returns:
        A scalar, the mean over all S samples.

    Raises:
        TypeError, ValueError: a tensor of another type, shape or device; rewards or embeddings not finite;
            groups that do not cover the samples; a group of one, unless baseline is "none"; a hyperparameter
            out of range.
    """
    _check.number("alpha", alpha, low=0.0)
    _check.number("beta", beta, low=0.0)
    _check.choice("baseline", baseline, ("loo", "reward", "none"))
    _inputs.needs_reference("ref_logps", ref_logps, beta)
    _inputs.given("rewards", rewards)
    names = ("logps", "rewards", "ref_logps")
    policy, fixed, reference = _inputs.scores(names, (logps, rewards, ref_logps if beta > 0 else None))
    group_size = _group_size(embeddings, logps, group_size, offsets)
    at_least = _values.least(baseline)
    offsets = _inputs.group_layout(policy.shape[0], group_size, offsets, policy.device, at_least=at_least)
    # Before the gains, which take most of the time and would come first to what is wrong.
    fixed = _values.values("rewards", fixed.detach())
    offsets = _values.groups(policy.shape[0], offsets, at_least)
    rows = embeddings.detach()
    if offsets is None and rows.ndim == 2:
        rows = rows.reshape(-1, group_size, rows.shape[1])
    with torch.no_grad():
        gains = dpp_gains(rows, offsets=offsets)
    diversity = gains.gains - gains.baselines if baseline == "loo" else gains.gains
    settings = {
        **AlphaBeta.of_kl(beta)._asdict(),
        "group_size": group_size,
        "offsets": offsets,
        "baseline": "none" if baseline == "none" else "loo",
        "bonus": alpha * diversity.reshape(-1).to(policy.dtype),
    }
    return _function.loss("group_loss", (policy, reference, fixed), settings)


def _group_size(embeddings: Any, logps: torch.Tensor, group_size: Any, offsets: Any) -> Any:
    """Check embeddings against logps; the group size that (G, k, d) embeddings imply, else the one given."""
    _check.tensor("embeddings", embeddings, device=logps.device)
    if embeddings.ndim in (2, 3) and not embeddings.shape[-1]:
        _check.bad_value("embeddings", "a width of at least 1", f"shape {tuple(embeddings.shape)}")
    if embeddings.ndim == 2:
        _check.tensor("embeddings", embeddings, shape=(logps.shape[0], -1))
        return group_size
    if embeddings.ndim != 3:
        _check.bad_value("embeddings", "shape (S, d) or (G, k, d)", tuple(embeddings.shape))
    groups, k, _ = embeddings.shape
    if offsets is not None:
        _check.bad_value("embeddings", "shape (S, d) with offsets", tuple(embeddings.shape))
    if group_size is not None and group_size != k:
        _check.bad_value("group_size", f"{k}, as the embeddings (G, k, d) have, or None", group_size)
    if groups * k != logps.shape[0]:
        _check.bad_value("embeddings", f"{logps.shape[0]} rows in all, as logps", f"{groups} x {k}")
    return k
