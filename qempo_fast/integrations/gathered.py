"""The gradient of a head that was gathered from a sharded DTensor outside of its FSDP unit's forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def averaged(x: torch.Tensor) -> torch.Tensor:
    """x; where it is the full_tensor() of a sharded parameter, with its gradient averaged over the mesh.

    Derived: FSDP2 averages gradients in the unit that gathers the parameter. TRL reads a head that is a unit of its own
    by full_tensor(), whose backward cuts this rank's rows out of this rank's gradient, so the tokens of all other ranks
    are lost on them. The mean of all first makes that cut right. Where the ranks have the same tokens (tensor
    parallel), or full_tensor() was told Partial(), the mean changes nothing.
    """
    leaf = _sharded_leaf(x)
    if leaf is None:
        return x
    out: torch.Tensor = _Averaged.apply(x, leaf.device_mesh)
    return out


def _sharded_leaf(x: torch.Tensor) -> Any:
    """The DTensor parameter that x, a plain tensor, was made of alone; else None."""
    # By attribute: torch.distributed.tensor takes 0.5 s to import. Tracing has no graph to walk.
    if torch.compiler.is_compiling() or hasattr(x, "full_tensor"):
        return None
    node: Any = x.grad_fn
    while node is not None and not hasattr(node, "variable"):
        before = [n for n, _ in node.next_functions if n is not None]
        node = before[0] if len(before) == 1 else None
    leaf = getattr(node, "variable", None)
    return leaf if hasattr(leaf, "full_tensor") else None


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: Any) -> torch.Tensor:  # type: ignore[override]
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        mean = grad / ctx.mesh.size()
        for dim in range(ctx.mesh.ndim):
            dist.all_reduce(mean, group=ctx.mesh.get_group(dim))
        return mean, None
