"""False captions by rule: hard negatives for data sets that have captions and nothing else.

    headstart build … --dataset coco --set negatives=rules          seed 0; negatives=rules:7 is seed 7

    caption                             false caption                           category
    a red car left of a blue bus        a blue car left of a red bus            swap_att
                                        a red bus left of a blue car            swap_obj
                                        a green car left of a blue bus          replace_att
                                        a red truck left of a blue bus          replace_obj
                                        a red car right of a blue bus           replace_rel
    a car on a street                   a purple car on a street                add_att
                                        a car on a street and a bench           add_obj

Every caption of train and val that has a false one becomes a `matching` example (image, caption, false caption); one
rule is drawn for each, by the seed and the caption's id: first whether to swap, replace or add, then how, and the next
where that does not apply. New words are drawn as often as the set's own captions say them, so that a false caption is
not known by its rare words. No caption of the image is ever a false one, and nothing that another caption of the image
names is put in or added. What is put in may still be true by chance, where all captions of an image are silent about
it. test stays as it is: these rules are for training and are no benchmark.

The idea of such rules is old (see SugarCrepe, arXiv 2306.14610, for what is wrong with them as a test); the rules, the
lexicon (lexicon.py) and the names of their categories, which follow SugarCrepe's, are ours.
"""

import re
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np

from cache_builder.datasets.base import Dataset, MatchingExample, TextRecord
from cache_builder.errors import UnknownName
from cache_builder.negative_rules import RULES, Told, Vocabulary, false_caption
from cache_builder.reading import read

SPLITS = ("train", "val")
"""Splits that get false captions."""


def with_negatives(dataset: Dataset, source: str) -> Dataset:
    """The data set with a false caption for every caption of train and val that has one.

    Args:
        dataset: with a retrieval task and no matching examples of train or val.
        source: "rules", or "rules:SEED".

    Raises:
        UnknownName: it is another word, the data set has no captions in train or val, or hard negatives of its own, or
            no rule applies to a single caption.
    """
    asked = re.fullmatch(r"rules(?::(\d{1,9}))?", source)
    if asked is None:
        raise UnknownName(
            f"negatives={source}: write negatives=rules, or negatives=rules:SEED with a whole number"
        )
    seed = int(asked.group(1) or 0)
    if any(e.split in SPLITS for e in (*dataset.tasks.matching, *dataset.tasks.two_by_two)):
        raise UnknownName(
            f"negatives={source}: {dataset.name} has hard negatives of its own; leave it out"
        )
    images = [e for e in dataset.tasks.retrieval if e.split in SPLITS and e.captions]
    if not images:
        raise UnknownName(
            f"negatives={source} makes false captions of those of train and val, and {dataset.name} has none there"
        )
    strings = {t.id: t.text for t in dataset.texts}
    readings = {c: read(strings[c]) for e in images for c in e.captions}
    vocabulary = Vocabulary(list(readings.values()))
    made, refused = Counter[str](), Counter[str]()
    texts: list[TextRecord] = []
    examples: list[MatchingExample] = []
    for e in images:
        told = Told.by([readings[c] for c in e.captions])
        for c in e.captions:
            rng = np.random.default_rng([seed, zlib.crc32(f"{e.image}\n{c}".encode())])
            found = false_caption(readings[c], told, vocabulary, rng, refused)
            if found is None:
                made["no rule applies"] += 1
                continue
            category, text = found
            made[category] += 1
            name = f"rules/{e.image}/{c}"
            texts.append(TextRecord(name, text))
            examples.append(MatchingExample(name, (e.image,), (c, name), category, e.split))
    if not examples:
        raise UnknownName(
            f"negatives={source}: no rule applies to any of the {made.total():,} captions of {dataset.name}; the rules "
            "know common English words for what pictures show"
        )
    return replace(
        dataset,
        texts=(*dataset.texts, *texts),
        tasks=replace(dataset.tasks, matching=(*dataset.tasks.matching, *examples)),
        counts={**dataset.counts, **_counts(made, refused, seed)},
    )


def _counts(made: Counter[str], refused: Counter[str], seed: int) -> dict[str, str]:
    """For people: what came of the captions, and of every rule that was tried."""
    categories = [f"{family}_{name}" for family, rules in RULES.items() for name in rules]
    whole = {f"negatives, {c}": f"{made[c]:,}" for c in categories}
    without = {"negatives, captions without": f"{made['no rule applies']:,}"}
    why = {f"negatives, not {reason}": f"{n:,}" for reason, n in sorted(refused.items())}
    return {"negatives": f"by rule, seed {seed}", **whole, **without, **why}
