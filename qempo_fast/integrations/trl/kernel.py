"""This library's log-prob op in the place of TRL's own kernel."""

from __future__ import annotations

import inspect
import logging
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import trl
import trl.trainer.utils as trl_utils

import qempo_fast as qf

from ... import _check
from ...logps._columns import mean_logits
from ...reference.logps import finish_head
from .. import scoring
from ..gathered import averaged
from ..known import lined_up, refuse_under_sets, scored

logger = logging.getLogger(__name__)

_SEAM = "_ChunkedLogProbFunction"
_PARAMETERS = (
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"),
    *("logit_scale", "outputs"),
)
_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Rows and columns of one tile of logits where a metric needs them after all: 16 MiB in float32.
_TILE = (256, 16384)
# Float32 sums over 10^5 columns are good to 1e-5 in their logarithm.
_MARGIN = 1e-3


def use_fused_logps(
    *,
    grad: str = "auto",
    tau: float | None = None,
    backend: str | None = None,
    logits_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> FusedLogps:
    """Give every TRL trainer of this process ``linear_logps`` in place of TRL's chunked log-prob kernel.

    TRL's trainers (DPO, GRPO, RLOO, KTO, SFT) look the kernel up at each call, so this works before and after a trainer
    is built. All that TRL asks of it is returned: log-probs, entropy, log sum p^2, mean logit, top-1 flag. What the op
    cannot do falls to TRL's kernel, with the reason logged once: a head that DeepSpeed ZeRO-3 partitions (its backward
    must gather the weight again), hidden states of other dtypes than the four float ones, a logit scale or softcap that
    is not positive. A head that FSDP2 shards in a unit of its own gets the mean of the ranks' gradients, as FSDP would
    give it; under TRL's kernel each rank's rows get those of its own tokens alone.

    Args:
        grad, tau, backend: as ``qf.linear_logps``.
        logits_dtype: as ``qf.linear_logps``: torch.float32 keeps half precision's logits in float32, the top-1 flag's
            too. float32 rows are as they are, float64 ones raise in the step; TRL's kernel, where it runs, rounds.
        batch_invariant: as ``qf.linear_logps``, of log-probs, entropy and log sum p^2 of equal hidden states. TRL's
            kernel does not promise it: what would fall to that raises, with the reason.

    Returns:
        A handle: ``remove()`` gives TRL its kernel back, and as a context manager it does so on exit.

    Raises:
        ImportError: this version of TRL has no such kernel; it names the versions that do.
        TypeError, ValueError: an argument; in a step, a head that is quantised: its integers are not its weights.
    """
    return FusedLogps(scoring(grad, tau, logits_dtype, batch_invariant, backend))


def own_logps(fused: bool, grad: str, tau: float | None) -> AbstractContextManager[Any]:
    """The seam during a trainer's own calls: an outer patch, with the trainer's gradient where it wants one."""
    default = grad == "auto" and tau is None
    if not fused and not default:
        _check.bad_value("grad", "'auto', and no tau, with fused=False: the seam is left as it is", grad)
    outer = getattr(trl_utils, _SEAM, None)
    held = outer.options if isinstance(outer, _Kernel) else {}
    if not fused or (held and default):
        return nullcontext()
    return use_fused_logps(**{**held, "grad": grad, "tau": tau})


def seam_rows(x: torch.Tensor, counted: torch.Tensor) -> torch.Tensor | None:
    """(N,) of x (S, T), a number for each token of the input: those that TRL has a row of hidden states for.

    On a GPU the tokens that count, without the first of each sequence; elsewhere all but the first. None where this
    TRL does not say which.
    """
    if not hasattr(trl_utils, "_use_triton"):
        return None
    x, counted = x[:, 1:], counted[:, 1:]
    return x[counted] if trl_utils._use_triton(x.device) else x.reshape(-1)


def seam_sets(support: qf.Support, counted: torch.Tensor) -> qf.Support:
    """The sets of seam_rows, out of one for each token of the input (S, T), empty where a token was not drawn.

    ``kept_sets`` takes them around TRL's forward; ``support.spread(drawn)`` lines up those of the drawn tokens.
    """
    rows = torch.arange(counted.numel(), device=counted.device, dtype=torch.int64).view(counted.shape)
    index = seam_rows(rows, counted)
    if index is None:
        raise ImportError(f"trl {trl.__version__} does not say of which tokens its rows are (tested with 1.16.0)")
    return lined_up(support, counted.shape, 0).rows(index)


def _seam() -> Any:
    """What stands in TRL's seam now: its kernel, or one of ours."""
    kernel = getattr(trl_utils, _SEAM, None)
    known = isinstance(kernel, _Kernel)
    if kernel is not None and not known:
        names = tuple(inspect.signature(kernel.forward).parameters)[1:] if hasattr(kernel, "forward") else ()
        known = names == _PARAMETERS
    if not known or not hasattr(trl_utils, "add_fused_lm_head"):
        what = "no log-prob kernel" if kernel is None else "a log-prob kernel with other arguments"
        raise ImportError(
            f"trl {trl.__version__} has {what} in trl.trainer.utils.{_SEAM}: "
            'pip install "trl>=1.16" (tested with 1.16.0)'
        )
    return kernel


class FusedLogps:
    """The patch that ``use_fused_logps`` makes; ``remove()`` or leaving it as a context takes it back."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._kernel = _Kernel(_seam(), options)
        setattr(trl_utils, _SEAM, self._kernel)

    def remove(self) -> None:
        """Put back what stood in TRL's seam before; of several patches the last that is left counts, in any order."""
        self._kernel.active = False
        while isinstance(kernel := getattr(trl_utils, _SEAM), _Kernel) and not kernel.active:
            setattr(trl_utils, _SEAM, kernel.before)

    def __enter__(self) -> FusedLogps:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


class _Kernel:
    """Stands where TRL has an autograd Function, of which it uses ``apply`` alone."""

    def __init__(self, before: Any, options: dict[str, Any]) -> None:
        self.before, self.options, self.active = before, options, True
        self.original: Any = before.original if isinstance(before, _Kernel) else before
        self._told: set[str] = set()

    def apply(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[torch.Tensor | None, ...]:
        for name, x in (("weight", weight), ("bias", bias)):
            if x is not None and x.dtype not in _check.FLOATS:
                # TRL's kernel takes the integers of an int8 head for weights of 1, 2, 3: log-probs of -750.
                wanted = "float16, bfloat16, float32 or float64 (leave the output head out of the quantisation)"
                _check.bad_type(name, wanted, x.dtype)
        weight, bias = averaged(weight), None if bias is None else averaged(bias)
        reason = _refusal(hidden, weight, softcap, logit_scale, outputs)
        if reason is not None:
            refuse_under_sets(reason)
            if self.options["batch_invariant"]:
                _check.bad_value("batch_invariant", f"False where TRL's own kernel has to run: {reason}", True)
            if reason not in self._told:
                logger.warning("TRL's own log-prob kernel runs instead of linear_logps: %s", reason)
                self._told.add(reason)
            args = (hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs)
            return self.original.apply(*args)
        # TRL casts to this dtype too. Under autocast hidden and weight come in float32.
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        head: dict[str, Any] = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
        tokens = scored(
            hidden,
            weight,
            targets,
            bias=bias,
            entropy="entropy" in outputs,
            sum_sq="log_sum_sq_probs" in outputs or "is_top1" in outputs,
            top1="is_top1" in outputs,
            **head,
            **self.options,
        )
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            tensors = (hidden, weight, bias, targets)
            mean, top1 = _metrics(tokens, tensors, head, outputs, self.options["logits_dtype"])
        return tokens.logps, tokens.entropy, tokens.sum_sq if "log_sum_sq_probs" in outputs else None, mean, top1


def _refusal(
    hidden: torch.Tensor, weight: torch.Tensor, softcap: Any, logit_scale: Any, outputs: tuple[str, ...]
) -> str | None:
    """Why the op cannot take this call, or None."""
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 partitions the output head, and the backward pass has to gather it again"
    if hidden.dtype not in _check.FLOATS:
        return f"hidden states are {hidden.dtype}"
    if not logit_scale > 0 or (softcap is not None and not softcap > 0):
        return f"logit_scale {logit_scale} and softcap {softcap} have to be positive"
    unknown = sorted(set(outputs) - set(_OUTPUTS))
    return f"outputs {unknown} are unknown" if unknown else None


def _metrics(
    tokens: qf.TokenLogps | qf.TokenScores,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor],
    head: dict[str, Any],
    outputs: tuple[str, ...],
    logits_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Mean logit and top-1 flag of each row, where asked for."""
    hidden, weight, bias, targets = tensors
    mean = top1 = None
    if "mean_logits" in outputs and head["softcap"] is not None:
        # tanh of each logit has no mean in closed form: one more pass over the logits, which gives the maximum too.
        mean, best = _pass_over_logits(hidden, weight, bias, head, logits_dtype)
        return mean, best == targets if "is_top1" in outputs else None
    if "mean_logits" in outputs:
        # Not by the op: batch_invariant refuses it there.
        mean = mean_logits(hidden, weight, bias, head["logit_scale"] / head["temperature"], len(weight))
    if "is_top1" in outputs:
        assert isinstance(tokens, qf.TokenScores)
        assert tokens.sum_sq is not None
        assert tokens.top1 is not None
        # Of equal logits TRL takes the first. A p with p^2 > S - p^2, S = sum p^2, is the largest, and alone.
        top1 = tokens.top1
        alone = 2 * tokens.logps.detach() + math.log(2) > tokens.sum_sq + _MARGIN
        unsure = (top1 & ~alone).nonzero()[:, 0]
        if len(unsure):
            _, best = _pass_over_logits(hidden[unsure], weight, bias, head, logits_dtype)
            top1[unsure] = best == targets[unsure]
    return mean, top1


def _pass_over_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    head: dict[str, Any],
    logits_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) mean logit and index of the first largest logit, tile by tile."""
    n, vocabulary, dtype = len(hidden), len(weight), logits_dtype or hidden.dtype
    total = torch.zeros(n, device=hidden.device, dtype=torch.float32)
    best = torch.zeros(n, dtype=torch.int64, device=hidden.device)
    rows, columns = _TILE
    for a in range(0, n, rows):
        top = torch.full((min(rows, n - a),), -torch.inf, device=hidden.device, dtype=torch.float32)
        for v in range(0, vocabulary, columns):
            raw = (hidden[a : a + rows].to(dtype) @ weight[v : v + columns].to(dtype).t()).float()
            raw = raw if bias is None else raw + bias[v : v + columns]
            value, at = raw.max(1)
            # Strictly larger: of equal logits the first counts, as in TRL. Scale, cap and temperature keep the order.
            best[a : a + rows] = torch.where(value > top, at + v, best[a : a + rows])
            top = torch.maximum(top, value)
            total[a : a + rows] += finish_head(raw, **head).sum(1)
    return total / vocabulary, best
