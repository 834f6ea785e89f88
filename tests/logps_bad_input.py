"""Bad calls of the log-prob ops: (id, make, error, message), make() -> (function, args, keywords), tensors fresh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import qempo_fast as qf

Row = tuple[str, Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]], type[Exception], str]


def head(**changes: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    x: dict[str, Any] = {"hidden": torch.ones(4, 3), "weight": torch.ones(7, 3), "targets": torch.arange(4)}
    x |= changes
    return qf.linear_logps, (x.pop("hidden"), x.pop("weight"), x.pop("targets")), x


def sequence(cu_seqlens: Any, **changes: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    _, args, keywords = head(**changes)
    return qf.sequence_logps, (*args, cu_seqlens), keywords


def weighted(coef: Any, **changes: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    _, args, keywords = head(**changes)
    return qf.weighted_logps, (*args, coef), keywords


def weighted_sequence(cu_seqlens: Any, coef: Any, **changes: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    _, args, keywords = head(**changes)
    return qf.weighted_sequence_logps, (*args, cu_seqlens, coef), keywords


def logits(targets: Any, **changes: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return qf.logps_from_logits, (changes.pop("logits", torch.ones(4, 7)), targets), changes


def segments(values: Any, cu_seqlens: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return qf.segment_sum, (values, cu_seqlens), {}


def kept(
    ids: Any = (0, 1, 2, 3), offsets: Any = (0, 1, 2, 3, 4), **changes: Any
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    made = [x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in (ids, offsets)]
    return head(support=qf.Support(*made), **changes)


def sets(*args: Any, **keywords: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return qf.Support.from_logits, args or (torch.ones(2, 5),), keywords


ROWS: list[Row] = [
    ("hidden is a list", lambda: head(hidden=[1.0, 2.0]), TypeError, "^hidden: wanted a tensor, got list"),
    (
        "hidden of integers",
        lambda: head(hidden=torch.ones(4, 3, dtype=torch.int64)),
        TypeError,
        "^hidden: .*int64",
    ),
    ("hidden is a scalar", lambda: head(hidden=torch.tensor(1.0)), ValueError, "^hidden: "),
    (
        "weight of another width",
        lambda: head(weight=torch.ones(7, 5)),
        ValueError,
        r"^weight: wanted shape \(any, 3\)",
    ),
    (
        "weight of another dtype",
        lambda: head(weight=torch.ones(7, 3).double()),
        TypeError,
        "^weight: wanted float32",
    ),
    (
        "weight without rows",
        lambda: head(weight=torch.ones(0, 3)),
        ValueError,
        "^weight: wanted at least one row",
    ),
    ("weight transposed", lambda: head(weight=torch.ones(3, 7)), ValueError, "^weight: "),
    (
        "weight elsewhere",
        lambda: head(weight=torch.ones(7, 3, device="meta")),
        ValueError,
        "^weight: .*cpu.*meta",
    ),
    ("targets of floats", lambda: head(targets=torch.ones(4)), TypeError, "^targets: wanted int32 or int64"),
    (
        "targets of another length",
        lambda: head(targets=torch.arange(5)),
        ValueError,
        r"^targets: wanted shape \(4\)",
    ),
    (
        "target past V",
        lambda: head(targets=torch.tensor([0, 7, 1, 1])),
        ValueError,
        r"^targets: .*\[0, 7\).*got 7",
    ),
    ("negative target", lambda: head(targets=torch.tensor([0, -1, 1, 1])), ValueError, "^targets: .*got -1"),
    (
        "-100 with another ignore_index",
        lambda: head(targets=torch.tensor([0, -100, 1, 1]), ignore_index=-1),
        ValueError,
        "^targets: .*ignore_index = -1, got -100",
    ),
    ("bias of another length", lambda: head(bias=torch.ones(3)), ValueError, r"^bias: wanted shape \(7\)"),
    ("bias is a number", lambda: head(bias=0.5), TypeError, "^bias: wanted a tensor"),
    ("temperature 0", lambda: head(temperature=0.0), ValueError, "^temperature: "),
    ("temperature -1", lambda: head(temperature=-1.0), ValueError, "^temperature: "),
    ("temperature text", lambda: head(temperature="hot"), TypeError, "^temperature: "),
    (
        "temperatures with a 0",
        lambda: head(temperature=torch.tensor([1.0, 0, 1, 1])),
        ValueError,
        "^temperature: ",
    ),
    ("temperatures of another shape", lambda: head(temperature=torch.ones(3)), ValueError, "^temperature: "),
    ("logit_scale 0", lambda: head(logit_scale=0.0), ValueError, "^logit_scale: "),
    ("logit_scale NaN", lambda: head(logit_scale=float("nan")), ValueError, "^logit_scale: "),
    ("softcap 0", lambda: head(softcap=0.0), ValueError, "^softcap: "),
    ("softcap infinite", lambda: head(softcap=float("inf")), ValueError, "^softcap: "),
    ("ignore_index a float", lambda: head(ignore_index=-100.0), TypeError, "^ignore_index: "),
    ("unknown grad", lambda: head(grad="approximate"), ValueError, "^grad: .*'approximate'"),
    ("tau 0", lambda: head(grad="sampled", tau=0.0), ValueError, "^tau: "),
    ("tau 2", lambda: head(grad="sampled", tau=2.0), ValueError, "^tau: "),
    ("tau with exact", lambda: head(grad="exact", tau=0.1), ValueError, "^tau: wanted None"),
    ("logits_dtype a word", lambda: head(logits_dtype="float32"), TypeError, "^logits_dtype: .*got str"),
    ("logits_dtype bfloat16", lambda: head(logits_dtype=torch.bfloat16), ValueError, "^logits_dtype: .*bfloat16"),
    (
        "logits_dtype narrower than hidden",
        lambda: head(hidden=torch.ones(4, 3).double(), weight=torch.ones(7, 3).double(), logits_dtype=torch.float32),
        ValueError,
        "^logits_dtype: wanted None with float64",
    ),
    ("batch_invariant a number", lambda: head(batch_invariant=1), TypeError, "^batch_invariant: wanted a bool"),
    (
        "batch_invariant of plain torch",
        lambda: head(batch_invariant=True, backend="reference"),
        ValueError,
        "^batch_invariant: wanted False with backend",
    ),
    ("unknown backend", lambda: head(backend="tpu"), ValueError, "^backend: .*'tpu'"),
    ("backend of another device", lambda: head(backend="cuda"), ValueError, "^backend: .*cuda"),
    (
        "hidden not flat",
        lambda: sequence(torch.tensor([0, 4]), hidden=torch.ones(2, 2, 3)),
        ValueError,
        "^hidden: ",
    ),
    ("cu_seqlens of floats", lambda: sequence(torch.tensor([0.0, 4.0])), TypeError, "^cu_seqlens: "),
    (
        "cu_seqlens falls",
        lambda: sequence(torch.tensor([0, 3, 2, 4])),
        ValueError,
        "^cu_seqlens: .*never fall",
    ),
    ("cu_seqlens too short", lambda: sequence(torch.tensor([0, 3])), ValueError, "^cu_seqlens: .*0 to 4"),
    ("cu_seqlens from 1", lambda: sequence(torch.tensor([1, 4])), ValueError, "^cu_seqlens: "),
    ("cu_seqlens empty", lambda: sequence(torch.zeros(0, dtype=torch.int64)), ValueError, "^cu_seqlens: "),
    ("cu_seqlens a list", lambda: sequence([0, 4]), TypeError, "^cu_seqlens: "),
    ("columns a list", lambda: head(columns=[[1]] * 4), TypeError, "^columns: wanted a tensor"),
    ("columns of floats", lambda: head(columns=torch.ones(4, 2)), TypeError, "^columns: wanted int32 or int64"),
    ("columns flat", lambda: head(columns=torch.arange(4)), ValueError, r"^columns: wanted shape \(4, K\)"),
    ("columns of other rows", lambda: head(columns=torch.zeros(5, 2).long()), ValueError, r"^columns: .*\(4, K\)"),
    ("no column", lambda: head(columns=torch.zeros(4, 0).long()), ValueError, "^columns: .*K at least 1"),
    ("column past V", lambda: head(columns=torch.full((4, 2), 7)), ValueError, r"^columns: .*\[0, 7\).*got 7"),
    ("negative column", lambda: head(columns=torch.full((4, 2), -1)), ValueError, "^columns: .*got -1"),
    ("top1 a word", lambda: head(top1="yes"), TypeError, "^top1: wanted "),
    ("mean_logits None", lambda: head(mean_logits=None), TypeError, "^mean_logits: wanted "),
    ("mean under a cap", lambda: head(mean_logits=True, softcap=3.0), ValueError, "^mean_logits: wanted False with"),
    ("smoothing of 1", lambda: head(label_smoothing=1.0), ValueError, r"^label_smoothing: .*\[0.0, 1.0\)"),
    ("smoothing a tensor", lambda: head(label_smoothing=torch.tensor(0.1)), TypeError, "^label_smoothing: "),
    ("smoothing under a cap", lambda: head(label_smoothing=0.1, softcap=3.0), ValueError, "^label_smoothing: wanted 0"),
    ("smoothed and fixed", lambda: head(label_smoothing=0.1, batch_invariant=True), ValueError, "^batch_invariant: "),
    ("columns elsewhere", lambda: head(columns=torch.zeros(4, 2, device="meta").long()), ValueError, "^columns: "),
    ("batch_invariant with lse", lambda: head(batch_invariant=True, lse=True), ValueError, "^batch_invariant: "),
    ("lse a number", lambda: head(lse=1), TypeError, "^lse: "),
    ("top1 of sequences", lambda: sequence(torch.tensor([0, 4]), top1=True), ValueError, "^top1: "),
    (
        "columns of sequences",
        lambda: sequence(torch.tensor([0, 4]), columns=torch.zeros(4, 1).long()),
        ValueError,
        "^columns: ",
    ),
    ("lse of sequences", lambda: sequence(torch.tensor([0, 4]), lse=True), ValueError, "^lse: "),
    ("coef is a list", lambda: weighted([1.0] * 4), TypeError, "^coef: wanted a tensor, got list"),
    ("coef of integers", lambda: weighted(torch.ones(4).long()), TypeError, "^coef: "),
    ("coef of another shape", lambda: weighted(torch.ones(5)), ValueError, r"^coef: wanted shape \(4\)"),
    ("coef elsewhere", lambda: weighted(torch.ones(4, device="meta")), ValueError, "^coef: .*meta"),
    ("coef is None", lambda: weighted(None), TypeError, "^coef: wanted a tensor"),
    (
        "coef_entropy of another shape",
        lambda: weighted(torch.ones(4), coef_entropy=torch.ones(3)),
        ValueError,
        r"^coef_entropy: wanted shape \(4\)",
    ),
    (
        "weighted, target past V",
        lambda: weighted(torch.ones(4), targets=torch.tensor([0, 9, 1, 1])),
        ValueError,
        "got 9",
    ),
    (
        "weights of other sequences",
        lambda: weighted_sequence(torch.tensor([0, 1, 4]), torch.ones(3)),
        ValueError,
        r"^coef: wanted shape \(2\)",
    ),
    (
        "weighted, cu_seqlens past the end",
        lambda: weighted_sequence(torch.tensor([0, 5]), torch.ones(1)),
        ValueError,
        "^cu_seqlens: .*0 to 4",
    ),
    (
        "logits without vocabulary",
        lambda: logits(torch.arange(4), logits=torch.ones(4, 0)),
        ValueError,
        "^logits: ",
    ),
    (
        "logits of integers",
        lambda: logits(torch.arange(4), logits=torch.ones(4, 7).long()),
        TypeError,
        "^logits: ",
    ),
    ("target past the logits", lambda: logits(torch.tensor([0, 1, 2, 9])), ValueError, "^targets: .*got 9"),
    ("targets of another shape", lambda: logits(torch.zeros(2, 2).long()), ValueError, "^targets: "),
    ("values of integers", lambda: segments(torch.arange(4), torch.tensor([0, 4])), TypeError, "^values: "),
    (
        "values with two axes",
        lambda: segments(torch.ones(2, 2), torch.tensor([0, 2])),
        ValueError,
        "^values: ",
    ),
    (
        "segments past the end",
        lambda: segments(torch.ones(4), torch.tensor([0, 5])),
        ValueError,
        "^cu_seqlens: ",
    ),
    (
        "support a tuple",
        lambda: head(support=(torch.arange(4), torch.arange(5))),
        TypeError,
        "^support: wanted a qempo",
    ),
    (
        "support of other positions",
        lambda: kept(offsets=(0, 2, 4)),
        ValueError,
        r"^support.offsets: wanted shape \(5\)",
    ),
    ("support of float ids", lambda: kept(ids=torch.ones(4)), TypeError, "^support.ids: wanted int32"),
    ("support falls", lambda: kept(offsets=(0, 2, 1, 3, 4)), ValueError, "^support.offsets: .*never fall"),
    ("support ends early", lambda: kept(offsets=(0, 1, 2, 3, 3)), ValueError, "^support.offsets: .*0 to 4"),
    (
        "support past V",
        lambda: kept(ids=(0, 1, 2, 3, 7), offsets=(0, 1, 2, 3, 5)),
        ValueError,
        r"^support: wanted ids in \[0, 7\), got 7",
    ),
    ("support below 0", lambda: kept(ids=(0, 1, 2, 3, -1), offsets=(0, 1, 2, 3, 5)), ValueError, "^support: .*got -1"),
    (
        "a token twice",
        lambda: kept(ids=(0, 5, 0, 1, 2, 3), offsets=(0, 3, 4, 5, 6)),
        ValueError,
        "^support: wanted no token twice",
    ),
    ("target not in its set", lambda: kept(ids=(0, 1, 5, 3)), ValueError, "^targets: .*support, got 2 at position 2"),
    (
        "counted target, empty set",
        lambda: kept(ids=(0, 1, 3), offsets=(0, 1, 2, 2, 3)),
        ValueError,
        "^targets: .*got 2",
    ),
    ("support, sampled", lambda: kept(grad="sampled"), ValueError, "^support: wanted None where .*sampled"),
    ("support with tau", lambda: kept(tau=0.1), ValueError, "^support: wanted None where .*sampled"),
    (
        "support of logits, target not in its set",
        lambda: logits(torch.arange(4), support=qf.Support(torch.tensor([0, 1, 2, 2]), torch.arange(5))),
        ValueError,
        "^targets: .*got 3 at position 3",
    ),
    ("top_p 0", lambda: sets(top_p=0.0), ValueError, "^top_p: "),
    ("top_k a float", lambda: sets(top_k=2.0), TypeError, "^top_k: "),
    ("top_k -1", lambda: sets(top_k=-1), ValueError, "^top_k: "),
    ("min_p 2", lambda: sets(min_p=2.0), ValueError, "^min_p: "),
    ("temperature of a sampler 0", lambda: sets(temperature=0.0), ValueError, "^temperature: "),
    ("sets of integers", lambda: sets(torch.ones(2, 5).long()), TypeError, "^logits: "),
    ("mask of floats", lambda: (qf.Support.from_mask, (torch.ones(2, 5),), {}), TypeError, "^mask: "),
    ("lists of floats", lambda: (qf.Support.from_lists, ([[1.0]],), {}), TypeError, "^lists: "),
    ("lists not nested", lambda: (qf.Support.from_lists, ([1, 2],), {}), TypeError, "^lists: "),
    ("lists a number", lambda: (qf.Support.from_lists, (3,), {}), TypeError, "^lists: "),
    ("a mask that was not returned", lambda: (qf.Support.from_vllm, (None,), {}), ValueError, "^mask: .*return"),
    ("cat of nothing", lambda: (qf.Support.cat, ([],), {}), ValueError, "^parts: "),
    (
        "spread over other entries",
        lambda: (qf.Support.from_lists([[1]]).spread, (torch.tensor([True, True]),), {}),
        ValueError,
        "^where: wanted 1 entries",
    ),
]
