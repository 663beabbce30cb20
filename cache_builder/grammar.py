"""How the words of a caption hang together, as far as cutting a thing out of it needs to know; no parser.

Every piece has a class of one letter, and a run of them is matched as a string:

    a  red  cup  on  top  of  the  side  of  a  box   .
    d   A    N   p-----------  d    m    o   d   N    .        cup│ on top of the side of a box │.

    d determiner or number · A adjective · N noun · p preposition or relation · o of · c and, or, comma · b is, are
    h has, have · w that, who · v -ing or -ed · m side, pair, group … · u any other word · . any other mark

Where these letters do not settle it, nothing is cut: an unknown word after a noun may be the true head of a compound
("a bus stop"), so that noun names nothing for certain.
"""

import re
from dataclasses import dataclass

from cache_builder.lexicon import near, words
from cache_builder.reading import Phrase, Piece, Reading
from cache_builder.rewriting import PEOPLE
from cache_builder.segments import DETERMINERS

CLASSES = {
    "o": words("of"),
    "c": words("and or , & / plus"),
    "b": words("is are was were be being been"),
    "h": words("has have had having"),
    "w": words("that who which"),
    "p": words(
        "in on at with without by from near to into onto over through across along around between beside against "
        "toward towards off past down up next out inside outside above below under behind beneath upon during"
    ),
    "m": words(
        "side top front back middle center edge corner end pair group bunch slice piece couple stack pile herd flock "
        "lot row set variety bit part"
    ),
}
"""Letter → its words; what else is a determiner, an -ing form and so on is found by rule."""

PRONOUNS = words("this that these those her some any all each many several few both no")
"""Determiners that may also stand for a thing, so that the word behind them may be a verb."""

OWN = words("his her their its my your our")
"""Determiners that point back to somebody."""

THERE = {(), ("there", "is"), ("there", "are"), ("this", "is"), ("these", "are")}
"""What may stand before the first thing of a caption that is cut out."""

TRAILING = re.compile(r"w?(?:b?v?[po]+|b?v|h)(?:d*m[po]*)?d*|c{1,2}(?:d*mo)?d*")
"""What may stand between the thing before and one that is cut out with it."""

LEADING = re.compile(r"p+(?:dm?o)?d*|cd*")
"""What may stand between the first thing and the next, to be cut out with the first."""

TOGETHER = words("between both either neither together each")
"""Words of a caption that want two things."""


def letter(piece: Piece) -> str:
    """Class of a piece."""
    word = piece.text.lower()
    if piece.entry is not None:
        return {"noun": "N", "adjective": "A", "relation": "p", "word": "u"}[piece.entry.role]
    for name, listed in CLASSES.items():
        if word in listed:
            return name
    if word in DETERMINERS or word.isdigit():
        return "d"
    if not word[0].isalnum():
        return "."
    return "v" if re.fullmatch(r".{2,}(ing|ed)", word) else "u"


@dataclass(frozen=True, slots=True)
class Thing:
    """A phrase with all words up to its determiners; places are those of pieces.

    Attributes:
        phrase: its noun and known adjectives.
        begin: of the first determiner.
        first: of the first word behind them, which the lexicon need not know.
        start, stop: places in the string, from `first` to the end of the noun.

    """

    phrase: Phrase
    begin: int
    first: int
    start: int
    stop: int


