"""A call of a function that scores hidden states: its arguments checked, flattened, and where it then runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributed import ProcessGroup

from .. import _backends, _check
from . import _inputs, _sharded
from ._options import ERROR, Options, accumulator

_Result = TypeVar("_Result")


class Call(NamedTuple):
    """hidden (N, D), targets (N,) int64; name of the backend."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    inv_temperature: torch.Tensor | None
    ignore_index: int
    options: Options
    name: str

    def run(self, traced: Callable[[Call], _Result], eager: Callable[[Call], _Result]) -> _Result:
        """As an operator of torch's library where a graph is made, else as an autograd function."""
        group = self.options.group
        if group is not None and torch.compiler.is_compiling():
            # Collectives and the sizes of the shards stay out of the graph: it breaks here, or fullgraph=True says so.
            return torch.compiler.disable(eager)(self)  # type: ignore[no-any-return]
        return traced(self) if group is None and _check.traced(self.hidden) else eager(self)


class Scored(NamedTuple):
    """(N,) each, what was not asked for None; lse (N, 2) as RowStats has it, without a graph. place: this shard's first
    column, and all shards' columns.
    """

    logps: torch.Tensor
    entropy: torch.Tensor | None
    sum_sq: torch.Tensor | None
    lse: torch.Tensor | None
    place: tuple[int, int]


def prepared(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float | torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    entropy: bool,
    sum_sq: bool,
    grad: str,
    tau: float | None,
    process_group: ProcessGroup | None,
    logits_dtype: torch.dtype | None,
    batch_invariant: bool,
    backend: str | None,
    also: Callable[[], None] = lambda: None,
) -> Call:
    """Arguments as linear_logps has them; `also` checks what else a function has, after them."""
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
        also()
    cap = None if softcap is None else float(softcap)
    options = Options(
        float(logit_scale), cap, entropy, sum_sq, None, 0, process_group, wide=wide, fixed=batch_invariant
    )
    if wants_gradient(hidden, weight, bias):
        if tau is not None:
            options = replace(options, tau=float(tau))
        elif grad == "sampled":
            options = replace(options, error=ERROR[weight.dtype])
    flat, rows = targets.reshape(-1).long(), hidden.reshape(-1, hidden.shape[-1])
    return Call(rows, weight, bias, flat, inv_temperature, ignore_index, options, name)


def seed() -> torch.Tensor:
    """From torch's generator: torch.manual_seed repeats a step, and activation checkpointing, which restores the
    generator, sees the same columns when it recomputes.
    """
    return torch.randint(2**62, (), dtype=torch.int64, device="cpu")


def _mapped() -> bool:
    """Whether the innermost transform is vmap."""
    level = torch._C._functorch.peek_interpreter_stack()
    return level is not None and level.key() == torch._C._functorch.TransformType.Vmap


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    # Within torch.func.grad Dynamo says of a view of its argument that it wants none, and vmap of its own tensors.
    within = torch._C._are_functorch_transforms_active() and (torch.compiler.is_compiling() or _mapped())
    return torch.is_grad_enabled() and any(x is not None and (within or x.requires_grad) for x in tensors)


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
    for name, x in zip(("hidden", "weight", "bias"), tensors, strict=False):
        _check.plain(name, x)  # other kinds of tensor know no cast
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
