"""The checks on first use: the head's formula against the model's own logits and loss, packed rows against parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ... import _check
from ...reference.logps import finish_head
from ._head import Head, head_logps
from ._packed import IGNORE

# Two rows: the second differs in its later half, which the first half must not see.
_ROWS, _LENGTH = 2, 16
# Tokens in front of a packed sequence, and in it: more than the taps of a convolution or a chunk of a few tokens.
_FRONT, _REAR = 13, 9
# Rows of the head that are widened at a time: 64 MiB at D = 4096.
_SLAB = 4096
# Entries of the largest buffer that is kept and put back. What is larger holds weights or a mask, and not statistics.
_BUFFER = 1 << 22

# Calls the model with these arguments while the first one answers in its head's place.
Run = Callable[..., Any]


class Listener:
    """Stands in the head's place, keeps the hidden states that come, and answers with the head's output, widened."""

    def __init__(self, head: Head | None) -> None:
        self.head, self.hidden, self.raw = (
            head,
            torch.empty(0, dtype=torch.float32, device="cpu"),
            torch.empty(0, dtype=torch.float32, device="cpu"),
        )
        self.calls = 0

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.hidden = hidden
        if self.head is None:
            return hidden.new_zeros((*hidden.shape[:-1], 1))
        self.raw = _widened(hidden, self.head)
        return self.raw.clone()  # a model may mask its logits in place


def _widened(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """hidden W^T + bias in float32, or in float64 where it is: what a model does to it after shows to 1e-6."""
    wide = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
    weight, bias = _whole(head.weight), None if head.bias is None else _whole(head.bias)
    with torch.autocast(weight.device.type, enabled=False):
        rows = hidden.to(weight.device, wide)
        raw = torch.cat([rows @ slab.to(wide).t() for slab in weight.split(_SLAB)], -1)
        return raw if bias is None else raw + bias.to(wide)


def _whole(x: Any) -> torch.Tensor:
    whole: torch.Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Run the model in eval mode without gradients, and leave no trace: modes, buffers and generators as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta and buffer.numel() <= _BUFFER
    ]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta", "mps")}
    with ExitStack() as stack:
        # One kind of accelerator: torch has one for each process.
        kind = next((d.type for d in devices), "cuda")
        stack.enter_context(torch.random.fork_rng([d.index or 0 for d in devices], device_type=kind))
        stack.enter_context(torch.no_grad())
        try:
            # Not eval(): models do more in it, as merging adapters.
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, buffer, saved in buffers:
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)
                module._buffers[name] = buffer
            # Casts of weights made here have no graph, and autocast would give them to the step.
            torch.clear_autocast_cache()


def check_logits(model: Any, head: Head, run: Run, options: dict[str, Any]) -> str:
    """Raise unless the model's logits are its head's, scaled and capped; returned is what is wrong with its own loss.

    All logits of 32 tokens in two contexts, in float32 whatever the weights are, at 8 units of rounding.
    """
    name = type(model).__name__
    ids = _tokens(model, head, _ROWS * _LENGTH).view(_ROWS, _LENGTH)
    ids[1, : _LENGTH // 2] = ids[0, : _LENGTH // 2]
    labels = ids.clone()
    labels[0, 3] = labels[1, -2] = IGNORE
    listener = Listener(head)
    with undisturbed(model):
        try:
            logits: Any = getattr(run(listener, input_ids=ids), "logits", None)
        except Exception as error:
            _check.bad_value("model", "an architecture that runs on token ids", f"{name}, which raises {_said(error)}")
        if listener.calls != 1:
            wanted = "an architecture that calls its output head once"
            _check.bad_value("model", wanted, f"{name}, which calls it {listener.calls} times")
        ours = finish_head(listener.raw, logit_scale=head.logit_scale, softcap=head.softcap)
        _compare_logits(name, logits, ours)
        _compare_logps(name, listener.hidden, ours, labels, head, options)
        early = listener.hidden[:, : _LENGTH // 2]
        seen = distance(early[1], early[0])
        if not seen <= limit(early.dtype):
            wanted = "a causal model, whose hidden states do not depend on later tokens"
            _check.bad_value("model", wanted, f"{name}, where they change by {seen:.2g} of their size")
        return _loss_verdict(name, ours, ids, labels, (run, listener, torch.finfo(logits.dtype).eps))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _compare_logits(name: str, logits: Any, ours: torch.Tensor) -> None:
    wanted = "an architecture whose logits are its output head's, scaled and capped"
    if logits is None or logits.shape != ours.shape:
        got = "none" if logits is None else str(tuple(logits.shape))
        _check.bad_value("model", wanted, f"{name}, whose logits are {got} where the head's are {tuple(ours.shape)}")
    logits = logits.to(ours.device)
    size = float(ours.abs().max())
    error = float((logits.to(ours.dtype).log_softmax(-1) - ours.log_softmax(-1)).abs().max())
    # A model that rounds its logits to half precision after the head may be off by that.
    if not error <= 8 * torch.finfo(logits.dtype).eps * (1 + size):
        _check.bad_value("model", wanted, f"{name}, log-probs off by {error:.3g}")


def _compare_logps(
    name: str, hidden: torch.Tensor, ours: torch.Tensor, labels: torch.Tensor, head: Head, options: dict[str, Any]
) -> None:
    """The op itself, in the dtype that training runs in."""
    labels = labels.to(ours.device)
    got = head_logps(hidden, head, labels, options).logps
    z = ours / options["temperature"]
    counted = labels != IGNORE
    truth = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0].where(counted, 0)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    error = float((got.to(truth.dtype) - truth).abs().max())
    # Sums of D products in another order, in TF32 where torch is told to.
    if not error <= 8 * max(torch.finfo(dtype).eps, 2**-13) * (1 + float(z.abs().max())):
        wanted = "an output head whose log-probs linear_logps gives"
        _check.bad_value("model", wanted, f"{name}, log-probs off by {error:.3g}")


def _loss_verdict(
    name: str, ours: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor, own: tuple[Run, Listener, float]
) -> str:
    """What is wrong with the model's own loss; empty where it is the mean over labels that are shifted by one."""
    run, listener, rounding = own
    without = listener.hidden
    try:
        loss = getattr(run(listener, input_ids=ids, labels=labels), "loss", None)
    except Exception as error:
        return f"{name} raises {_said(error)}"
    if loss is None:
        return f"{name} gives no loss for labels"
    # The fused forward calls the model without them.
    if not distance(listener.hidden.flatten(0, 1), without.flatten(0, 1)) <= limit(without.dtype):
        return f"{name} has other hidden states with labels than without"
    labels = labels.to(ours.device)
    value = float(loss.float().mean())

    def mean(z: torch.Tensor, to: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(z.flatten(0, 1), to.flatten(), ignore_index=IGNORE))

    def near(other: float) -> bool:
        return abs(value - other) <= max(1e-4, 8 * rounding) * (1 + abs(other))

    shifted = mean(ours[:, :-1], labels[:, 1:])
    if near(shifted):
        return ""
    if near(mean(ours, labels)):
        return f"{name} does not shift its labels"
    return f"{name}'s own loss is {value:.4g} where the mean of its shifted labels is {shifted:.4g}"