class Clause:
    """A caption with the class of every piece, and its things."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.letters = "".join(letter(piece) for piece in reading.pieces)
        self.words = [piece.text.lower() for piece in reading.pieces]
        heads = {p.last for p in reading.phrases}
        self.things = [self._thing(p, heads) for p in reading.phrases]

    def _thing(self, phrase: Phrase, heads: set[int]) -> Thing:
        """Takes in nouns and one word that is not known, if a determiner stands before them: the fluffy dog bowl."""
        first = phrase.first
        while first and self.letters[first - 1] in "NA" and first - 1 not in heads:
            first -= 1
        before = self.letters[max(first - 2, 0) : first]
        if re.fullmatch("d[uv]", before) and self.words[first - 2] not in PRONOUNS:
            first -= 1
        elif not before.endswith("d"):
            first = phrase.first
        begin = first
        while begin and self.letters[begin - 1] == "d":
            begin -= 1
        return Thing(phrase, begin, first, self.reading.pieces[first].start, phrase.noun.stop)

    def name(self, thing: Thing) -> str:
        """What the caption calls it, without determiners, in lower case."""
        return " ".join(self.reading.text[thing.start : thing.stop].lower().split())

    def after(self, thing: Thing) -> str:
        """Class of what follows; "" at the end."""
        return self.letters[thing.phrase.last + 1 : thing.phrase.last + 2]

    def is_whole(self, thing: Thing) -> bool:
        """Is its noun the head for certain?"""
        follows = self.after(thing)
        if follows == "u" and thing.phrase.entry.kind in PEOPLE | {"anybody", "animal"}:
            word = self.words[thing.phrase.last + 1]  # a man rides, a dog sits
            return word.endswith("s") and "'" not in word and word != "tennis"
        if follows == "v" and self.words[thing.phrase.last + 1].endswith("ed"):
            return self.letters[thing.phrase.last + 2 :][:1] in (
                "",
                ".",
                "p",
            )  # heart shaped pillows
        return follows == "" or follows in ".cpobhwv"

    def is_alone(self, thing: Thing, without: Piece | None = None) -> bool:
        """Is no other thing of the caption called so too, by its noun and adjectives (but for one)?"""
        mine = {a.entry.group for a in thing.phrase.adjectives if a.entry and a is not without}
        return not any(
            other is not thing.phrase
            and other.entry.group in near(thing.phrase.entry.group)
            and mine <= {a.entry.group for a in other.adjectives if a.entry}
            for other in self.reading.phrases
        )

    def without(self, n: int) -> str | None:
        """The caption without its thing n, and what joins it to the others; None where that cannot be told."""
        thing = self.things[n]
        if not self.is_whole(thing) or self.after(thing) in ("o", "w", "u"):
            return None
        return (self._without_trailing(n) if n else None) or self._without_leading(n)

    def _without_trailing(self, n: int) -> str | None:
        """A red cup left of a blue ring → a red cup."""
        before, thing = self.things[n - 1], self.things[n]
        between = self.letters[before.phrase.last + 1 : thing.first]
        behind = self.words[thing.phrase.last + 1 : thing.phrase.last + 3]
        if (
            not TRAILING.fullmatch(between)
            or not self._may_stand_apart(between, self.after(thing))
            or (set("wh") & set(between) and self.after(thing) not in ("", "."))
            or (behind[1:] and behind[1] in OWN)  # holding a phone in her hand
            or (
                self.after(thing) == "v" and behind[0].endswith("ed")
            )  # a wall with clocks mounted to it
        ):
            return None
        text = self.reading.text
        return f"{text[: before.stop]}{text[thing.stop :]}"

    def _without_leading(self, n: int) -> str | None:
        """A red cup left of a blue ring → a blue ring."""
        if n or len(self.things) < 2:
            return None
        thing, follower = self.things[:2]
        between = self.letters[thing.phrase.last + 1 : follower.first]
        rest = self.letters[follower.phrase.last + 1 :]
        one_number = thing.phrase.entry.plural == follower.phrase.entry.plural
        said_before = tuple(self.words[: thing.begin])
        if (
            said_before not in THERE
            or not LEADING.fullmatch(between)
            or not self.is_whole(follower)
            or follower.phrase.entry.kind == "clothing"
            or not (one_number or (not said_before and not rest.strip(".")))
            or not self._may_stand_apart(between, rest[:1])
        ):
            return None
        pieces, text = self.reading.pieces, self.reading.text
        start, stop = pieces[thing.begin].start, pieces[follower.begin].start
        kept = text[stop:]
        if text[start].isupper():
            kept = kept[:1].upper() + kept[1:]
        return f"{text[:start]}{kept}"

    def _may_stand_apart(self, between: str, follows: str) -> bool:
        """Does what is left need neither two things nor a verb in the plural?"""
        if between.startswith("c"):
            alone = self.letters.count("c") == len(between) - len(between.lstrip("c"))
            return alone and follows in ("", ".", "p", "v") and not TOGETHER & set(self.words)
        return follows != "c"
