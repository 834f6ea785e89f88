"""Log-probs and entropies from any transformers causal language model, without its logits."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import qempo_fast as qf

from .. import _check
from . import missing

try:
    from transformers.utils import ModelOutput, is_flash_attn_2_available
except ModuleNotFoundError as error:
    raise missing(error, "hf") from error

logger = logging.getLogger(__name__)

_IGNORE = -100


@dataclass
class FusedOutput(ModelOutput):  # type: ignore[misc]
    """What a model under ``fused_forward`` returns for a call with labels.

    Attributes:
        loss: scalar, minus the sum of logps over num_items_in_batch (the number of counted labels unless given).
        logps: float32, shaped like labels: the log-prob of each label given the tokens before it. 0 where the label
            is -100, at the first token of each row, and at the first token of each packed sequence.
        entropy: the same shape, of the distribution that the label is drawn from, where asked for.
        sum_sq: the same shape, log sum_j p_j^2, where asked for; not differentiable.
    """

    loss: torch.Tensor | None = None
    logps: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    sum_sq: torch.Tensor | None = None


class Head(NamedTuple):
    """The output head of a causal language model: z = softcap(logit_scale * (h W^T + bias))."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    softcap: float | None


def read_head(model: Any) -> Head:
    """The output head of a transformers model as it is now; tied weights are the embedding's own Parameter.

    Args:
        model: a causal language model of transformers, not a PEFT wrapper.

    Returns:
        Head(weight (V, D), bias (V,) or None, logit_scale, softcap or None).

    Raises:
        TypeError, ValueError: a model without an output head, with a PEFT adapter on it, or one that DeepSpeed ZeRO-3
            has partitioned.
    """
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(module, "weight", None)
    if weight is None:
        _check.bad_type("model", "a causal language model of transformers with output embeddings", type(model).__name__)
    if hasattr(module, "base_layer"):
        _check.bad_value("model", "an output head without a PEFT adapter (leave it out of target_modules)", "one with")
    if hasattr(weight, "ds_id"):
        _check.bad_value("model", "an output head that is whole", "one that DeepSpeed ZeRO-3 has partitioned")
    config = model.config.get_text_config()
    return Head(weight, getattr(module, "bias", None), _logit_scale(config), _softcap(config))


