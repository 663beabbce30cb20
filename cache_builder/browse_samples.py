"""Which images `headstart browse` looks at, and what the tasks say of them: the same samples in every cache."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from cache_builder.cache import FeatureCache
from cache_builder.datasets.base import (
    CompositionExample,
    MatchingExample,
    RetrievalExample,
    Tasks,
)
from cache_builder.errors import CacheMismatch, UnknownName

MOST = 20_000
"""Images looked at unless told otherwise: 59 MiB a backbone at D = 768."""

MOST_MEANS = 2_000
"""The same where a cache has no pooled embeddings: patches are read, 2.2 GiB of a ViT-L/14 at 336 pixels."""

LABELS = 12
"""Labels and captions of an image that are shown."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Images that all caches hold, in the row order of the first, a seeded permutation: the first n are a fair sample.

    Attributes:
        ids: of those looked at.
        total: how many there are in the split, quarantined ones left out.
        bad: id → why it is in quarantine, in any of the caches.
        splits: id → the splits it occurs in.
        says: id → its labels and captions.
        texts: text id → string.
    """

    ids: tuple[str, ...]
    total: int
    bad: Mapping[str, str]
    splits: Mapping[str, tuple[str, ...]]
    says: Mapping[str, tuple[str, ...]]
    texts: Mapping[str, str]


def samples_of(caches: Sequence[FeatureCache], split: str | None, most: int) -> Samples:
    """Choose what to look at.

    Args:
        caches: of the same samples.
        split: only its images; None is all.
        most: images at most.

    Raises:
        CacheMismatch: the caches hold different samples; names ids that differ.
        UnknownName: no such split, or no image is left.
    """
    first = caches[0]
    for other in caches[1:]:
        _check_same(first, other)
    texts = dict(zip(first.text_ids, first.texts, strict=True))
    splits: dict[str, list[str]] = {}
    for image, name in _splits(first.tasks):
        found = splits.setdefault(image, [])
        if name not in found:
            found.append(name)
    known = sorted({name for names in splits.values() for name in names})
    if split is not None and split not in known:
        raise UnknownName(
            f"{first.place} has no images of split {split!r} (it has: {', '.join(known) or 'no splits'})"
        )
    bad = {image: why for cache in caches for image, why in cache.quarantined.items()}
    left = [
        image
        for image in first.image_ids
        if image not in bad and (split is None or split in splits.get(image, ()))
    ]
    if not left:
        raise UnknownName(
            f"{first.place} has no image to look at{f' in split {split!r}' if split else ''}: "
            f"{len(bad)} of {len(first.image_ids)} are in quarantine; repair their files and build again"
        )
    ids = tuple(left[:most])
    return Samples(
        ids=ids,
        total=len(left),
        bad=bad,
        splits={image: tuple(names) for image, names in splits.items()},
        says=_labels(first.tasks, texts, {*ids}),
        texts=texts,
    )


def found_texts(samples: Samples, words: str, most: int) -> list[tuple[str, str]]:
    """Id and string of the first cached texts that hold all of the words; one that equals them first, each once."""
    wanted = words.lower().split()
    found: dict[str, str] = {}
    for text_id, text in samples.texts.items():
        if text.lower().split() == wanted:
            found[text] = text_id
            break
    for text_id, text in samples.texts.items():
        if len(found) == most:
            break
        if all(word in text.lower() for word in wanted):
            found.setdefault(text, text_id)
    return [(text_id, text) for text, text_id in found.items()]


def found_images(samples: Samples, words: str) -> list[int]:
    """Places of the images whose id, split, labels or captions hold all of the words."""
    wanted = words.lower().split()
    if not wanted:
        return list(range(len(samples.ids)))

    def body(image: str) -> str:
        parts = (image, *samples.splits.get(image, ()), *samples.says.get(image, ()))
        return " ".join(parts).lower()

    return [i for i, image in enumerate(samples.ids) if all(w in body(image) for w in wanted)]


def _check_same(one: FeatureCache, other: FeatureCache) -> None:
    """Refuse caches of different samples; tasks may differ, as options that add some do."""
    names = one.spec.dataset.name, other.spec.dataset.name
    if names[0] != names[1]:
        raise CacheMismatch(
            f"{one.place} holds {names[0]} and {other.place} holds {names[1]}; browse caches of the same samples "
            "together, others one by one"
        )
    strings = [dict(zip(cache.text_ids, cache.texts, strict=True)) for cache in (one, other)]
    for side, a, b in (
        ("image", dict.fromkeys(one.image_ids), dict.fromkeys(other.image_ids)),
        ("text", *strings),
    ):
        differ = [key for key in {**a, **b} if key not in a or key not in b or a[key] != b[key]]
        if differ:
            named = ", ".join(map(repr, differ[:3])) + ", …" * (len(differ) > 3)
            raise CacheMismatch(
                f"{one.place} and {other.place} hold different samples: {len(differ)} {side} ids are in one of them "
                f"only, or say something else ({named}); build both from the same data set, or browse them one by one"
            )


def _splits(tasks: Tasks) -> Iterator[tuple[str, str]]:
    """Image and split, of every task."""
    for example in chain.from_iterable(map(tasks.examples, tasks.kinds)):
        for image in example.images:
            yield image, example.split


def _labels(tasks: Tasks, texts: Mapping[str, str], wanted: set[str]) -> dict[str, tuple[str, ...]]:
    """Pairs and true captions; false captions are not said of an image."""
    found: dict[str, dict[str, None]] = {}
    for image, said in _said(tasks, texts):
        if image in wanted:
            found.setdefault(image, {})[said] = None
    return {image: tuple(islice(said, LABELS)) for image, said in found.items()}


def _said(tasks: Tasks, texts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for example in chain.from_iterable(map(tasks.examples, tasks.kinds)):
        if isinstance(example, CompositionExample):
            yield example.image, f"{example.attr} {example.obj}"
        elif isinstance(example, RetrievalExample):
            yield from ((example.image, texts[caption]) for caption in example.captions)
        elif isinstance(example, MatchingExample):
            # among matching one image with the true caption first; among two_by_two caption i is of image i
            pairs = zip(example.images, example.captions, strict=False)
            yield from ((image, texts[caption]) for image, caption in pairs)
