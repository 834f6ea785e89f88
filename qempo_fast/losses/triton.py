"""The Triton kernels of the losses: kernels/loss_*.py, which fit the seam of _function.py as they are."""

from __future__ import annotations

import torch

from .. import _check
from ..kernels import loss_contrastive, loss_groups, loss_pairs, loss_risk, loss_tokens
from ..reference.family import product
from ..reference.risk import rspo_weights

pair_loss = loss_pairs.pair_loss_fwd
epa_loss = loss_contrastive.epa_loss_fwd
poft_loss = loss_contrastive.poft_loss_fwd
group_loss = loss_groups.group_loss_fwd
variance_loss = loss_groups.variance_loss_fwd
token_loss = loss_tokens.token_loss_fwd


def _for_reference(n: int, k: int, group_size: int | None, offsets: torch.Tensor | None) -> bool:
    """Whether plain torch runs this call: a group too large for the registers, or more samples than 32 bits count.

    The sizes of ragged groups on a GPU are read only where QEMPO_CHECK=1 allows the synchronisation; otherwise the
    kernel turns such a group into NaN.
    """
    largest = loss_risk.LARGEST
    if k == 1 or n <= largest:
        return False
    if offsets is None:
        return (group_size or 0) > largest or n >= 2**31
    return n >= 2**31 or (_check.readable(offsets) and bool((offsets.diff() > largest).any()))


def rspo_loss(
    logps, rewards, *, k, group_size=None, offsets=None, baseline="loo"
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The kernel, or the reference's weights for groups of more than 1024."""
    groups = {"group_size": group_size, "offsets": offsets}
    if not _for_reference(logps.shape[0], k, group_size, offsets):
        return loss_risk.rspo_loss_fwd(logps, rewards, k=k, baseline=baseline, **groups)
    coef = rspo_weights(rewards, k=k, **groups) * (-k / logps.shape[0])
    return product(coef, logps).sum(), (coef,)
