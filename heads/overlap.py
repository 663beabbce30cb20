"""Which images of a benchmark were trained on: COCO's image numbers are the same in its releases of 2014 and 2017.

    trained on   val2014/COCO_val2014_000000222235.jpg      ─┐
                                                             ├─▶  222235 in both: no held-out number
    scored on    val2017/000000222235.jpg                   ─┘

SugarCrepe, GeneCIS' object tasks, CIRCO and BiVLC are made of COCO images, and Karpathy's train and restval hold 1,200
of SugarCrepe's 1,560. Numbers are read from ids; where ids carry none (BiVLC's are row numbers), nothing is known,
which is not the same as no overlap. Rule: docs/protocols.md, leak check.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cache_builder import FeatureCache
from cache_builder.datasets.base import Tasks

FILE = re.compile(r"(?:.*/)?(?:COCO_(?:train|val|test)20\d\d_)?(0{6}\d{6})\.\w+")
"""COCO's file names. Its numbers have six digits at most, so twelve digits of a camera's clock are none."""

BARE = frozenset({"circo", "genecis"})
"""Data sets whose images of COCO are named by the number alone."""

SHOWN = 3


@dataclass(frozen=True, slots=True)
class TrainOverlap:
    """How much of what is scored was trained on.

    Attributes:
        count: images scored whose number a training image has; None if that cannot be known.
        of: images scored that have a number.
        first: ids of the first three of `count`, in the data set's order.
        unnumbered: images scored, and images trained on, that have no number and were not compared.
        why: what hinders the check, if `count` is None.

    """

    count: int | None
    of: int = 0
    first: tuple[str, ...] = ()
    unnumbered: tuple[int, int] = (0, 0)
    why: str = ""

    @property
    def says(self) -> str:
        """One sentence for people."""
        if self.count is None:
            return f"whether images scored were trained on cannot be checked: {self.why}"
        scored, trained = self.unnumbered
        rest = (
            f"; {scored:,} images scored and {trained:,} trained on carry no COCO number and were not compared"
            if scored or trained
            else ""
        )
        if not self.count:
            return f"none of the {self.of:,} images scored was trained on, by COCO number{rest}"
        first = ", ".join(self.first)
        return (
            f"{self.count:,} of the {self.of:,} images scored were trained on, by COCO number, the first: "
            f"{first}{rest}; this is no held-out number"
        )

    def to_json(self) -> dict[str, Any]:
        """For `meta` of a score table: the fields, and `says`."""
        return {
            "count": self.count,
            "of": self.of,
            "first": list(self.first),
            "unnumbered": list(self.unnumbered),
            "says": self.says,
        }


def coco_number(image_id: str, dataset: str = "") -> int | None:
    """The number that an image has in COCO; None if its id carries none.

    Args:
        image_id: as a reader of `cache_builder/datasets` names it.
        dataset: that reader's name; decides whether a bare number is one of COCO's.

    >>> coco_number("val2014/COCO_val2014_000000391895.jpg"), coco_number("000000222235.jpg")
    (391895, 222235)
    >>> coco_number("189213", "genecis"), coco_number("189213", "bivlc")
    (189213, None)
    """
    if found := FILE.fullmatch(image_id):
        return int(found[1])
    if dataset in BARE and re.fullmatch("[0-9]{1,12}", image_id):
        return int(image_id)
    return None


def compare(
    trained: Iterable[str], trained_set: str, scored: Iterable[str], scored_set: str
) -> TrainOverlap:
    """Images of one list whose COCO number occurs in another.

    Args:
        trained, scored: image ids; repeated ones count once.
        trained_set, scored_set: names of their data sets.
    """
    by_id = {i: coco_number(i, scored_set) for i in scored}
    numbered = {i: number for i, number in by_id.items() if number is not None}
    theirs = [coco_number(i, trained_set) for i in dict.fromkeys(trained)]
    numbers = {number for number in theirs if number is not None}
    for name, some in ((scored_set, numbered), (trained_set, numbers)):
        if not some:
            return TrainOverlap(None, why=f"the image ids of {name} carry no COCO number")
    both = [i for i, number in numbered.items() if number in numbers]
    missing = (len(by_id) - len(numbered), theirs.count(None))
    return TrainOverlap(len(both), len(numbered), tuple(both[:SHOWN]), missing)


def train_overlap(
    trained: FeatureCache, trained_task: str, scored: FeatureCache, task: str, split: str
) -> TrainOverlap:
    """Images of a split of one cache that the train split of another holds; quarantined ones are in neither.

    Args:
        trained, trained_task: what a head was trained on.
        scored, task, split: what it is scored on.
    """
    return compare(
        _images(trained, trained_task, "train"),
        trained.spec.dataset.name,
        _images(scored, task, split),
        scored.spec.dataset.name,
    )


def images_of(tasks: Tasks, kind: str, split: str) -> list[str]:
    """Every image that the examples of a task and split name, galleries included, in order of first mention.

    Args:
        tasks: of a cache.
        kind: a task, or "images" for all of them together.
        split: train, val or test.
    """
    if kind == "images":
        named = [i for kind in tasks.kinds for i in images_of(tasks, kind, split)]
    elif kind == "composed":
        asked = [e for e in tasks.composed if e.split == split]
        galleries = dict.fromkeys(e.gallery for e in asked if e.gallery)
        named = [i for e in asked for i in e.images]
        named += [i for name in galleries for i in tasks.galleries[name].images]
    else:
        named = [i for e in tasks.examples(kind) if e.split == split for i in e.images]
    return list(dict.fromkeys(named))


def _images(cache: FeatureCache, task: str, split: str) -> list[str]:
    bad = cache.quarantined
    return [i for i in images_of(cache.tasks, task, split) if i not in bad]
