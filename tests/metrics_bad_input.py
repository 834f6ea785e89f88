"""Bad arguments of the metrics: id, what to call, the error and its message."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from qempo_fast import metrics

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

ROWS: list[tuple[str, Callable[[], Call], type[Exception], str]] = [
    (
        "distinct_n, one string",
        lambda: (metrics.distinct_n, ("a b", 1), {}),
        TypeError,
        "texts: wanted .*got str",
    ),
    (
        "distinct_n, numbers",
        lambda: (metrics.distinct_n, ([1, 2], 1), {}),
        TypeError,
        "texts: wanted .*got int",
    ),
    ("distinct_n, none", lambda: (metrics.distinct_n, ([], 1), {}), ValueError, "texts: wanted at least one"),
    ("distinct_n, n = 0", lambda: (metrics.distinct_n, (["a"], 0), {}), ValueError, "n: wanted .*got 0"),
    ("self_bleu, one", lambda: (metrics.self_bleu, (["a"],), {}), ValueError, "texts: wanted at least two"),
    ("self_bleu, tokens", lambda: (metrics.self_bleu, ([["a"], ["b"]],), {}), TypeError, "texts: .*a list$"),
    ("self_bleu, n", lambda: (metrics.self_bleu, (["a", "b"],), {"n": 1.5}), TypeError, "n: wanted an int"),
    (
        "self_rouge, kind",
        lambda: (metrics.self_rouge, (["a", "b"],), {"kind": "rougeW"}),
        ValueError,
        "kind: wanted 'rouge1' or 'rouge2' or 'rougeL', got 'rougeW'",
    ),
    (
        "embedding_cosine, 1-d",
        lambda: (metrics.embedding_cosine, ([1.0, 2.0],), {}),
        ValueError,
        r"embeddings: wanted shape .*got \(2,\)",
    ),
    (
        "embedding_cosine, NaN",
        lambda: (metrics.embedding_cosine, ([[1.0, math.nan]],), {}),
        ValueError,
        "embeddings: wanted finite values, got 1",
    ),
    (
        "vendi, ragged lists",
        lambda: (metrics.vendi, ([[1.0], [1.0, 2.0]],), {}),
        TypeError,
        "embeddings: wanted numbers",
    ),
    (
        "vendi, texts",
        lambda: (metrics.vendi, (["a", "b"],), {}),
        TypeError,
        r"embeddings: .*\(embed first\), got texts",
    ),
    ("embedding_cosine, a text", lambda: (metrics.embedding_cosine, ("a",), {}), TypeError, "embed first"),
    ("vendi, empty", lambda: (metrics.vendi, ([[]],), {}), ValueError, "embeddings: wanted shape"),
    ("pass_at_k, k above n", lambda: (metrics.pass_at_k, (4, 1, 5), {}), ValueError, "k: wanted .*4, got 5"),
    (
        "pass_at_k, c above n",
        lambda: (metrics.pass_at_k, (4, [1, 5], 2), {}),
        ValueError,
        "c: wanted .*got 5",
    ),
    (
        "pass_at_k, half",
        lambda: (metrics.pass_at_k, (4, 1.5, 2), {}),
        ValueError,
        "c: wanted whole numbers, got 1.5",
    ),
    (
        "pass_at_k, shapes",
        lambda: (metrics.pass_at_k, ([4, 4], [1, 1, 1], 2), {}),
        ValueError,
        r"c: wanted shape \(2,\) as n, got \(3,\)",
    ),
    # By broadcasting these were P x P and P problems.
    (
        "pass_at_k, a column and a row",
        lambda: (metrics.pass_at_k, (torch.full((3, 1), 4), torch.ones(3), 2), {}),
        ValueError,
        r"c: wanted shape \(3, 1\) as n, got \(3,\)",
    ),
    (
        "pass_at_k, one n in a list",
        lambda: (metrics.pass_at_k, ([4], [1, 1, 1], 2), {}),
        ValueError,
        r"c: wanted shape \(1,\) as n, got \(3,\)",
    ),
    ("pass_at_k, None", lambda: (metrics.pass_at_k, (None, 1, 1), {}), TypeError, "n: wanted numbers.*NoneType"),
    ("pass_at_k, k a bool", lambda: (metrics.pass_at_k, (4, 1, True), {}), TypeError, "k: wanted an int, got bool"),
    *[
        (
            f"distinct_n, {label}",
            lambda token=token: (metrics.distinct_n, ([[token, token]], 1), {}),  # type: ignore[misc]
            TypeError,
            "texts: wanted tokens that are ids or strings, got one that is a",
        )
        # Tensors are members of a set by their address: two of one id counted as different.
        for label, token in [("lists", [1]), ("tensors", torch.tensor(1)), ("None", None), ("floats", 1.0)]
    ],
    ("distinct_n, bytes", lambda: (metrics.distinct_n, ([b"ab"], 1), {}), TypeError, "texts: .*got bytes"),
    (
        "distinct_n, rows of floats",
        lambda: (metrics.distinct_n, ([torch.ones(2)], 1), {}),
        TypeError,
        "texts: wanted uint8 or .*float32",
    ),
    (
        "distinct_n, a table of ids",
        lambda: (metrics.distinct_n, ([torch.ones(2, 2, dtype=torch.int64)], 1), {}),
        ValueError,
        "texts: wanted 1 dimensions",
    ),
    (
        "distinct_n, ids on meta",
        lambda: (metrics.distinct_n, ([torch.ones(2, dtype=torch.int64, device="meta")], 1), {}),
        ValueError,
        "texts: wanted values that can be read",
    ),
    (
        "self_rouge, kind a list",
        lambda: (metrics.self_rouge, (["a", "b"],), {"kind": ["rouge1"]}),
        ValueError,
        "kind: ",
    ),
    ("vendi, None", lambda: (metrics.vendi, (None,), {}), TypeError, "embeddings: wanted numbers"),
    ("vendi, complex", lambda: (metrics.vendi, (torch.ones(2, 2) * 1j,), {}), TypeError, "embeddings: wanted real"),
    ("ece, complex list", lambda: (metrics.ece, ([1j], [1]), {}), TypeError, "probabilities: wanted numbers"),
    ("vendi, sparse", lambda: (metrics.vendi, (torch.eye(2).to_sparse(),), {}), TypeError, "embeddings: .*dense"),
    (
        "vendi, nested",
        lambda: (metrics.vendi, (torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),), {}),
        TypeError,
        "embeddings: wanted a plain tensor .* nested",
    ),
    (
        "vendi, quantised",
        lambda: (metrics.vendi, (torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8),), {}),
        TypeError,
        "embeddings: .*quantised",
    ),
    (
        "vendi, rows of two widths",
        lambda: (metrics.vendi, ([torch.ones(2), torch.ones(3)],), {}),
        TypeError,
        "embeddings: wanted numbers.*got list",
    ),
    (
        "max_at_k, meta",
        lambda: (metrics.max_at_k, (torch.ones(3, device="meta"), 1), {}),
        ValueError,
        "rewards: wanted values that can be read",
    ),
    ("max_at_k, a huge int", lambda: (metrics.max_at_k, ([10**400], 1), {}), TypeError, "rewards: wanted numbers"),
    ("brier, a dict", lambda: (metrics.brier, ({}, [1]), {}), TypeError, "probabilities: wanted numbers.*dict"),
    ("max_at_k, k = 0", lambda: (metrics.max_at_k, ([1.0, 2.0], 0), {}), ValueError, "k: wanted .*got 0"),
    (
        "max_at_k, k above n",
        lambda: (metrics.max_at_k, ([1.0, 2.0], 3), {}),
        ValueError,
        "k: wanted .*2, got 3",
    ),
    ("max_at_k, none", lambda: (metrics.max_at_k, ([], 1), {}), ValueError, "rewards: wanted shape"),
    ("max_at_k, words", lambda: (metrics.max_at_k, (["a"], 1), {}), TypeError, "rewards: wanted numbers"),
    (
        "ece, above 1",
        lambda: (metrics.ece, ([0.5, 1.5], [0, 1]), {}),
        ValueError,
        r"probabilities: .*\[0, 1\]",
    ),
    ("ece, bins", lambda: (metrics.ece, ([0.5], [0]), {"bins": 0}), ValueError, "bins: wanted .*got 0"),
    (
        "brier, outcome",
        lambda: (metrics.brier, ([0.5], [2]), {}),
        ValueError,
        "outcomes: wanted values 0 or 1, got 2",
    ),
    (
        "brier, shapes",
        lambda: (metrics.brier, ([0.5, 0.5], [1]), {}),
        ValueError,
        r"outcomes: wanted shape \(2,\) as probabilities, got \(1,\)",
    ),
    ("brier, none", lambda: (metrics.brier, ([], []), {}), ValueError, "outcomes: wanted at least one value"),
]
