"""Diversity, best-of-k and calibration of sampled responses; definitions: docs/metrics.md."""

from .calibration import brier, ece
from .embeddings import embedding_cosine, vendi
from .sampling import max_at_k, pass_at_k
from .text import distinct_n, self_bleu, self_rouge

__all__ = [
    "brier",
    "distinct_n",
    "ece",
    "embedding_cosine",
    "max_at_k",
    "pass_at_k",
    "self_bleu",
    "self_rouge",
    "vendi",
]
