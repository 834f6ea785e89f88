"""Log-probs of tokens where the logits exist already."""

from __future__ import annotations

import torch

from .. import _backends, _check
from ..reference.logps import TokenLogps
from . import _inputs, _support_function, op
from ._logits import LogpsFromLogits
from ._options import accumulator
from .support import Support
from .support import check as check_support


def logps_from_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    support: Support | None = None,
    backend: str | None = None,
) -> TokenLogps:
    """Log-probs of target tokens from logits that exist already, in one pass forward and one backward.

    logps = z[target] - logsumexp(z), z = logits / temperature;  entropy = -sum_j p_j log p_j,  p = softmax(z)

    Args:
        logits: (..., V) float16, bfloat16, float32 or float64; -inf masks a token.
        targets: (...) int64 or int32 in [0, V), or ignore_index.
        temperature: a positive number, or a tensor of one entry or shaped like targets; not differentiable.
        ignore_index: rows with this target count nowhere: outputs and gradients are 0.
        entropy: ask for the entropy too; it is differentiable.
        support: kept tokens of each position, as linear_logps takes them.
        backend: see backends(); None chooses.

    Returns:
        TokenLogps(logps, entropy, None), shaped like targets, float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: naming the argument, as linear_logps does.
    """
    _check.tensor("logits", logits)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        _check.bad_value("logits", "shape (..., V) with V > 0", tuple(logits.shape))
    _check.tensor("targets", targets, dtypes=_check.INTS, shape=logits.shape[:-1], device=logits.device)
    _check.integer("ignore_index", ignore_index, low=-(2**63))
    _check.boolean("entropy", entropy)
    if support is not None:
        check_support(support, targets.numel(), logits.device)
    inv_temperature = _inputs.inverse_temperature(temperature, targets, accumulator(logits.dtype))
    name = _backends.choose("logps_from_logits", logits.device, backend)
    rows, flat = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long()
    counted = flat != ignore_index
    if support is not None:
        logps, h = _support_function.from_logits(support, rows, flat, inv_temperature, ignore_index, entropy, name)
        return TokenLogps(logps.reshape(targets.shape), _inputs.shaped(h, targets), None)
    if _check.traced(logits):
        logps, h, _ = op.from_logits(rows, flat, inv_temperature, ignore_index, entropy, name)
        h = h.where(counted, 0.0) if entropy else None  # not h itself, as in linear.py
    else:
        _inputs.check_values(flat, logits.shape[-1], inv_temperature, ignore_index)
        tiles = _backends.kernel("logps_from_logits", logits.device, name)()
        logps, h = LogpsFromLogits.apply(rows, flat.where(counted, 0), counted, inv_temperature, tiles, entropy)
    logps = _inputs.marked(logps, flat, counted, logits.shape[-1])
    return TokenLogps(logps.reshape(targets.shape), _inputs.shaped(h, targets) if entropy else None, None)
