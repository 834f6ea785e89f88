"""fused_forward: log-probs where a transformers model computes its logits."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from ... import _check
from .. import scoring
from ..known import lined_up
from . import _packed, _swap, _verify
from ._head import Head, find_head, head_logps, head_of
from ._packed import IGNORE

logger = logging.getLogger(__name__)


@dataclass
class FusedOutput(ModelOutput):  # type: ignore[misc]
    """What a model under ``fused_forward`` returns for a call with labels.

    Attributes:
        loss: scalar, minus the sum of logps over num_items_in_batch (the number of counted labels unless given).
        logps: float32, shaped like labels: the log-prob of each label given the tokens before it. 0 where the label
            is -100, at the first token of each row, and at the first token of each packed sequence.
        entropy: the same shape, of the distribution that the label is drawn from, where asked for.
        sum_sq: the same shape, log sum_j p_j^2, where asked for; not differentiable.
        hidden_states, attentions: the model's own, where the call asks for them.
    """

    loss: torch.Tensor | None = None
    logps: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    sum_sq: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


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
    logits_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> FusedForward:
    """Make a causal language model return log-probs instead of logits whenever it is called with labels.

    ``model(input_ids, labels=labels)`` then runs the model's own forward with ``linear_logps`` in the place of its
    output head, and returns a ``FusedOutput``. Without labels the forward is the model's own, so ``generate`` is
    unchanged. ``labels`` are shifted here, as transformers does; ``shift_labels`` are taken as they are.

    ``support=`` at a call is a ``qf.Support`` with a set for each entry of labels, row after row, as
    ``support.spread(labels != -100)`` lines up those of the answers: log-probs and entropy are then over these sets.
    A set whose label is shifted out goes with it.

    Padding-free rows: pass one row (1, N) of sequences one after another with ``cu_seqlens=`` (S + 1,), or with
    ``position_ids`` that restart at 0 and no attention mask. Attention stays inside each sequence, and
    ``qf.segment_sum(out.logps[0], cu_seqlens)`` gives the sequences' log-probs. Architectures that would mix the
    sequences are refused when they are first asked to (docs/integrations/architectures.md).

    Args:
        model: a causal language model of transformers, or a PEFT model around one. Its output head (tied or not, with
            bias, logit scale or softcap) is looked at and read at each call.
        temperature: divides the logits, > 0.
        entropy, sum_sq: ask for these outputs.
        grad, tau, backend: as ``qf.linear_logps``.
        varlen: attend with flash-attn's varlen kernels where flash-attn is installed and the model is in half precision
            on a GPU: its default attention gives way to "flash_attention_2" until ``remove()``. Elsewhere the
            model's own attention runs, on a block-diagonal mask for packed rows.
        check: compare once with the model's own logits and loss, on 32 tokens, and at the first packed row with its
            parts, so that an architecture which does something else raises. For a model with weights on the meta
            device at its first call with labels.
        logits_dtype: as ``qf.linear_logps``: torch.float32 keeps a half-precision head's logits in float32 and leaves
            a float32 head as it is. A float64 head raises, at the check or else at the first call with labels.
        batch_invariant: as ``qf.linear_logps``, of the head: equal hidden states give equal bits whatever rows come
            with them. Whether the body gives a row equal hidden states in every batch is the model's.

    Returns:
        A handle: ``remove()`` restores the model, and as a context manager it does so on exit. Run the backward
        pass before, where activations are checkpointed. Deep copies and pickles of the model are patched too, each
        by a handle of its own.

    Raises:
        TypeError, ValueError: as ``read_head``; an argument out of range; an encoder-decoder model; an architecture
            whose log-probs differ. At a call: labels for a model that does not shift its own, packed rows for one that
            mixes them; support with batch_invariant.
        ImportError: transformers is not installed.
    """
    _check.positive("temperature", temperature)
    options = {
        "temperature": temperature,
        "entropy": entropy,
        "sum_sq": sum_sq,
        **scoring(grad, tau, logits_dtype, batch_invariant, backend),
    }
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = find_head(base)
    if getattr(base.config, "is_encoder_decoder", False):
        _check.bad_type("model", "a decoder, whose labels are its input's next tokens", type(base).__name__)
    head_of(base, module)
    handle = FusedForward(base, options, varlen, check)
    if check and not any(p.is_meta for p in base.parameters()):
        try:
            handle.check()
        except Exception:
            handle.remove()
            raise
    return handle


class FusedForward:
    """The patch that ``fused_forward`` makes; ``remove()`` or leaving it as a context takes it back."""

    def __init__(self, model: Any, options: dict[str, Any], varlen: bool, check: bool) -> None:
        self.model, self.options = model, options
        self._attention: str | None = None
        # What the checks found: None where they are still to be made.
        self._loss: str | None = None if check else ""
        self._rows: dict[Any, str] | None = {} if check else None
        if varlen and _packed.varlen_would_run(model):
            self._attention = model.config._attn_implementation
            model.set_attn_implementation("flash_attention_2")
            logger.info("attention switched from %s to flash_attention_2", self._attention)
        _swap.push(model, self)
        _swap.prepare_head(find_head(model))

    def remove(self) -> None:
        """Give the model its own forward, and attention, back."""
        if not any(patch is self for patch in _swap.patches(self.model)):
            return
        _swap.drop(self.model, self)
        if self._attention is not None:
            self.model.set_attn_implementation(self._attention)

    def __enter__(self) -> FusedForward:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def check(self, *, packed: bool = False) -> None:
        """Raise unless the model's logits are its head's, scaled and capped, on 32 tokens.

        Args:
            packed: look at a packed row too, and raise where the model would mix its sequences. Otherwise that is
                done at the first packed row, which torch.compile with fullgraph=True cannot.
        """
        model = self.model
        # From outside: through the hooks of the model, in which FSDP gathers its weights.
        self._check_logits(model, lambda **kwargs: model(**kwargs))
        if packed:
            self._check_rows(model, "cu_seqlens", lambda **kwargs: model(**kwargs))
            self._refuse_rows(model, "cu_seqlens")

    def _check_logits(self, model: Any, call: Any) -> None:
        self._loss = _verify.check_logits(model, *self._run(model, call), self.options)

    def _check_rows(self, model: Any, by: str, call: Any) -> None:
        def arguments(row: torch.Tensor, cu_seqlens: torch.Tensor) -> dict[str, Any]:
            made = _packed.packed(model, cu_seqlens, {"input_ids": row})
            return made if by == "cu_seqlens" else {"position_ids": made["position_ids"]}

        self._rows = self._rows or {}
        self._rows[by, model.config._attn_implementation] = _verify.check_packed(
            model, *self._run(model, call), arguments
        )

    def _run(self, model: Any, call: Any) -> tuple[Head, Any]:
        """The head, and the call of the model's own forward with a listener in its place."""
        module = find_head(model)

        def run(listener: Any, **kwargs: Any) -> Any:
            return call(**_without_cache(model, kwargs), _listener=listener)

        return _in_memory(head_of(model, module)), run

    def _forward(self, model: Any, kwargs: dict[str, Any]) -> Any:
        if (listener := kwargs.pop("_listener", None)) is not None:
            return _swap.stand_in(find_head(model), listener, lambda: _swap.own_forward(model, kwargs))
        cu_seqlens = kwargs.pop("cu_seqlens", None)
        if cu_seqlens is not None:
            kwargs.update(_packed.packed(model, cu_seqlens, kwargs))
        self._look_at_rows(model, cu_seqlens, kwargs)
        if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
            if kwargs.pop("support", None) is not None:
                _check.bad_value("support", "None without labels", "one")
            return _swap.own_forward(model, kwargs)
        return self._log_probs(model, kwargs)

    def _log_probs(self, model: Any, kwargs: dict[str, Any]) -> Any:
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            _refuse_predictions()
        if self._loss is None:
            _eagerly(self._check_logits, model, lambda **given: self._forward(model, given))
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        if self._loss and shifted is None:
            _check.bad_value("labels", "None and shift_labels, which are not shifted", f"labels, where {self._loss}")
        count = kwargs.pop("num_items_in_batch", None)
        if kwargs.pop("output_router_logits", getattr(model.config, "output_router_logits", False)):
            _check.bad_value("output_router_logits", "False: the fused forward has no router loss", True)
        as_tuple = not kwargs.pop("return_dict", getattr(model.config, "return_dict", True))
        asked = _Asked(model, labels, shifted, kwargs, self.options)
        if as_tuple:
            kwargs["return_dict"] = True
        kwargs = _without_cache(model, kwargs)
        out = _swap.stand_in(asked.module, asked, lambda: _swap.own_forward(model, kwargs))
        result = asked.output(count, out)
        return result.to_tuple() if as_tuple else result

    def _look_at_rows(self, model: Any, cu_seqlens: Any, kwargs: dict[str, Any]) -> None:
        """At the first packed row look whether the model keeps its sequences apart; raise wherever it does not."""
        by = "cu_seqlens" if cu_seqlens is not None else "position_ids"
        places = _packed.positions(kwargs)
        if self._rows is None or places is None:
            return
        if (by, model.config._attn_implementation) not in self._rows:
            _eagerly(self._check_rows, model, by, lambda **given: self._forward(model, given))
        # Positions that begin once in each row are no packed rows. Only who would be refused waits to know.
        if self._rows[by, model.config._attn_implementation] and int((places == 0).sum()) > len(places):
            self._refuse_rows(model, by)

    def _refuse_rows(self, model: Any, by: str) -> None:
        if why := (self._rows or {})[by, model.config._attn_implementation]:
            _check.bad_value(by, "one sequence: the model does not keep those of a packed row apart", why)


