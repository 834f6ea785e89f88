"""The operators that graphs hold, called with arguments that no public function has looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qempo_fast._backends import OPS

from . import functions
from .functions import Draw, Function

_EXTRA: dict[str, dict[str, Any]] = {
    "pair_loss": {"alpha": 0.5, "beta": 0.2},
    "group_loss": {"alpha": 0.5, "beta": 0.2, "baseline": "loo", "bonus": None},
    "variance_loss": {"alpha": 0.5, "beta": 0.2},
    "rspo_loss": {"k": 2, "baseline": "loo"},
}
_LIKE = {
    "pair_loss": functions._pairs("ref_chosen", "ref_rejected"),
    "epa_loss": functions.epa_loss,
    "poft_loss": functions.poft_loss,
    "group_loss": functions._groups("logps", "ref_logps", "rewards"),
    "variance_loss": functions._groups("logps", "ref_logps", "rewards"),
    "rspo_loss": functions._groups("logps", "rewards"),
    "token_loss": functions.grpo_loss,
}


def _called(op: str) -> Callable[..., Any]:
    """The operator of arguments by name; a number that it takes as a tensor becomes one."""
    schema = getattr(torch.ops.qempo_fast, op).default._schema
    tensors = {argument.name for argument in schema.arguments if "Tensor" in str(argument.type)}

    def call(**x: Any) -> Any:
        numbers = {name for name in tensors & x.keys() if type(x[name]) in (int, float)}
        made = {name: torch.tensor(float(x[name]), dtype=torch.float64, device="cpu") for name in numbers}
        return getattr(torch.ops.qempo_fast, op)(**{**x, **made})

    return call


def _loss(op: str) -> Function:
    """Tensors of one dtype, float32 or float64, as the losses hand them on."""

    def make(seed: int) -> dict[str, Any]:
        x = {**_LIKE[op](seed), **_EXTRA.get(op, {}), "backend": "cpu"}
        if op == "token_loss":
            x |= {
                "kl": x.get("kl", 0.0),
                "ref_token_logps": x.get("ref_token_logps"),
                "eps_low": 0.2,
                "surrogate": "clip",
            }
            x["normalize"] = {"sequence": 0, "token": -1}.get(x["normalize"], x["normalize"])
        elif "logps" in x and op != "poft_loss":
            x = {"group_size": None, "offsets": None, **x}
        like = next(v for v in x.values() if isinstance(v, torch.Tensor) and v.is_floating_point())
        wide = torch.promote_types(like.dtype, torch.float32)
        floats = {k for k, v in x.items() if isinstance(v, torch.Tensor) and (v.is_floating_point() or k == "lengths")}
        return {k: v.to(wide) if k in floats else v for k, v in x.items()}

    reference = OPS[op].reference
    assert reference is not None

    def truth(**x: Any) -> Any:
        if op == "token_loss":
            x["normalize"] = {0: "sequence", -1: "token"}.get(x["normalize"], x["normalize"])
        return reference(**x)

    call = _called(op)
    policy = tuple(make(0))[: OPS[op].policy]
    if op != "epa_loss" and op != "pair_loss":
        policy = ("token_logps",) if op == "token_loss" else ("logps",)
    return Function(make, lambda **x: call(**x)[0], truth, policy, operator=True, weight=2)


def _made(make: Callable[[int], dict[str, Any]], *drop: str, **more: Any) -> Callable[[int], dict[str, Any]]:
    def made(seed: int) -> dict[str, Any]:
        x = {**more, **make(seed)}
        return {name: v for name, v in x.items() if name not in drop}

    return made


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _linear(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    n, width, vocabulary = d.size(), d.size(1, 12), d.of(1, 7, 33, 200)
    x: dict[str, Any] = {"hidden": d.floats(n, width), "weight": d.floats(vocabulary, width)}
    x |= {"bias": d.of(None, d.floats(vocabulary)), "targets": d.ints(0, vocabulary, n).long()}
    x |= {"inv_temperature": d.of(None, d.floats(n, dtype=_wide(d.dtype)).abs() + 0.5)}
    x |= {"seed": torch.tensor(7, device="cpu"), "ignore_index": -100, "logit_scale": 1.0, "softcap": d.of(None, 3.0)}
    x |= {
        "entropy": d.of(True, False),
        "sum_sq": False,
        "tau": d.of(None, 0.05),
        "error": None,
        "slopes": d.of(True, False),
        "wide": d.dtype.itemsize == 2 and d.of(True, False),
        "fixed": d.of(True, False, False),
        "chunk": 1024,
        "backend": "cpu",
    }
    return {**x, "slopes": x["slopes"] and x["tau"] is None}


def _logits(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    n, vocabulary = d.size(), d.of(1, 7, 33, 200)
    x: dict[str, Any] = {"logits": d.floats(n, vocabulary), "targets": d.ints(0, vocabulary, n).long()}
    x |= {"inv_temperature": d.of(None, d.floats(n, dtype=_wide(d.dtype)).abs() + 0.5)}
    return {**x, "ignore_index": -100, "entropy": d.of(True, False), "backend": "cpu"}


def _support(seed: int) -> dict[str, Any]:
    x = _linear(seed)
    drop = ("seed", "tau", "error", "slopes", "fixed", "chunk")
    sets = functions._support(Draw(seed), x["targets"], len(x["weight"]))
    return {**{name: v for name, v in x.items() if name not in drop}, **sets}


def _backward_support(seed: int) -> dict[str, Any]:
    x = _support(seed)
    kept = _called("support_logps_fwd")(**{**x, "entropy": True})
    grad = Draw(seed).floats(len(x["hidden"]), dtype=kept[3].dtype)
    x = {name: v for name, v in x.items() if name not in ("entropy", "sum_sq", "wide")}
    x |= {"grad": grad, "grad_entropy": None, "lse": kept[3], "entropy": kept[1], "z": kept[5]}
    return {**x, "needs": [True, True, x["bias"] is not None]}


def _support_logits(seed: int) -> dict[str, Any]:
    x = _logits(seed)
    return {**x, **functions._support(Draw(seed), x["targets"], x["logits"].shape[1])}


def _backward_support_logits(seed: int) -> dict[str, Any]:
    x = _support_logits(seed)
    _, entropy, lse, _ = _called("support_from_logits_fwd")(**{**x, "entropy": True})
    del x["entropy"]
    grad = Draw(seed).floats(len(x["logits"]), dtype=lse.dtype)
    return {**x, "grad": grad, "grad_entropy": None, "lse": lse, "entropy": entropy}


def _backward_linear(seed: int) -> dict[str, Any]:
    x = _linear(seed)
    slopes = x["slopes"]
    for name in ("seed", "entropy", "sum_sq", "slopes", "chunk"):
        del x[name]
    n, d = x["hidden"].shape[0], Draw(seed)
    wide = _wide(d.dtype)
    scales = torch.ones(0 if x["tau"] is None else 1, len(x["weight"]), dtype=wide, device="cpu")
    kept = _called("linear_logps_fwd")(**_linear(seed))
    x |= {"grad": d.floats(n, dtype=wide), "grad_entropy": None, "lse": kept[3], "entropy": kept[1], "scales": scales}
    x |= {"order": kept[5], "values": kept[6], "size": kept[7]}
    return {**x, "needs": [True, False, False] if slopes else [True, True, x["bias"] is not None]}


def _columns(seed: int) -> dict[str, Any]:
    x, d = _linear(seed), Draw(seed + 1)
    ids = d.ints(0, len(x["weight"]), len(x["hidden"]), d.size(1, 3)).long()
    return {"hidden": x["hidden"], "weight": x["weight"], "ids": ids, "wide": x["wide"], "backend": "cpu"}


def _backward_columns(seed: int) -> dict[str, Any]:
    x = _columns(seed)
    grad = Draw(seed).floats(*x["ids"].shape, dtype=_wide(x["hidden"].dtype))
    del x["wide"]
    return {**x, "grad": grad, "need_hidden": True, "need_weight": True}


def _weighted(seed: int) -> dict[str, Any]:
    x, d = _linear(seed), Draw(seed + 1)
    for name in ("sum_sq", "slopes", "fixed", "chunk"):
        del x[name]
    n, wide = len(x["hidden"]), _wide(x["hidden"].dtype)
    x |= {"coef": d.floats(n, dtype=wide), "coef_entropy": d.of(None, d.floats(n, dtype=wide))}
    return {**x, "need_hidden": True, "need_weight": d.of(True, False), "need_bias": x["bias"] is not None}


def _backward_logits(seed: int) -> dict[str, Any]:
    x = _logits(seed)
    _, entropy, lse = _called("logps_from_logits_fwd")(**{**x, "entropy": True})
    del x["entropy"]
    grad = Draw(seed).floats(len(x["logits"]), dtype=lse.dtype)
    return {**x, "grad": grad, "grad_entropy": None, "lse": lse, "entropy": entropy}


def _backward_dpp(seed: int) -> dict[str, Any]:
    x = _DPP(seed)
    logdet, gains, _ = _called("dpp_fwd")(**x)
    return {"grad_logdet": torch.ones_like(logdet), "grad_gains": torch.ones_like(gains), **x}


def _renamed(make: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    def made(seed: int) -> dict[str, Any]:
        x = make(seed)
        return {"x": x.pop("embeddings"), "log_quality": None, "offsets": None, **x, "backend": "cpu"}

    return made


_DPP = _renamed(functions.dpp_gains)
_SELECT = _renamed(functions.dpp_select)
OTHERS: dict[str, Callable[[int], dict[str, Any]]] = {
    "linear_logps_fwd": _linear,
    "linear_logps_bwd": _backward_linear,
    "weighted_logps": _weighted,
    "column_products_fwd": _columns,
    "column_products_bwd": _backward_columns,
    "logps_from_logits_fwd": _logits,
    "logps_from_logits_bwd": _backward_logits,
    "support_logps_fwd": _support,
    "support_logps_bwd": _backward_support,
    "support_from_logits_fwd": _support_logits,
    "support_from_logits_bwd": _backward_support_logits,
    "segment_sum": _made(functions.segment_sum, backend="reference"),
    "dpp_fwd": _DPP,
    "dpp_bwd": _backward_dpp,
    "dpp_select": _SELECT,
}
OPERATORS = {f"ops.{op}": _loss(op) for op in _LIKE}
# Compared with themselves on plain copies: their values are those of the public functions.
OPERATORS |= {f"ops.{op}": Function(make, _called(op), None, operator=True, weight=2) for op, make in OTHERS.items()}
CALLED = functions.FUNCTIONS | OPERATORS
