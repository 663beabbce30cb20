"""Rewriting a caption: edits of its string, what may be put in, and the words of the set that they are drawn from.

What the rules of false captions (negative_rules.py) and of triplets (triplet_rules.py) have in common. "a" and "an"
follow the word behind them.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cache_builder.lexicon import Entry, near, plural_of
from cache_builder.reading import Phrase, Reading

FEW = 3
"""A kind of which the captions name fewer other groups is exchanged for nouns of any kind."""

ADDED = ("colour", "pattern")
"""Kinds of adjectives that are added to a thing: those that it seldom has by chance."""

PEOPLE = frozenset({"person", "role"})
"""Kinds of nouns that stand for no thing."""

UNPAINTED = frozenset({"anybody", "person", "role", "ground", "room", "cover", "food (mass)"})
"""Kinds of nouns that no adjective is added to."""


@dataclass(frozen=True, slots=True)
class Told:
    """What the captions of an image say, the one at hand among them.

    Attributes:
        barred: groups that are named, and those that the same thing may belong to.
        said: all captions, as `plainly` has them.
    """

    barred: frozenset[str]
    said: frozenset[str]

    @classmethod
    def by(cls, readings: Sequence[Reading]) -> "Told":
        """What these captions say together."""
        groups = {group for reading in readings for group in reading.groups()}
        return cls(
            frozenset(other for group in groups for other in near(group)),
            frozenset(plainly(reading.text) for reading in readings),
        )


class Vocabulary:
    """Nouns and adjectives by kind, as often as the captions name them."""

    def __init__(self, readings: Sequence[Reading]) -> None:
        self.nouns: dict[str, Counter[Word]] = {}
        self.adjectives: dict[str, Counter[Word]] = {}
        for phrase in (p for r in readings for p in r.phrases):
            _count(self.nouns, phrase.entry)
            for entry in (a.entry for a in phrase.adjectives):
                _count(self.adjectives, entry)

    def noun(
        self,
        like: Entry,
        told: Told,
        rng: np.random.Generator,
        without: frozenset[str] = frozenset(),
    ) -> str | None:
        """Another noun of the same kind and number, which no caption of the image names.

        Args:
            like: the noun.
            told: what the captions of the image say.
            rng: draws it.
            without: kinds that it is never of, where its own has too few.
        """
        others = {w.group for w in self.nouns.get(like.kind, ())} - {like.group}
        wider = sorted(set(self.nouns) - PEOPLE - without)
        kinds = [like.kind] if len(others) >= FEW else wider
        found = _drawn(self.nouns, kinds, told.barred, rng)
        return plural_of(found) if found and like.plural else found

    def noun_of(
        self, kinds: Sequence[str], barred: frozenset[str], rng: np.random.Generator
    ) -> str | None:
        """A noun of these kinds, singular, of none of the groups that are barred."""
        return _drawn(self.nouns, kinds, barred, rng)

    def adjective(
        self, kinds: Sequence[str], barred: frozenset[str], rng: np.random.Generator
    ) -> str | None:
        """An adjective of these kinds, of none of the groups that are barred."""
        return _drawn(self.adjectives, kinds, barred, rng)


class Word(NamedTuple):
    """A word by its group and its singular."""

    group: str
    lemma: str


def _count(found: "dict[str, Counter[Word]]", entry: Entry | None) -> None:
    if entry and entry.kind != "anybody":
        found.setdefault(entry.kind, Counter())[Word(entry.group, entry.lemma)] += 1


def _drawn(
    words: "dict[str, Counter[Word]]",
    kinds: Sequence[str],
    barred: frozenset[str],
    rng: np.random.Generator,
) -> str | None:
    """A word of these kinds, as often as it was counted; in what order they were counted is no matter."""
    found = sorted(
        (w.lemma, n) for k in kinds for w, n in words.get(k, {}).items() if w.group not in barred
    )
    if not found:
        return None
    ends = np.cumsum([n for _, n in found])
    return found[int(np.searchsorted(ends, rng.integers(ends[-1]), side="right"))][0]


class Refusal(NamedTuple):
    """Why a rule gave nothing."""

    reason: str


class Edit(NamedTuple):
    """A part of a caption, by places in it, and what stands there instead."""

    start: int
    stop: int
    text: str


def plainly(text: str) -> str:
    """A text as captions are compared: lower case, words alone.

    >>> plainly("A red  cup.") == plainly("a red cup")
    True
    """
    return " ".join(re.findall(r"\w+", text.lower()))


def edited(text: str, edits: Sequence[Edit]) -> str:
    """A text with parts of it replaced, and "a" or "an" before them made right.

    >>> edited("A red cup", [Edit(2, 5, "orange")])
    'An orange cup'
    """
    for start, stop, new in sorted(edits, reverse=True):
        before, old = text[:start], text[start:stop]
        if old[:1].isupper() and old[1:2].islower():
            new = new[:1].upper() + new[1:]
        if article := re.search(r"\b([Aa])n?(\s+)$", before):
            n = "n" if re.match(r"(?!uni|one|us|eu)[aeiou]|hour", new.lower()) else ""
            before = f"{before[: article.start()]}{article[1]}{n}{article[2]}"
        text = f"{before}{new}{text[stop:]}"
    return text


def articled(words: str) -> str:
    """Words for one thing, behind "a" or "an".

    >>> articled("orange cup")
    'an orange cup'
    """
    return edited(f"a {words}", [Edit(2, 2 + len(words), words)])


def bare_things(reading: Reading) -> list[Phrase]:
    """Things without a known adjective, right behind an article or at the start, that an adjective may be added to."""
    return [
        p
        for p in reading.phrases
        if not p.adjectives
        and p.entry.kind not in UNPAINTED
        and (p.last == 0 or reading.pieces[p.last - 1].text.lower() in ("a", "an", "the"))
    ]