def check_packed(model: Any, head: Head, run: Run, arguments: Callable[[torch.Tensor, torch.Tensor], Any]) -> str:
    """What is wrong with a sequence behind another one in a packed row; empty where it is as it is alone."""
    ids = _tokens(model, head, 2 * _FRONT + _REAR)
    rear = ids[-_REAR:]
    cu_seqlens = torch.tensor([0, _FRONT, _FRONT + _REAR], dtype=torch.int64, device=ids.device)
    name = type(model).__name__
    with undisturbed(model):
        try:
            alone = _hidden(run, {"input_ids": rear[None]})
            behind = []
            for front in ids[: 2 * _FRONT].split(_FRONT):
                row = torch.cat([front, rear])[None]
                behind.append(_hidden(run, {"input_ids": row, **arguments(row, cu_seqlens)})[_FRONT:])
        except Exception as error:
            return f"{name}, which raises {_said(error)}"
    # What is in front must not be seen at all, by the same kernels on the same shapes. Alone, others may run.
    seen, off = distance(behind[0], behind[1]), distance(behind[0], alone)
    if seen <= limit(alone.dtype) and off <= limit(alone.dtype, other_shapes=True):
        return ""
    return f"{name}, whose hidden states change by {max(seen, off):.2g} of their size"


def _hidden(run: Run, kwargs: dict[str, Any]) -> torch.Tensor:
    listener = Listener(None)
    run(listener, **kwargs)
    return listener.hidden[0]


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """By how much of their size hidden states (T, D) differ. In half precision at the middle token.

    There an expert whose gate is a near tie may change with rounding alone, which moves one token far.
    """
    x, y = x.float(), y.float().to(x.device)
    off = (x - y).norm(dim=-1) / y.norm(dim=-1).clamp(min=1e-30)
    return float(off.max() if x.dtype == torch.float32 else off.median())


def limit(dtype: torch.dtype, other_shapes: bool = False) -> float:
    """Between what rounding does to hidden states, and what tokens do that they must not see.

    SmolLM2-135M alone and packed: 2e-6 in float32, 0.01 in bfloat16; with attention across the bound 0.3 and more. On
    the same shapes all are 0. The least of transformers' architectures, random and two layers deep: 0.015.
    """
    if dtype in (torch.float32, torch.float64):
        return 1e-3
    return 0.1 if other_shapes else 0.03


def _tokens(model: Any, head: Head, count: int) -> torch.Tensor:
    """Token ids all over the vocabulary, the same each time, without those that stand for padding or images."""
    embedding = model.get_input_embeddings().weight
    vocabulary = min(head.weight.shape[0], embedding.shape[0])
    configs = (model.config, model.config.get_text_config())
    named = [(key, x) for config in configs for key, x in config.to_dict().items()]
    special = {x for key, x in named if key.endswith(("_id", "_index")) and isinstance(x, int)}
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(vocabulary, (8 * count,), generator=generator, dtype=torch.int64, device="cpu").tolist()
    ids = [i for i in drawn if i not in special][:count]
    return torch.tensor(ids, dtype=torch.int64, device=embedding.device)
