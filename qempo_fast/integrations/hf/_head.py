"""The output head of a transformers model: found, looked at and read anew at each call."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch.nn.modules import module as _modules

import qempo_fast as qf

from ... import _check
from ..known import scored

_LINEAR = torch.nn.Linear.forward


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
        TypeError, ValueError: a model without an output head; a head that is more than h W^T + bias (another forward
            than torch.nn.Linear's, hooks, a PEFT adapter, an FSDP unit of its own), whose weights are quantised, or
            that DeepSpeed ZeRO-3 has partitioned.
    """
    return head_of(model, find_head(model))


def head_of(model: Any, module: Any) -> Head:
    # One look at the weight: a parametrisation makes it anew each time, and spectral norm takes a step.
    weight, bias = module.weight, getattr(module, "bias", None)
    _check_weight(weight)
    config = model.config.get_text_config(decoder=True)
    return Head(weight, bias, _logit_scale(config), _softcap(config))


def find_head(model: Any) -> torch.nn.Module:
    """The module that makes logits of hidden states, if that is all it does. Looked at in 1 to 2 microseconds."""
    module: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if getattr(type(module), "forward", None) is not _LINEAR and hasattr(module, "modules_to_save"):
        module = _saved_by_peft(module)
    if (
        getattr(type(module), "forward", None) is not _LINEAR
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _modules._global_forward_hooks
    ):
        _check_more(model, module)
    found: torch.nn.Module = module
    return found


def _check_more(model: Any, module: torch.nn.Module) -> None:
    """Raise by name of what the head does beside h W^T + bias, if that is not known to change nothing."""
    kind = type(module)
    if hasattr(module, "base_layer"):
        _check.bad_value("model", "an output head without a PEFT adapter (leave it out of target_modules)", "one with")
    if not isinstance(module, torch.nn.Module) or not hasattr(module, "weight"):
        _check.bad_type("model", "a causal language model of transformers with output embeddings", type(model).__name__)
    if kind.forward is not _LINEAR:
        wanted = "an output head that computes as torch.nn.Linear does"
        _check.bad_type("model", wanted, f"{kind.__name__}, which has a forward of its own")
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) and isinstance(module, fsdp.FSDPModule):
        # It would be gathered for the length of its own forward, which does not run.
        _check.bad_value("model", "an output head in the FSDP unit of the whole model", "one in a unit of its own")
    if any(getattr(hook, "offload", False) for hook in _placing(module)):
        _check.bad_value("model", "an output head in memory", "one that accelerate offloads")
    if "forward" in module.__dict__ and not _only_placed(module):
        _check.bad_value(
            "model", "an output head that computes as torch.nn.Linear does", "one whose forward is replaced"
        )
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    # A DTensor's hooks bring its input and output into layout, which linear_logps does itself.
    if any(own) and not hasattr(module.weight, "full_tensor"):
        _check.bad_value("model", "an output head without hooks: they would not run", f"one with {_hooks(own)}")
    # torch's own look on: a FLOP counter's are there for every module.
    if not all(h.__module__.startswith("torch.") for h in _modules._global_forward_hooks.values()):
        _check.bad_value("model", "no global forward hooks: the output head does not run", "some")


def _hooks(own: tuple[Any, ...]) -> str:
    hook = next(iter(next(hooks for hooks in own if hooks).values()))
    return getattr(hook, "__qualname__", type(hook).__name__)


def _only_placed(module: Any) -> bool:
    """Whether what stands before the head's forward is accelerate's, which brings its input to its device."""
    placed = all(type(h).__qualname__ == "AlignDevicesHook" for h in _placing(module))
    return placed and getattr(getattr(module, "_old_forward", None), "__func__", None) is _LINEAR


def _placing(module: Any) -> tuple[Any, ...]:
    """accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))


def _saved_by_peft(wrapper: Any) -> torch.nn.Module:
    """The head that PEFT's modules_to_save has in use."""
    in_use = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    if wrapper.disable_adapters or not in_use:
        found: torch.nn.Module = wrapper.original_module
    else:
        found = wrapper.modules_to_save[in_use[0]]
    return found


def _check_weight(weight: Any) -> None:
    if type(weight) is not torch.nn.Parameter and type(weight) is not torch.Tensor:
        _check_kind(weight)
    if weight.dtype not in _check.FLOATS:
        got = f"one of {str(weight.dtype).removeprefix('torch.')}"
        _check.bad_type("model", "an output head of float weights, not quantised", got)
    if hasattr(weight, "ds_id"):
        _check.bad_value("model", "an output head that is whole", "one that DeepSpeed ZeRO-3 has partitioned")


def _check_kind(weight: Any) -> None:
    """Quantised weights are tensors that compute otherwise than their values say."""
    if not isinstance(weight, torch.Tensor):
        _check.bad_type("model", "an output head with a weight", type(weight).__name__)
    # DTensors, results of a collective and fake tensors go on: linear_logps knows them.
    if not (
        _check.owns_memory(weight) or any(hasattr(weight, x) for x in ("full_tensor", "trigger_wait", "fake_mode"))
    ):
        _check.bad_type("model", "an output head of plain weights, not quantised", type(weight).__name__)


def head_logps(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, options: dict[str, Any], shift: int = 0
) -> qf.TokenLogps | qf.TokenScores:
    """linear_logps of a model's hidden states, brought to the head's device and dtype."""
    weight, bias, logit_scale, softcap = head
    # A model split over devices may end its backbone elsewhere than at the head.
    hidden, targets = hidden.to(weight.device), targets.to(weight.device)
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)
    head_of_model = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}
    return scored(hidden, weight, targets, shift=shift, **head_of_model, **options)


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