def _logit_scale(config: Any) -> float:
    """Every name that transformers has for a factor on the logits."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def _softcap(config: Any) -> float | None:
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return None


def fused_forward(
    model: Any,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    sum_sq: bool = False,
    grad: str = "auto",
    tau: float | None = None,
    backend: str | None = None,
    varlen: bool = True,
    check: bool = True,
) -> FusedForward:
    """Make a causal language model return log-probs instead of logits whenever it is called with labels.

    ``model(input_ids, labels=labels)`` then runs the backbone and ``linear_logps`` inside ``model.forward`` and
    returns a ``FusedOutput``. Without labels the forward is the model's own, so ``generate`` is unchanged. ``labels``
    are shifted here, as transformers does; ``shift_labels`` are taken as they are.

    Padding-free rows: pass one row (1, N) of sequences one after another with ``cu_seqlens=`` (S + 1,), or with
    ``position_ids`` that restart at 0 and no attention mask. Attention stays inside each sequence, and
    ``qf.segment_sum(out.logps[0], cu_seqlens)`` gives the sequences' log-probs.

    Args:
        model: a causal language model of transformers, or a PEFT model around one. Its output head (tied or not, with
            bias, logit scale or softcap) is read at each call.
        temperature: divides the logits, > 0.
        entropy, sum_sq: ask for these outputs.
        grad, tau, backend: as ``qf.linear_logps``.
        varlen: attend with flash-attn's varlen kernels where flash-attn is installed and the model is in half precision
            on a GPU: its default attention gives way to "flash_attention_2" until ``remove()``. Elsewhere the
            model's own attention runs, on a block-diagonal mask for packed rows.
        check: compare with the logits path once, on eight tokens, so that an architecture which does something else
            between backbone and logits raises here. Skipped for models whose weights are on the meta device.

    Returns:
        A handle: ``remove()`` restores the model, and as a context manager it does so on exit. Run the backward
        pass before, where activations are checkpointed.

    Raises:
        TypeError, ValueError: as ``read_head``; an argument out of range; an architecture whose log-probs differ.
        ImportError: transformers is not installed.
    """
    _check.positive("temperature", temperature)
    _check.choice("grad", grad, ("auto", "exact", "sampled"))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    read_head(base)
    if base.base_model is base:
        _check.bad_type("model", "a model with a backbone apart from its output head", type(base).__name__)
    options = {"temperature": temperature, "entropy": entropy, "sum_sq": sum_sq}
    handle = FusedForward(base, {**options, "grad": grad, "tau": tau, "backend": backend}, varlen)
    if check and not any(p.is_meta for p in base.parameters()):
        try:
            handle.check()
        except Exception:
            handle.remove()
            raise
    return handle


class FusedForward:
    """The patch that ``fused_forward`` makes; ``remove()`` or leaving it as a context takes it back."""

    def __init__(self, model: Any, options: dict[str, Any], varlen: bool) -> None:
        self.model, self.options, self.active = model, options, True
        self._attention: str | None = None
        if varlen and _varlen_would_run(model):
            self._attention = model.config._attn_implementation
            model.set_attn_implementation("flash_attention_2")
            logger.info("attention switched from %s to flash_attention_2", self._attention)
        self._before = model.__dict__.get("forward")
        self._signature = inspect.signature(type(model).forward)

        # wraps: generate and Trainer look at the signature of forward. The model comes as an argument, so that a deep
        # copy of it works too.
        @functools.wraps(type(model).forward)
        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            return self._forward(model, *args, **kwargs) if self.active else self._original(model, *args, **kwargs)

        self._patched = types.MethodType(forward, model)
        model.forward = self._patched

    def remove(self) -> None:
        """Give the model its own forward, and attention, back."""
        if not self.active:
            return
        self.active = False  # should a later patch still hold ours, it passes through from now on
        if self.model.__dict__.get("forward") is self._patched:
            if self._before is None:
                del self.model.forward
            else:
                self.model.forward = self._before
        if self._attention is not None:
            self.model.set_attn_implementation(self._attention)

    def __enter__(self) -> FusedForward:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def _original(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return type(model).forward(model, *args, **kwargs) if self._before is None else self._before(*args, **kwargs)

    def _forward(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind_partial(model, *args).arguments
        kwargs = {**dict(list(bound.items())[1:]), **kwargs}
        cu_seqlens = kwargs.pop("cu_seqlens", None)
        if cu_seqlens is not None:
            kwargs.update(_packed(model, cu_seqlens, kwargs))
        if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
            return self._original(model, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        count = kwargs.pop("num_items_in_batch", None)
        if kwargs.pop("output_router_logits", getattr(model.config, "output_router_logits", False)):
            _check.bad_value("output_router_logits", "False: the fused forward has no router loss", True)
        hidden = model.base_model(**{**kwargs, "use_cache": False}).last_hidden_state
        if shifted is not None:
            return self._output(model, hidden, shifted, count, shift=0)
        return self._output(model, hidden[:, :-1], _targets(labels, kwargs)[:, 1:], count, shift=1)

    def _output(self, model: Any, hidden: torch.Tensor, targets: torch.Tensor, count: Any, shift: int) -> FusedOutput:
        weight, bias, logit_scale, softcap = read_head(model)
        # A model split over devices may end its backbone elsewhere than at the head.
        hidden, targets = hidden.to(weight.device), targets.to(weight.device)
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(weight.dtype)
        scores = qf.linear_logps(
            hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, **self.options
        )
        items = (targets != _IGNORE).sum().clamp(min=1) if count is None else count
        aligned = (None if x is None else torch.nn.functional.pad(x, (shift, 0)) for x in scores)
        return FusedOutput(-scores.logps.sum() / items, *aligned)

    @torch.no_grad()
    def check(self) -> None:
        """Raise unless the log-probs of eight tokens are those of the model's own logits."""
        training = self.model.training
        self.model.eval()
        try:
            device = self.model.get_input_embeddings().weight.device
            ids = torch.arange(8, device=device)[None] % self.model.get_output_embeddings().weight.shape[0]
            ours = self.model(input_ids=ids, labels=ids).logps[0, 1:]
            logits = self._original(self.model, input_ids=ids, use_cache=False).logits[0, :-1].float()
        finally:
            self.model.train(training)
        plain = torch.log_softmax(logits / self.options["temperature"], -1)
        plain = plain.gather(1, ids[0, 1:, None].to(plain.device))[:, 0]
        error = float((ours - plain.to(ours.device)).abs().max())
        # Half precision rounds logits by up to 2% of their spread; a scale or cap that was missed is off by far more.
        spread = float((logits / self.options["temperature"]).std(-1).max())
        if not error <= 0.05 * spread + 1e-5:
            wanted = "an architecture whose logits are its output head's, scaled and capped"
            _check.bad_value("model", wanted, f"{type(self.model).__name__}, log-probs off by {error:.3g}")


def _varlen_would_run(model: Any) -> bool:
    weight = model.get_output_embeddings().weight
    half = weight.dtype in (torch.float16, torch.bfloat16)
    # Gemma 2 caps its attention scores, which SDPA cannot: there "eager" is what the model comes with.
    default = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    takes_it = model.config._attn_implementation == default and getattr(model, "_supports_flash_attn", False)
    return half and takes_it and weight.device.type == "cuda" and is_flash_attn_2_available()


def _packed(model: Any, cu_seqlens: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
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
    packed: dict[str, Any] = {"position_ids": (torch.arange(total, device=row.device) - starts)[None]}
    if "flash" in (model.config._attn_implementation or ""):
        offsets, longest = cu_seqlens.int(), int(lengths.max())
        packed.update(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=longest, max_length_k=longest)
    return packed


def _targets(labels: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """labels, with the first token of each packed sequence ignored: nothing in its own sequence predicts it."""
    positions = kwargs.get("position_ids")
    if positions is None or positions.ndim != 2 or kwargs.get("attention_mask") is not None:
        return labels
    return labels.masked_fill(positions.to(labels.device) == 0, _IGNORE)
