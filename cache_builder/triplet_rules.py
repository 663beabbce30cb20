"""The rules that turn a caption into an edit and the caption of the edited picture; `triplets.py` applies them.

    a red cup left of a dog    change the red cup to a red vase      a red vase left of a dog       substitute_obj
                               make the red cup blue                 a blue cup left of a dog       substitute_att
                               remove the dog                        a red cup                      remove_obj
                               the cup is no longer red              a cup left of a dog            remove_att
                               add a bench                           a red cup left of a dog and a bench    add_obj
                               make the dog striped                  a red cup left of a striped dog        add_att
    a man rides a horse        the man is wearing a hat              a man wearing a hat rides a horse      add_worn

A target caption is of another picture, so it need not be false of the reference: it must say something else than every
caption of the image does, and what is put in is nothing that they say of the same thing. What is edited is named so
that it can be no other thing of the caption. Where a caption leaves in doubt what belongs together, the rule gives
nothing and says why. The kinds of edits are RTD's (arXiv 2406.09188); rules and wording are ours.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np

from cache_builder.grammar import Clause, Thing
from cache_builder.lexicon import FREE, NOUNS, near, plural_of, words
from cache_builder.reading import Piece, Reading
from cache_builder.rewriting import (
    ADDED,
    PEOPLE,
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

T = TypeVar("T")

MASS = frozenset({"cover", "food (mass)"})
"""Kinds of nouns without an article."""

NEVER_ONE = frozenset({"scissors"})
"""Groups of nouns that have no singular, so that they are not put in."""

PLACES = frozenset({"room", "ground"})
"""Kinds of nouns that everything else is in."""

STAYING = PLACES | {"part"}
"""Kinds of nouns that are not removed."""

NOT_SAID_OF = frozenset({"place"})
"""Kinds of adjectives that stand before their noun alone: no cup is left-hand."""

LOOKS = {"colour": "color", "pattern": "pattern"}
"""Kind of adjectives → what may be removed by that name."""

CARRIED = words("umbrella backpack handbag purse suitcase")
IN_PAIRS = words("shoe boot glove sock")
"""Clothing that a person is with, not wearing; and such as is worn in twos."""

PRONOUNS = words("he she him his her hers himself herself")
"""Words that agree with one kind of person."""

DRESSED = words("wearing with in has have dressed holding carrying")
"""Words behind a person after which no clothing is added to them."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What all captions of an image say of it.

    Attributes:
        told: by groups, and as strings.
        said_of: group of a noun → groups of adjectives that some caption says of such a thing.

    """

    told: Told
    said_of: Mapping[str, frozenset[str]]

    @classmethod
    def by(cls, readings: Sequence[Reading]) -> "Shown":
        """What these captions say together."""
        found: dict[str, frozenset[str]] = {}
        for phrase in (p for reading in readings for p in reading.phrases):
            said = {g for a in phrase.adjectives if a.entry for g in near(a.entry.group)}
            for group in near(phrase.entry.group):
                found[group] = found.get(group, frozenset()) | said
        return cls(Told.by(readings), found)


class Change(NamedTuple):
    """An edit in words, and the caption after it."""

    modification: str
    target: str


class Draw:
    """What a rule draws with: the words of the set, and a generator."""

    def __init__(self, shown: Shown, vocabulary: Vocabulary, rng: np.random.Generator) -> None:
        self.shown, self.vocabulary, self.rng = shown, vocabulary, rng

    def one(self, among: Sequence[T]) -> T:
        """Any of several, all alike."""
        return among[int(self.rng.integers(len(among)))]

    def noun(self, thing: Thing) -> str | None:
        """Another noun of its kind, which no caption of the image names."""
        entry = thing.phrase.entry
        alike = next((s for s in (PEOPLE, MASS, PLACES) if entry.kind in s), None)
        without = frozenset(NOUNS) - alike if alike else PEOPLE | MASS | PLACES
        told = self.shown.told
        told = replace(told, barred=told.barred | NEVER_ONE)
        return self.vocabulary.noun(entry, told, self.rng, without)

    def adjective(self, thing: Thing, kinds: Sequence[str]) -> str | None:
        """An adjective that no caption of the image says of such a thing."""
        said = self.shown.said_of.get(thing.phrase.entry.group, frozenset())
        return self.vocabulary.adjective(kinds, said, self.rng)


Rule = Callable[[Clause, Draw], Change | Refusal]

NONE_ALONE = Refusal("nothing that is named by itself")


def changes(
    reading: Reading,
    shown: Shown,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    refused: Counter[str] | None = None,
) -> list[tuple[str, Change]]:
    """At most one change of every family, with the name of its rule, `family_name`.

    Args:
        reading: of the caption.
        shown: what all captions of its image say, this one among them.
        vocabulary: of the whole set.
        rng: draws the rule of each family, what it edits, and the wording.
        refused: why a rule gave nothing is added to it.
    """
    refused = Counter() if refused is None else refused
    clause, draw = Clause(reading), Draw(shown, vocabulary, rng)
    found: list[tuple[str, Change]] = []
    for family, rules in RULES.items():
        for name in [list(rules)[i] for i in rng.permutation(len(rules))]:
            change = rules[name](clause, draw)
            if isinstance(change, Change) and plainly(change.target) in shown.told.said:
                change = Refusal("a caption of the image says it")
            if isinstance(change, Change):
                found.append((f"{family}_{name}", change))
                break
            refused[f"{family}_{name}: {change.reason}"] += 1
    return found


def _substitute_obj(clause: Clause, draw: Draw) -> Change | Refusal:
    known = [t for t in clause.things if t.phrase.entry.kind != "anybody" and clause.is_whole(t)]
    if not known:
        return Refusal("no thing known by name")
    known = [t for t in known if _is_exchangeable(clause, t)]
    if not known:
        return Refusal("no thing that another may stand for")
    things = _alone(clause, known)
    if not things:
        return NONE_ALONE
    thing = draw.one(things)
    new = draw.noun(thing)
    if new is None:
        return Refusal("no other thing that no caption names")
    noun, text = thing.phrase.noun, clause.reading.text
    old = clause.name(thing)
    target = edited(text, [Edit(noun.start, noun.stop, new)])
    new = _determined(f"{text[thing.start : noun.start].lower()}{new}", thing)
    said = draw.one(
        [
            f"change the {old} to {new}",
            f"replace the {old} with {new}",
            f"turn the {old} into {new}",
            f"{new} instead of the {old}",
            f"has {new} instead of the {old}",
        ]
    )
    return Change(said, target)


def _substitute_att(clause: Clause, draw: Draw) -> Change | Refusal:
    found = _described(clause)
    if isinstance(found, Refusal):
        return found
    thing, old = draw.one(found)
    assert old.entry
    new = draw.adjective(thing, [old.entry.kind])
    if new is None and old.entry.kind in FREE:
        new = draw.adjective(thing, sorted(FREE))
    if new is None:
        return Refusal("no other adjective that no caption says of it")
    name, text = clause.name(thing), clause.reading.text
    edits = [Edit(old.start, old.stop, new)]
    inner = Edit(old.start - thing.start, old.stop - thing.start, new)
    whole = _determined(edited(text[thing.start : thing.stop].lower(), [inner]), thing)
    one = f"{new} ones" if thing.phrase.entry.plural else articled(f"{new} one")
    countable = thing.phrase.entry.kind not in MASS | PEOPLE | {"anybody"}
    ways = [f"has {whole} instead of the {old.text.lower()} one{'s' * thing.phrase.entry.plural}"]
    if not countable:
        ways = [f"change the {name} to {whole}"]
    else:
        ways += [f"change the {name} to {one}", f"replace the {name} with {one}"]
    if old.entry.kind not in NOT_SAID_OF:
        ways += [f"make the {name} {new}", f"the {name} should be {new}"]
    return Change(draw.one(ways), edited(text, edits))


def _remove_obj(clause: Clause, draw: Draw) -> Change | Refusal:
    numbers = [
        n
        for n, t in enumerate(clause.things)
        if t.phrase.entry.kind not in STAYING and _is_counted(clause, t)
    ]
    if not numbers:
        return Refusal("no thing known by name that could go")
    cut = [(clause.things[n], text) for n in numbers if (text := clause.without(n))]
    if not cut:
        return Refusal("nothing that can be cut out")
    cut = [(thing, text) for thing, text in cut if clause.is_alone(thing)]
    if not cut:
        return NONE_ALONE
    thing, target = draw.one(cut)
    old, are = clause.name(thing), "are" if thing.phrase.entry.plural else "is"
    ways = [
        f"remove the {old}",
        f"take away the {old}",
        f"without the {old}",
        f"there {are} no {old}",
    ]
    return Change(draw.one(ways), target)


def _remove_att(clause: Clause, draw: Draw) -> Change | Refusal:
    found = _described(clause)
    if isinstance(found, Refusal):
        return found
    found = [
        (t, a)
        for t, a in found
        if clause.is_alone(t, without=a) and a.entry and a.entry.kind not in NOT_SAID_OF
    ]
    if not found:
        return NONE_ALONE
    thing, old = draw.one(found)
    assert old.entry
    behind = next(p for p in clause.reading.pieces if p.start >= old.stop)
    text, are = clause.reading.text, "are" if thing.phrase.entry.plural else "is"
    name = f"{text[thing.start : old.start]}{text[behind.start : thing.stop]}".lower()
    word = old.text.lower()
    ways = [f"the {name} {are} no longer {word}", f"the {name} {are} not {word}"]
    if look := LOOKS.get(old.entry.kind):
        ways += [f"remove the {word} {look} from the {name}"]
    return Change(draw.one(ways), edited(text, [Edit(old.start, behind.stop, behind.text)]))


def _add_obj(clause: Clause, draw: Draw) -> Change | Refusal:
    things = [t for t in clause.things if t.phrase.entry.kind not in UNPAINTED | STAYING]
    if not things:
        return Refusal("no thing known by name")
    text = clause.reading.text.rstrip(" .!\n")
    ends = [n for n, p in enumerate(clause.reading.pieces) if p.stop == len(text)]
    if not ends or clause.letters[ends[0]] not in "Nu":
        return Refusal("it does not end in a thing")
    like = draw.one(things)
    single = replace(like.phrase, entry=replace(like.phrase.entry, plural=False))
    new = draw.noun(replace(like, phrase=single))
    if new is None:
        return Refusal("no other thing that no caption names")
    if all(p.adjectives for p in clause.reading.phrases):  # a caption that describes what it names
        free = [a.entry.kind for a in like.phrase.adjectives if a.entry and a.entry.kind in FREE]
        painted = draw.vocabulary.adjective(free, frozenset(), draw.rng)
        new = f"{painted} {new}" if painted else new
    new = articled(new)
    skipped = 2 if clause.words[0] == "there" else 0
    happens = set(clause.letters[skipped:]) & set("buv")
    plain = " with " if happens and "with" not in clause.words else " and "
    ways = [(f"add {new}", plain), (f"has {new}", plain), (f"there is also {new}", plain)]
    last = clause.things[-1]
    if last in things and last.stop == len(text) and last in _alone(clause, [last]):
        ways += [(f"add {new} next to the {clause.name(last)}", " next to ")]
    said, join = draw.one(ways)
    return Change(said, f"{text}{join}{new}{clause.reading.text[len(text) :]}")


def _add_att(clause: Clause, draw: Draw) -> Change | Refusal:
    bare = {p.last for p in bare_things(clause.reading)}
    things = [t for t in clause.things if t.phrase.last in bare and clause.is_whole(t)]
    things = [t for t in things if _is_counted(clause, t)]
    if not things:
        return Refusal("no bare thing")
    things = _alone(clause, things)
    if not things:
        return NONE_ALONE
    thing = draw.one(things)
    new = draw.adjective(thing, ADDED)
    if new is None:
        return Refusal("no other adjective that no caption says of it")
    name, noun = clause.name(thing), thing.phrase.noun
    are = "are" if thing.phrase.entry.plural else "is"
    ways = [
        f"make the {name} {new}",
        f"the {name} should be {new}",
        f"the {name} {are} {new}",
        f"has {_determined(f'{new} {name}', thing)}",
    ]
    edit = Edit(noun.start, noun.start, f"{new} ")
    if noun.start == 0:
        edit = Edit(0, noun.stop, f"{new} {noun.text.lower()}")
    return Change(draw.one(ways), edited(clause.reading.text, [edit]))


def _add_worn(clause: Clause, draw: Draw) -> Change | Refusal:
    people = [
        t
        for t in clause.things
        if t.phrase.entry.kind in PEOPLE | {"anybody"}
        and not t.phrase.entry.plural
        and clause.is_whole(t)
        and clause.after(t) not in ("c", "o", "w", "h")
        and not DRESSED & set(clause.words[t.phrase.last + 1 : t.phrase.last + 3])
    ]
    if not people:
        return Refusal("no person whose clothes are not told")
    people = _alone(clause, people)
    if not people:
        return NONE_ALONE
    thing = draw.one(people)
    new = draw.vocabulary.noun_of(["clothing"], draw.shown.told.barred, draw.rng)
    if new is None:
        return Refusal("no clothing that no caption names")
    verb = "with" if new in CARRIED else "wearing"
    worn = plural_of(new) if new in IN_PAIRS else articled(new)
    name, text = clause.name(thing), clause.reading.text
    said = draw.one(
        [
            f"the {name} has {worn}" if new in CARRIED else f"the {name} is wearing {worn}",
            f"add {worn} to the {name}",
            f"has {worn}",
        ]
    )
    return Change(said, f"{text[: thing.stop]} {verb} {worn}{text[thing.stop :]}")


RULES: dict[str, dict[str, Rule]] = {
    "substitute": {"obj": _substitute_obj, "att": _substitute_att},
    "remove": {"obj": _remove_obj, "att": _remove_att},
    "add": {"obj": _add_obj, "att": _add_att, "worn": _add_worn},
}
"""Family, which is the category of a triplet → name → rule."""


def _alone(clause: Clause, things: Sequence[Thing]) -> list[Thing]:
    return [t for t in things if clause.is_alone(t)]


def _is_exchangeable(clause: Clause, thing: Thing) -> bool:
    """May another noun stand for it, with all other words kept?"""
    entry = thing.phrase.entry
    if clause.after(thing) == "o" or "N" in clause.letters[thing.first : thing.phrase.first]:
        return False  # a cup of coffee, a dog bowl
    if not _is_counted(clause, thing):
        return False
    if entry.kind == "person" and PRONOUNS & set(clause.words):
        return False  # a man as he eats
    if entry.kind == "cover" and clause.letters[: thing.begin].endswith("o"):
        return False  # a body of water
    return not (entry.plural and entry.kind in MASS)


def _is_counted(clause: Clause, thing: Thing) -> bool:
    """Is it plain whether it is one or several? Not of sheep, unless it is a sheep."""
    lemma = thing.phrase.entry.lemma
    return plural_of(lemma) != lemma or clause.words[thing.begin] in ("a", "an")


def _described(clause: Clause) -> list[tuple[Thing, Piece]] | Refusal:
    """Things named by themselves with each of their adjectives that stands by itself."""
    whole = [t for t in clause.things if clause.is_whole(t) and _is_counted(clause, t)]
    found = [(t, a) for t in whole for a in t.phrase.adjectives if not _is_of_people(t, a)]
    if not found:
        return Refusal("nothing described")
    found = [(t, a) for t, a in found if _stands_alone(clause, t, a)]
    if not found:
        return Refusal("described in more words than are known")
    found = [(t, a) for t, a in found if clause.is_alone(t)]
    return found or NONE_ALONE


def _is_of_people(thing: Thing, adjective: Piece) -> bool:
    """Is it a colour of a person? That is no edit of a picture."""
    people = thing.phrase.entry.kind in PEOPLE | {"anybody"}
    return bool(people and adjective.entry and adjective.entry.kind == "colour")


def _stands_alone(clause: Clause, thing: Thing, adjective: Piece) -> bool:
    """Can it be taken out? Not from black and white, light blue, dark blue or very small."""
    number = next(n for n, p in enumerate(clause.reading.pieces) if p is adjective)
    if number == 0:
        return True
    before = clause.reading.pieces[number - 1]
    if number > thing.phrase.first:
        return before.entry is not None and before.entry.kind != "light"
    return clause.letters[number - 1] in "dpbho"


def _determined(words: str, thing: Thing) -> str:
    """Words for a thing, with an article where it takes one."""
    entry = thing.phrase.entry
    return words if entry.plural or entry.kind in MASS else articled(words)
