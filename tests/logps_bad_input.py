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


def logits(targets: Any, **changes: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return qf.logps_from_logits, (changes.pop("logits", torch.ones(4, 7)), targets), changes


def segments(values: Any, cu_seqlens: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return qf.segment_sum, (values, cu_seqlens), {}


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
]
