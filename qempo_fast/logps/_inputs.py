"""Checks and casts that the log-prob functions share."""

from __future__ import annotations

from typing import Any

import torch

from .. import _check

_Optional = torch.Tensor | None


def outside(targets: torch.Tensor, counted: torch.Tensor, vocabulary: int) -> torch.Tensor:
    return counted & (targets.clamp(0, vocabulary - 1) != targets)


def check_values(targets: torch.Tensor, vocabulary: int, inv_temperature: _Optional, ignore_index: int) -> None:
    """Raise on targets outside [0, vocabulary) that are counted, and on a temperature that is not positive."""
    if not _check.readable(targets):
        return
    # 1 / temperature is positive and finite where the temperature is.
    if inv_temperature is not None and not bool(((inv_temperature > 0) & inv_temperature.isfinite()).all()):
        _check.bad_value("temperature", "positive finite values", "others among them")
    bad = outside(targets, targets != ignore_index, vocabulary)
    if bool(bad.any()):
        first = int(targets[bad][0])
        _check.bad_value("targets", f"tokens in [0, {vocabulary}) or ignore_index = {ignore_index}", first)


def check_sequences(hidden: Any, targets: Any, cu_seqlens: Any, average: Any) -> None:
    """Arguments of a function of packed sequences, which come before those of the head."""
    _check.tensor("hidden", hidden, ndim=2)
    _check.tensor("targets", targets, dtypes=_check.INTS, shape=hidden.shape[:1], device=hidden.device)
    _check.offsets("cu_seqlens", cu_seqlens, hidden.shape[0], hidden.device)
    _check.boolean("average", average)


def wide_logits(logits_dtype: Any, dtype: torch.dtype) -> bool:
    """Whether logits are float32 that the dtype of hidden would round."""
    if logits_dtype is None:
        return False
    if not isinstance(logits_dtype, torch.dtype):
        _check.bad_type("logits_dtype", "None or torch.float32", type(logits_dtype).__name__)
    if logits_dtype != torch.float32:
        _check.bad_value("logits_dtype", "None or torch.float32", logits_dtype)
    if dtype == torch.float64:
        _check.bad_value("logits_dtype", "None with float64 hidden, whose digits it would lose", logits_dtype)
    return dtype != torch.float32


def orders_sums(batch_invariant: bool, backend: str) -> None:
    """Torch's sum over a row may be shared by threads, and in another order for other numbers of rows."""
    if batch_invariant and backend == "reference":
        _check.bad_value("batch_invariant", "False with backend 'reference'", batch_invariant)


def shaped(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if x is None else x.reshape(like.shape)


def marked(logps: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """NaN at targets outside [0, V) where they could not be checked before: never a plausible number."""
    if _check.readable(targets):
        return logps
    return logps.masked_fill(outside(targets, counted, vocabulary), torch.nan)


def inverse_temperature(temperature: Any, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """(N,) 1 / temperature, or None for 1."""
    n, device = targets.numel(), targets.device
    if isinstance(temperature, torch.Tensor):
        if temperature.numel() == 1:
            _check.tensor("temperature", temperature)
            return temperature.detach().reshape(1).to(device, dtype).reciprocal().expand(n)
        _check.tensor("temperature", temperature, shape=targets.shape, device=device)
        return temperature.detach().reshape(-1).to(dtype).reciprocal()
    _check.positive("temperature", temperature)
    largest = torch.finfo(dtype).max
    if temperature * largest < 1.0:
        _check.bad_value("temperature", f"a number of at least {1 / largest:.2g}", temperature)
    if not torch.compiler.is_compiling():
        return None if temperature == 1 else torch.full((n,), 1.0 / temperature, dtype=dtype, device=device)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # 0.3 s, which tracing has spent

    # No guard on a temperature that changes; a factor, as in scalar() of _operator.py: one graph for all of them.
    known = statically_known_true(temperature == 1)
    return None if known else torch.ones(n, dtype=dtype, device=device) * (1.0 / temperature)
