"""A cache's rows joined with its task examples: what is trained on, and what is scored.

    cache.tasks (ids)  ──┐    CompositionData · MatchingData · RetrievalData
                         ├─▶  ComposedData · TripletData · ImageData (composed_tasks.py)     row numbers of one cache
    cache.rows(ids)    ──┘

Row numbers are of the cache they came from and mean nothing elsewhere; ids travel with them for messages and tables.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int

from cache_builder import FeatureCache
from cache_builder.datasets.base import Pair
from heads import composed_tasks
from heads.composed_tasks import ComposedData, ImageData, TripletData
from heads.errors import TaskError
from heads.task_examples import of_split, usable

KINDS = ("czsl", "matching", "two_by_two", "retrieval", "composed")
"""Tasks that heads are scored on."""

LEARNED = ("triplets", "images")
"""What heads are trained on besides, as those of composed retrieval are (`Head.learns_from`)."""


@dataclass(frozen=True, slots=True)
class CompositionData:
    """Images of a split against the candidate pairs of a world.

    Attributes:
        images, image_ids: cache rows and ids of the labelled images, in the data set's order.
        attr, obj: each image's label, indices into `attrs` and `objs`.
        target: column of each image's true pair.
        pairs: the candidates by name; `pair_index` the same as indices; `prompts` their text rows.
        seen: True where a candidate pair occurs in training.
        dropped: ids of quarantined images left out.

    """

    kind: ClassVar = "czsl"
    cache: FeatureCache
    split: str
    world: str
    images: Int[np.ndarray, " q"]
    image_ids: tuple[str, ...]
    attr: Int[np.ndarray, " q"]
    obj: Int[np.ndarray, " q"]
    target: Int[np.ndarray, " q"]
    pairs: tuple[Pair, ...]
    pair_index: Int[np.ndarray, "c 2"]
    prompts: Int[np.ndarray, " c"]
    seen: Bool[np.ndarray, " c"]
    attrs: tuple[str, ...]
    objs: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)


@dataclass(frozen=True, slots=True)
class MatchingData:
    """Captions against their hard negatives, with one or two images an item.

    Attributes:
        images: image rows, (n, 1) or (n, 2).
        captions: text rows, (n, 2): the true one first (one image), or caption i of image i (two images).
        category: kind of edit, per item.
        dropped: ids of items left out because an image of theirs is quarantined.

    """

    cache: FeatureCache
    split: str
    ids: tuple[str, ...]
    images: Int[np.ndarray, "n i"]
    captions: Int[np.ndarray, "n 2"]
    category: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The task: "matching" with one image an item, "two_by_two" with two."""
        return "two_by_two" if self.images.shape[1] == 2 else "matching"

    def __len__(self) -> int:
        """Number of items."""
        return len(self.images)


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """Images with their captions.

    Attributes:
        images, image_ids: the image gallery, in the data set's order.
        captions, caption_ids: the caption gallery, in order of first mention.
        matches: (image, caption) as positions in the two galleries, one row per true match, by image.
        dropped: ids of quarantined images left out, with the captions that only they had.

    """

    kind: ClassVar = "retrieval"
    cache: FeatureCache
    split: str
    images: Int[np.ndarray, " i"]
    image_ids: tuple[str, ...]
    captions: Int[np.ndarray, " t"]
    caption_ids: tuple[str, ...]
    matches: Int[np.ndarray, "m 2"]
    dropped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def positives(self) -> Bool[np.ndarray, "i t"]:
        """True where a caption is one of the image's own."""
        table = np.zeros((len(self.images), len(self.captions)), dtype=bool)
        table[self.matches[:, 0], self.matches[:, 1]] = True
        return table


TaskData = CompositionData | MatchingData | RetrievalData | ComposedData | TripletData | ImageData


def load_task(
    cache: FeatureCache,
    task: str | None = None,
    split: str = "test",
    world: str = "closed",
    *,
    allow_missing: bool = False,
) -> TaskData:
    """Join the rows of a cache with the examples of one task and split.

    Args:
        cache: an open feature cache.
        task: one of `KINDS` or `LEARNED`; None takes the only one of `KINDS` that the cache has.
        split: "train", "val" or "test".
        world: czsl candidates: "closed" = train pairs ∪ the split's pairs, "open" = all attr × obj.
        allow_missing: drop examples whose image is quarantined (they are listed in `dropped`) instead of refusing.

    Raises:
        TaskError: no such task, split or world in this cache, quarantined images, or pairs without a prompt.
    """
    if task == "triplets":
        return composed_tasks.triplets(cache, split, allow_missing)
    if task == "images":
        return composed_tasks.images(cache, split)
    task = _choose(cache, task, KINDS)
    if world not in ("closed", "open"):
        raise TaskError(f"no world {world!r}: czsl candidates are 'closed' or 'open'")
    if task == "czsl":
        return _composition(cache, split, world, allow_missing)
    if task == "composed":
        return composed_tasks.composed(cache, split, allow_missing)
    if task in ("matching", "two_by_two"):
        return _matching(cache, task, split, allow_missing)
    return _retrieval(cache, split, allow_missing)


