"""Inputs and plain formulae that the DPP tests share."""

from __future__ import annotations

import torch

LABELS = ("logdet", "gains", "baselines", "d_embeddings", "d_log_quality")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain(x: torch.Tensor, q: torch.Tensor | None = None, ridge: float = 1.0, normalize: bool = True) -> torch.Tensor:
    """L + ridge I as eager torch writes it."""
    x = torch.nn.functional.normalize(x, dim=-1) if normalize else x
    x = x if q is None else x * torch.exp(q / 2)[..., None]
    return x @ x.mT + ridge * torch.eye(x.shape[-2], dtype=x.dtype)
