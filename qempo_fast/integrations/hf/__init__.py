"""Log-probs and entropies from any transformers causal language model, without its logits."""

from __future__ import annotations

from .. import missing

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise missing(error, "hf") from error

from ._head import Head, read_head
from .fused import FusedForward, FusedOutput, fused_forward

__all__ = ["FusedForward", "FusedOutput", "Head", "fused_forward", "read_head"]
