"""The images of a split, in the order of its examples, and what the examples say of them.

    task                    one row for …                    labels
    czsl                    each labelled image              attr, obj, pair ("wet cat")
    matching, two_by_two    each image of each item          category
    retrieval               each image with captions
    composed                each reference image             category
    triplets                the image of each                category

numpy and the standard library only, for people who bring their own classifier.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_builder.datasets.base import (
    ComposedExample,
    CompositionExample,
    MatchingExample,
    RetrievalExample,
    Tasks,
    TripletExample,
)
from cache_builder.errors import UnknownName

Example = CompositionExample | MatchingExample | RetrievalExample | ComposedExample | TripletExample


def split_labels(tasks: Tasks, split: str, task: str | None = None) -> dict[str, NDArray[Any]]:
    """Image ids of a split as `id`, and labels, all as arrays of strings of one length (n,).

    Args:
        tasks: of a cache.
        split: e.g. "train".
        task: whose split; None is czsl, the one with labels, or else the only task there is.

    Raises:
        UnknownName: no such task or split, or several tasks and none was named.
    """
    task = _chosen(tasks, task)
    examples = tasks.examples(task)
    rows = [row for e in examples if e.split == split for row in _rows(e)]
    if not rows:
        counts = Counter(e.split for e in examples)
        found = ", ".join(f"{name} ({n})" for name, n in sorted(counts.items()))
        raise UnknownName(f"no {task} examples of split {split!r}; there are {found}")
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def image_labels(tasks: Tasks) -> dict[str, dict[str, str]]:
    """Image id → `split` and what its examples say of it, of czsl or else the only task; empty if there is no such.

    An image that stands in several examples has all that differs, joined by " | ".
    """
    if "czsl" not in tasks.kinds and len(tasks.kinds) != 1:
        return {}
    task = _chosen(tasks, None)
    examples = tasks.examples(task)
    found: dict[str, dict[str, dict[str, None]]] = {}
    for example in examples:
        for row in _rows(example):
            mine = found.setdefault(row["id"], {})
            for name, value in {**row, "split": example.split}.items():
                mine.setdefault(name, {})[value] = None
    return {
        image: {name: " | ".join(values) for name, values in said.items() if name != "id"}
        for image, said in found.items()
    }


def _chosen(tasks: Tasks, task: str | None) -> str:
    kinds = tasks.kinds
    if task is None and ("czsl" in kinds or len(kinds) == 1):
        return "czsl" if "czsl" in kinds else kinds[0]
    if task not in kinds:
        asked = "several tasks, or none, have splits" if task is None else f"no task {task!r}"
        raise UnknownName(f"{asked}; name one by task=… (there are: {', '.join(kinds) or 'none'})")
    return task


def _rows(example: Example) -> Iterator[dict[str, str]]:
    """One row per image of an example."""
    if isinstance(example, CompositionExample):
        attr, obj = example.attr, example.obj
        yield {"id": example.image, "attr": attr, "obj": obj, "pair": f"{attr} {obj}"}
    elif isinstance(example, MatchingExample):
        yield from ({"id": image, "category": example.category} for image in example.images)
    elif isinstance(example, ComposedExample):
        yield {"id": example.reference, "category": " ".join(example.categories)}
    elif isinstance(example, TripletExample):
        yield {"id": example.image, "category": example.category}
    else:
        yield {"id": example.image}
