"""Log-probs of tokens and of packed sequences, straight from hidden states and the output head."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed import ProcessGroup

from .. import _backends, _check
from .._operator import scalar
from ..reference.logps import SequenceLogps, TokenLogps, TokenScores, reduce_sequences
from . import _columns, _inputs, _sharded, _support_function, op
from ._call import Call, Scored, prepared, seed, wants_gradient
from ._function import LinearLogps, live_rows
from ._options import Wanted, logits_budget
from .segments import summed
from .support import Support
from .support import check as check_support


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
    support: Support | None = None,
    columns: torch.Tensor | None = None,
    lse: bool = False,
    top1: bool = False,
    mean_logits: bool = False,
    label_smoothing: float = 0.0,
    logits_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> TokenLogps | TokenScores:
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
        support: kept tokens of each position: softmax, entropy and sum_sq are over them alone, with an exact gradient
            and without the other logits (docs/support.md). A counted target has to be in its set.
        columns: (..., K) int64 or int32, targets' shape and one axis more: tokens whose log-probs are returned beside
            the target's, over the vocabulary or the support (-inf outside of a set). Of ignore_index: 0.
        lse, top1, mean_logits: ask for logsumexp(z), for whether no token is likelier than the target (one as likely,
            to rounding, may be), and for mean_j z_j. With one of these or columns the result is a TokenScores.
        label_smoothing: e in [0, 1): logps become (1 - e) log p[target] + e mean_j log p_j, minus what torch's
            cross_entropy of the same name gives. It and mean_logits go without softcap and support.
        logits_dtype: torch.float32 keeps half precision's logits in float32 until the softmax, forward and backward;
            None: they are rounded to the dtype of hidden, as a model gives them.
        batch_invariant: a row's outputs, and its exact gradient of hidden, do not depend, to the bit, on the rows that
            come with it (docs/linear_logps.md says of which GEMMs that was seen); not with backend="reference",
            support, or any of the above that takes logits of single columns or their mean.
        backend: "cpu", "reference", ... (see backends()); None chooses.

    Returns:
        TokenLogps(logps, entropy, sum_sq), shaped like targets, in nats, float32 (float64 for float64); or
        TokenScores(logps, entropy, sum_sq, lse, columns, top1, mean_logits), top1 bool, lse, columns and mean_logits
        differentiable, once.

    Raises:
        TypeError, ValueError: naming the argument; targets outside [0, V) that are not ignore_index raise on CPU, and
            on a GPU under QEMPO_CHECK=1; without it their log-prob is NaN.
    """

    more = Wanted(columns, lse, top1, mean_logits, label_smoothing)

    def also() -> None:
        _check_wanted(more, softcap, support, batch_invariant)
        if columns is not None:
            _columns.check(columns, targets, ignore_index, None if process_group is not None else weight.shape[0])
        if support is not None:
            check_support(support, targets.numel(), hidden.device)
            if grad == "sampled" or tau is not None:
                wanted = "None where the gradient is sampled (kept sets leave nothing to drop)"
                _check.bad_value("support", wanted, grad)

    call = prepared(
        *(hidden, weight, targets, bias, temperature, logit_scale, softcap, ignore_index, entropy, sum_sq),
        *(grad, tau, process_group, logits_dtype, batch_invariant, backend, also),
    )
    options = call.options
    frozen = wants_gradient(call.hidden) and not wants_gradient(call.weight, call.bias)
    slopes = frozen and support is None and not options.sampled and options.group is None
    asked = more.scores or label_smoothing != 0
    if slopes or asked:
        call = call._replace(options=replace(options, slopes=slopes, lse=asked))
    if columns is not None:
        more = more._replace(columns=columns.reshape(-1, columns.shape[-1]).long())
    if support is None:
        out = call.run(_traced, partial(_eager, more=more))
    else:
        traced = partial(_support_function.traced, support)
        out = call.run(traced, partial(_support_function.eager, support, more=more))
    if not asked:
        return TokenLogps(*(_inputs.shaped(x, targets) for x in out[:3]))  # type: ignore[arg-type]
    logps, total, picked, best, mean = _columns.composed(call, out, more, support)
    tokens = TokenLogps(*(_inputs.shaped(x, targets) for x in (logps, *out[1:3])))  # type: ignore[arg-type]
    if not more.scores:
        return tokens
    picked = None if picked is None or columns is None else picked.reshape(columns.shape)
    shaped = [_inputs.shaped(x, targets) for x in (total, best, mean)]
    return TokenScores(*tokens, shaped[0], picked, *shaped[1:])


