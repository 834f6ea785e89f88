"""DQO in plain torch: rewards through the (alpha, beta) family, diversity through the DPP gains.

No argument is checked here.
"""

from __future__ import annotations

import torch

from .dpp import dpp_gains
from .family import AlphaBeta
from .groups import group_loss


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
    """-mean A_i l_i, A_i = (S_i - baseline) + alpha (g_i - b_i), S_i = r_i - beta (sg(l_i) - f_i)."""
    if embeddings.ndim == 3:
        group_size = embeddings.shape[1]
    elif offsets is None:
        assert group_size is not None
        embeddings = embeddings.reshape(len(embeddings) // group_size, group_size, embeddings.shape[1])
    gains = dpp_gains(embeddings.detach(), offsets=offsets)
    diversity = gains.gains - gains.baselines if baseline == "loo" else gains.gains
    return group_loss(
        logps,
        ref_logps,
        rewards,
        **AlphaBeta.of_kl(beta)._asdict(),
        group_size=group_size,
        offsets=offsets,
        baseline="none" if baseline == "none" else "loo",
        bonus=alpha * diversity.reshape(-1).to(logps.dtype),
    )
