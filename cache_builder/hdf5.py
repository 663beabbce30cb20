"""A whole cache as one HDF5 file: `export_hdf5`, and the way in. The round trip is exact, byte for byte.

    photos.h5
      image/patches …      every array under its own name, chunked as in the cache, unfiltered, axes as dimension labels
      image/id …           strings: fixed-length UTF-8, deflated
      header.json  tasks.json  manifest.jsonl  quarantine.jsonl      texts, each with its sha256 as attribute

A chunk of the cache *is* a chunk of the .h5 file, copied as it lies and compared with its CRC-32C on both ways. The
file format is HDF5 1.10's: its own bookkeeping carries checksums, and nothing here lies in a heap, which does not.
docs/exchange.md says what a user sees.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
from pydantic import BaseModel
from tqdm import tqdm

from cache_builder.cache import FeatureCache
from cache_builder.codec import decode_chunk, decode_strings
from cache_builder.errors import CacheCorrupt, CacheError, CacheMismatch
from cache_builder.exporting import check_sealed
from cache_builder.format import Bad, Entry, Layout
from cache_builder.hdf5_checks import stored_dtype
from cache_builder.hdf5_reading import ENDING_NULS, Exported, exported, string_type
from cache_builder.hdf5_writing import whole_or_absent
from cache_builder.header import check_spec
from cache_builder.receive import receive

STRING_BLOCK = 1 << 20
"""Bytes of one chunk of strings, before deflation."""


def export_hdf5(cache: FeatureCache, file: str | Path, *, progress: bool = False) -> Path:
    """Write a sealed cache into one .h5 file, chunk by chunk; the file appears whole, or not at all.

    Args:
        cache: sealed. It is only read.
        file: a free name. If it is an export of this very cache already, nothing is done.
        progress: show a bar.

    Returns:
        The file.

    Raises:
        CacheIncomplete: the cache is not sealed, or a chunk is missing.
        CacheCorrupt: a chunk is not what was written.
        CacheMismatch: the name is taken by something else, which is not touched.
        CacheLocked: another process is exporting to this name.
        OSError: the disk is full, or the place cannot be written; nothing is left behind.
    """
    file = Path(file)
    check_sealed(cache)
    if file.exists() or file.is_symlink():
        _check_same(cache, file)
        return file
    total = sum(entry.bytes for entry in cache.chunks.manifest.values())
    with (
        whole_or_absent(file) as disk,
        h5py.File(disk, "w", libver=("v110", "v110")) as h5,
        tqdm(desc="export", total=total, unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        for layout in cache.header.arrays.values():
            if layout.dtype == "string":
                _write_strings(h5, layout, cache)
                disk.check()
                continue
            for _, data in _write_numbers(h5, layout, cache):
                disk.check()
                bar.update(len(data))
        for name, text in _texts(cache).items():
            _write_text(h5, name, text.encode())
    return file


def import_hdf5(file: str | Path, path: str | Path, *, progress: bool = False) -> FeatureCache:
    """Make the cache again that `export_hdf5` wrote: same header, same digest, the same bytes in every chunk.

    Repeating the call after any interruption finishes it; a finished cache is left as it is.

    Args:
        file: made by `export_hdf5`.
        path: folder of the cache: free, or what an earlier import of this file left.
        progress: show a bar.

    Returns:
        The sealed cache, open for reading.

    Raises:
        CacheNotFound: there is no such file; or the path holds something that is no cache.
        CacheCorrupt: the file is damaged, or not made by `export_hdf5`; says where it first differs.
        CacheMismatch: the path holds another cache, which is not touched.
        CacheLocked: another process writes the cache.
    """
    with exported(Path(file)) as given:

        def begin() -> FeatureCache:
            header = given.header.model_copy(
                update={"state": "building", "digest": None, "quarantine_sha256": None}
            )
            known = {
                name: given.whole(name) for name in header.arrays if name not in header.embedded()
            }
            return FeatureCache.lay_out(path, header, given.tasks, known, given.bad)

        return receive(
            path,
            begin,
            lambda cache: _check_begun(cache, given),
            given.chunk,
            digest=given.header.digest,
            progress=progress,
        )


def _check_begun(cache: FeatureCache, given: Exported) -> None:
    """Refuse to go on in a cache that is not the beginning of the one in the file."""
    check_spec(cache.place, cache.spec, given.header.spec)
    if cache.state == "sealed" and cache.header.digest == given.header.digest:
        return
    same = {"state", "digest", "quarantine_sha256"}
    header, listed = cache.header.model_dump(exclude=same), cache.chunks.manifest
    other = [key for key, entry in sorted(listed.items()) if given.entries.get(key) != entry]
    if header != given.header.model_dump(exclude=same) or cache.quarantined != {
        bad.id: bad.reason for bad in given.bad
    }:
        what = "it was cut, or its pictures were read, otherwise"
    elif other:
        what = f"chunk {other[0][1]} of {other[0][0]} and {len(other) - 1} others have other bytes"
    else:
        return
    raise CacheMismatch(
        f"{cache.place} holds another cache of the same claim than {given.file}: {what}. Choose another --out, or "
        "remove the cache"
    )


def stored_chunk(cache: FeatureCache, array: str, chunk: int) -> bytes:
    """The values of a chunk as bytes, whatever its file's codec; the file is compared with its checksum in memory."""
    data = cache.chunks.read_chunk(array, chunk)
    return bytes(decode_chunk(cache.layout(array), data))