def _check_wanted(more: Wanted, softcap: float | None, support: Support | None, batch_invariant: bool) -> None:
    for name in ("lse", "top1", "mean_logits"):
        _check.boolean(name, getattr(more, name))
    _check.number("label_smoothing", more.label_smoothing, low=0.0, high=1.0, open_high=True)
    if more.mean and (softcap is not None or support is not None):
        # A cap's tanh has no mean in closed form, and the sum over a set is no row of the weight.
        name = "label_smoothing" if more.label_smoothing else "mean_logits"
        wanted = f"{'0' if more.label_smoothing else 'False'} with softcap or support"
        _check.bad_value(name, wanted, getattr(more, name))
    if batch_invariant and (support is not None or more.products or more.mean):
        # Their products are summed as it comes, in the cheapest of three ways.
        wanted = "False with support, columns, lse, mean_logits or label_smoothing"
        _check.bad_value("batch_invariant", wanted, True)


def _eager(call: Call, more: Wanted) -> Scored:
    hidden, weight, bias, targets, inv_temperature, ignore_index, options, name = call
    tiles = _backends.kernel("linear_logps", hidden.device, name)()
    shard = (hidden, weight, bias, targets, inv_temperature, ignore_index, options)
    first, vocabulary = _sharded.shard_range(*shard, more=more)
    _inputs.check_values(targets, vocabulary, inv_temperature, ignore_index)
    counted = targets != ignore_index
    live = live_rows(counted)
    if options.sampled:
        options = replace(options, seed=int(seed()))
    elif wants_gradient(hidden, weight, bias) and not options.slopes:
        rows = len(targets) if live is None else len(live)
        options = replace(options, keep_logits=logits_budget(rows, weight, options.logits_dtype(hidden)))
    given = (hidden, weight, bias, targets, inv_temperature, live, first, tiles, options)
    logps, h, ss, lse = LinearLogps.apply(*given)
    return Scored(_inputs.marked(logps, targets, counted, vocabulary), h, ss, lse, (first, vocabulary))


def _traced(call: Call) -> Scored:
    hidden, weight, bias, targets, inv_temperature, ignore_index, options, name = call
    drawn = seed() if options.sampled else None
    logps, h, ss, lse, *_ = op.linear(
        *(hidden, weight, bias, targets, inv_temperature, drawn),
        *map(scalar, (options.logit_scale, options.softcap, options.tau, options.error)),
        *(ignore_index, options.entropy, options.sum_sq, options.slopes, options.wide, options.fixed),
        *(op.chunk_rows(hidden.device, name), name),
    )
    counted = targets != ignore_index
    logps = _inputs.marked(logps, targets, counted, weight.shape[0])
    # Not h itself: an edit of the entropy in place reached what the backward reads, and Inductor drops a clone.
    more = (h.where(counted, 0.0) if options.entropy else None, ss if options.sum_sq else None)
    return Scored(logps, *more, lse if options.lse else None, (0, weight.shape[0]))


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
        _inputs.check_sequences(hidden, targets, cu_seqlens, average)
    for name in ("columns", "lse", "top1", "mean_logits"):
        if head.get(name) is not None and head[name] is not False:
            _check.bad_value(name, "nothing of the kind: sums over tokens have none (linear_logps has)", name)
    tokens = linear_logps(hidden, weight, targets, **head)
    return reduce_sequences(tokens, targets, cu_seqlens, average, head.get("ignore_index", -100), summed)
