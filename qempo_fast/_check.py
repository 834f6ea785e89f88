"""Argument checks, made once in the public functions and before any launch.

Every message reads ``name: wanted <what>, got <what>``.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from . import _C

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)
_WIDE = (torch.float32, torch.float64)
_INT64 = 2**63
# Offsets that Python compares faster than torch does.
_FEW = 256


# What os.environ keeps. It says that a name is not set by raising and catching two errors, 0.7 microseconds a look, and
# a loss looks twice; the dictionary answers in 0.1.
_ENVIRONMENT: dict[Any, Any] | None = getattr(os.environ, "_data", None)
_NAMES = {name: os.environ.encodekey(name) for name in ("QEMPO_BACKEND", "QEMPO_CHECK")}  # type: ignore[attr-defined]


def environment(name: str) -> str | None:
    """The environment's variable now, or None."""
    if _ENVIRONMENT is None or _NAMES[name] in _ENVIRONMENT:
        return os.environ.get(name)
    return None


def bad_value(name: str, wanted: str, got: object) -> NoReturn:
    raise ValueError(f"{name}: wanted {wanted}, got {got}")


def bad_type(name: str, wanted: str, got: object) -> NoReturn:
    raise TypeError(f"{name}: wanted {wanted}, got {got}")


def traced(x: Any = None) -> bool:
    """Whether this call has to go through torch's dispatcher, as an operator that whoever looks on can see.

    torch.compile and torch.jit trace it, functorch or a dispatch mode wants to transform it (FakeTensorMode, make_fx,
    a FLOP counter), forward-mode AD runs, or x is a fake or functional tensor, or on the meta device. Native code would
    give a constant, or read memory that is not there.
    """
    if _compiling():
        return True
    if _modes() or _transforms() or _jit() is not None or forward_ad._current_level >= 0:
        return True
    return x is not None and ((type(x) is not _Tensor and _is_fake(x)) or x.is_meta)


def transformed() -> bool:
    """Whether functorch (torch.func) or forward-mode AD runs."""
    return not torch.compiler.is_compiling() and (_transforms() or forward_ad._current_level >= 0)


_Tensor = torch.Tensor
_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_jit = torch._C._get_tracing_state


def _is_fake(x: Any) -> bool:
    # By attribute: to import the classes takes longer than a call, and who has such a tensor has imported them.
    return hasattr(x, "fake_mode") or hasattr(x, "from_functional")


def readable(x: torch.Tensor) -> bool:
    """Whether the values of x may be read: free on CPU, a synchronisation elsewhere (QEMPO_CHECK=1).

    Never while the call is traced: reading a value would break the graph. Ops check again where the graph runs.
    """
    return not traced(x) and may_read(x)


def _knows_autocast(device_type: str) -> bool:
    return bool(torch.amp.is_autocast_available(device_type))


# What torch.compiler.assume_constant_result sets; the decorator itself imports Dynamo. Up to torch 2.11 Dynamo cannot
# trace the question, and no log-prob was one graph there.
_knows_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for this kind of device; some, such as meta, know none."""
    return _knows_autocast(device_type) and torch.is_autocast_enabled(device_type)


def own_dtypes(device_type: str) -> AbstractContextManager[Any]:
    """Operators in the dtypes of their arguments, whatever autocast runs: it knows no torch.cat of float64, and in a
    backward pass it is not the forward's.
    """
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()


def may_read(x: torch.Tensor) -> bool:
    """readable() where nothing is traced."""
    return x.device.type == "cpu" or environment("QEMPO_CHECK") == "1"


def tensor(
    name: str,
    x: Any,
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    ndim: int | None = None,
    shape: tuple[int, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Check type, layout, dtype, rank, shape (-1 matches any size) and device of one tensor."""
    # Nearly every call: one look from C++ for all that follows, 0.2 microseconds instead of 1.2.
    if not _compiling() and _C.fits(x, dtypes, ndim, shape) and (device is None or x.device == device):
        return
    if type(x) is not _Tensor or x.layout is not torch.strided or x.is_nested:
        plain(name, x)
    elif not torch.compiler.is_compiling() and _freed(x):
        bad_value(name, "a tensor with memory of its own", "one that has none, or whose storage was freed")
    if x.dtype not in dtypes:
        bad_type(name, " or ".join(str(d).removeprefix("torch.") for d in dtypes), x.dtype)
    if ndim is not None and x.ndim != ndim:
        bad_value(name, f"{ndim} dimensions", f"shape {tuple(x.shape)}")
    if (
        shape is not None
        and x.shape != shape
        and (x.ndim != len(shape) or any(w not in (-1, s) for w, s in zip(shape, x.shape, strict=True)))
    ):
        wanted = "(" + ", ".join("any" if w == -1 else str(w) for w in shape) + ")"
        bad_value(name, f"shape {wanted}", tuple(x.shape))
    if device is not None and x.device != device:
        bad_value(name, f"a tensor on {device}", f"one on {x.device}")


