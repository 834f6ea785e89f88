"""The library inside other people's training code: ``hf`` (transformers), ``trl``, ``verl``, ``openrlhf``.

Import the module you need. ``methods`` has the losses that they know by name.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from .. import _check
from ..logps import _inputs

logger = logging.getLogger(__name__)


def missing(error: ModuleNotFoundError, extra: str) -> ImportError:
    """What to raise where a framework is not installed."""
    return ImportError(f'{error.name} is not installed: pip install "qempo-fast[{extra}]"', name=error.name)


def scoring(grad: Any, tau: Any, logits_dtype: Any, batch_invariant: Any, backend: Any = None) -> dict[str, Any]:
    """What every slot hands on to linear_logps, checked when the slot is filled and not at its first step."""
    _check.gradient(grad, tau)
    # The dtype of hidden is the call's to look at: a model may be cast after.
    _inputs.wide_logits(logits_dtype, torch.float32)
    _check.boolean("batch_invariant", batch_invariant)
    _inputs.orders_sums(batch_invariant, backend)
    _tell(grad, tau)
    return {
        "grad": grad,
        "tau": tau,
        "logits_dtype": logits_dtype,
        "batch_invariant": batch_invariant,
        "backend": backend,
    }


@functools.cache
def _tell(grad: str, tau: float | None) -> None:
    """Log once which gradient linear_logps then takes; a sampled one loud enough for who has set up no logging."""
    if grad == "exact" or (grad == "auto" and tau is None):
        logger.info("linear_logps: exact gradients (grad=%r)", grad)
        return
    text = (
        "linear_logps: sampled gradients (grad=%r, tau=%s): two equal calls give two of them, see docs/linear_logps.md"
    )
    logger.warning(text, grad, "chosen" if tau is None else f"{tau:g}")
