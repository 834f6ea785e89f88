"""Whether what a call did is right."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import changes, kinds, modes
from .functions import FLOATS, Function
from .modes import MODES, Results
from .operators import CALLED
from .spec import Spec

# More than tests/tolerances.py allows: a wrong stride is off by the numbers themselves, and of a million comparisons
# some are unlucky by any rule that leaves no room.
PLAIN, FLOOR = 8.0, 256.0
# An error names the argument first: "weight: wanted (any, 3), got (4, 3)".
_NAMED = re.compile(r"^[A-Za-z_][\w.\[\], ]*: (wanted|another)")
GOOD = ("right", "returned", "refused", "foreign")


# An operator takes as many numbers, whatever their shape, and torch makes an int of a tensor.
_UNCOMPARED = changes.SHAPES.keys() | changes.NUMBERS.keys() | changes.WORDS.keys()


@dataclass(frozen=True)
class Verdict:
    """kind is one of GOOD, or a fault: wrong, opaque, accepted, unwilling, modified."""

    kind: str
    detail: str = ""


class _Call:
    """The arguments of a spec: as given, as plain copies, and how they have to end."""

    def __init__(self, spec: Spec) -> None:
        self.function: Function = CALLED[spec.function]
        given = self.function.make(spec.seed)
        plain = dict(given)
        self.good = MODES[spec.mode].good and not self.function.operator
        self.refused = False
        for name, change in spec.changes:
            given[name], like = changes.apply(change, given[name], spec.seed)
            if name == "temperature" and change == "number":
                like = given[name]
            self.good &= changes.ALL[change].good
            if like is changes.REFUSED:
                # A reference that no coefficient asks for is not looked at.
                self.refused = not self.function.loose and not name.startswith("ref_")
                if self.function.loose:
                    plain[name] = given[name]
            else:
                plain[name] = like
        self.given, self.plain = given, plain


def _memory(arguments: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every byte of the storages of the arguments, and copies."""
    found = []
    for x in arguments.values():
        if type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided and x.device.type == "cpu":
            if x.is_quantized or torch._is_functional_tensor(x) or not x.untyped_storage().data_ptr():
                continue
            whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(x.detach().untyped_storage())
            found.append((whole, whole.clone()))
    return found