def alike(tensors: tuple[Any, ...], *, vectors: bool = False) -> bool:
    """Whether all are plain tensors of one device and one of float32 and float64; None may stand behind the first.

    vectors: and of one dimension and one length. Nearly every loss, seen from C++ in half a microsecond, where checks
    by name and casts take five. False may also mean that it cannot be said from there: those say it.
    """
    return not _compiling() and _C.alike(tensors, _WIDE, vectors)


def finite(name: str, x: torch.Tensor) -> None:
    if not x.numel() or not readable(x):
        return
    if _freed(x):
        bad_value(name, "finite values", "a tensor whose storage was freed")
    # One pass, no temporary: on 100 MB this takes 4 ms, isfinite().all() 110. NaN passes through to both ends.
    if not all(math.isfinite(end) for end in torch.aminmax(x.detach())):
        bad_value(name, "finite values", f"{int((~torch.isfinite(x)).sum())} NaN or infinite")


def number(
    name: str,
    x: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Check a finite Python number inside [low, high], or with an end left out where open."""
    if type(x) is not float:
        _real(name, x)
    inside = (x > low if open_low else x >= low) and (x < high if open_high else x <= high)
    # Not math.isfinite, which torch.compile cannot trace on a number that changes from call to call.
    if not (inside and -math.inf < x < math.inf):
        ends = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        bad_value(name, f"a finite number in {ends}", x)


def _real(name: str, x: Any) -> None:
    """A number of Python's, of NumPy's, or of torch.compile's."""
    if isinstance(x, bool) or not isinstance(x, (int, float, numbers.Real)):
        bad_type(name, "a number", type(x).__name__)
    # torch's operators and C++ take no longer one: "int too big to convert".
    if isinstance(x, int) and not -_INT64 <= x < _INT64:
        bad_value(name, "a float, or an int of 64 bits", x)


def positive(name: str, x: Any) -> None:
    if type(x) is not float or not 0.0 < x < math.inf:
        number(name, x, low=0.0, open_low=True)


def integer(name: str, x: Any, *, low: int, high: int | None = None) -> None:
    if type(x) is int and low <= x < _INT64 and high is None:
        return
    _integral(name, x)
    if x < low or (high is not None and x > high):
        bad_value(name, f"an int of at least {low}" + (f" and at most {high}" if high is not None else ""), x)
    if x >= _INT64:
        bad_value(name, "an int of 64 bits", x)


def _integral(name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, numbers.Integral)):
        bad_type(name, "an int", type(x).__name__)


def boolean(name: str, x: Any) -> None:
    if not isinstance(x, bool):
        bad_type(name, "a bool", type(x).__name__)


def choice(name: str, x: Any, options: Sequence[str]) -> None:
    # An array is compared entry by entry, and has no truth.
    if not isinstance(x, str) or x not in options:
        bad_value(name, " or ".join(repr(o) for o in options), repr(x))


def gradient(grad: Any, tau: Any) -> None:
    """Check linear_logps' choice of gradient."""
    choice("grad", grad, ("auto", "exact", "sampled"))
    if tau is not None:
        number("tau", tau, low=0.0, high=1.0, open_low=True)
        if grad == "exact":
            bad_value("tau", "None with grad='exact'", tau)


def offsets(name: str, x: Any, total: int, device: torch.device | None = None) -> None:
    """Check (n + 1,) int32/int64 offsets that start at 0, never fall and end at total."""
    tensor(name, x, dtypes=INTS, ndim=1, device=device)
    if x.numel() == 0:
        bad_value(name, "at least one entry, the first 0", "an empty tensor")
    if not readable(x):
        return
    # A few are read at once: 2 microseconds, where each of torch's operators takes 3.
    few = x.tolist() if x.numel() <= _FEW else None
    first, last = (few[0], few[-1]) if few else (int(x[0]), int(x[-1]))
    if first != 0 or last != total:
        bad_value(name, f"offsets from 0 to {total}", f"from {first} to {last}")
    if any(map(operator.gt, few, few[1:])) if few else bool((x[1:] < x[:-1]).any()):
        bad_value(name, "offsets that never fall", few if few and len(few) <= 16 else "a fall")


