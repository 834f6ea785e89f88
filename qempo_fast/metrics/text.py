"""Diversity of a set of responses, measured on their words."""

from __future__ import annotations

import importlib
import itertools
import math
import numbers
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from .. import _check
from ._words import apart, words

_IDS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _library(metric: str, package: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"{metric} needs {package}: pip install qempo-fast[metrics]"
        raise ImportError(message) from error


# What torch.compiler.assume_constant_result sets; the decorator itself imports Dynamo. Traced, an import runs a whole
# library's body through Dynamo: scipy's ends in an AttributeError there.
_library._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        return apart(text).split()
    if isinstance(text, torch.Tensor):
        _check.tensor("texts", text, dtypes=_IDS, ndim=1)
        _check.present("texts", text)
        return text.tolist()
    if not isinstance(text, Sequence) or isinstance(text, bytes):
        _check.bad_type("texts", "strings, or sequences of tokens", type(text).__name__)
    for token in text:
        # Tensors of one number are equal only to themselves as members of a set: each would count as different.
        if not isinstance(token, (str, bytes, numbers.Integral)):
            _check.bad_type("texts", "tokens that are ids or strings", f"one that is a {type(token).__name__}")
    return list(text)


def distinct_n(texts: Sequence[Any], n: int) -> float:
    """Distinct-n of a set of responses, ``different n-grams / all n-grams``, counted over the set as a whole.

    Args:
        texts: strings, split at white space and around each character of a script without spaces (Chinese,
            Japanese, Thai, Lao, Khmer, Burmese), or sequences of tokens (lists or 1-d tensors of ids).
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
    exponential smoothing, and n-gram orders that a short response does not have left out. Characters of scripts
    without spaces are tokens of their own, as by its zh tokenizer; a response that stands twice scores 1.

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
    bleu = metrics.BLEU(max_ngram_order=int(n), effective_order=True)
    rows = [" ".join(apart(row).split()) for row in rows]
    times = Counter(rows)
    # A copy's BLEU is 1, but for that of an empty response, which has no n-gram of any order.
    scores = [
        100.0 if times[row] > 1 else bleu.sentence_score(row, rows[:i] + rows[i + 1 :]).score
        for i, row in enumerate(rows)
    ]
    # sacrebleu returns 100 exp(0) = 100.00000000000004 for a perfect match.
    return min(1.0, sum(scores) / (100 * len(scores)))


class _AsTheyAre:
    """Tokenizer for rouge-score, given words. Its own drops every character outside a-z and 0-9."""

    def tokenize(self, text: list[str]) -> list[str]:
        return text


def self_rouge(texts: Sequence[str], *, kind: str = "rougeL") -> float:
    """Self-ROUGE of a set of responses: the mean ROUGE F1 over all pairs of them.

    Higher means more alike; papers that report it "higher is more diverse", as DQO does, report ``1 -
    self_rouge`` or another falling function of it. Words are runs of letters and digits of any script with their
    marks, in lower case and normal form C; characters of scripts without spaces (Chinese, Japanese, Thai, Lao,
    Khmer, Burmese) are words of their own, and so are the characters of a response without words ("?!"). Two
    responses of the same words score 1; "rouge2" counts single words where one of the two has no second.

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
    scorers = {name: rouge.RougeScorer([name], tokenizer=_AsTheyAre()) for name in (kind, "rouge1")}

    def score(a: list[str], b: list[str]) -> float:
        if a == b:
            return 1.0
        name = "rouge1" if kind == "rouge2" and min(len(a), len(b)) < 2 else kind
        return scorers[name].score(a, b)[name].fmeasure

    scores = [score(a, b) for a, b in itertools.combinations(map(words, rows), 2)]
    return sum(scores) / len(scores)
