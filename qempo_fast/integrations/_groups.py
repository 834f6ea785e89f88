"""Group losses by name, and as one advantage per response where a policy loss is minus advantage times log-prob."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

import qempo_fast as qf

from .. import _check


class Rows(NamedTuple):
    """What group losses read besides log-probs: (S,) each, embeddings (S, d); layout: group_size or offsets."""

    ref_logps: torch.Tensor | None
    rewards: torch.Tensor
    embeddings: torch.Tensor | None
    layout: Mapping[str, Any]


# loss(logps, rows, **kw): logps (S,).
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "qempo": lambda x, g, **kw: qf.qempo_loss(x, g.rewards, **g.layout, **kw),
    "qempo_kl": lambda x, g, **kw: qf.qempo_kl_loss(x, g.ref_logps, g.rewards, **g.layout, **kw),
    "spl": lambda x, g, **kw: qf.spl_loss(x, g.ref_logps, g.rewards, **g.layout, **kw),
    "gvpo": lambda x, g, **kw: qf.gvpo_loss(x, g.ref_logps, g.rewards, **g.layout, **kw),
    "rspo": lambda x, g, **kw: qf.rspo_loss(x, g.rewards, **g.layout, **kw),
    "dqo": lambda x, g, **kw: qf.dqo_loss(x, g.rewards, g.embeddings, ref_logps=g.ref_logps, **g.layout, **kw),
}


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
    _check.choice("loss", loss, tuple(LOSSES))
    if loss == "dqo" and embeddings is None:
        _check.bad_value("embeddings", "one row for each response with loss='dqo'", None)
    order = torch.argsort(ids, stable=True)
    counts = torch.unique_consecutive(ids[order], return_counts=True)[1]
    # Offsets, since a trainer's filters leave groups of several sizes.
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    ref, rows = (None if x is None else x[order] for x in (ref_logps, embeddings))
    groups = Rows(ref, rewards[order], rows, {"offsets": offsets})
    _, coef = qf.coefficients(LOSSES[loss], logps[order], groups, **hyperparameters)
    assert isinstance(coef, torch.Tensor)
    return torch.empty_like(coef).index_copy_(0, order, -len(coef) * coef)
