"""The rules that make a false caption of a true one; `negatives.py` applies them to a data set.

Each rule gets what the lexicon reads in a caption, what all captions of the image say, and the words of the whole set;
it returns edits of the string (rewriting.py), or why it has none.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cache_builder.lexicon import FREE, SYMMETRIC, near
from cache_builder.reading import Phrase, Piece, Reading
from cache_builder.rewriting import (
    ADDED,
    UNPAINTED,
    Edit,
    Refusal,
    Told,
    Vocabulary,
    articled,
    bare_things,
    edited,
    plainly,
)

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
    return [Edit(end, end, f" and {articled(new)}")]


def _add_att(
    reading: Reading, told: Told, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Edit] | Refusal:
    bare = bare_things(reading)
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