def _write_numbers(
    h5: h5py.File, layout: Layout, cache: FeatureCache
) -> Iterator[tuple[int, bytes]]:
    """Write an array chunk by chunk; gives each chunk that was written."""
    dtype = stored_dtype(layout)
    whole = layout.n_chunks and math.prod(layout.chunk_shape)
    chunks = layout.chunk_shape if layout.shape and whole else None
    made = h5.create_dataset(layout.name, layout.shape, dtype, chunks=chunks)
    _label(made, layout)
    for chunk in range(layout.n_chunks):
        data = stored_chunk(cache, layout.name, chunk)
        if chunks is not None:
            made.id.write_direct_chunk((chunk * layout.chunk, *(0 for _ in layout.shape[1:])), data)
        elif whole:
            made[()] = np.frombuffer(data, dtype)[0]
        yield chunk, data


def _write_strings(h5: h5py.File, layout: Layout, cache: FeatureCache) -> None:
    strings = [
        s.encode() for s in decode_strings(cache.chunks.read_whole(layout.name), layout.shape[0])
    ]
    dtype = string_type(max(map(len, strings), default=1) or 1)
    rows = max(1, min(len(strings), STRING_BLOCK // dtype.itemsize))
    filters = {"chunks": (rows,), "compression": "gzip", "compression_opts": 1} if strings else {}
    made = h5.create_dataset(layout.name, layout.shape, dtype, **filters)
    _label(made, layout)
    for start in range(0, len(strings), rows):
        block = strings[start : start + rows]
        made[start : start + len(block)] = np.array(block, dtype)
    nuls = [(row, len(s) - len(s.rstrip(b"\0"))) for row, s in enumerate(strings)]
    if ending := [(row, n) for row, n in nuls if n]:  # padding would swallow them
        made.attrs.create(ENDING_NULS, np.array(ending, "<i8"))


def _write_text(h5: h5py.File, name: str, data: bytes) -> None:
    dtype = string_type(max(1, len(data)))
    made = h5.create_dataset(name, (), dtype)
    made[()] = np.array(data, dtype)
    made.attrs.create("sha256", np.bytes_(hashlib.sha256(data).hexdigest().encode()))


def _label(made: h5py.Dataset, layout: Layout) -> None:
    for axis, name in zip(made.dims, layout.dims, strict=False):
        axis.label = name
    if layout.torch_dtype:
        made.attrs["torch_dtype"] = layout.torch_dtype


def _texts(cache: FeatureCache) -> dict[str, str]:
    """Name → text, of all that is no array."""
    tasks = cache.tasks.to_json()
    if hashlib.sha256(tasks.encode()).hexdigest() != cache.header.tasks_sha256:
        raise CacheCorrupt(
            f"the tasks of {cache.place} are not in canonical form; build the cache again"
        )
    entries = [entry for _, entry in sorted(cache.chunks.manifest.items())]
    header = json.dumps(cache.header.attributes(), ensure_ascii=False, indent=1)
    return {
        "header.json": header,
        "tasks.json": tasks,
        "manifest.jsonl": _lines(entries),
        "quarantine.jsonl": _lines(cache.bad_images()),
    }


def _lines(records: list[Entry] | list[Bad]) -> str:
    def line(record: BaseModel) -> str:
        return f"{record.model_dump_json()}\n"

    return "".join(map(line, records))


def _check_same(cache: FeatureCache, file: Path) -> None:
    """Refuse a name that is taken, unless by an export of this very cache."""
    found: str | None = None
    with suppress(CacheError), exported(file) as given:
        found = given.header.digest
    if found != cache.header.digest:
        what = f"an export of another cache, {found[:12]}" if found else "something else"
        raise CacheMismatch(
            f"{file} exists and is {what}, so it is not overwritten; choose another name, or remove it"
        )
