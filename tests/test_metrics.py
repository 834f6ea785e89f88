"""Metrics against numbers worked by hand and against enumeration."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import pytest
import torch

from qempo_fast import metrics


def test_distinct_n_by_hand() -> None:
    # a b a b | b a: bigrams ab ba ab ba, 2 different of 4; unigrams 2 of 6.
    texts = ["a b a b", "b  a"]
    assert metrics.distinct_n(texts, 1) == pytest.approx(2 / 6)
    assert metrics.distinct_n(texts, 2) == pytest.approx(2 / 4)
    assert metrics.distinct_n(texts, 3) == 1.0
    assert math.isnan(metrics.distinct_n(texts, 5))


def test_distinct_n_of_token_ids() -> None:
    ids = [[1, 2, 1, 2], (2, 1)]
    assert metrics.distinct_n(ids, 2) == pytest.approx(2 / 4)
    assert metrics.distinct_n([torch.tensor(row) for row in ids], 2) == pytest.approx(2 / 4)


def test_self_bleu_ends() -> None:
    pytest.importorskip("sacrebleu")
    assert metrics.self_bleu(["the cat sat on the mat"] * 3) == 1.0
    assert metrics.self_bleu(["Paris"] * 2) == 1.0
    assert metrics.self_bleu(["a b c d e", "f g h i j"]) < 0.1


def test_self_bleu_by_hand() -> None:
    """Unigram BLEU: 3 of 4 words match, equal lengths, both ways."""
    pytest.importorskip("sacrebleu")
    assert metrics.self_bleu(["one two three four", "one two three five"], n=1) == pytest.approx(0.75)
    # orders 1 and 2: 3/4 and 2/3, geometric mean.
    expected = math.sqrt(3 / 4 * 2 / 3)
    assert metrics.self_bleu(["one two three four", "one two three five"], n=2) == pytest.approx(expected)


def test_self_bleu_takes_all_others_as_references() -> None:
    pytest.importorskip("sacrebleu")
    # The first is covered by the second and third together: 1; they match it in 2 of 4 words each.
    texts = ["a b c d", "a b x y", "c d z w"]
    assert metrics.self_bleu(texts, n=1) == pytest.approx((1 + 0.5 + 0.5) / 3)


def test_self_rouge_by_hand() -> None:
    pytest.importorskip("rouge_score")
    # Longest common subsequence "the sat mat", 3 of 4 and 3 of 5 words: F1 = 2 (3/4)(3/5) / (3/4 + 3/5) =
    # 2/3.
    assert metrics.self_rouge(["The cat sat mat", "the dog sat big mat"]) == pytest.approx(2 / 3)
    assert metrics.self_rouge(["a b c", "b a d"], kind="rouge1") == pytest.approx(2 / 3)
    assert metrics.self_rouge(["a b c", "b a d"], kind="rouge2") == 0.0


def test_self_rouge_means_over_pairs() -> None:
    pytest.importorskip("rouge_score")
    assert metrics.self_rouge(["a b", "a b", "c d"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("function", "module", "package"),
    [
        ("self_bleu", "sacrebleu.metrics", "sacrebleu"),
        ("self_rouge", "rouge_score.rouge_scorer", "rouge-score"),
    ],
)
def test_missing_library_names_the_extra(
    function: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install qempo-fast\[metrics\]"):
        getattr(metrics, function)(["a", "b"])


def test_embedding_cosine_by_hand() -> None:
    # Two equal rows and one orthogonal: of 9 ordered pairs 4 have distance 1.
    x = [[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]
    assert metrics.embedding_cosine(x).item() == pytest.approx(4 / 9)
    assert metrics.embedding_cosine([[1.0, 0.0], [-1.0, 0.0]]).item() == pytest.approx(1.0)
    assert metrics.embedding_cosine([[2.0, 1.0]]).item() == 0.0
    # The zero row: distance 1 to both others.
    assert metrics.embedding_cosine([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]).item() == pytest.approx(4 / 9)


def test_vendi_by_hand() -> None:
    assert metrics.vendi([[1.0, 0.0], [5.0, 0.0]]).item() == pytest.approx(1.0)
    assert metrics.vendi(torch.eye(4)).item() == pytest.approx(4.0)
    # cos = 1/2: eigenvalues of K / 2 are 3/4 and 1/4.
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert metrics.vendi([[1.0, 0.0], [0.5, math.sqrt(0.75)]]).item() == pytest.approx(expected)
    # Two pairs of equal rows count as two.
    assert metrics.vendi([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).item() == pytest.approx(2.0)


@pytest.mark.parametrize("tiny", [5e-324, 1e-200, 1e-160])
def test_rows_of_any_size_have_their_direction(tiny: float) -> None:
    """The squares of these leave float64."""
    for size in (tiny, 1 / max(tiny, 1e-308)):
        alike = [[size, 0.0], [size, 0.0], [1.0, 0.0]]
        assert metrics.vendi(alike).item() == pytest.approx(1.0)
        assert metrics.embedding_cosine(alike).item() == 0.0
        across = [[size, 0.0], [0.0, size], [0.0, 1.0]]
        assert metrics.embedding_cosine(across).item() == pytest.approx(4 / 9)
    half = torch.full((3, 4096), 65504.0, dtype=torch.float16)
    assert metrics.vendi(half).item() == pytest.approx(1.0)
    assert metrics.embedding_cosine(half).item() == 0.0


@pytest.mark.parametrize(("n", "width"), [(3, 7), (7, 3), (5, 5), (1, 4), (4, 1)])
def test_either_gram_matrix_gives_the_cosines_numbers(n: int, width: int) -> None:
    """X X^T by its definition, also where X^T X is the smaller, with a zero row in one set."""
    x = torch.randn(4, n, width, dtype=torch.float64)
    x[0, 0] = 0.0
    unit = torch.nn.functional.normalize(x, dim=-1)
    cosines = unit @ unit.mT
    cosines.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    weights = torch.linalg.eigvalsh(cosines / n).clamp(min=0.0)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(metrics.vendi(x), torch.special.entr(weights).sum(-1).exp(), **close)
    torch.testing.assert_close(metrics.embedding_cosine(x), (1 - cosines).mean((-2, -1)), **close)


def test_a_distance_below_rounding_is_not_lost() -> None:
    """1 - cos of an angle of 1e-9 is 5e-19, which 1 - 1.0 has no digit of."""
    assert metrics.embedding_cosine([[1.0, 0.0], [1.0, 1e-9]]).item() == pytest.approx(2.5e-19, rel=1e-6)


@pytest.mark.parametrize("name", ["embedding_cosine", "vendi"])
def test_many_sets_equal_a_loop(name: str) -> None:
    metric, x = getattr(metrics, name), torch.randn(2, 3, 5, 4, dtype=torch.bfloat16)
    out = metric(x)
    assert out.shape == (2, 3)
    assert out.dtype == torch.float64
    loop = torch.stack([metric(row) for row in x.reshape(6, 5, 4)]).reshape(2, 3)
    torch.testing.assert_close(out, loop, rtol=0, atol=1e-12)


def test_pass_at_k_by_hand() -> None:
    # n = 5, c = 2, k = 2: 1 - C(3,2)/C(5,2) = 1 - 3/10.
    assert metrics.pass_at_k(5, 2, 2).item() == pytest.approx(0.7)
    assert metrics.pass_at_k(5, 2, 1).item() == pytest.approx(0.4)
    assert metrics.pass_at_k(5, [0, 1, 4, 5], 2).tolist() == pytest.approx([0.0, 0.4, 1.0, 1.0])
    assert metrics.pass_at_k(torch.tensor([4, 10]), torch.tensor([1, 1]), 4).tolist() == pytest.approx([1.0, 0.4])


def test_pass_at_k_of_many_samples() -> None:
    """Binomials of 10000 leave every float; the ratio is near exp(-k c / n)."""
    expected = 1 - math.comb(9950, 1000) / math.comb(10000, 1000)
    assert metrics.pass_at_k(10000, 50, 1000).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_max_at_k_equals_all_subsets(k: int) -> None:
    rewards = [[0.5, -1.0, 2.0, 2.0, 0.0], [1.0, 3.0, -2.0, 0.25, 7.0]]
    expected = [sum(max(s) for s in itertools.combinations(row, k)) / math.comb(5, k) for row in rewards]
    assert metrics.max_at_k(rewards, k).tolist() == pytest.approx(expected)


def test_max_at_k_of_zeros_and_ones_is_pass_at_k() -> None:
    rewards = (torch.rand(20, 12) < 0.3).int()
    for k in (1, 4, 12):
        expected = metrics.pass_at_k(12, rewards.sum(-1), k)
        torch.testing.assert_close(metrics.max_at_k(rewards, k), expected, rtol=0, atol=1e-14)


def test_brier_by_hand() -> None:
    assert metrics.brier([1.0, 0.5, 0.2], [1, 0, 0]) == pytest.approx((0 + 0.25 + 0.04) / 3)
    assert metrics.brier([0.0, 1.0], [False, True]) == 0.0


def test_brier_equals_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    p, y = torch.rand(100, dtype=torch.float64), (torch.rand(100) < 0.5).int()
    assert metrics.brier(p, y) == pytest.approx(sklearn.brier_score_loss(y.numpy(), p.numpy()), rel=1e-12)


def read_as(form: str, values: list[float]) -> Any:
    """The same numbers as a user may hold them."""
    numpy = pytest.importorskip("numpy")
    if form == "list":
        return values
    if form in ("float64", "float32", "float16"):
        return torch.tensor(values, dtype=getattr(torch, form))
    x = numpy.array(values, dtype="float32" if form == "numpy float32" else "float64")
    if form == "read-only":
        x.flags.writeable = False
    return {"reversed": x[::-1][::-1], "big-endian": x.astype(">f8")}.get(form, x)


FORMS = ["list", "float64", "float32", "float16", "numpy", "numpy float32", "reversed", "read-only", "big-endian"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bins", [10, 15])
@pytest.mark.filterwarnings("error")
def test_a_probability_on_an_edge_lies_in_the_bin_below(form: str, bins: int) -> None:
    """Stated confidences lie on edges: 0.3 is one of ten bins, and float32's 0.3 is 0.30000001."""
    for m in range(1, bins):
        # Outcomes 1 and 0: in one bin |(1 - edge) - middle| / 2, in two bins the sum instead of the difference.
        edge, middle = m / bins, (m - 0.5) / bins
        value = metrics.ece(read_as(form, [edge, middle]), [1, 0], bins=bins)
        assert value == pytest.approx(abs(1 - edge - middle) / 2, abs=1e-3), m


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_lists_are_read_in_float64_whatever_torch_makes_by_default(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        assert metrics.ece([0.25, 0.3], [1, 0], bins=10) == pytest.approx(0.225, abs=1e-15)
        assert metrics.ece([0.2, 0.15], [0, 1]) == pytest.approx(0.325, abs=1e-15)
        assert metrics.brier([0.1], [0]) == pytest.approx(0.01, abs=1e-17)
        assert metrics.max_at_k([0.1, 0.7], 2).item() == 0.7
        assert metrics.pass_at_k(2**25 + 1, 1, 1).item() == pytest.approx(1 / (2**25 + 1), rel=1e-7)
        assert metrics.vendi([[0.1, 0.2], [0.2, 0.4], [0.0, 0.0]]).item() == pytest.approx(1.8898815748423097)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.mark.filterwarnings("error")
def test_embeddings_come_as_rows_too() -> None:
    numpy = pytest.importorskip("numpy")
    x = torch.randn(4, 3)
    for rows in (list(x), list(x.numpy()), x.tolist(), numpy.asfortranarray(x.numpy())[:, ::-1]):
        assert metrics.vendi(rows).item() == pytest.approx(metrics.vendi(x).item(), rel=1e-6)


def test_a_device_without_float64_is_read_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch answers on Apple's GPUs; where the tensor really lies does not matter here."""
    told = []

    def to(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args == (torch.float64,) and not told:
            told.append(x)
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return original(x, *args, **kwargs)

    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", to)
    out = metrics.max_at_k(torch.tensor([1.0, 2.0]), 2)
    assert told
    assert (out.dtype, out.item()) == (torch.float64, 2.0)


def test_ece_by_hand() -> None:
    # Bins (0, 1/2] and (1/2, 1]: 0.2, 0.4 with outcomes 0, 1; 0.6, 0.9 with 1, 1.
    # |0.5 - 0.3| / 2 + |1 - 0.75| / 2.
    assert metrics.ece([0.2, 0.4, 0.6, 0.9], [0, 1, 1, 1], bins=2) == pytest.approx(0.225)
    # 1/2 belongs to the lower bin: there |1/2 - 1/4|, the upper is empty.
    assert metrics.ece([0.0, 0.5], [0, 1], bins=2) == pytest.approx(0.25)
    assert metrics.ece([0.5, 0.51], [1, 0], bins=2) == pytest.approx(0.5 * 0.5 + 0.5 * 0.51)
    assert metrics.ece([0.0, 1.0], [0, 1]) == 0.0
    assert metrics.ece([1.0], [0], bins=1) == 1.0
