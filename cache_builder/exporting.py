"""What exports for other programs have in common: which rows, what is said of them, and how many at a time.

`npz.py` and `parquet_writing.py` decode what is stored; `hdf5.py` copies it as it lies, to come back as this cache.
Pictures in quarantine have no numbers, so they are left out and listed.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_builder import format as fmt
from cache_builder.cache import FeatureCache
from cache_builder.errors import CacheError, CacheIncomplete, CacheMismatch
from cache_builder.splits import image_labels

BLOCK = 32 << 20
"""Bytes of numbers that are decoded at once."""


def check_sealed(cache: FeatureCache) -> None:
    """Refuse to export what is not finished, or was changed since."""
    if cache.state != "sealed" or cache.pending():
        raise CacheIncomplete(
            f"{cache.place} is not finished, and only a sealed cache is exported; repeat: {cache.chunks.command}"
        )
    cache.check_journals()


def check_free(target: Path) -> None:
    """Nothing is overwritten: `CacheMismatch` where a name is taken."""
    if target.exists() or target.is_symlink():
        raise CacheMismatch(
            f"{target} exists, so it is not overwritten; choose another name, or remove it"
        )


@dataclass(frozen=True, slots=True)
class Given:
    """What is exported of a cache.

    Attributes:
        cache: sealed, and opened so that every chunk is compared with its checksum.
        images: rows of the images that are not in quarantine.
        labels: name → one string an image of `images`, empty where no example says it.

    """

    cache: FeatureCache
    images: NDArray[np.int64]
    labels: Mapping[str, list[str]]

    def streams(self, *sides: str) -> list[str]:
        """Names of the streams of some sides."""
        return [name for name in self.cache.streams if fmt.stream(name).side in sides]

    def rows(self, stream: str) -> NDArray[np.int64]:
        """Rows that a stream is read by: images, texts, or parts of words."""
        side = fmt.stream(stream).side
        if side in ("image", "crop"):
            return self.images
        return np.arange(self.cache.n_rows("text" if side == "text" else "word"))

    def sizes(self, stream: str, item: int = 4) -> NDArray[np.int64]:
        """Bytes of each of its rows in memory, at `item` bytes a number."""
        cache, rows = self.cache, self.rows(stream)
        entry = int(np.prod(cache.layout(stream).shape[1:])) * item
        if not cache.is_ragged(stream):
            return np.full(len(rows), entry)
        offsets = cache.offsets(stream)
        return (offsets[rows + 1] - offsets[rows]) * entry

    def texts(self) -> dict[str, str]:
        """Name → JSON of what is no array: the header, the tasks, what was left out, and the string of every token."""
        left_out = [bad.model_dump() for bad in self.cache.bad_images()]
        known = "text/vocabulary" in self.cache.header.arrays
        tokens = {"vocabulary": json.dumps(self.cache.vocabulary())} if known else {}
        return {
            **tokens,
            "header": json.dumps(self.cache.header.attributes(), ensure_ascii=False),
            "tasks": self.cache.tasks.to_json(),
            "quarantine": json.dumps(left_out, ensure_ascii=False),
        }


def given(cache: FeatureCache) -> Given:
    """What is exported of a sealed cache.

    Raises:
        CacheIncomplete, CacheCorrupt: it is not finished, or was changed.
    """
    check_sealed(cache)
    cache = FeatureCache.open(cache.place, check="read")
    ids, bad = cache.image_ids, cache.quarantined
    images = np.array([row for row, i in enumerate(ids) if i not in bad], np.int64)
    said = image_labels(cache.tasks)
    names = sorted({name for of in said.values() for name in of})
    labels = {name: [said.get(ids[row], {}).get(name, "") for row in images] for name in names}
    return Given(cache, images, labels)


def parts(sizes: NDArray[np.int64], limit: int | None = None) -> Iterator[slice]:
    """Rows after rows that take about `limit` bytes together, and at least one row."""
    limit = limit or BLOCK
    start, taken = 0, 0
    for row, size in enumerate(sizes.tolist()):
        if row > start and taken + size > limit:
            yield slice(start, row)
            start, taken = row, 0
        taken += size
    if len(sizes):
        yield slice(start, len(sizes))


def check_strings(name: str, strings: list[str], kind: str) -> None:
    """Refuse a string that a kind of file would cut."""
    if wrong := [s for s in strings if s.endswith("\0")]:
        raise CacheError(
            f"{name} has strings that end in NUL, as {wrong[0]!r}, which {kind} would cut; export to .h5"
        )


def numbers(
    given: Given, stream: str, part: slice
) -> tuple[NDArray[Any], NDArray[np.int64] | None]:
    """Numbers of some rows of a stream, one after the other if it is ragged; then also where each row begins."""
    cache, rows = given.cache, given.rows(stream)[part]
    if cache.is_ragged(stream):
        return cache.read_ragged(stream, rows)
    return cache.read(stream, rows), None