def groups(
    n: int,
    group_size: Any,
    group_offsets: Any,
    *,
    at_least: int = 1,
    k: int | None = None,
    device: torch.device | None = None,
) -> None:
    """Check that exactly one of group_size and offsets is given, covers n samples, and each group has at_least.

    k: the argument that asks for groups of at_least, where it is not the baseline.
    """
    if (group_size is None) == (group_offsets is None):
        got = "neither" if group_size is None else "both"
        bad_value("group_size", "exactly one of group_size and offsets", got)
    if group_size is not None:
        integer("group_size", group_size, low=1)
        if n % group_size:
            bad_value("group_size", f"a divisor of the {n} samples", group_size)
        smallest = group_size
    else:
        offsets("offsets", group_offsets, n, device)
        if not readable(group_offsets):
            return
        if group_offsets.numel() <= _FEW:
            at = group_offsets.tolist()
            smallest = min(map(operator.sub, at[1:], at), default=at_least)
        else:
            smallest = int((group_offsets[1:] - group_offsets[:-1]).min())
        if smallest < 1:
            bad_value("offsets", "groups of at least one sample", "an empty group")
    if smallest < at_least:
        if k is not None:
            bad_value("k", f"at most {smallest}, the smallest group", k)
        name = "group_size" if group_size is not None else "offsets"
        bad_value(name, f"groups of at least {at_least} samples for this baseline", f"a group of {smallest}")


def plain(name: str, x: Any) -> None:
    """Refuse what is no tensor, and a tensor whose values do not lie row by row in memory of its own.

    A wrapper's address is null, or that of a part: native code took a DTensor or a MaskedTensor for an argument that
    is absent. The result of a collective and a fake tensor pass: they are waited for, and never read.
    """
    if not isinstance(x, torch.Tensor):
        bad_type(name, "a tensor", type(x).__name__)
    if hasattr(x, "full_tensor"):
        bad_type(name, "a plain tensor (x.to_local() with process_group=, or x.full_tensor())", type(x).__name__)
    if torch.compiler.is_compiling():
        return
    if x.is_quantized:
        bad_type(name, "a plain tensor (x.dequantize())", f"a quantised one, {x.dtype}")
    if x.is_nested:
        bad_type(name, "a plain tensor (its values, with offsets)", "a nested tensor")
    if x.layout is not torch.strided:
        bad_type(name, "a dense tensor (x.to_dense())", f"one of layout {str(x.layout).removeprefix('torch.')}")
    if isinstance(x, torch.nn.parameter.UninitializedTensorMixin):  # type: ignore[attr-defined]
        bad_type(name, "a tensor with a shape", type(x).__name__)
    if not (owns_memory(x) or _is_fake(x) or hasattr(x, "trigger_wait")):
        bad_type(name, "a plain tensor", f"{type(x).__name__}, a wrapper without memory of its own")


def _freed(x: torch.Tensor) -> bool:
    """Whether x is empty-handed, as FSDP's parameters are between forwards: torch's own operators read address 0."""
    try:
        return x.untyped_storage().nbytes() == 0 and x.numel() > 0
    except (RuntimeError, NotImplementedError):
        return False  # functorch's wrappers have no storage


def owns_memory(x: torch.Tensor) -> bool:
    """Whether x is a tensor like torch's own: a Parameter, or a subclass without a dispatch of its own."""
    return type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def present(name: str, x: torch.Tensor) -> None:
    """Refuse a tensor on meta or a fake one where its values have to be read."""
    if x.is_meta or _is_fake(x):
        bad_value(name, "values that can be read", "a fake tensor, or one on the meta device")


def double(x: torch.Tensor) -> torch.Tensor:
    """x in float64: on its device, or on the CPU where that has none, as Apple's GPUs."""
    try:
        return x.to(torch.float64)
    except (TypeError, RuntimeError):
        return x.cpu().to(torch.float64)
