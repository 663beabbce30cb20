"""A cache as one .npz file, for whoever has numpy: `export_npz`.

    image/id  image/split  image/attr …      strings, one an image          image/pooled   (n, D)
    image/patches + image/offsets            where rows differ in length    text/tokens    (total, V) + text/offsets

Arrays are written a block at a time, so that memory does not grow with the cache, and numpy reads one without the
others. Numbers are what `FeatureCache.read` gives, float16 and float32 as stored, all else as float32, and are not
compressed; strings are, as numpy has all of an array as long as the longest.
"""

import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cache_builder import exporting
from cache_builder.aside import new_file
from cache_builder.cache import FeatureCache
from cache_builder.exporting import Given, check_strings, numbers, parts

ANCIENT = (1980, 1, 1, 0, 0, 0)
"""Date of every member: the same cache gives the same file."""

STRINGS = 1 << 12
"""Strings that are written at once."""


def export_npz(cache: FeatureCache, file: str | Path, *, progress: bool = False) -> Path:
    """Write a sealed cache into one .npz file; the file appears whole, or not at all.

    Args:
        cache: sealed. It is only read, and every chunk compared with its checksum.
        file: a free name.
        progress: show a bar.

    Returns:
        The file.

    Raises:
        CacheIncomplete, CacheCorrupt: the cache is not finished, or not what was written.
        CacheMismatch: the name is taken.
        CacheLocked: another process is exporting to this name.
        OSError: the disk is full, or the place cannot be written; nothing is left behind.
    """
    file = Path(file)
    exporting.check_free(file)
    given = exporting.given(cache)
    with (
        new_file(file) as number,
        os.fdopen(number, "wb", closefd=False) as out,
        zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as members,
        tqdm(desc="export", unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        for name, strings in _strings(given):
            _write_strings(members, name, strings)
        for name, shape, dtype, blocks in _arrays(given):
            _write(members, name, shape, dtype, blocks, bar.update)
    return file


def _strings(given: Given) -> Iterator[tuple[str, list[str]]]:
    cache = given.cache
    yield "image/id", [cache.image_ids[row] for row in given.images]
    for name, values in given.labels.items():
        yield f"image/{name}", values
    yield "text/id", cache.text_ids
    yield "text/string", cache.texts
    if "word/id" in cache.header.arrays:
        yield "word/id", cache.word_ids
        yield "word/string", cache.word_strings


Array = tuple[str, tuple[int, ...], np.dtype[Any], Iterable[NDArray[Any]]]
"""Name, shape, type, and the values block by block."""


def _arrays(given: Given) -> Iterator[Array]:
    """Every array of numbers."""
    cache = given.cache
    cut: set[str] = set()
    for stream in given.streams("image", "crop", "text", "word"):
        first, offsets = numbers(given, stream, slice(0, 0))
        sizes = given.sizes(stream, first.dtype.itemsize)
        home, n = stream.rpartition("/")[0], len(sizes)
        if offsets is not None:
            lengths = np.diff(cache.offsets(stream))[given.rows(stream)]
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
            n = int(ends[-1])
            if home not in cut:
                yield _whole(f"{home}/offsets", ends)
                yield from _measures(given, stream, home)
            cut.add(home)
        blocks = (numbers(given, stream, part)[0] for part in parts(sizes))
        yield stream, (n, *first.shape[1:]), first.dtype, blocks
    for name in ("text/ids", "word/ids"):
        if name in cache.header.arrays:
            yield _whole(name, cache.read_ragged(name)[0])
    if "word/parts" in cache.header.arrays:
        yield _whole("word/parts", cache.word_parts)
    for name, values in cache.readout().items():
        yield _whole(f"readout/{name}", values)
    for name, text in given.texts().items():
        yield _whole(name, np.array(text))


def _measures(given: Given, stream: str, home: str) -> Iterator[Array]:
    """Rows and columns of the patches of pictures that keep their shape; where crops lie."""
    cache = given.cache
    if f"{home}/grid" in cache.header.arrays:
        yield _whole(f"{home}/grid", cache.grid(home)[given.images])
    if home == "crop":
        yield _whole("crop/box", cache.boxes()[cache.places(stream, given.images)[0]])


def _whole(name: str, values: NDArray[Any]) -> Array:
    return name, values.shape, values.dtype, [values]


def _write_strings(members: zipfile.ZipFile, name: str, strings: list[str]) -> None:
    check_strings(name, strings, ".npz")
    dtype = np.dtype(f"<U{max(map(len, strings), default=1) or 1}")
    blocks = (strings[i : i + STRINGS] for i in range(0, len(strings), STRINGS))
    arrays = (np.array(block, dtype) for block in blocks)
    _write(members, name, (len(strings),), dtype, arrays, packed=zipfile.ZIP_DEFLATED)


def _write(
    members: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    blocks: Iterable[NDArray[Any]],
    tell: Callable[[int], object] = int,
    packed: int = zipfile.ZIP_STORED,
) -> None:
    """One array as a member of the archive, as `np.savez` writes it, or `np.savez_compressed`."""
    header = io.BytesIO()
    dtype = dtype.newbyteorder("<")
    said = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, said)
    member = zipfile.ZipInfo(f"{name}.npy", ANCIENT)
    member.compress_type = packed
    with members.open(member, "w", force_zip64=True) as out:
        out.write(header.getvalue())
        for block in blocks:
            data = np.ascontiguousarray(block, dtype).reshape(-1).view(np.uint8).data
            out.write(data)
            tell(len(data))
