"""Examples of a cache's tasks by split, and which of them can be used: what all kinds of data share."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from cache_builder import FeatureCache
from heads.errors import TaskError


def of_split(cache: FeatureCache, task: str, split: str) -> list[Any]:
    """Examples of one split; `TaskError` names the splits there are."""
    everything = cache.tasks.examples(task)
    chosen = [example for example in everything if example.split == split]
    if not chosen:
        counts = Counter(example.split for example in everything)
        found = ", ".join(f"{name} ({n})" for name, n in sorted(counts.items()))
        raise TaskError(
            f"{cache.place} has no {task} examples of split {split!r}; it has {found or 'none at all'}"
        )
    return chosen


def usable(
    cache: FeatureCache, named: Iterable[tuple[str, Any, Sequence[str]]], allow: bool
) -> tuple[list[Any], tuple[str, ...]]:
    """Split (name, example, its image ids) into usable examples and the names of the others.

    Raises:
        TaskError: images are quarantined and that is not allowed, or nothing is left.
    """
    quarantined = cache.quarantined
    kept: list[Any] = []
    dropped: list[str] = []
    bad: dict[str, None] = {}
    for name, example, ids in named:
        missing = [i for i in ids if i in quarantined]
        bad.update(dict.fromkeys(missing))
        if missing:
            dropped.append(name)
        else:
            kept.append(example)
    if bad and not allow:
        first = "; ".join(f"{i}: {quarantined[i]}" for i in list(bad)[:3])
        raise TaskError(
            f"{len(bad)} images of these examples are quarantined in {cache.place} ({first}); repair the files, "
            "remove the cache and build again, or drop the examples with allow_missing=True (--allow-missing), which "
            "marks it partial"
        )
    if not kept:
        raise TaskError(f"all {len(dropped)} examples are of images quarantined in {cache.place}")
    return kept, tuple(dropped)