class _Asked:
    """Stands in the head's place for one call: takes hidden states and keeps log-probs."""

    def __init__(self, model: Any, labels: Any, shifted: Any, kwargs: dict[str, Any], options: dict[str, Any]) -> None:
        self.module = find_head(model)
        self.head = _in_memory(head_of(model, self.module))
        self.shift = 0 if shifted is not None else 1
        self.shape = (labels if shifted is None else shifted).shape
        self.targets = _packed.targets(labels, kwargs)[:, 1:] if shifted is None else shifted
        self.options = options
        if (support := kwargs.pop("support", None)) is not None:
            sets = lined_up(support, self.shape, self.shift).to(self.head.weight.device)
            self.options = {**options, "support": sets}
        self.scores: Any = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.scores is not None:
            _check.bad_value("model", "an architecture that calls its output head once", "a second call")
        if hidden.shape[:-1] != self.shape:
            name = "labels" if self.shift else "shift_labels"
            _check.bad_value(name, f"shape {tuple(hidden.shape[:-1])}, as the head's input has", tuple(self.shape))
        self.scores = head_logps(
            hidden[:, : self.shape[1] - self.shift], self.head, self.targets, self.options, self.shift
        )
        # What the model goes on to do with its logits it does with this.
        return torch.zeros((*hidden.shape[:-1], 1), dtype=hidden.dtype, device=hidden.device)

    def output(self, count: Any, out: Any) -> FusedOutput:
        if self.scores is None:
            _check.bad_value("model", "an architecture that calls its output head", "none of its calls")
        items = (self.targets != IGNORE).sum().clamp(min=1) if count is None else count
        loss = -self.scores.logps.sum() / (items.to(self.scores.logps.device) if torch.is_tensor(items) else items)
        logps, entropy, sum_sq = (
            None if x is None else torch.nn.functional.pad(x, (self.shift, 0)) for x in self.scores
        )
        own = {name: getattr(out, name, None) for name in ("hidden_states", "attentions")}
        return FusedOutput(loss=loss, logps=logps, entropy=entropy, sum_sq=sum_sq, **own)


def _without_cache(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    taken = _swap.taken(model)
    return {**kwargs, "use_cache": False} if taken is None or "use_cache" in taken else kwargs


def _in_memory(head: Head) -> Head:
    if head.weight.is_meta:
        _check.bad_value("model", "an output head in memory", "one that is offloaded, or on the meta device")
    return head


def _eagerly(function: Any, *args: Any) -> None:
    """Under torch.compile the graph breaks here, once."""
    (torch.compiler.disable(function) if torch.compiler.is_compiling() else function)(*args)


def _refuse_predictions() -> None:
    """Raise where transformers' Trainer would hand log-probs to compute_metrics, or out of predict(), for logits."""
    if (trainer := sys.modules.get("transformers.trainer")) is None:
        return
    step, frame = trainer.Trainer.prediction_step.__code__, sys._getframe(2).f_back
    while frame is not None and frame.f_code is not step:
        frame = frame.f_back
    if frame is not None and not frame.f_locals["prediction_loss_only"]:
        wanted = "None, or prediction_loss_only=True: a model under fused_forward makes no logits"
        _check.bad_value("compute_metrics", wanted, "Trainer's call for predictions")
