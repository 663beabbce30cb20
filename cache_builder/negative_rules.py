"""The rules that make a false caption of a true one; `negatives.py` applies them to a data set.

Each rule gets what the lexicon reads in a caption, what all captions of the image say, and the words of the whole set;
it returns edits of the string, or why it has none. "a" and "an" follow the word behind them.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cache_builder.lexicon import FREE, SYMMETRIC, Entry, near, plural_of
from cache_builder.reading import Phrase, Piece, Reading

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

    def noun(self, like: Entry, told: Told, rng: np.random.Generator) -> str | None:
        """Another noun of the same kind and number, which no caption of the image names."""
        others = {w.group for w in self.nouns.get(like.kind, ())} - {like.group}
        kinds = [like.kind] if len(others) >= FEW else sorted(set(self.nouns) - PEOPLE)
        found = _drawn(self.nouns, kinds, told.barred, rng)
        return plural_of(found) if found and like.plural else found

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


Rule = Callable[[Reading, Told, Vocabulary, np.random.Generator], list[Edit] | Refusal]


def false_caption(
    reading: Reading,
    told: Told,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    refused: Counter[str] | None = None,
) -> tuple[str, str] | None:
    """Category and text of a false caption, or None; why a rule gave nothing is added to `refused`."""
    refused = Counter() if refused is None else refused
    families = [list(RULES)[i] for i in rng.permutation(len(RULES))]
    for family in families:
        rules = RULES[family]
        for name in [list(rules)[i] for i in rng.permutation(len(rules))]:
            edits = rules[name](reading, told, vocabulary, rng)
            if isinstance(edits, Refusal):
                refused[f"{family}_{name}: {edits.reason}"] += 1
                continue
            text = edited(reading.text, edits)
            if plainly(text) in told.said:
                refused[f"{family}_{name}: a caption of the image says it"] += 1
                continue
            return f"{family}_{name}", text
    return None


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


def _swap_obj(
    reading: Reading, told: Told, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Edit] | Refusal:
    pairs = _pairs(reading.phrases)
    pairs = [(a, b) for a, b in pairs if b.entry.group not in near(a.entry.group)]
    if not pairs:
        return Refusal("no two things of different names")
    pairs = [(a, b) for a, b in pairs if a.entry.plural == b.entry.plural]
    if not pairs:
        return Refusal("one thing against several")
    pairs = [(a, b) for a, b in pairs if not _either_way(reading, a, b) or _told_apart(a, b)]
    if not pairs:
        return Refusal("true in either order")
    a, b = pairs[rng.integers(len(pairs))]
    return _exchange(a.noun, b.noun)


def _swap_att(
    reading: Reading, told: Told, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Edit] | Refusal:
    described = [p for p in reading.phrases if p.adjectives]
    if len(described) < 2:
        return Refusal("no two described things")
    pairs = [(a, b, x, y) for a, b in _pairs(described) for x in a.adjectives for y in b.adjectives]
    pairs = [p for p in pairs if _differ(p[2], p[3])]
    if not pairs:
        return Refusal("described alike")
    pairs = [p for p in pairs if _exchangeable(p[2], p[3])]
    if not pairs:
        return Refusal("described by different kinds of words")
    pairs = [
        p
        for p in pairs
        if not (p[1].entry.group in near(p[0].entry.group) and _either_way(reading, p[0], p[1]))
    ]
    if not pairs:
        return Refusal("true in either order")
    _, _, x, y = pairs[rng.integers(len(pairs))]
    return _exchange(x, y)


def _replace_obj(
    reading: Reading, told: Told, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Edit] | Refusal:
    things = [p for p in reading.phrases if p.entry.kind != "anybody"]
    if not things:
        return Refusal("no thing known by name")
    thing = things[rng.integers(len(things))]
    new = vocabulary.noun(thing.entry, told, rng)
    if new is None:
        return Refusal("no other thing that no caption names")
    return [Edit(thing.noun.start, thing.noun.stop, new)]


def _replace_att(
    reading: Reading, told: Told, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Edit] | Refusal:
    found = [a for p in reading.phrases for a in p.adjectives]
    if not found:
        return Refusal("nothing described")
    old = found[rng.integers(len(found))]
    assert old.entry
    new = vocabulary.adjective([old.entry.kind], told.barred, rng)
    if new is None and old.entry.kind in FREE:
        new = vocabulary.adjective(sorted(FREE), told.barred, rng)
    if new is None:
        return Refusal("no other adjective that no caption names")
    return [Edit(old.start, old.stop, new)]


def _replace_rel(
    reading: Reading, told: Told, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Edit] | Refusal:
    ends = [p.last for p in reading.phrases]
    starts = [p.first for p in reading.phrases]
    found = [
        p
        for i, p in enumerate(reading.pieces)
        if p.of("relation") and any(e < i for e in ends) and any(i < s <= i + 2 for s in starts)
    ]
    if not found:
        return Refusal("no relation between two things")
    old = found[rng.integers(len(found))]
    assert old.entry
    new = old.entry.kind
    if side := re.match(r"(to|on) the ", old.text.lower()):
        new = f"{side.group()}{new}"
    return [Edit(old.start, old.stop, new)]


def _add_obj(
    reading: Reading, told: Told, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Edit] | Refusal:
    things = [p.entry for p in reading.phrases if p.entry.kind not in UNPAINTED]
    if not things:
        return Refusal("no thing known by name")
    like = replace(things[rng.integers(len(things))], plural=False)
    new = vocabulary.noun(like, told, rng)
    if new is None:
        return Refusal("no other thing that no caption names")
    end = len(reading.text.rstrip(" .!"))
    added = edited(f"a {new}", [Edit(2, 2 + len(new), new)])
    return [Edit(end, end, f" and {added}")]


def _add_att(
    reading: Reading, told: Told, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Edit] | Refusal:
    bare = [p for p in reading.phrases if not p.adjectives and p.entry.kind not in UNPAINTED]
    bare = [
        p
        for p in bare
        if p.last == 0 or reading.pieces[p.last - 1].text.lower() in ("a", "an", "the")
    ]
    if not bare:
        return Refusal("no bare thing")
    thing = bare[rng.integers(len(bare))]
    new = vocabulary.adjective(ADDED, told.barred, rng)
    if new is None:
        return Refusal("no other adjective that no caption names")
    return [Edit(thing.noun.start, thing.noun.start, f"{new} ")]


RULES: dict[str, dict[str, Rule]] = {
    "swap": {"obj": _swap_obj, "att": _swap_att},
    "replace": {"obj": _replace_obj, "att": _replace_att, "rel": _replace_rel},
    "add": {"obj": _add_obj, "att": _add_att},
}
"""Family → name → rule; a category is `family_name`."""


def _pairs(phrases: Sequence[Phrase]) -> list[tuple[Phrase, Phrase]]:
    return [(a, b) for i, a in enumerate(phrases) for b in phrases[i + 1 :]]


def _either_way(reading: Reading, a: Phrase, b: Phrase) -> bool:
    """Do only symmetric words, and other things, stand between them?"""
    between = reading.pieces[a.last + 1 : b.last]
    return all(p.text.lower() in SYMMETRIC or p.of("noun") or p.of("adjective") for p in between)


def _told_apart(a: Phrase, b: Phrase) -> bool:
    """Are they described differently, so that exchanging their names alone says something else?"""
    return {x.entry for x in a.adjectives} != {y.entry for y in b.adjectives}


def _differ(a: Piece, b: Piece) -> bool:
    return bool(a.entry and b.entry and b.entry.group not in near(a.entry.group))


def _exchangeable(a: Piece, b: Piece) -> bool:
    """Adjectives that may change places without making nonsense: of one kind, or such as any thing may have."""
    assert a.entry
    assert b.entry
    return a.entry.kind == b.entry.kind or {a.entry.kind, b.entry.kind} <= FREE


def _exchange(a: Piece, b: Piece) -> list[Edit]:
    return [Edit(a.start, a.stop, b.text.lower()), Edit(b.start, b.stop, a.text.lower())]
