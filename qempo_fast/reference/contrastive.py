"""EPA's contrast and PoFT's comparison with aligned models, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .family import reduced


def epa_loss(
    positive: torch.Tensor,
    strong: torch.Tensor,
    weak: torch.Tensor,
    ref_positive: torch.Tensor,
    ref_strong: torch.Tensor,
    ref_weak: torch.Tensor,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
) -> torch.Tensor:
    """log(1 + sum_j e^{u_j - u_+}), u = beta (l - f), j over the strong and weak negatives.

    Log-probs of -inf have the limits: such a negative counts nothing; such a positive costs infinity, at slopes that
    are the negatives' shares; one that the reference alone excludes (f = -inf) has the whole chance. NaN on purpose:
    several that the reference excludes, as they have no shares; a response that policy and reference exclude; and a row
    where no response is possible.
    """
    negatives = torch.cat([strong - ref_strong, weak - ref_weak], dim=1)
    own = positive - ref_positive
    endless = negatives == torch.inf
    alone = endless.sum(1, keepdim=True) == 1
    # logsumexp's backward is exp(u - output): unshifted, float32 coefficients at u = 1e5 are 0.2% off. Shifted by the
    # positive, a mask fill there would leave the negatives no digits.
    kept = negatives.masked_fill(endless & alone, 0)
    top = kept.detach().amax(1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    # A logsumexp of nothing else than -inf has slopes of NaN; none where the positive is possible.
    nothing = (kept == -torch.inf).all(1) & (own > -torch.inf)
    shares = torch.logsumexp((beta * (kept - top)).masked_fill(nothing[:, None], 0), dim=1)
    margin = beta * (top[:, 0] - own) + torch.where(nothing, -torch.inf, shares)
    margin = torch.where(alone[:, 0], beta * (negatives.amax(1) - own), margin)
    # Not softplus: torch's returns x itself above 20, an error of 2e-9.
    return reduced(-F.logsigmoid(-margin), reduction)


def poft_loss(
    logps: torch.Tensor,
    lengths: torch.Tensor,
    aligned_mean_logps: torch.Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """-log s(h), h = beta l/|y| - beta mean_m(aligned) + gamma; infinity, at the full slope, of a log-prob of -inf."""
    h = beta * (logps / lengths - aligned_mean_logps.mean(1)) + gamma
    return reduced(-F.logsigmoid(h), reduction)
