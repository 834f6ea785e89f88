"""Log-probs of tokens and of packed sequences, straight from hidden states and the output head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup

from .. import _backends, _check
from .._operator import scalar
from ..reference.logps import SequenceLogps, TokenLogps, reduce_sequences
from . import _inputs, _sharded, op
from ._function import LinearLogps, live_rows
from ._options import ERROR, Options, accumulator, logits_budget
from .segments import summed


class _Call(NamedTuple):
    """A call whose arguments are checked: hidden (N, D), targets (N,); name of the backend."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    inv_temperature: torch.Tensor | None
    ignore_index: int
    options: Options
    name: str


def linear_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    sum_sq: bool = False,
    grad: str = "auto",
    tau: float | None = None,
    process_group: ProcessGroup | None = None,
    logits_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> TokenLogps:
    """Log-probs of target tokens straight from hidden states and the output head; the logits are never kept.

        z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature
        logps = z[target] - logsumexp(z);  entropy = -sum_j p_j log p_j;  sum_sq = log sum_j p_j^2,  p = softmax(z)

    The gradient is exact or, where that is asked for, sampled: an unbiased estimate that keeps vocabulary column j of a
    chunk of rows with probability min(1, u_j / tau), u_j an upper bound on its softmax entries there, and divides what
    it keeps by that probability (docs/linear_logps.md). logps and entropy are differentiable, once, in hidden, weight
    and bias; temperature and sum_sq are not.

    Args:
        hidden: (..., D) float16, bfloat16, float32 or float64.
        weight: (V, D) of the same dtype; with process_group, this rank's rows of it. A DTensor placed Shard(0) brings
            its group along (docs/distributed.md).
        targets: (...) int64 or int32 in [0, V), or ignore_index.
        bias: (V,), or this rank's part, or None.
        temperature: a positive number, or a tensor of one entry or shaped like targets.
        logit_scale: multiplies the head's output (Cohere, Granite).
        softcap: caps it smoothly at +-softcap (Gemma 2); None for no cap.
        ignore_index: rows with this target count nowhere: outputs and gradients are 0.
        entropy, sum_sq: ask for these outputs.
        grad: "exact", "sampled", or "auto": sampled where tau is given, else exact. docs/linear_logps.md says what a
            sampled gradient does to an optimiser. Exact and with neither weight nor bias to differentiate, hidden's
            gradient is made in the forward, up to a factor of each row.
        tau: keep threshold of the sampled gradient; smaller keeps more columns. None: the largest that adds at most
            2^-9 of the norm of hidden's gradient (float16 2^-12, else 2^-7), with entropy of each of both.
        process_group: weight is a vocabulary shard, ranks in vocabulary order, uneven sizes allowed. Each rank gets
            all outputs and the whole hidden gradient. Collectives stay out of a torch.compile graph, which breaks here.
        logits_dtype: torch.float32 keeps half precision's logits in float32 until the softmax, forward and backward;
            None: they are rounded to the dtype of hidden, as a model gives them.
        batch_invariant: a row's outputs, and its exact gradient of hidden, do not depend, to the bit, on the rows that
            come with it (docs/linear_logps.md says of which GEMMs that was seen); not with backend="reference".
        backend: "cpu", "reference", ... (see backends()); None chooses.

    Returns:
        TokenLogps(logps, entropy, sum_sq), shaped like targets, in nats, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument; targets outside [0, V) that are not ignore_index raise on CPU, and
            on a GPU under QEMPO_CHECK=1; without it their log-prob is NaN.
    """
    weight, bias, process_group = _sharded.local_head(weight, bias, process_group)
    with _sharded.checked_together(process_group, hidden, weight):
        hidden, weight, bias = _autocast(hidden, weight, bias)
        _check_head(hidden, weight, targets, bias, logit_scale, softcap, ignore_index)
        _check.gradient(grad, tau)
        _check.boolean("entropy", entropy)
        _check.boolean("sum_sq", sum_sq)
        wide = _inputs.wide_logits(logits_dtype, hidden.dtype)
        inv_temperature = _inputs.inverse_temperature(temperature, targets, accumulator(hidden.dtype))
        _check.boolean("batch_invariant", batch_invariant)
        name = _backends.choose("linear_logps", hidden.device, backend)
        _inputs.orders_sums(batch_invariant, name)
    cap = None if softcap is None else float(softcap)
    options = Options(float(logit_scale), cap, entropy, sum_sq, None, 0, process_group)
    options = replace(options, wide=wide, fixed=batch_invariant)
    options = _sampling(options, grad, tau, hidden, weight, bias)
    run = _traced if process_group is None and _check.traced(hidden) else _eager
    if process_group is not None and torch.compiler.is_compiling():
        # Collectives and the sizes of the shards stay out of the graph: it breaks here, or fullgraph=True says so.
        run = torch.compiler.disable(_eager)
    flat = targets.reshape(-1).long()
    rows = hidden.reshape(-1, hidden.shape[-1])
    logps, h, ss = run(_Call(rows, weight, bias, flat, inv_temperature, ignore_index, options, name))
    return TokenLogps(logps.reshape(targets.shape), _inputs.shaped(h, targets), _inputs.shaped(ss, targets))


