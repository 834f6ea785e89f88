"""What counts as a word, in any script: Unicode's default rule (UAX 29) without its dictionary."""

from __future__ import annotations

import re
import unicodedata

# Scripts written without spaces, by the first word of their characters' Unicode names: each character is a word of its
# own, as for sacrebleu's "zh" tokenizer. A sentence as one word made near-copies share nothing.
_UNSPACED = {"CJK", "IDEOGRAPHIC", "HIRAGANA", "THAI", "LAO", "KHMER", "MYANMAR"}
# Zero-width non-joiner and joiner: inside words of Persian and of India's languages.
_JOINERS = "\u200c\u200d"


class _Kinds(dict[int, str]):
    """For str.translate: s a word alone, w part of a word, m a mark or joiner that belongs to what it follows."""

    def __missing__(self, code: int) -> str:
        self[code] = kind = self._kind(chr(code))
        return kind

    def _kind(self, c: str) -> str:
        # No \w matches a mark: without its vowel signs, Hindi's "day" is its "donation".
        if unicodedata.category(c)[0] == "M" or c in _JOINERS:
            return "m"
        if not (c.isalnum() or c == "_"):
            return " "
        single = not c.isdecimal() and unicodedata.name(c, "").split(" ")[0] in _UNSPACED
        return "s" if single else "w"


_KINDS = _Kinds()


def words(text: str) -> list[str]:
    """Runs of letters and digits with their marks, in lower case; of a text that has none, its other characters."""
    text = unicodedata.normalize("NFC", text.lower())
    found = [text[m.start() : m.end()] for m in re.finditer("sm*|w[wm]*", text.translate(_KINDS))]
    return found or [c for c in text if not c.isspace()]


def apart(text: str) -> str:
    """text with spaces around each character that is a word alone."""
    if text.isascii():
        return text
    # NFC: an accent typed as a mark and one typed with its letter are one text to a reader.
    text = unicodedata.normalize("NFC", text)
    return " ".join(text[m.start() : m.end()] for m in re.finditer("sm*|[^s]+", text.translate(_KINDS)))
