"""The text-like head of the benchmarks keeps the columns that text keeps, and its rows are as sure as text's."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from bench_modules import load

# (columns kept at tau 2^-7, 2^-9, 2^-11) that SmolLM2 keeps of English text, by the rows of a chunk.
TEXT = {1024: (0.088, 0.185, 0.347), 256: (0.041, 0.095, 0.198)}
# Hidden width, vocabulary, and by how much the shares may be off. The fit is for vocabularies of language models, where
# it is within a tenth; these are what a test has time for.
SHAPES = [(64, 8192, 0.3), (64, 16384, 0.25)]


@pytest.fixture(scope="module")
def heads() -> ModuleType:
    return load("suite.heads")


def log_probs(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight.T).log_softmax(1)


def kept_share(logp: torch.Tensor, tau: float, rows: int) -> float:
    """Mean probability to keep a column, min(1, p / tau) of its largest p in a chunk, without the forced targets."""
    return float(torch.stack([(part.amax(0).exp() / tau).clamp(max=1).mean() for part in logp.split(rows)]).mean())


@pytest.mark.parametrize(("d", "v", "off"), SHAPES)
def test_text_like_head_keeps_what_text_keeps(heads: ModuleType, d: int, v: int, off: float) -> None:
    hidden, weight, targets = heads.text_like(1024, d, v)
    assert (hidden.shape, weight.shape, targets.shape) == ((1024, d), (v, d), (1024,))
    logp = log_probs(hidden, weight)
    for rows, wanted in TEXT.items():
        for power, share in zip((7, 9, 11), wanted, strict=True):
            assert kept_share(logp, 2.0**-power, rows) == pytest.approx(share, rel=off), (rows, power)
    entropy = -(logp.exp() * logp).sum(1)
    assert 2.0 < float(entropy.mean()) < 3.1
    # Text has both: a tenth of SmolLM2's rows lie under 0.07 nats, half above 2.5.
    assert 0.1 < float((entropy < 0.3).float().mean()) < 0.3
    assert float((entropy > 2).float().mean()) > 0.5
    # Targets drawn from the model: their surprise is the entropy, up to 4 standard errors of 1024 draws.
    surprise = -logp.gather(1, targets[:, None])[:, 0] - entropy
    assert abs(float(surprise.mean())) < 4 * float(surprise.std()) / 1024**0.5
    # Common columns have low numbers, loosely, as in a vocabulary of merges.
    mass = logp.exp().mean(0)
    assert 0.5 < float(mass[: v // 8].sum()) < 0.999


def test_text_like_head_follows_its_seed(heads: ModuleType) -> None:
    first, again, other = (heads.text_like(40, 16, 300, seed=seed) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_flat_head_keeps_far_more_columns(heads: ModuleType) -> None:
    hidden, weight, _ = heads.synthetic(1024, 64, 8192)
    assert kept_share(log_probs(hidden, weight), 2.0**-11, 1024) > 0.9
