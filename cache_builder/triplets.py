"""Text-anchored triplets of a data set: an image, an edit in words, and the caption of the edited picture.

    headstart build … --dataset coco --set triplets=rules                  seed 0; triplets=rules:7 is seed 7
    headstart build … --dataset coco --set triplets=triplets.jsonl         a published file, or what `headstart
                                                                           triplets` wrote (triplet_files.py)

By rule, every caption of train and val gets at most one triplet of each category (substitute, remove, add), drawn by
the seed, the image and the caption's id; test has none. Strings become texts of the cache, each once however many
triplets share it, under an id that they have already or `triplet:STRING`. Whether a string fits a tokenizer, and how
close two captions are, is known only with a backbone, and looked at when heads are trained.
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cache_builder.datasets.base import Dataset, TextRecord, TripletExample
from cache_builder.errors import UnknownName
from cache_builder.reading import read
from cache_builder.rewriting import Vocabulary
from cache_builder.triplet_files import (
    CATEGORIES,
    LEARNED,
    Caption,
    Triplet,
    fault,
    read_triplets,
    require_images,
)
from cache_builder.triplet_rules import RULES, Shown, changes


@dataclass(frozen=True, slots=True)
class Made:
    """What the rules made of captions.

    Attributes:
        triplets: in the order of the captions.
        by_rule: name of a rule → how many it made.
        refused: rule and reason → how often it gave nothing.
        captions: how many were asked.
        without: how many of them have no triplet.

    """

    triplets: tuple[Triplet, ...]
    by_rule: Counter[str]
    refused: Counter[str]
    captions: int
    without: int


def with_triplets(dataset: Dataset, source: str) -> Dataset:
    """The data set with triplets, and their strings among its texts.

    Args:
        dataset: with captions in train or val, for rules.
        source: "rules", "rules:SEED", or a path of a file of triplets.

    Raises:
        UnknownName: rules with something else for a seed, no captions in train or val, or no rule applies at all.
        DatasetError, FileNotFoundError: the file cannot be read, or names images that the data set does not have.
    """
    asked = re.fullmatch(r"rules(?::(.*))?", source)
    if asked is None:
        found = read_triplets(Path(source))
        require_images((i.id for i in dataset.images), found.triplets, source)
        kinds = Counter(t.category or "without a category" for t in found.triplets)
        counts = {"triplets": f"{len(found.triplets):,} of {Path(source).name}"}
        counts |= {f"triplets, {kind}": f"{n:,}" for kind, n in sorted(kinds.items())}
        if found.ignored:
            counts["triplets, keys ignored"] = ", ".join(map(repr, found.ignored))
        return _joined(dataset, found.triplets, counts)
    seed = asked[1] or "0"
    if not re.fullmatch(r"\d{1,9}", seed) or source == "rules:":
        raise UnknownName(
            f"triplets={source}: write triplets=rules, triplets=rules:SEED with a whole number, or a path of a file"
        )
    captions = captions_of(dataset)
    if not captions:
        raise UnknownName(
            f"triplets={source} edits captions of train and val, and {dataset.name} has none there"
        )
    made = by_rules(captions, int(seed))
    if not made.triplets:
        raise UnknownName(
            f"triplets={source}: no rule applies to any of the {made.captions:,} captions of {dataset.name}; the rules "
            "know common English words for what pictures show"
        )
    return _joined(dataset, made.triplets, _counts(made, int(seed)))


def captions_of(dataset: Dataset) -> list[Caption]:
    """Captions of train and val, each once an image."""
    strings = {t.id: t.text for t in dataset.texts}
    listed = {
        (e.image, c): Caption(c, e.image, strings[c], e.split)
        for e in dataset.tasks.retrieval
        if e.split in LEARNED
        for c in e.captions
    }
    return list(listed.values())


def by_rules(captions: Sequence[Caption], seed: int) -> Made:
    """What the rules make of captions of train and val; their order is no matter.

    Args:
        captions: all of the set, since what is put in is drawn from them.
        seed: draws rules, words and wording, together with the image and the caption's id.
    """
    readings = {c.name: read(c.text) for c in captions}
    of_image: dict[str, list[Caption]] = {}
    for c in captions:
        of_image.setdefault(c.image, []).append(c)
    vocabulary = Vocabulary(list(readings.values()))
    triplets: list[Triplet] = []
    by_rule, refused, without = Counter[str](), Counter[str](), 0
    shown = {i: Shown.by([readings[c.name] for c in cs]) for i, cs in of_image.items()}
    for c in captions:
        rng = np.random.default_rng([seed, zlib.crc32(f"{c.image}\n{c.id}".encode())])
        before = len(triplets)
        for rule, change in changes(readings[c.name], shown[c.image], vocabulary, rng, refused):
            if reason := fault(c.text, change.modification, change.target):
                refused[f"{rule}: {reason}"] += 1
                continue
            by_rule[rule] += 1
            family = rule.partition("_")[0]
            triplets.append(
                Triplet(
                    f"rules/{c.name}/{family}",
                    c.image,
                    c.text,
                    change.modification,
                    change.target,
                    c.split,
                    family,
                )
            )
        without += len(triplets) == before
    return Made(tuple(triplets), by_rule, refused, len(captions), without)


def prefixed(text: str) -> str:
    """Id of a string that only triplets say, among the texts."""
    return f"triplet:{text}"


def _joined(dataset: Dataset, triplets: Sequence[Triplet], counts: dict[str, str]) -> Dataset:
    """The data set with these triplets, each string a text once."""
    ids: dict[str, str] = {}
    for t in dataset.texts:
        ids.setdefault(t.text, t.id)
    texts: list[TextRecord] = []

    def text_id(text: str) -> str:
        if text not in ids:
            ids[text] = prefixed(text)
            texts.append(TextRecord(ids[text], text))
        return ids[text]

    examples = [
        TripletExample(
            t.id,
            t.image,
            text_id(t.reference_caption),
            text_id(t.modification),
            text_id(t.target_caption),
            t.category,
            t.split,
        )
        for t in triplets
    ]
    added = {"triplets, texts added": f"{len(texts):,}"}
    return replace(
        dataset,
        texts=(*dataset.texts, *texts),
        tasks=replace(dataset.tasks, triplets=(*dataset.tasks.triplets, *examples)),
        counts={**dataset.counts, **counts, **added},
    )


def _counts(made: Made, seed: int) -> dict[str, str]:
    """For people: what came of the captions, and of every rule that was tried."""
    kinds = Counter(t.category for t in made.triplets)
    rules = [f"{family}_{name}" for family, names in RULES.items() for name in names]
    return {
        "triplets": f"{len(made.triplets):,} by rule, seed {seed}",
        **{f"triplets, {kind}": f"{kinds[kind]:,}" for kind in CATEGORIES},
        **{f"triplets, {rule}": f"{made.by_rule[rule]:,}" for rule in rules},
        "triplets, captions without": f"{made.without:,}",
        **{f"triplets, not {reason}": f"{n:,}" for reason, n in sorted(made.refused.items())},
    }