def judge(spec: Spec) -> Verdict:
    try:
        call = _Call(spec)
    except Exception as error:
        # Torch cannot make this kind of this tensor.
        return Verdict("foreign", f"not made: {error}"[:200])
    before = _memory(call.given)
    torch.manual_seed(spec.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            results = MODES[spec.mode].run(call.function, call.given)
        except Exception as error:
            verdict = _of_error(call, spec, error)
        else:
            verdict = _of_results(call, spec, results)
    if verdict.kind in GOOD and any(not torch.equal(now, then) for now, then in before):
        return Verdict("modified", "an argument's memory was written")
    return verdict


def _foreign(spec: Spec) -> str:
    """What torch itself may say of this call."""
    names = [change for _, change in spec.changes if change in kinds.KINDS]
    found = [MODES[spec.mode].foreign, *(kinds.KINDS[name].foreign for name in names)]
    return "|".join(words for words in found if words) or "$^"


def _of_error(call: _Call, spec: Spec, error: Exception) -> Verdict:
    said = f"{type(error).__name__}: {str(error).strip()}"[:400]
    if isinstance(error, (TypeError, ValueError)) and _NAMED.match(str(error)):
        return Verdict("unwilling", said) if call.good else Verdict("refused")
    if isinstance(error, modes.NotMade) or re.search(_foreign(spec), said):
        return Verdict("foreign", said)
    # A graph holds an operator with what a public function has looked at: it must not crash, but owes no names.
    if call.function.operator:
        return Verdict("foreign", said)
    return Verdict("unwilling" if call.good else "opaque", said)


def _of_results(call: _Call, spec: Spec, results: Results) -> Verdict:
    if call.function.operator and any(change == "meta" for _, change in spec.changes):
        return Verdict("foreign", "torch's dispatcher takes one meta tensor for a call on meta")
    if call.function.operator and any(c in _UNCOMPARED for _, c in spec.changes):
        return Verdict("returned")
    if call.refused and not call.function.operator:
        return Verdict("accepted", "something that no plain tensor stands for")
    if any(map(_valueless, results.values)):
        return _same_shapes(call, spec, results)
    try:
        truth = _truth(call, spec, results)
    except Exception as error:
        if call.function.reference is None and spec.mode == "dispatch_mode":
            return Verdict("returned")  # a mode may be a tracer's: values are not read under one
        return Verdict("accepted", f"what plain torch refuses: {type(error).__name__}: {error}"[:300])
    if len(results.values) != len(truth.values):
        return Verdict("wrong", f"{len(results.values)} results, wanted {len(truth.values)}")
    # Plain torch's own error is asked for only where a fixed bound does not do: it takes as long as the call.
    plain: Results | None = None
    for name, out, true, eps in _pairs(call, spec, results, truth):
        if not _differs(out, true, true, eps):
            continue
        like = true
        if call.function.reference is not None:
            plain = plain or _plainly(call, spec, results)
            like = _named(plain, name, true)
            if name.startswith("gradient"):
                like, true = _independent(call, name, out, like, true)
        if wrong := _differs(out, like, true, eps):
            return Verdict("wrong", f"{name}: {wrong}")
    return Verdict("right" if results.values else "returned")


def _valueless(x: torch.Tensor) -> bool:
    """Whether x is fake or on meta, under functionalisation's wrapper too, whose type is the plain one."""
    inner = torch._from_functional_tensor(x) if torch._is_functional_tensor(x) else x
    return inner.device.type == "meta" or type(inner).__name__ == "FakeTensor"


def _same_shapes(call: _Call, spec: Spec, results: Results) -> Verdict:
    """Of results without values: their shapes and dtypes."""
    if not call.good and spec.mode not in ("all_meta", "fake_mode"):
        return Verdict("returned")
    try:
        want = modes.called(call.function, _fresh(call.plain), False).values
    except (TypeError, ValueError):
        return Verdict("returned")  # refused for its values, which are not there to be seen
    seen, wanted = ([(tuple(x.shape), x.dtype) for x in v] for v in (results.values, want))
    return Verdict("right") if seen == wanted else Verdict("wrong", f"shapes {seen}, wanted {wanted}"[:300])


def _fresh(arguments: dict[str, Any], dtype: torch.dtype | None = None, finite: bool = False) -> dict[str, Any]:
    """Plain contiguous copies, the floating ones in dtype; finite: with a number for each NaN and infinity."""

    def fresh(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            # torch's operators take neither NumPy's numbers nor an int past 64 bits.
            x = x.item() if isinstance(x, np.generic) else x.decode() if isinstance(x, bytes) else x
            return float(x) if type(x) is int and abs(x) >= 2**63 else x
        x = x.detach().clone(memory_format=torch.contiguous_format)
        if dtype is None or not x.is_floating_point():
            return x
        return x.to(dtype).nan_to_num_(0.37, 1e15, -1e15) if finite else x.to(dtype)

    return {name: fresh(x) for name, x in arguments.items()}


def _computed_in(call: _Call) -> torch.dtype:
    """The dtype of plain torch's own computation: the policy's, half precision widened where the library does."""
    floats = [x.dtype for x in call.plain.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    mine = [call.plain[n].dtype for n in call.function.policy if isinstance(call.plain.get(n), torch.Tensor)]
    dtype = (mine or floats or [torch.float32])[0]
    for other in mine[1:] if call.function.wide else ():
        dtype = torch.promote_types(dtype, other)
    return torch.float32 if call.function.wide and dtype != torch.float64 else dtype


def _truth(call: _Call, spec: Spec, results: Results) -> Results:
    """In float64 by the definition, or the call itself on plain tensors."""
    differentiate = bool(results.grads) and not _sampled(call)
    if call.function.reference is None:
        torch.manual_seed(spec.seed)
        return modes.called(call.function, _fresh(call.plain), differentiate)
    return modes.called(call.function.defined(), _fresh(call.plain, torch.float64), differentiate)


def _independent(call: _Call, name: str, out: torch.Tensor, *found: torch.Tensor) -> list[torch.Tensor]:
    """found, and where out has a number for its NaN what is right where that number depends on nothing that is not one.

    Plain torch multiplies by 0 what a row without a coefficient, or a token outside of a set, holds, and 0 times it is
    NaN; a kernel that never reads it has the number that any other there gives.
    """
    free = [x.isnan() & out.isfinite() for x in found]
    if not any(bool(where.any()) for where in free):
        return list(found)
    results = modes.called(call.function.defined(), _fresh(call.plain, torch.float64, finite=True))
    right = results.grads[name.removeprefix("gradient ")]
    return [x.where(~where, right.to(x.dtype)) for x, where in zip(found, free, strict=True)]


def _plainly(call: _Call, spec: Spec, results: Results) -> Results:
    """By the definition, in the dtype that plain torch would take."""
    # Under autocast the head's logits are rounded to bfloat16 in both.
    run = MODES["autocast"].run if spec.mode == "autocast" and not call.function.wide else modes.called
    return run(call.function.defined(), _fresh(call.plain, _computed_in(call)))


def _named(results: Results, name: str, default: torch.Tensor) -> torch.Tensor:
    kind, _, which = name.partition(" ")
    return results.values[int(which)] if kind == "value" else results.grads.get(which, default)


def _pairs(call: _Call, spec: Spec, results: Results, truth: Results) -> Iterator[tuple[str, Any, Any, float]]:
    """(name, out, truth, eps) of every value and gradient."""
    function = call.function
    eps = torch.finfo(torch.bfloat16 if spec.mode == "autocast" and not function.wide else _computed_in(call)).eps
    # The coarsest of what goes in and comes out decides: half-precision embeddings have float32 gains.
    floats = [x.dtype for x in (*call.plain.values(), *results.values) if _floating(x)]
    eps = max([eps, *(torch.finfo(torch.promote_types(x, torch.float32)).eps for x in floats)])
    if any(change == "is_array" for _, change in spec.changes):  # a NumPy float32
        eps = max(eps, torch.finfo(torch.float32).eps)
    for i, (out, true) in enumerate(zip(results.values, truth.values, strict=True)):
        yield f"value {i}", out, true, eps
    for name in results.grads.keys() & truth.grads.keys():
        out, true = results.grads[name], truth.grads[name]
        # As the leaf's dtype holds it: a gradient past 65504 is infinite in float16.
        held = true.to(out.dtype).float()
        yield (
            f"gradient {name}",
            out,
            true.where(held.isfinite(), held.to(true.dtype)),
            max(eps, torch.finfo(out.dtype).eps),
        )


def _floating(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype in FLOATS


def _sampled(call: _Call) -> bool:
    """Whether the gradient may be an estimate."""
    x = call.plain
    if "weight" not in x or "hidden" not in x or x.get("grad", "auto") == "exact":
        return False
    return bool(x.get("grad") == "sampled" or x.get("tau") is not None)


def _differs(out: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, eps: float) -> str:
    """What is wrong, or nothing."""
    if out.shape != truth.shape:
        return f"shape {tuple(out.shape)}, wanted {tuple(truth.shape)}"
    if not truth.numel():
        return ""
    plain = plain.to(out.dtype)  # infinite where a gradient is in float16
    out, plain, truth = (x.detach().as_subclass(torch.Tensor).double() for x in (out, plain, truth))
    if out.dtype == truth.dtype and torch.equal(out, truth):
        return ""
    # A gradient of exactly 0 is right where a row does not count, and plain torch has 0 times NaN.
    if bool((truth.isnan() & plain.isnan() & out.isfinite() & (out != 0)).any()):
        return f"a number where plain torch has NaN: {out.flatten()[:6].tolist()}"
    sure = truth.isfinite() & plain.isfinite()
    if bool((sure & ~out.isfinite()).any()):
        return f"{out.flatten()[:6].tolist()}, wanted {truth.flatten()[:6].tolist()}"
    if not bool(sure.any()):
        return ""
    out, plain, truth = out[sure], plain[sure], truth[sure]
    error = (out - truth).abs().max().item()
    allowed = PLAIN * (plain - truth).abs().max().item() + max(FLOOR * eps, 1e-10) * max(truth.abs().max().item(), 1.0)
    return f"error {error:.3g}, allowed {allowed:.3g}" if error > allowed else ""