def _seed() -> torch.Tensor:
    """From torch's generator: torch.manual_seed repeats a step, and activation checkpointing, which restores the
    generator, sees the same columns when it recomputes.
    """
    return torch.randint(2**62, (), dtype=torch.int64, device="cpu")


def _eager(call: _Call) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    hidden, weight, bias, targets, inv_temperature, ignore_index, options, name = call
    tiles = _backends.kernel("linear_logps", hidden.device, name)()
    shard = (hidden, weight, bias, targets, inv_temperature, ignore_index, options)
    first, vocabulary = _sharded.shard_range(*shard)
    _inputs.check_values(targets, vocabulary, inv_temperature, ignore_index)
    counted = targets != ignore_index
    live = live_rows(counted)
    if options.sampled:
        options = replace(options, seed=int(_seed()))
    elif _wants_gradient(hidden, weight, bias) and not options.slopes:
        rows = len(targets) if live is None else len(live)
        options = replace(options, keep_logits=logits_budget(rows, weight, options.logits_dtype(hidden)))
    logps, h, ss = LinearLogps.apply(hidden, weight, bias, targets, inv_temperature, live, first, tiles, options)
    return _inputs.marked(logps, targets, counted, vocabulary), h, ss


def _traced(call: _Call) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    hidden, weight, bias, targets, inv_temperature, ignore_index, options, name = call
    seed = _seed() if options.sampled else None
    logps, h, ss, *_ = op.linear(
        *(hidden, weight, bias, targets, inv_temperature, seed),
        *map(scalar, (options.logit_scale, options.softcap, options.tau, options.error)),
        *(ignore_index, options.entropy, options.sum_sq, options.slopes, options.wide, options.fixed),
        *(op.chunk_rows(hidden.device, name), name),
    )
    counted = targets != ignore_index
    logps = _inputs.marked(logps, targets, counted, weight.shape[0])
    # Not h itself: an edit of the entropy in place reached what the backward reads, and Inductor drops a clone.
    return logps, h.where(counted, 0.0) if options.entropy else None, ss if options.sum_sq else None


def sequence_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    average: bool = False,
    **head: Any,
) -> SequenceLogps:
    """Log-probs of packed sequences: linear_logps summed over each segment of a flat token axis.

    logps_s = sum over counted tokens t of sequence s of log p(target_t); with average=True divided by their number
    (0 where there is none).

    Args:
        hidden: (N, D), all sequences one after another, no padding.
        weight: (V, D).
        targets: (N,); tokens equal to ignore_index are not counted.
        cu_seqlens: (S + 1,) int32 or int64, from 0 to N, as flash-attn's varlen functions take it.
        average: divide logps and entropy by the number of counted tokens.
        **head: every other keyword of linear_logps.

    Returns:
        SequenceLogps(logps (S,), entropy (S,) or None, lengths (S,) int64 of counted tokens, token_logps (N,)).

    Raises:
        TypeError, ValueError: as linear_logps; cu_seqlens that fall or do not cover the tokens.
    """
    *_, group = _sharded.local_head(weight, head.get("bias"), head.get("process_group"))
    with _sharded.checked_together(group, hidden, weight):
        _check.tensor("hidden", hidden, ndim=2)
        _check.tensor("targets", targets, dtypes=_check.INTS, shape=hidden.shape[:1])
        _check.offsets("cu_seqlens", cu_seqlens, hidden.shape[0], hidden.device)
        _check.boolean("average", average)
    tokens = linear_logps(hidden, weight, targets, **head)
    return reduce_sequences(tokens, targets, cu_seqlens, average, head.get("ignore_index", -100), summed)


def _autocast(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Under autocast the head runs in the autocast dtype, as torch's own linear does."""
    tensors = (hidden, weight) if bias is None else (hidden, weight, bias)
    if not all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in tensors):
        return hidden, weight, bias  # the checks that follow say what is wrong
    device = hidden.device.type
    if not _check.autocasts(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_head(
    hidden: Any, weight: Any, targets: Any, bias: Any, logit_scale: Any, softcap: Any, ignore_index: Any
) -> None:
    _check.tensor("hidden", hidden)
    if hidden.ndim < 1 or hidden.shape[-1] == 0:
        _check.bad_value("hidden", "shape (..., D) with D > 0", tuple(hidden.shape))
    _check.tensor("weight", weight, dtypes=(hidden.dtype,), shape=(-1, hidden.shape[-1]), device=hidden.device)
    if weight.shape[0] == 0:
        _check.bad_value("weight", "at least one row", tuple(weight.shape))
    _check.tensor("targets", targets, dtypes=_check.INTS, shape=hidden.shape[:-1], device=hidden.device)
    if bias is not None:
        _check.tensor("bias", bias, shape=weight.shape[:1], device=hidden.device)
    _check.positive("logit_scale", logit_scale)
    if softcap is not None:
        _check.positive("softcap", softcap)
    _check.integer("ignore_index", ignore_index, low=-(2**63))


def _wants_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _sampling(
    options: Options,
    grad: str,
    tau: float | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> Options:
    """With the threshold of this call, or the error that sets it; as they are for an exact gradient or none."""
    if not _wants_gradient(hidden, weight, bias):
        return options
    if tau is not None:
        return replace(options, tau=float(tau))
    if grad != "sampled":
        return replace(options, slopes=options.group is None and not _wants_gradient(weight, bias))
    return replace(options, error=ERROR[weight.dtype])
