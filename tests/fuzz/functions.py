"""The functions that are called, how a good call of each is made, and its definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch

import qempo_fast as qf
from qempo_fast import metrics, packing

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SETTINGS = ("backend", "grad", "tau", "logits_dtype", "batch_invariant")


class Draw:
    """Plain tensors and numbers from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self.dtype = self.rng.choices(FLOATS, (5, 2, 1, 1))[0]

    def size(self, low: int = 0, high: int = 9) -> int:
        return self.rng.randint(low, high)

    def of(self, *values: Any) -> Any:
        return self.rng.choice(values)

    def floats(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        x = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return (x * scale).to(dtype or self.dtype)

    def ints(self, low: int, high: int, *shape: int) -> torch.Tensor:
        dtype = self.of(torch.int64, torch.int64, torch.int32)
        return torch.randint(low, high, shape, generator=self._generator, dtype=dtype, device="cpu")

    def offsets(self, *sizes: int) -> torch.Tensor:
        ends = [0, *itertools.accumulate(sizes)]
        return torch.tensor(ends, dtype=self.of(torch.int64, torch.int64, torch.int32), device="cpu")


@dataclass(frozen=True)
class Function:
    """make(seed) gives the arguments by name; the policy's get a gradient.

    call takes them all; reference the same but for the settings that say how, and is None where the call itself on
    plain tensors has to do. wide: half precision is computed in float32.
    """

    make: Callable[[int], dict[str, Any]]
    call: Callable[..., Any]
    reference: Callable[..., Any] | None
    policy: tuple[str, ...] = ()
    wide: bool = True
    weight: int = 4
    operator: bool = False
    loose: bool = False  # takes arrays, lists and numbers for tensors

    def defined(self) -> Function:
        """Its definition, called alike."""
        reference = self.reference
        assert reference is not None

        def call(**arguments: Any) -> Any:
            return reference(**{name: x for name, x in arguments.items() if name not in _SETTINGS})

        return replace(self, call=call, reference=None)


def _sizes(d: Draw, low: int) -> list[int]:
    return [d.size(low, 5) for _ in range(d.size(0, 3))]


def _targets(d: Draw, vocabulary: int, *shape: int) -> torch.Tensor:
    targets = d.ints(0, vocabulary, *shape)
    return targets.masked_fill(d.ints(0, 5, *shape) == 0, -100) if d.of(True, False) else targets


def _head(d: Draw, *rows: int) -> dict[str, Any]:
    width, vocabulary = d.size(1, 12), d.of(1, 2, 7, 33, 33, 200, 700)
    x: dict[str, Any] = {
        "hidden": d.floats(*rows, width),
        "weight": d.floats(vocabulary, width),
        "targets": _targets(d, vocabulary, *rows),
    }
    if d.of(True, False, False):
        x["bias"] = d.floats(vocabulary)
    x["temperature"] = d.of(1.0, 1.0, 0.7, d.floats(*rows, dtype=torch.float32).abs() + 0.5)
    x["logit_scale"], x["softcap"] = d.of(1.0, 0.5), d.of(None, None, 3.0)
    x["entropy"], x["sum_sq"] = d.of(True, False), d.of(True, False, False)
    x["grad"] = d.of("auto", "exact", "exact", "sampled")
    if x["grad"] == "sampled":
        x["tau"] = d.of(None, 0.05)
    x["backend"] = d.of(None, None, None, "cpu", "reference")
    if d.dtype != torch.float64 and d.of(True, False, False):
        x["logits_dtype"] = torch.float32
    x["batch_invariant"] = x["backend"] != "reference" and d.of(True, False, False)
    return x


def linear_logps(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    x = _head(d, *d.of((d.size(),), (d.size(),), (2, d.size(0, 4))))
    if d.of(True, False, False):
        x["columns"] = _targets(d, len(x["weight"]), *x["targets"].shape, d.size(1, 3))
    x["lse"], x["top1"] = d.of(True, False, False), d.of(True, False, False)
    # Of one token's p = 1 the mean logit and the log-sum-exp are the same number, of which no digit may be left.
    mean = x["softcap"] is None and len(x["weight"]) > 1
    x["mean_logits"], x["label_smoothing"] = mean and d.of(True, False, False), d.of(0.0, 0.0, 0.1) if mean else 0.0
    products = "columns" in x or x["lse"] or x["mean_logits"] or x["label_smoothing"]
    x["batch_invariant"] = x["batch_invariant"] and not products
    return x


def _without_top1(function: Callable[..., Any]) -> Callable[..., Any]:
    """Which of two equal logits is the larger is rounding's choice."""

    def call(**x: Any) -> Any:
        out = function(**x)
        return out._replace(top1=None) if hasattr(out, "top1") else out

    return call


def sequence_logps(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    sizes = _sizes(d, 0)
    head = _head(d, sum(sizes))
    del head["sum_sq"]
    return {**head, "cu_seqlens": d.offsets(*sizes), "average": d.of(True, False)}


def _weights(d: Draw, *rows: int) -> dict[str, Any]:
    x = {"coef": d.floats(*rows)}
    return {**x, "coef_entropy": d.floats(*rows)} if d.of(True, False, False) else x


def weighted_logps(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    rows = d.of((d.size(),), (d.size(),), (2, d.size(0, 4)))
    head = _head(d, *rows)
    del head["sum_sq"], head["batch_invariant"]
    return {**head, **_weights(d, *rows)}


def weighted_sequence_logps(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    sizes = _sizes(d, 0)
    head = _head(d, sum(sizes))
    del head["sum_sq"], head["batch_invariant"]
    return {**head, "cu_seqlens": d.offsets(*sizes), "average": d.of(True, False), **_weights(d, len(sizes))}


def logps_from_logits(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    rows, vocabulary = d.of((d.size(),), (2, d.size(0, 4))), d.of(1, 2, 7, 33, 200)
    x = {"logits": d.floats(*rows, vocabulary, scale=3), "targets": _targets(d, vocabulary, *rows)}
    temperature = d.of(1.0, 0.7, d.floats(*rows, dtype=torch.float32).abs() + 0.5)
    return {**x, "temperature": temperature, "entropy": d.of(True, False), "backend": d.of(None, None, "reference")}


def _support(d: Draw, targets: torch.Tensor, vocabulary: int) -> dict[str, torch.Tensor]:
    """Sets with the target in each, or nothing."""
    flat = targets.reshape(-1).long()
    mask = torch.rand(len(flat), vocabulary, generator=d._generator, device="cpu") < 0.3
    mask[flat != -100, flat[flat != -100]] = True
    support = qf.Support.from_mask(mask)
    dtype = d.of(torch.int64, torch.int32)
    return {"ids": support.ids.to(dtype), "offsets": support.offsets.to(dtype)}


def kept_sets(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    x = _head(d, *d.of((d.size(),), (2, d.size(0, 4))))
    sets = _support(d, x["targets"], len(x["weight"]))
    return {**{name: v for name, v in x.items() if name not in ("grad", "tau", "batch_invariant")}, **sets}


def _over_sets(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a head with support= by its two parts."""
    return lambda ids, offsets, **x: function(support=qf.Support(ids, offsets), **x)


def segment_sum(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    sizes = _sizes(d, 0)
    return {"values": d.floats(sum(sizes)), "cu_seqlens": d.offsets(*sizes)}


def dpp_gains(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    width, ragged = d.size(1, 6), d.of(True, False, False)
    sizes = [d.size(1, 5) for _ in range(d.size(1, 3))]
    rows = (sum(sizes),) if ragged else (len(sizes), sizes[0])
    x: dict[str, Any] = {"embeddings": d.floats(*rows, width)}
    if d.of(True, False):
        x["log_quality"] = d.floats(*rows)
    if ragged:
        x["offsets"] = d.offsets(*sizes)
    return {
        **x,
        "ridge": d.of(1.0, 0.1),
        "normalize": d.of(True, True, False),
        "backend": d.of(None, None, "reference"),
    }


def dpp_select(seed: int) -> dict[str, Any]:
    x = dpp_gains(seed)
    del x["normalize"]
    smallest = int(x["offsets"].diff().min()) if "offsets" in x else x["embeddings"].shape[1]
    return {**x, "n": Random(seed).randint(1, smallest)}


def _pairs(*reference: str, **settings: Any) -> Callable[[int], dict[str, Any]]:
    def make(seed: int) -> dict[str, Any]:
        d = Draw(seed)
        n = d.size()
        x = {name: d.floats(n, scale=3) for name in ("chosen", "rejected", *reference)}
        reduction, smoothing = d.of("mean", "sum", "none"), d.of(0.0, 0.0, 0.1)
        return {**x, **settings, "label_smoothing": smoothing, "reduction": reduction}

    return make


def epa_loss(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    rows, strong, weak = d.size(), d.size(1, 4), d.size(0, 4)
    shapes = {"positive": (rows,), "strong": (rows, strong), "weak": (rows, weak)}
    x = {name: d.floats(*shape, scale=3) for name, shape in shapes.items()}
    x |= {f"ref_{name}": d.floats(*shape, scale=3) for name, shape in shapes.items()}
    return {**x, "beta": d.of(0.1, 1.0), "reduction": d.of("mean", "sum", "none")}


def poft_loss(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    rows = d.size()
    x = {
        "logps": d.floats(rows, scale=3),
        "lengths": d.ints(1, 9, rows),
        "aligned_mean_logps": d.floats(rows, d.size(1, 3)),
    }
    return {**x, "beta": d.of(0.1, 1.0), "gamma": d.of(0.0, 0.5), "reduction": d.of("mean", "sum", "none")}


def _groups(*names: str, least: int = 2, baseline: bool = False, **settings: Any) -> Callable[[int], dict[str, Any]]:
    def make(seed: int) -> dict[str, Any]:
        d = Draw(seed)
        sizes = [d.size(least, 5) for _ in range(d.size(0, 3))]
        if d.of(True, False):
            total, layout = sum(sizes), {"offsets": d.offsets(*sizes)}
        else:
            size = sizes[0] if sizes else least
            total, layout = size * len(sizes), {"group_size": size}
        x = {name: d.floats(total, scale=3) for name in names}
        if "embeddings" in x:
            x["embeddings"] = d.floats(total, d.size(1, 5))
        how = {"baseline": d.of("loo", "mean", "none")} if baseline else {}
        return {**x, **layout, **settings, **how}

    return make


def _dqo(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    x = _groups("logps", "rewards", "embeddings")(seed)
    if d.of(True, False):
        x |= {"ref_logps": d.floats(len(x["logps"])), "beta": 0.2}
    return {**x, "alpha": d.of(1.0, 0.3), "baseline": d.of("loo", "reward")}


def grpo_loss(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    sizes = _sizes(d, 1)
    names = ("token_logps", "old_token_logps")
    x: dict[str, Any] = {name: d.floats(sum(sizes)) for name in names}
    x |= {"advantages": d.floats(len(sizes)), "cu_seqlens": d.offsets(*sizes)}
    if d.of(True, False):
        x |= {"ref_token_logps": d.floats(sum(sizes)), "kl": 0.1}
    return {
        **x,
        "eps_high": d.of(0.2, 0.3),
        "ratio": d.of("token", "sequence"),
        "normalize": d.of("sequence", "token", 7),
    }


def policy_gradient_loss(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    n = d.size(1)
    return {"logps": d.floats(n), "advantages": d.floats(n)}


def group_advantages(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    return {**_groups("rewards")(seed), "scale": d.of("std", "none"), "baseline": d.of("mean", "loo")}


def coefficients(seed: int) -> dict[str, Any]:
    return _groups("logps", "rewards", lam=2.0)(seed)


def gather_groups(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    n = d.size()
    return {"groups": d.ints(0, 3, n), "first": d.floats(n), "second": d.floats(n, 2)}


def _gathered(groups: Any, first: Any, second: Any) -> Any:
    return qf.gather_groups(groups, first, second)


def target_distribution(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    shape = d.of((d.size(1),), (2, d.size(1, 5)))
    return {
        "rewards": d.floats(*shape),
        "ref_logps": d.floats(*shape).log_softmax(-1),
        "alpha": 0.5,
        "beta": d.of(0.0, 0.3),
    }


def solve_qempo(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    n = d.size(2)
    rewards = d.floats(n)
    return {"rewards": rewards, "ref_logps": d.floats(n).log_softmax(-1), "min_reward": float(rewards.float().mean())}


def constraint(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    x = {"min_reward": 0.5, "lr": 0.1, "step": d.of("additive", "multiplicative"), "damping": d.of(0.0, 1.0)}
    return {**x, "rewards": d.floats(d.size(1))}


def _update(rewards: Any, **settings: Any) -> torch.Tensor:
    return qf.QualityConstraint(**settings).update(rewards).lam


def pack_prompts(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    prompts = [d.ints(0, 50, d.size(1, 4)) for _ in range(d.size(1, 3))]
    completions = [[d.ints(0, 50, d.size(0, 3)).tolist() for _ in range(d.size(0, 3))] for _ in prompts]
    first = prompts.pop(0)
    return {
        "first": first,
        "prompts": prompts,
        "completions": completions,
        "max_length": d.of(None, 60),
        "pad_id": d.of(0, 3),
    }


def _pack(first: Any, prompts: Any, **settings: Any) -> Any:
    packed = packing.pack_prompts([first, *prompts] if isinstance(prompts, list) else prompts, **settings)
    return tuple(x for x in vars(packed).values() if isinstance(x, torch.Tensor))


def probabilities(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    n = d.size(1)
    return {"probabilities": d.floats(n).sigmoid(), "outcomes": d.ints(0, 2, n)}


def _embeddings(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    return {"embeddings": d.floats(d.size(1, 5), d.size(1, 5))}


def max_at_k(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    samples = d.size(1)
    return {"rewards": d.floats(d.size(1, 3), samples), "k": d.size(1, samples)}


def pass_at_k(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    return {"n": d.of(9, d.ints(9, 20, 3)), "c": d.ints(0, 9, 3), "k": d.size(1, 9)}


def texts(seed: int) -> dict[str, Any]:
    d = Draw(seed)
    words = ("a", "b", "ccc", "D", "é", "", ".")
    return {
        "texts": [" ".join(d.of(*words) for _ in range(d.size(0, 6))) for _ in range(d.size(2, 4))],
        "n": d.size(1, 4),
    }


_REFERENCES = ("ref_chosen", "ref_rejected")
_GROUP = ("logps", "ref_logps", "rewards")
_LOSSES: dict[str, tuple[Callable[[int], dict[str, Any]], tuple[str, ...]]] = {
    "dpo_loss": (_pairs(*_REFERENCES, beta=0.2), ("chosen", "rejected")),
    "spl_pair_loss": (_pairs(*_REFERENCES, alpha=0.5, beta=0.2), ("chosen", "rejected")),
    "hdpo_loss": (_pairs(*_REFERENCES, alpha=0.5, beta=0.2), ("chosen", "rejected")),
    "qempo_pair_loss": (_pairs(lam=3.0), ("chosen", "rejected")),
    "qempo_kl_pair_loss": (_pairs(*_REFERENCES, lam=3.0, mu=0.5), ("chosen", "rejected")),
    "epa_loss": (epa_loss, ("positive", "strong", "weak")),
    "poft_loss": (poft_loss, ("logps",)),
    "spl_loss": (_groups(*_GROUP, baseline=True, alpha=0.5, beta=0.2), ("logps",)),
    "qempo_loss": (_groups("logps", "rewards", baseline=True, lam=3.0), ("logps",)),
    "qempo_kl_loss": (_groups(*_GROUP, baseline=True, lam=3.0, mu=0.5), ("logps",)),
    "variance_loss": (_groups(*_GROUP, alpha=0.5, beta=0.2), ("logps",)),
    "gvpo_loss": (_groups(*_GROUP, beta=0.2), ("logps",)),
    "rspo_loss": (_groups("logps", "rewards", k=2), ("logps",)),
    "dqo_loss": (_dqo, ("logps",)),
    "grpo_loss": (grpo_loss, ("token_logps",)),
    "policy_gradient_loss": (policy_gradient_loss, ("logps",)),
}


def _public() -> dict[str, Function]:
    reference = qf.reference
    head: dict[str, Any] = {"policy": ("hidden", "weight", "bias"), "wide": False}
    weighted = {**head, "policy": (*head["policy"], "coef", "coef_entropy")}
    found = {
        "linear_logps": Function(
            linear_logps, _without_top1(qf.linear_logps), _without_top1(reference.linear_logps), **head, weight=14
        ),
        "sequence_logps": Function(sequence_logps, qf.sequence_logps, reference.sequence_logps, **head, weight=8),
        "weighted_logps": Function(weighted_logps, qf.weighted_logps, reference.weighted_logps, **weighted, weight=8),
        "weighted_sequence_logps": Function(
            weighted_sequence_logps, qf.weighted_sequence_logps, reference.weighted_sequence_logps, **weighted, weight=6
        ),
        "logps_from_logits": Function(
            logps_from_logits, qf.logps_from_logits, reference.logps_from_logits, ("logits",), weight=8
        ),
        "Support": Function(
            kept_sets, _over_sets(qf.linear_logps), _over_sets(reference.linear_logps), **head, weight=8
        ),
        "segment_sum": Function(segment_sum, qf.segment_sum, reference.segment_sum, ("values",)),
        "dpp_gains": Function(dpp_gains, qf.dpp_gains, reference.dpp_gains, ("embeddings", "log_quality"), weight=6),
        "dpp_logdet": Function(dpp_gains, qf.dpp_logdet, reference.dpp_logdet, ("embeddings", "log_quality")),
        "dpp_select": Function(dpp_select, qf.dpp_select, reference.dpp_select),
        "group_advantages": Function(group_advantages, qf.group_advantages, reference.group_advantages),
        "coefficients": Function(coefficients, lambda **x: qf.coefficients(qf.qempo_loss, **x), None, weight=2),
        "gather_groups": Function(gather_groups, _gathered, None, weight=2),
        "target_distribution": Function(target_distribution, qf.target_distribution, None, weight=2),
        "solve_qempo": Function(solve_qempo, qf.solve_qempo, None, weight=1),
        "QualityConstraint": Function(constraint, _update, None, weight=2),
        "pack_prompts": Function(pack_prompts, _pack, None, weight=1),
        "last_stats": Function(lambda _: {}, lambda: qf.last_stats() and None, None, weight=1),
        "backends": Function(lambda _: {}, lambda: str(qf.backends()) and None, None, weight=1),
        "brier": Function(probabilities, metrics.brier, None, weight=1),
        "ece": Function(probabilities, metrics.ece, None, weight=1),
        "embedding_cosine": Function(_embeddings, metrics.embedding_cosine, None, weight=1),
        "vendi": Function(_embeddings, metrics.vendi, None, weight=1),
        "max_at_k": Function(max_at_k, metrics.max_at_k, None, weight=1),
        "pass_at_k": Function(pass_at_k, metrics.pass_at_k, None, weight=1),
        "distinct_n": Function(texts, metrics.distinct_n, None, weight=1),
        "self_bleu": Function(texts, metrics.self_bleu, None, weight=1),
        "self_rouge": Function(lambda seed: {"texts": texts(seed)["texts"]}, metrics.self_rouge, None, weight=1),
    }  # fmt: skip
    for name in (
        "brier",
        "ece",
        "embedding_cosine",
        "vendi",
        "max_at_k",
        "pass_at_k",
        "pack_prompts",
        "QualityConstraint",
    ):
        found[name] = replace(found[name], loose=True)
    for name, (make, policy) in _LOSSES.items():
        found[name] = Function(make, getattr(qf, name), getattr(reference, name), policy)
    return found


FUNCTIONS = _public()
# Shown by the package, and no call of its own: rows and named tuples that calls return, and two modules.
NOT_CALLED = {
    *(
        "DppGains",
        "GatheredGroups",
        "LogpsStats",
        "QempoSolution",
        "SequenceLogps",
        "TokenLogps",
        "TokenScores",
        "WeightedLogps",
        "WeightedSequenceLogps",
        "metrics",
        "reference",
    ),
}
