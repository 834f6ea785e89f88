"""Checks that the DPP functions share."""

from __future__ import annotations

from typing import Any

import torch

from .. import _check


def check_groups(embeddings: Any, log_quality: Any, offsets: Any, ridge: Any) -> None:
    _check.tensor("embeddings", embeddings)
    if embeddings.ndim != (3 if offsets is None else 2):
        wanted = "(groups, k, width), or (rows, width) with offsets"
        _check.bad_value(
            "embeddings",
            wanted,
            f"{tuple(embeddings.shape)} {'without' if offsets is None else 'with'} offsets",
        )
    if embeddings.shape[-1] < 1:
        _check.bad_value("embeddings", "a width of at least 1", tuple(embeddings.shape))
    if offsets is None and embeddings.shape[1] < 1:
        _check.bad_value("embeddings", "groups of at least one row", tuple(embeddings.shape))
    _check.positive("ridge", ridge)
    if log_quality is not None:
        _check.tensor("log_quality", log_quality, shape=embeddings.shape[:-1], device=embeddings.device)
    check_values(embeddings, log_quality, offsets)


def check_values(embeddings: torch.Tensor, log_quality: torch.Tensor | None, offsets: torch.Tensor | None) -> None:
    """Raise where values are not finite or offsets do not make groups; no reading on a GPU without QEMPO_CHECK=1."""
    if offsets is not None:
        _check.groups(embeddings.shape[0], None, offsets, device=embeddings.device)
    # Asked once: on a GPU it reads the environment, a microsecond each time.
    if not _check.readable(embeddings):
        return
    _check.finite("embeddings", embeddings)
    if log_quality is not None:
        _check.finite("log_quality", log_quality)
