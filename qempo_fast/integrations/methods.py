"""METHODS: the losses that trainers know by name, one row each; what one reads follows from its parameters' names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

import qempo_fast as qf

from .. import _check
from ..reference.family import AlphaBeta

PAIRS, GROUPS = "pairs", "groups"


class Method(NamedTuple):
    """A loss of pairs or of groups, and the (alpha, beta) that its hyperparameters mean.

    stored: its squared form, ``qf.variance_loss``, is offered too, for responses that are not samples of the policy.
    """

    name: str
    data: str
    loss: Callable[..., torch.Tensor]
    family: Callable[..., AlphaBeta] = lambda: AlphaBeta(0.0, 0.0)  # a loss outside the family
    stored: bool = False

    def takes(self, name: str) -> bool:
        return name in inspect.signature(self.loss).parameters

    def reads(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Of tensors by name, those that the loss has a parameter for."""
        return {name: x for name, x in tensors.items() if self.takes(name)}

    @property
    def settings(self) -> tuple[str, ...]:
        """What a user may set: keyword-only parameters but those that trainers fill in."""
        parameters = inspect.signature(self.loss).parameters.values()
        filled = ("ref_logps", "group_size", "offsets")
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in filled)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The hyperparameters that decide (alpha, beta)."""
        return tuple(self.reads(inspect.signature(self.family).parameters))

    def alpha_beta(self, given: Mapping[str, Any]) -> AlphaBeta:
        """(alpha, beta) of the hyperparameters given, the others at the loss's defaults."""
        parameters = inspect.signature(self.loss).parameters
        known = {name: given.get(name, parameters[name].default) for name in self.numbers}
        return self.family(**{name: x for name, x in known.items() if x is not inspect.Parameter.empty})


# A new method is one row here. Losses left out, and why: tests/test_integration_methods.py.
METHODS = (
    Method("dpo", PAIRS, qf.dpo_loss, AlphaBeta.of_kl),
    Method("spl", PAIRS, qf.spl_pair_loss, AlphaBeta),
    Method("hdpo", PAIRS, qf.hdpo_loss, AlphaBeta.of_hdpo),
    Method("qempo", PAIRS, qf.qempo_pair_loss, AlphaBeta.of_qempo),
    Method("qempo_kl", PAIRS, qf.qempo_kl_pair_loss, AlphaBeta.of_qempo),
    Method("epa", PAIRS, qf.epa_loss, AlphaBeta.of_kl),
    Method("qempo", GROUPS, qf.qempo_loss, AlphaBeta.of_qempo, stored=True),
    Method("qempo_kl", GROUPS, qf.qempo_kl_loss, AlphaBeta.of_qempo, stored=True),
    Method("spl", GROUPS, qf.spl_loss, AlphaBeta, stored=True),
    Method("gvpo", GROUPS, qf.gvpo_loss, AlphaBeta.of_kl, stored=True),
    Method("rspo", GROUPS, qf.rspo_loss),
    Method("dqo", GROUPS, qf.dqo_loss, AlphaBeta.of_kl),
)


def by_name(data: str) -> dict[str, Method]:
    return {method.name: method for method in METHODS if method.data == data}


def group_advantages(
    loss: str,
    ids: torch.Tensor,
    logps: torch.Tensor,
    rewards: torch.Tensor,
    *,
    ref_logps: torch.Tensor | None = None,
    embeddings: torch.Tensor | None = None,
    **hyperparameters: Any,
) -> torch.Tensor:
    """(S,) A_i = -S dL/dl_i: the gradient of -mean_i A_i l_i is then the group loss's own (derived: the chain rule)."""
    methods = by_name(GROUPS)
    _check.choice("loss", loss, tuple(methods))
    method = methods[loss]
    if embeddings is None and method.takes("embeddings"):
        _check.bad_value("embeddings", f"one row for each response with loss={loss!r}", None)
    order = torch.argsort(ids, stable=True)
    counts = torch.unique_consecutive(ids[order], return_counts=True)[1]
    rows = {"ref_logps": ref_logps, "rewards": rewards, "embeddings": embeddings}
    sorted_rows = {name: None if x is None else x[order] for name, x in rows.items()}
    # Offsets, since a trainer's filters leave groups of several sizes.
    groups = method.reads(sorted_rows | {"offsets": torch.nn.functional.pad(counts.cumsum(0), (1, 0))})
    _, coef = qf.coefficients(method.loss, logps[order], **groups, **hyperparameters)
    assert isinstance(coef, torch.Tensor)
    return torch.empty_like(coef).index_copy_(0, order, -len(coef) * coef)