def rows_of(data: TaskData) -> tuple[np.ndarray, np.ndarray]:
    """All image rows and all text rows of a split, repeats included, flat."""
    none = np.empty(0, dtype=np.int64)
    match data:
        case ImageData():
            return data.images, none
        case TripletData():
            texts = [data.modifications, data.targets, data.references]
            return data.images, np.concatenate(texts)
        case ComposedData():
            said = data.modifications
            return np.concatenate([data.references, data.images]), said[said >= 0]
        case CompositionData():
            return data.images.reshape(-1), data.prompts.reshape(-1)
        case _:
            return data.images.reshape(-1), data.captions.reshape(-1)


def task_of(cache: FeatureCache, task: str | None, among: Collection[str] = KINDS) -> str:
    """The task that is meant: `task` itself if the cache has it, or its only one.

    Args:
        cache: an open feature cache.
        task: as somebody named it, or None.
        among: tasks that come into question. One alone is meant even if the cache has none of it: what is trained on
            may be another.

    Raises:
        TaskError: the cache has no such task, or several and none was named.
    """
    if len(among) == 1 and {task} <= {None, *among}:
        return next(iter(among))
    return _choose(cache, task, among)


def splits_of(cache: FeatureCache, task: str) -> tuple[str, ...]:
    """Splits that have examples of `task`, sorted."""
    return tuple(sorted({example.split for example in cache.tasks.examples(task)}))


def _choose(cache: FeatureCache, task: str | None, among: Collection[str]) -> str:
    kinds = [kind for kind in cache.tasks.kinds if kind in KINDS]
    if task is None and len(meant := [kind for kind in kinds if kind in among]) == 1:
        return meant[0]
    found = ", ".join(kinds) or "none that heads are trained or scored on"
    if task is None:
        if len(kinds) != 1:
            raise TaskError(f"{cache.place} has several tasks or none ({found}); name one (--task)")
        return kinds[0]
    if task not in kinds:
        raise TaskError(
            f"no task {task!r} in {cache.place}; tasks of this cache that heads train on and are scored on: {found}"
        )
    return task


def _composition(
    cache: FeatureCache, split: str, world: str, allow_missing: bool
) -> CompositionData:
    task = cache.tasks.czsl
    assert task is not None
    named = ((e.image, e, [e.image]) for e in of_split(cache, "czsl", split))
    examples, dropped = usable(cache, named, allow_missing)
    pairs = task.candidates(split, world)
    without = [pair for pair in pairs if pair not in task.prompts]
    if without:
        raise TaskError(
            f"{len(without)} of {len(pairs)} {world}-world pairs have no prompt in {cache.place}, the first: "
            f"{' '.join(without[0])}; only worlds whose prompts the data set lists can be scored"
        )
    attr_index = {attr: i for i, attr in enumerate(task.attrs)}
    obj_index = {obj: i for i, obj in enumerate(task.objs)}
    column = {pair: i for i, pair in enumerate(pairs)}
    foreign = [e for e in examples if (e.attr, e.obj) not in column]
    if foreign:
        raise TaskError(
            f"{len(foreign)} {split} images have a pair that is no {world}-world candidate, the first: "
            f"{foreign[0].image} ({foreign[0].attr} {foreign[0].obj})"
        )
    seen = set(task.pairs["train"])
    return CompositionData(
        cache=cache,
        split=split,
        world=world,
        images=cache.rows("image", [e.image for e in examples]),
        image_ids=tuple(e.image for e in examples),
        attr=np.array([attr_index[e.attr] for e in examples], dtype=np.int64),
        obj=np.array([obj_index[e.obj] for e in examples], dtype=np.int64),
        target=np.array([column[e.attr, e.obj] for e in examples], dtype=np.int64),
        pairs=pairs,
        pair_index=np.array([(attr_index[a], obj_index[o]) for a, o in pairs], dtype=np.int64),
        prompts=cache.rows("text", [task.prompts[pair] for pair in pairs]),
        seen=np.array([pair in seen for pair in pairs]),
        attrs=task.attrs,
        objs=task.objs,
        dropped=dropped,
    )


def _matching(cache: FeatureCache, task: str, split: str, allow_missing: bool) -> MatchingData:
    named = ((e.id, e, e.images) for e in of_split(cache, task, split))
    examples, dropped = usable(cache, named, allow_missing)
    n = len(examples)
    return MatchingData(
        cache=cache,
        split=split,
        ids=tuple(e.id for e in examples),
        images=cache.rows("image", [i for e in examples for i in e.images]).reshape(n, -1),
        captions=cache.rows("text", [c for e in examples for c in e.captions]).reshape(n, 2),
        category=tuple(e.category for e in examples),
        dropped=dropped,
    )


def _retrieval(cache: FeatureCache, split: str, allow_missing: bool) -> RetrievalData:
    named = ((e.image, e, [e.image]) for e in of_split(cache, "retrieval", split))
    examples, dropped = usable(cache, named, allow_missing)
    captions: dict[str, int] = {}
    images: dict[str, int] = {}
    matches: dict[tuple[int, int], None] = {}
    for e in examples:
        i = images.setdefault(e.image, len(images))
        for c in e.captions:
            matches[i, captions.setdefault(c, len(captions))] = None
    if not captions:
        raise TaskError(f"no image of split {split!r} in {cache.place} has a caption")
    return RetrievalData(
        cache=cache,
        split=split,
        images=cache.rows("image", list(images)),
        image_ids=tuple(images),
        captions=cache.rows("text", list(captions)),
        caption_ids=tuple(captions),
        matches=np.array(sorted(matches), dtype=np.int64).reshape(-1, 2),
        dropped=dropped,
    )
