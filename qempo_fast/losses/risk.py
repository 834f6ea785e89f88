"""RSPO: policy gradient of the best of k samples."""

from __future__ import annotations

import torch

from .. import _check
from . import _function, _inputs, _values


def rspo_loss(
    logps: torch.Tensor,
    rewards: torch.Tensor,
    *,
    k: int,
    group_size: int | None = None,
    offsets: torch.Tensor | None = None,
    baseline: str = "loo",
) -> torch.Tensor:
    """RSPO: unbiased policy gradient of Max@k, which is Pass@k where rewards are 0 or 1.

        w_i = mean over (k-1)-subsets T of the others of (r_i - max_T r)_+,   L = -mean_i k w_i l_i

    Derived from the abstract of 2508.01174; k w_i / n equals PKPO's leave-one-out-minus-one reward
    (2505.15201). Whether the authors rescale or normalise the weights is not established. Costs one sort per
    group.

    Args:
        logps: (S,) float, log-prob of each response, summed over its tokens.
        rewards: (S,) float, finite. Detached.
        k: samples whose best counts, at least 1 and at most the smallest group.
        group_size: n responses per prompt, where equal; exactly one of group_size and offsets.
        offsets: (G + 1,) int, group g is offsets[g]:offsets[g + 1].
        baseline: used for k = 1 alone, where w_i = r_i (the mean reward): "loo" subtracts the mean of the
            others, "mean" the group's, "none" nothing. For k > 1 the maximum of the others is already
            subtracted.

    Returns:
        A scalar, the mean over all S samples.

    Raises:
        TypeError, ValueError: a tensor of another type, shape or device; rewards not finite; a group smaller
            than k, or of one at k = 1 with a baseline; k < 1.
    """
    _check.integer("k", k, low=1)
    _check.choice("baseline", baseline, _inputs.BASELINES)
    _inputs.given("rewards", rewards)
    policy, fixed = _inputs.scores(("logps", "rewards"), (logps, rewards))
    at_least, named = _values.least(baseline, k), k if k > 1 else None
    offsets = _inputs.group_layout(policy.shape[0], group_size, offsets, policy.device, at_least=at_least, k=named)
    settings = {"k": k, "group_size": group_size, "offsets": offsets, "baseline": baseline}
    return _function.loss("rspo_loss", (policy, fixed), settings)
