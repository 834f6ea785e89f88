"""What the metrics of words hold for one word and for one response, in any script."""

from __future__ import annotations

import itertools
import unicodedata

import pytest

from qempo_fast import metrics
from qempo_fast.metrics._words import apart, words

KINDS = ("rouge1", "rouge2", "rougeL")
# One word, no word, no letter, nothing.
SHORT = ["Paris", "Paris, France", "🙂", "👩‍🚀", "?!", "!", "...", "", " ", "\n", "<skipped>", "你好", "दिन", "a", "1"]


def composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Don't stop_it 3.14", "don t stop_it 3 14"),
        # Vowel signs, a virama, a joiner and a non-joiner, accents.
        ("दिन दान क्षेत्र", "दिन दान क्षेत्र"),
        ("தமிழ் മലയാളം বাংলা", "தமிழ் മലയാളം বাংলা"),
        ("می\u200cخواهم بروم", "می\u200cخواهم بروم"),
        ("שָׁלוֹם مَرْحَبًا", "שָׁלוֹם مَرْحَبًا"),
        ("Crème BRÛLÉE", "crème brûlée"),
        (decomposed("Việt Nam"), "việt nam"),
        # Lower case decomposes what has no capital of one character.
        ("J\u030c", "\u01f0"),
        ("ΣΟΦΟΣ", "σοφος"),
        ("Київ — столиця", "київ столиця"),
        ("한국어 좋아요", "한국어 좋아요"),
        (decomposed("한국어"), "한국어"),
        # Scripts without spaces: each character, its marks with it; digits, Katakana and Latin stay together.
        ("我喜欢cats。", "我 喜 欢 cats"),
        ("東京タワーへ12", "東 京 タワー へ 12"),
        ("คำที่ ๑๒", "ค ำ ที่ ๑๒"),
        ("〇々", "〇 々"),
        # Zero-width spaces and soft hyphens part; a mark without a letter is none.
        ("a\u200bb", "a b"),
        ("x² ½ №5", "x² ½ 5"),
        ("\u0301 a", "a"),
        # No words: its characters.
        ("?! …", "? ! …"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_words(text: str, wanted: str) -> None:
    assert words(text) == [composed(word) for word in wanted.split()]


def test_apart_keeps_every_character() -> None:
    for text in ("plain  text.", "我喜欢cats。", "คำที่", "दिन, दान", decomposed("é"), "👩‍🚀 ok"):
        assert apart(text).replace(" ", "") == composed(text).replace(" ", "")
    assert apart("我喜欢 cats。ok").split() == ["我", "喜", "欢", "cats。ok"]
    assert apart("a  b") == "a  b"


def test_every_letter_and_digit_of_unicode_is_in_a_word_with_its_marks() -> None:
    """No character of a word is lost: of a letter with a mark after it, either form gives one word."""
    for code in range(0x110000):
        c = chr(code)
        if c.isalnum():
            assert words(c) != [], hex(code)
        elif unicodedata.category(c)[0] == "M":
            assert words(f"a{c}") == [composed(f"a{c}".lower())], hex(code)


@pytest.mark.parametrize("text", SHORT)
def test_identical_responses_score_one(text: str) -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    for count in (2, 3):
        for kind in KINDS:
            assert metrics.self_rouge([text] * count, kind=kind) == 1.0
        for n in (1, 2, 4):
            assert metrics.self_bleu([text] * count, n=n) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_short_responses_that_differ(kind: str) -> None:
    pytest.importorskip("rouge_score")

    def score(a: str, b: str) -> float:
        both = metrics.self_rouge([a, b], kind=kind), metrics.self_rouge([b, a], kind=kind)
        assert both[0] == both[1]
        assert 0.0 <= both[0] <= 1.0
        return both[0]

    for a, b in [
        ("Paris", "London"),
        ("", "Paris"),
        ("🙂", "🙁"),
        ("?!", "..."),
        ("दिन", "दान"),
        ("क", "कि"),
        ("?!", "Paris"),
    ]:
        assert score(a, b) == 0.0
    # One word of two, and of one: 2 (1)(1/2) / (1 + 1/2). Bigrams are counted where both have some.
    assert score("Paris", "Paris France") == pytest.approx(2 / 3)
    assert score("?!", "!") == pytest.approx(2 / 3)
    assert score("a b c", "b a d") == (0.0 if kind == "rouge2" else pytest.approx(2 / 3 if kind == "rouge1" else 1 / 3))
    for a, b in itertools.product(SHORT, SHORT):
        assert (score(a, b) == 1.0) == (words(a) == words(b)), (a, b)


def test_near_copies_without_spaces_are_alike() -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    near, far = ["我喜欢吃苹果和香蕉。", "我喜欢吃苹果和橘子。"], ["我喜欢吃苹果。", "明天会下雨吗？"]
    assert metrics.self_rouge(near) == pytest.approx(7 / 9)
    assert metrics.self_rouge(far) == 0.0
    assert metrics.self_bleu(near) > 0.6
    assert metrics.self_bleu(far) < 0.1
    assert metrics.distinct_n(["我喜欢猫", "我喜欢狗"], 1) == pytest.approx(5 / 8)
    assert metrics.self_rouge(["東京", "京都"]) == pytest.approx(1 / 2)


@pytest.mark.parametrize("text", ["Crème brûlée à volonté", "Việt Nam đẹp lắm", "한국어 좋아요 정말 네"])
def test_forms_of_one_text_are_one_text(text: str) -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    forms = [composed(text), decomposed(text)]
    assert forms[0] != forms[1]
    assert metrics.self_rouge(forms) == metrics.self_bleu(forms) == 1.0
    assert metrics.distinct_n(forms, 1) == 0.5


def test_a_copy_among_others_scores_one_in_bleu() -> None:
    """The two equal ones 1 each, the empty one nothing."""
    pytest.importorskip("sacrebleu")
    assert metrics.self_bleu(["a b", "a  b", ""]) == pytest.approx(2 / 3)
    assert metrics.self_bleu(["", "", "a b"]) == pytest.approx(2 / 3)
