"""Sequences one after another in one row: what the model's forward gets for them, and which labels count."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from ... import _check

IGNORE = -100


def varlen_would_run(model: Any) -> bool:
    """Whether flash-attn's varlen kernels would run where the model's own attention does now."""
    weight = model.get_output_embeddings().weight
    half = weight.dtype in (torch.float16, torch.bfloat16)
    # Gemma 2 caps its attention scores, which SDPA cannot: there "eager" is what the model comes with.
    default = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    takes_it = model.config._attn_implementation == default and getattr(model, "_supports_flash_attn", False)
    return half and takes_it and weight.device.type == "cuda" and is_flash_attn_2_available()


def packed(model: Any, cu_seqlens: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """position_ids of one row of packed sequences, and what flash-attn's varlen kernels take."""
    row = kwargs.get("input_ids")
    row = kwargs.get("inputs_embeds") if row is None else row
    if row is None or row.shape[0] != 1:
        _check.bad_value("input_ids", "one row (1, N) with cu_seqlens", None if row is None else tuple(row.shape))
    if kwargs.get("attention_mask") is not None:
        _check.bad_value("attention_mask", "None with cu_seqlens: packed rows have no padding", "a mask")
    total = row.shape[1]
    _check.offsets("cu_seqlens", cu_seqlens, total, row.device)
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=total)
    places = torch.arange(total, dtype=torch.int64, device=row.device)
    made: dict[str, Any] = {"position_ids": (places - starts)[None]}
    if "flash" in (model.config._attn_implementation or ""):
        offsets, longest = cu_seqlens.int(), int(lengths.max())
        made.update(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=longest, max_length_k=longest)
    return made


def positions(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """position_ids that may say where sequences begin: a mask says otherwise, and VLMs have three for each token."""
    found = kwargs.get("position_ids")
    return None if found is None or found.ndim != 2 or kwargs.get("attention_mask") is not None else found


def targets(labels: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """labels, with the first token of each packed sequence ignored: nothing in its own sequence predicts it."""
    found = positions(kwargs)
    return labels if found is None else labels.masked_fill(found.to(labels.device) == 0, IGNORE)
