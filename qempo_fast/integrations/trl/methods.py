"""Losses by name, for pairs and for groups, and what each needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

import torch

import qempo_fast as qf

from ... import _check
from ...reference.family import AlphaBeta
from .._groups import LOSSES


class Method(NamedTuple):
    """loss(...) as a scalar, and family(**hyperparameters) as the (alpha, beta) of its implicit reward."""

    loss: Callable[..., torch.Tensor]
    family: Callable[..., AlphaBeta]


def alpha_beta(family: Callable[..., AlphaBeta], kwargs: Mapping[str, Any]) -> AlphaBeta:
    """The family's two numbers from those of a loss's hyperparameters that decide them."""
    names = inspect.signature(family).parameters
    return family(**{name: value for name, value in kwargs.items() if name in names})


def _kl(beta: float = 0.1) -> AlphaBeta:
    return AlphaBeta.of_kl(beta)


def _optional_kl(beta: float = 0.0) -> AlphaBeta:
    return AlphaBeta.of_kl(beta)


def _qempo(lam: float) -> AlphaBeta:
    return AlphaBeta.of_qempo(lam)


def _no_family() -> AlphaBeta:
    return AlphaBeta(0.0, 0.0)


def _epa(logps: torch.Tensor, ref: torch.Tensor, *, n_weak: int, **kw: Any) -> torch.Tensor:
    split = [(x[0], x[1, :, None], x[2:].t()) for x in (logps, ref)]
    return qf.epa_loss(*split[0], *split[1], **kw)


# loss(logps, ref, **kw): logps (2 + n_weak, B), rows chosen, rejected, weak negatives; ref alike, or None rows.
PAIR_LOSSES: dict[str, Method] = {
    "dpo": Method(lambda x, f, **kw: qf.dpo_loss(*x, *f, **kw), _kl),
    "spl": Method(lambda x, f, **kw: qf.spl_pair_loss(*x, *f, **kw), AlphaBeta),
    "hdpo": Method(lambda x, f, **kw: qf.hdpo_loss(*x, *f, **kw), AlphaBeta.of_hdpo),
    "qempo": Method(lambda x, f, **kw: qf.qempo_pair_loss(*x, **kw), _qempo),
    "qempo_kl": Method(lambda x, f, **kw: qf.qempo_kl_pair_loss(*x, *f, **kw), AlphaBeta.of_qempo),
    "epa": Method(_epa, _kl),
}

_GROUP_FAMILIES: dict[str, Callable[..., AlphaBeta]] = {
    "qempo": _qempo,
    "qempo_kl": AlphaBeta.of_qempo,
    "spl": AlphaBeta,
    "gvpo": _kl,
    "rspo": _no_family,
    "dqo": _optional_kl,
}

# "grpo" is TRL's own loss, whichever loss_type names.
GROUP_LOSSES: dict[str, Method | None] = {
    "grpo": None,
    **{name: Method(loss, _GROUP_FAMILIES[name]) for name, loss in LOSSES.items()},
}

# Stored responses are not samples of the policy: only the family's squared form, qf.variance_loss, is right for them.
OFFLINE_LOSSES = {name: _GROUP_FAMILIES[name] for name in ("gvpo", "spl", "qempo", "qempo_kl")}


def tried(loss: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a loss on stand-ins, so that wrong loss_kwargs raise before a model is loaded."""
    try:
        loss(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"loss_kwargs: {error}") from error


def with_beta(family: Callable[..., AlphaBeta], kwargs: Mapping[str, Any] | None, beta: float) -> dict[str, Any]:
    """loss_kwargs, with the config's beta where the loss has one and loss_kwargs does not say."""
    kw = dict(kwargs or {})
    if "beta" in inspect.signature(family).parameters and beta:
        kw.setdefault("beta", beta)
    return kw


def refuse_unused(args: Any, names: tuple[str, ...], loss: str) -> None:
    """Raise where a setting of TRL's own loss was changed, which this loss does not read."""
    for field in fields(args):
        if field.name in names:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            value = getattr(args, field.name)
            if value != default:
                _check.bad_value(f"args.{field.name}", f"its default, {default!r}, with loss={loss!r}", repr(value))
