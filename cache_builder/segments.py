"""Parts of a caption that can be looked for one by one: noun phrases, and each two of them with what joins them.

    a red ball left of two wooden chairs  →  a red ball · two wooden chairs · a red ball left of two wooden chairs

Structure-guided inference (`heads/methods/sgi.py`) scores a caption by its parts, so each part is a text of the cache,
under the id `segment:PART`, in lower case, once however many captions share it:

    headstart build … --streams crop/pooled image/pooled text/pooled --set segments=rules      captions of val and test

A part ends where a verb, a preposition or a mark stands; without any noun phrase, the caption is its own only part.
There is no tagger: function words, -ing forms and the nouns of lexicon.py decide. On captions of `toy_world`, and of
any template "ATTR OBJ relation ATTR OBJ" in words that the lexicon knows, the parts are exact.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from cache_builder.datasets.base import Dataset, TextRecord
from cache_builder.errors import UnknownName
from cache_builder.lexicon import words
from cache_builder.reading import Piece, read

SPLITS = ("val", "test")
"""Splits whose captions get parts: what reads them is not trained."""

DETERMINERS = words(
    "a an the this that these those his her their its my your our some any no one two three "
    "four five six seven eight nine ten several many few both each every another"
)

CLOSERS = words(
    "of in on at with without by from near and or but to into onto over through across along "
    "around between beside against toward towards like as is are was were be being has have "
    "had for off past down up next while who that which there here it they he she not very"
)
"""Words that no noun phrase holds, if no determiner."""


def prefixed(part: str) -> str:
    """Id of a part among the texts."""
    return f"segment:{part}"


def segments(text: str) -> tuple[str, ...]:
    """Parts of a text in lower case, each once: noun phrases in order, then each two neighbours with what joins them.

    >>> segments("A man riding a wave on top of a surfboard.")
    ('a man', 'a wave', 'a surfboard', 'a man riding a wave', 'a wave on top of a surfboard')
    >>> segments("there is an orange ring")
    ('an orange ring',)
    """
    spans = _spans(text)
    joined = [(a[0], b[1]) for a, b in itertools.pairwise(spans)]
    parts = [" ".join(text[start:stop].lower().split()) for start, stop in (*spans, *joined)]
    whole = " ".join(text.lower().split())
    return tuple(dict.fromkeys(parts)) or (whole,)


def with_segments(dataset: Dataset, source: str) -> Dataset:
    """The data set with the parts of its captions of val and test among its texts.

    Raises:
        UnknownName: `source` is not "rules", or there are no captions in val or test.
    """
    if source != "rules":
        raise UnknownName(f"segments={source}: there is one way to cut captions, segments=rules")
    captions = captions_of(dataset)
    if not captions:
        raise UnknownName(
            f"segments=rules cuts captions of val and test, and {dataset.name} has none there; leave it out"
        )
    strings = {t.id: t.text for t in dataset.texts}
    parts = dict.fromkeys(part for c in captions for part in segments(strings[c]))
    texts = [TextRecord(prefixed(part), part) for part in parts]
    shown = f"{len(parts):,} parts of {len(captions):,} captions of val and test"
    return replace(
        dataset, texts=(*dataset.texts, *texts), counts={**dataset.counts, "segments": shown}
    )


def captions_of(dataset: Dataset) -> Sequence[str]:
    """Ids of the captions of val and test, each once."""
    tasks = dataset.tasks
    examples = (*tasks.retrieval, *tasks.matching, *tasks.two_by_two)
    return list(dict.fromkeys(c for e in examples if e.split in SPLITS for c in e.captions))


def _spans(text: str) -> list[tuple[int, int]]:
    """Places of the noun phrases: runs without verbs, prepositions and marks, up to the last noun that is known."""
    spans: list[tuple[int, int]] = []
    run: list[Piece] = []
    for piece in (*read(text).pieces, Piece(len(text), len(text), ".")):
        word = piece.text.lower()
        closes = (
            piece.of("relation")
            or (piece.entry is None and word.endswith("ing"))
            or (word in CLOSERS and word not in DETERMINERS)
            or not word[0].isalnum()
        )
        if closes or (run and word in DETERMINERS):
            spans += _span(run)
            run = []
        if not closes:
            run.append(piece)
    return spans


def _span(run: list[Piece]) -> list[tuple[int, int]]:
    """The noun phrase of a run: to its last known noun, or all of it if a determiner begins it."""
    nouns = [i for i, piece in enumerate(run) if piece.of("noun")]
    if nouns:
        return [(run[0].start, run[nouns[-1]].stop)]
    determined = len(run) > 1 and run[0].text.lower() in DETERMINERS
    return [(run[0].start, run[-1].stop)] if determined else []
