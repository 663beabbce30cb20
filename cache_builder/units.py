"""A build cut into units that processes share out among themselves, without anybody who assigns them.

A unit is what is missing of one span of rows: every chunk belongs to the span its last row is in, and batches that
reach over a border are encoded on both sides of it. Whoever claims a unit builds it. A claim is the kernel's lock of a
file, so it ends with its holder; on an object store there is none, and two may build the same unit. That costs time and
nothing else: equal batches give equal bytes, files are whole or absent, and everybody lists chunks in a journal of
their own.
"""

import time
from collections import defaultdict
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from tqdm import tqdm

from cache_builder.cache import FeatureCache
from cache_builder.filler import SIDES, Filler
from cache_builder.format import Side
from cache_builder.passes import Passes

Unit = list[tuple[str, int]]
"""Chunks, as (array, chunk)."""

PAUSE = 0.25
"""Seconds between two looks at what others have done."""


@runtime_checkable
class Engine(Protocol):
    """Other processes that help to build."""

    def helping(self, passes: Passes) -> AbstractContextManager[None]:
        """Have them help while the context lasts; an engine may also have done everything when it begins."""
        ...


def units(cache: FeatureCache, side: Side) -> dict[str, Unit]:
    """What is missing of a side, by names that are the same for every process."""
    filler = Filler(cache, side)
    fixed = [la.chunk for la in filler.layouts if la.name not in filler.bounds]
    most = max((la.n_chunks for la in filler.layouts), default=1)
    ragged = max(
        1, filler.n_rows // max(1, most)
    )  # about the rows of a chunk, where their lengths differ
    found: dict[str, Unit] = defaultdict(list)
    for layout in filler.layouts:
        suffixes = [s for s in ("", "_scale") if layout.name + s in cache.header.arrays]
        for chunk in sorted(filler.missing_of(layout)):
            start, stop = layout.bounds(chunk)
            _, last = filler.rows_of(layout, start, stop)
            span = last // max(fixed, default=ragged)
            keys = [(layout.name + s, chunk) for s in suffixes]
            found[f"{side}-{span}"] += [key for key in keys if key in filler.missing]
    return dict(sorted(found.items(), key=lambda item: int(item[0].partition("-")[2])))


def share(passes: Passes, rank: int = 0, world: int = 1) -> None:
    """Build units that nobody else builds until nothing is missing, side by side.

    Args:
        passes: how.
        rank, world: where to begin, so that few want the same unit.
    """
    cache = passes.cache
    cache.chunks.refresh()
    total, left = cache.chunks.total, cache.chunks.n_missing
    with tqdm(
        desc="chunks", total=total, initial=total - left, unit="chunk", disable=not passes.progress
    ) as bar:
        for side in SIDES:
            while missing := units(cache, side):
                names = list(missing)
                first = rank * len(names) // world
                worked = False
                for name in names[first:] + names[:first]:
                    with cache.place.claimed(f"claims/{name}") as mine:
                        cache.chunks.refresh()
                        todo = [k for k in missing[name] if cache.chunks.is_pending(*k)]
                        if mine and todo:
                            passes.run(side, todo)
                            worked = True
                    bar.update(total - cache.chunks.n_missing - bar.n)
                    if passes.stop is not None and passes.stop.is_set():
                        break
                if not worked:
                    time.sleep(PAUSE)
                    cache.chunks.refresh()
                if passes.stop is not None and passes.stop.is_set():
                    raise KeyboardInterrupt
