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
    """log(1 + sum_j e^{u_j - u_+}), u = beta (l - f), j over the strong and weak negatives."""
    negatives = torch.cat([strong - ref_strong, weak - ref_weak], dim=1)
    u = beta * (negatives - (positive - ref_positive)[:, None])
    # logsumexp's backward is exp(u - output): unshifted, float32 coefficients at u = 1e5 are 0.2% off.
    top = u.detach().amax(1, keepdim=True)
    margin = top[:, 0] + torch.logsumexp(u - top, dim=1)
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
    """-log s(h), h = beta l/|y| - beta mean_m(aligned) + gamma."""
    h = beta * (logps / lengths - aligned_mean_logps.mean(1)) + gamma
    return reduced(-F.logsigmoid(h), reduction)
