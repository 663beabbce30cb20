"""Samples appended to a sealed cache: the next generation, which begins with all that the cache holds.

    photos.zarr           sealed, and read by others all the while
    .photos.zarr.next     the next generation: chunks that stay the same are links, a chunk that is cut by the border
                          begins with the old rows, new rows are encoded
    then the two change places in one step, and the old one goes

A sealed cache is never written to; an append that is stopped leaves it as it was, and is resumed by repeating it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_builder.backbones.base import Backbone
from cache_builder.cache import Contents, FeatureCache
from cache_builder.chunks import Values
from cache_builder.contents import contents, words_contents
from cache_builder.datasets.base import Dataset
from cache_builder.errors import CacheError
from cache_builder.format import Bad
from cache_builder.spec import CacheSpec, DatasetSpec
from cache_builder.words import words_of

GROWING = ("id", "string", "ids", "box", "grid")
"""Last part of the names of arrays whose new values follow the old ones."""

BOUNDS = ("offsets", "parts", "copies")
"""Of arrays that count, and go on counting."""


def next_place(path: Path) -> Path:
    """Where the next generation of a cache is built."""
    return path.with_name(f".{path.name}.next")


def grown_spec(cache: FeatureCache, wanted: CacheSpec) -> CacheSpec:
    """The spec of the next generation: what is wanted, after what the cache holds."""
    before = cache.spec
    words = cache.n_rows("word") if "word/states" in before.streams else 0
    held = (before.dataset.n_images, before.dataset.n_texts, words)
    return wanted.model_copy(update={"generations": (*before.generations, held)})


def same_but_for_samples(cache: FeatureCache, wanted: CacheSpec) -> CacheSpec:
    """What is wanted, with the samples of the cache: equal to its spec if samples are all that differs."""
    mine: DatasetSpec = cache.spec.dataset
    dataset = wanted.dataset.model_copy(
        update={"digest": mine.digest, "n_images": mine.n_images, "n_texts": mine.n_texts}
    )
    return wanted.model_copy(update={"dataset": dataset, "generations": cache.spec.generations})


def grown_contents(
    cache: FeatureCache, spec: CacheSpec, dataset: Dataset, backbone: Backbone, progress: bool
) -> Contents:
    """All of the next generation but its embeddings.

    Args:
        cache: the generation before.
        spec: of the next.
        dataset: all samples, old and new.
        backbone: encodes the new ones.
        progress: show a bar while pictures are measured.

    Raises:
        CacheError: an old sample is gone, or a text is another one than it was.
    """
    _check_old(cache, dataset)
    old_images, old_texts = set(cache.image_ids), set(cache.text_ids)
    added = replace(
        dataset,
        images=tuple(r for r in dataset.images if r.id not in old_images),
        texts=tuple(t for t in dataset.texts if t.id not in old_texts),
    )
    found = contents(spec, added, backbone, progress=progress)
    fresh = dict(found.arrays)
    if "word/states" in spec.streams:
        held = set(cache.word_ids)
        fresh |= words_contents(
            [w for w in words_of(dataset.tasks, dataset.words) if w.id not in held], backbone
        )
    if "image/copies" in cache.header.arrays or "image/copies" in fresh:
        fresh.setdefault("image/copies", np.arange(len(added.images) + 1))
    before = cache.known_arrays()
    if "image/copies" in fresh:
        before.setdefault("image/copies", np.arange(len(old_images) + 1))
    arrays = {name: _grown(name, before.get(name), values) for name, values in fresh.items()}
    arrays |= {name: values for name, values in before.items() if name not in arrays}
    shift = len(old_images)
    bad = [
        *cache.bad_images(),
        *(Bad(id=b.id, reason=b.reason, row=b.row + shift) for b in found.bad),
    ]
    return Contents(dataset.tasks, arrays, bad)


def _grown(name: str, before: Values | None, added: Values) -> Values:
    """An array known from the start, of the old samples and the new."""
    last = name.rpartition("/")[2]
    if before is None or not name.startswith(("image/", "text/", "word/", "crop/")):
        return added
    if last in BOUNDS:
        old: NDArray[Any] = np.asarray(before)
        return np.concatenate([old, np.asarray(added)[1:] + old[-1]])
    if last in GROWING:
        if isinstance(before, np.ndarray):
            return np.concatenate([before, np.asarray(added)])
        return [*before, *added]
    return before


def _check_old(cache: FeatureCache, dataset: Dataset) -> None:
    """Everything the cache holds must still be among the samples, unchanged."""
    _refuse_lost(cache, "images", cache.image_ids, (r.id for r in dataset.images))
    _refuse_lost(cache, "texts", cache.text_ids, (t.id for t in dataset.texts))
    now = {t.id: t.text for t in dataset.texts}
    changed = [
        (i, text) for i, text in zip(cache.text_ids, cache.texts, strict=True) if now[i] != text
    ]
    if changed:
        name, was = changed[0]
        raise CacheError(
            f"{len(changed)} texts of {cache.place} are others now, the first is {name!r}: {was[:60]!r} became "
            f"{now[name][:60]!r}; appending only adds, so build a new cache"
        )


def _refuse_lost(cache: FeatureCache, what: str, held: Sequence[str], now: Iterable[str]) -> None:
    ids = Counter(now)
    lost = [i for i in held if i not in ids]
    if lost:
        raise CacheError(
            f"{len(lost)} of the {len(held)} {what} of {cache.place} are not in the data set any more, the first is "
            f"{lost[0]!r}; appending only adds, so restore them or build a new cache"
        )
