"""What the trainers check, and say, about a loss and its settings before a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

import qempo_fast as qf

from ... import _check
from ..methods import Method

logger = logging.getLogger(__name__)


def refuse_unknown(loss: str, given: Iterable[str], taken: Iterable[str]) -> None:
    """Raise where loss_kwargs has a name that this loss does not take, one left over from another loss for instance."""
    unknown = sorted(set(given) - set(taken))
    if unknown:
        wanted = ", ".join(taken) or "none"
        raise TypeError(f"loss_kwargs: loss={loss!r} takes {wanted}, got {', '.join(unknown)}")


def tried(call: Callable[[], Any]) -> Any:
    """Call a loss on stand-ins, so that wrong loss_kwargs raise before a model is loaded."""
    try:
        return call()
    except TypeError as error:
        raise TypeError(f"loss_kwargs: {error}") from error


def with_beta(method: Method, kwargs: Mapping[str, Any] | None, beta: float | None) -> dict[str, Any]:
    """loss_kwargs, with the config's beta where the loss has one and loss_kwargs does not say."""
    given = {"beta": beta} if "beta" in method.numbers and beta is not None else {}
    return given | dict(kwargs or {})


def refuse_unused(args: Any, names: tuple[str, ...], loss: str) -> None:
    """Raise where settings of TRL's own loss were changed, which this loss does not read: all of them at once."""
    changed = {}
    for field in fields(args):
        if field.name in names:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            value = getattr(args, field.name)
            if value != default:
                changed[f"args.{field.name}"] = repr(value)
    if changed:
        left_out = "it left out" if len(changed) == 1 else "them left out"
        wanted = f"{left_out}, since loss={loss!r} does not read {left_out.split()[0]}"
        _check.bad_value(", ".join(changed), wanted, ", ".join(changed.values()))


def refuse_no_reference(model: Any, peft_config: Any, name: str, wanted: str) -> None:
    """Raise where TRL would ask the hub for the reference of a model that came from nowhere.

    With adapters it needs none: the reference is the model with its adapters off.
    """
    adapted = peft_config is not None or hasattr(model, "get_base_model")
    source = model if isinstance(model, str) else getattr(model.config, "_name_or_path", None)
    if not adapted and not source:
        _check.bad_value(name, f"{wanted}, as the loss reads a reference", "a model built in memory")


def tell_where_kl_is_qempo(
    method: Method, hyperparameters: Mapping[str, Any], constraint: qf.QualityConstraint | None = None
) -> None:
    moves = constraint is not None and constraint.max_kl is not None
    if "mu" in method.numbers and not hyperparameters.get("mu") and not moves:
        logger.warning("loss=%r is QEMPO here: mu is 0, and only a QualityConstraint with max_kl moves it", method.name)
