"""Diversity of a set of responses, measured on their words."""

from __future__ import annotations

import importlib
import itertools
import math
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from .. import _check


def _library(metric: str, package: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"{metric} needs {package}: pip install qempo-fast[metrics]"
        raise ImportError(message) from error


def _strings(texts: Any) -> list[str]:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        _check.bad_type("texts", "a list of strings", type(texts).__name__)
    for text in texts:
        if not isinstance(text, str):
            _check.bad_type("texts", "a list of strings", f"one with a {type(text).__name__}")
    if len(texts) < 2:
        _check.bad_value("texts", "at least two strings", len(texts))
    return list(texts)


def _tokens(text: Any) -> list[Any]:
    if isinstance(text, str):
        return text.split()
    if isinstance(text, torch.Tensor) and text.ndim == 1:
        return text.tolist()
    if isinstance(text, Sequence):
        return list(text)
    _check.bad_type("texts", "strings, or sequences of tokens", type(text).__name__)


def distinct_n(texts: Sequence[Any], n: int) -> float:
    """Distinct-n of a set of responses, ``different n-grams / all n-grams``, counted over the set as a whole.

    Args:
        texts: strings, split at white space, or sequences of tokens (lists or 1-d tensors of ids).
        n: length of the n-grams, at least 1.

    Returns:
        A number in (0, 1], 1 where no n-gram repeats. NaN where no response has n tokens.

    Raises:
        TypeError, ValueError: a single string, elements of another type, no responses, n below 1.

    Li et al. (arXiv:1510.03055). They divide by the number of tokens; with n-grams below, the value does not
    fall for short responses, and equals theirs at n = 1. DQO (arXiv:2509.04784) reports n = 4.
    """
    _check.integer("n", n, low=1)
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        _check.bad_type("texts", "a list of strings or of token sequences", type(texts).__name__)
    if not texts:
        _check.bad_value("texts", "at least one response", "none")
    rows = [_tokens(text) for text in texts]
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(texts: Sequence[str], *, n: int = 4) -> float:
    """Self-BLEU of a set of responses: the mean BLEU of each against all the others as references.

    Higher means more alike; ``1 - self_bleu`` grows with diversity. Sentence BLEU by sacrebleu: 13a tokens,
    exponential smoothing, and n-gram orders that a short response does not have left out.

    Args:
        texts: at least two strings.
        n: highest n-gram order.

    Returns:
        A number in [0, 1], 1 where all responses are the same.

    Raises:
        TypeError, ValueError: not strings, fewer than two, n below 1.
        ImportError: sacrebleu is not installed.

    Zhu et al. (arXiv:1802.01886, section 3).
    """
    rows = _strings(texts)
    _check.integer("n", n, low=1)
    metrics = _library("self_bleu", "sacrebleu", "sacrebleu.metrics")
    bleu = metrics.BLEU(max_ngram_order=n, effective_order=True)
    scores = [bleu.sentence_score(row, rows[:i] + rows[i + 1 :]).score for i, row in enumerate(rows)]
    # sacrebleu returns 100 exp(0) = 100.00000000000004 for a perfect match.
    return min(1.0, sum(scores) / (100 * len(scores)))


class _Words:
    """Tokenizer for rouge-score, whose own drops every character outside a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def self_rouge(texts: Sequence[str], *, kind: str = "rougeL") -> float:
    """Self-ROUGE of a set of responses: the mean ROUGE F1 over all pairs of them.

    Higher means more alike; papers that report it "higher is more diverse", as DQO does, report ``1 -
    self_rouge`` or another falling function of it. Words are runs of letters and digits of any script, in
    lower case.

    Args:
        texts: at least two strings.
        kind: "rougeL" (longest common subsequence), "rouge1" or "rouge2" (n-grams).

    Returns:
        A number in [0, 1], 1 where all responses are the same.

    Raises:
        TypeError, ValueError: not strings, fewer than two, another kind.
        ImportError: rouge-score is not installed.

    ROUGE: Lin (2004). Used as a diversity measure by DQO (arXiv:2509.04784); which variant is not
        established.
    """
    rows = _strings(texts)
    _check.choice("kind", kind, ("rouge1", "rouge2", "rougeL"))
    rouge = _library("self_rouge", "rouge-score", "rouge_score.rouge_scorer")
    scorer = rouge.RougeScorer([kind], tokenizer=_Words())
    scores = [scorer.score(a, b)[kind].fmeasure for a, b in itertools.combinations(rows, 2)]
    return sum(scores) / len(scores)
