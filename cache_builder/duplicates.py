"""Pictures of the same bytes, so that each is encoded once.

Sizes are compared first, then both ends of files of one size, then everything of those still alike: a data set without
copies costs two small reads a picture.
"""

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from cache_builder.datasets.base import ImageRecord
from cache_builder.images import MAX_BYTES
from cache_builder.loading import ITEMS, by_threads

END = 4096
"""Bytes compared at either end."""

BLOCK = 1 << 20
"""Bytes hashed at once."""


def same_bytes(records: Sequence[ImageRecord]) -> list[list[int]]:
    """Numbers of the records, those of equal files together; in the order of the first of each.

    A record without a file, or whose file cannot be read, is alone.
    """
    paths = [_path(record) for record in records]
    by_size = _grouped(range(len(records)), lambda i: _size(paths[i]))
    by_ends = [g for group in by_size for g in _grouped(group, lambda i: _ends(paths[i]))]
    groups = [g for group in by_ends for g in _grouped(group, lambda i: _hash(paths[i]))]
    return sorted(groups)


def _grouped(numbers: Sequence[int], key: Callable[[int], Hashable | None]) -> list[list[int]]:
    """Numbers by their key; those without one, and a single number, alone. Keys are found by threads."""
    if len(numbers) < 2:
        return [list(numbers)] if numbers else []
    found = by_threads(key, numbers, 4, "compare") if len(numbers) > ITEMS else map(key, numbers)
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, one in zip(numbers, found, strict=True):
        groups[("alone", number) if one is None else one].append(number)
    return list(groups.values())


def _path(record: ImageRecord) -> Path | None:
    try:
        return record.path and record.path()
    except (OSError, ValueError):
        return None


def _size(path: Path | None) -> int | None:
    try:
        found = path and path.stat()
    except (OSError, ValueError):
        return None
    usable = found and stat.S_ISREG(found.st_mode) and 0 < found.st_size <= MAX_BYTES
    return found.st_size if found and usable else None


def _ends(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            first = file.read(END)
            file.seek(max(0, os.fstat(file.fileno()).st_size - END))
            return hashlib.sha256(first + file.read(END)).digest()  # 8 kB a picture add up
    except OSError:
        return None


def _hash(path: Path | None) -> bytes | None:
    if path is None:
        return None
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError:
        return None
    return digest.digest()
