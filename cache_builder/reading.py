"""A caption read by the lexicon: its words in order, and the noun phrases among them; no tagger.

    "a red ball on two wooden chairs"
       a   red/colour  ball/sport   on/RELATION   two  wooden/material  chairs/furniture (plural)
    →  phrases [red] ball · [wooden] chairs, and one relation between them

A word that is both (an orange, an orange cup) is an adjective where a noun or an adjective follows at once. A noun
where a verb would stand (a man skis) is a plain word, like every word that is not listed.
"""

import re
from dataclasses import dataclass, field

from cache_builder.lexicon import OPENERS, VERB_LIKE, Entry, Role, lexicon


@dataclass(frozen=True, slots=True)
class Piece:
    """A word of a caption, or several that are one entry; `start` and `stop` are places in the string."""

    start: int
    stop: int
    text: str
    entry: Entry | None = None

    def of(self, role: Role) -> bool:
        """Is it one?"""
        return self.entry is not None and self.entry.role == role


@dataclass(frozen=True, slots=True)
class Phrase:
    """A noun with the adjectives right before it; `first` and `last` are numbers of pieces, last that of the noun."""

    noun: Piece
    entry: Entry
    adjectives: tuple[Piece, ...]
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A caption by the lexicon: all its pieces, and the phrases among them, in order."""

    text: str
    pieces: tuple[Piece, ...]
    phrases: tuple[Phrase, ...] = field(default=())

    def groups(self) -> set[str]:
        """Groups of all nouns and adjectives named."""
        return {p.entry.group for p in self.pieces if p.entry and p.entry.role != "relation"}


def read(text: str) -> Reading:
    """A caption by the lexicon.

    >>> [(p.noun.text, [a.text for a in p.adjectives]) for p in read("a red cup left of two wooden chairs").phrases]
    [('cup', ['red']), ('chairs', ['wooden'])]
    """
    pieces = tuple(_without_verbs(_pieces(text)))
    phrases, adjectives, begun = [], [], 0
    for i, piece in enumerate(pieces):
        if piece.of("adjective"):
            begun = begun if adjectives else i
            adjectives.append(piece)
            continue
        after = pieces[i + 1] if i + 1 < len(pieces) else None
        if piece.of("noun") and piece.entry:
            begun = begun if adjectives else i
            if not (after and after.of("noun") and piece.entry.lemma == piece.text.lower()):
                phrases.append(Phrase(piece, piece.entry, tuple(adjectives), begun, i))
        adjectives = []
    return Reading(text, pieces, tuple(phrases))


def _without_verbs(pieces: list[Piece]) -> list[Piece]:
    """Nouns that stand where a verb would are plain words."""
    found: list[Piece] = []
    for piece in pieces:
        verb = piece.of("noun") and (
            (found[-1].of("noun") and piece.text.lower() in VERB_LIKE)
            if found and found[-1].entry
            else not _may_begin(found)
        )
        found.append(Piece(piece.start, piece.stop, piece.text) if verb else piece)
    return found


def _may_begin(before: list[Piece]) -> bool:
    """May a noun follow here: at the start, after an opener, an -ing form or a mark, or two unknown words after one?"""
    for piece in reversed(before[-3:]):
        word = piece.text.lower()
        if piece.of("relation") or word in OPENERS or word.endswith("ing") or not word[0].isalnum():
            return True
        if piece.entry is not None or word.isdigit():
            return not piece.of("noun")
    return len(before) < 3


LONGEST = 4
"""Words of the longest entry: on the left of."""

WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")


def _pieces(text: str) -> list[Piece]:
    """Words of a text, the longest entries first."""
    words = list(WORD.finditer(text))
    found: list[Piece] = []
    i = 0
    while i < len(words):
        n = next(n for n in range(LONGEST, 0, -1) if n == 1 or _said(words[i : i + n]) in lexicon())
        n = min(n, len(words) - i)
        after = words[i + n].group() if i + n < len(words) else ""
        start, stop = words[i].start(), words[i + n - 1].end()
        entry = _chosen(lexicon().get(_said(words[i : i + n]), ()), after)
        found.append(Piece(start, stop, text[start:stop], entry))
        i += n
    return found


def _said(words: list[re.Match[str]]) -> str:
    return " ".join(word.group().lower() for word in words)


def _chosen(entries: tuple[Entry, ...], after: str) -> Entry | None:
    """An adjective's reading where a noun or an adjective follows at once, else the noun's."""
    if len(entries) < 2:
        return entries[0] if entries else None
    follows = any(e.role in ("noun", "adjective") for e in lexicon().get(after.lower(), ()))
    wanted = "adjective" if follows else "noun"
    return next((e for e in entries if e.role == wanted), entries[0])
