"""An exported .h5 file, read as if a stranger had written it: every claim is compared before a byte is used.

Names, types, shapes, chunk sizes and stored sizes are looked at first, so nothing is allocated that the file does not
hold; links to other files, virtual and external data, pointers and unknown filters are refused; then every chunk is
compared with its CRC-32C, every text with its sha256.
"""

import hashlib
import math
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from cache_builder.chunks import Values
from cache_builder.codec import encode_chunk, encode_strings
from cache_builder.datasets.base import Tasks
from cache_builder.durable import crc32c
from cache_builder.errors import CacheCorrupt, CacheNotFound
from cache_builder.format import FORMAT, Bad, Entry, Layout
from cache_builder.hdf5_access import REMEDY, careful, damaged, dataset_of
from cache_builder.hdf5_checks import TEXTS, check_claims, check_structure, stored_dtype
from cache_builder.header import Header, checked_header
from cache_builder.records import parse_json

ENDING_NULS = "ends_in_nul"
"""Attribute of an array of strings: (row, NUL characters at its end), which the padding would swallow."""


def string_type(length: int) -> np.dtype[Any]:
    """Fixed-length UTF-8 of so many bytes, padded with NUL."""
    return h5py.string_dtype("utf-8", length)


@dataclass(frozen=True)
class Exported:
    """An open export whose structure was found right; its chunks are compared as they are read.

    Attributes:
        file: its path.
        h5: open for reading.
        header: of the cache, sealed.
        tasks: bytes of `tasks.json`.
        entries: (array, chunk) → its line of the manifest.
        bad: images in quarantine.
    """

    file: Path
    h5: h5py.File
    header: Header
    tasks: bytes
    entries: dict[tuple[str, int], Entry]
    bad: list[Bad]

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the arrays of embeddings."""
        return self.header.spec.streams

    def chunk(self, array: str, chunk: int) -> NDArray[Any]:
        """Values of a whole chunk of numbers, padding included.

        Raises:
            CacheCorrupt: not the bytes that were exported.
        """
        layout, entry = self.header.arrays[array], self.entries[array, chunk]
        with careful(self.file):
            dataset = dataset_of(self.h5, array, self.file)
            if dataset.chunks is None:
                data = np.asarray(dataset[()], stored_dtype(layout)).tobytes()
            else:
                at = (chunk * layout.chunk, *(0 for _ in layout.shape[1:]))
                data = dataset.id.read_direct_chunk(at)[1]
        dtype = stored_dtype(layout)
        if len(data) == math.prod(layout.chunk_shape) * dtype.itemsize:
            values = np.frombuffer(data, dtype).reshape(layout.chunk_shape)
            stored = encode_chunk(layout, values)
            if len(stored) == entry.bytes and crc32c(stored) == entry.crc32c:
                return values
        raise damaged(
            self.file, f"chunk {chunk} of {array} is not what was written (crc32c {entry.crc32c})"
        )

    def whole(self, array: str) -> Values:
        """All of an array that is known from the start, numbers or strings, compared likewise."""
        layout = self.header.arrays[array]
        if layout.dtype == "string":
            return self._strings(layout)
        if not layout.shape:
            return self.chunk(array, 0)
        out = np.zeros(layout.shape, stored_dtype(layout))
        for chunk in range(layout.n_chunks):
            start, stop = layout.bounds(chunk)
            out[start:stop] = self.chunk(array, chunk)[: stop - start]
        return out

    def _strings(self, layout: Layout) -> list[str]:
        if not layout.n_chunks:
            return []
        entry, found, size = self.entries[layout.name, 0], list[bytes](), 4
        with careful(self.file):
            dataset = dataset_of(self.h5, layout.name, self.file)
            rows = max(1, dataset.chunks[0] if dataset.chunks else 1)
            for start in range(0, layout.shape[0], rows):
                block = dataset[start : start + rows].tolist()
                size += sum(map(len, block)) + 4 * len(block)
                if size > entry.bytes:
                    break
                found += block
            for row, n in _ending_nuls(dataset, entry.bytes):
                found[row], size = found[row] + bytes(n), size + n
            strings = [s.decode() for s in found]
        if size != entry.bytes or crc32c(encode_strings(strings)) != entry.crc32c:
            raise damaged(
                self.file, f"the strings of {layout.name} are not those that were written"
            )
        return strings


@contextmanager
def exported(file: Path) -> Generator[Exported]:
    """Open an export and check all of it but the chunks.

    Raises:
        CacheNotFound, CacheCorrupt, CacheTooNew, CacheTooOld: see their messages.
    """
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise CacheNotFound(
            f"no exported cache at {file}: it {what}; make one with: headstart export CACHE {file}"
        )
    with careful(file):
        opened = h5py.File(file, "r", locking=False)
    with opened as h5:
        with careful(file):
            if "header.json" not in h5:
                names = ", ".join(sorted(h5)[:5]) or "nothing"
                raise CacheCorrupt(
                    f"{file} was not made by `headstart export` (it holds {names}); a foreign feature file comes in "
                    "with a mapping: see docs/exchange.md"
                )
            texts = {name: _text(h5, name, file) for name in TEXTS}
        yield _checked(file, h5, texts)


def _checked(file: Path, h5: h5py.File, texts: dict[str, bytes]) -> Exported:
    attributes = _parsed(texts["header.json"], f"{file}: header.json")
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise damaged(file, "header.json is no header of a cache")
    header = checked_header(attributes, file, file / "header.json")
    if header.state != "sealed":
        raise damaged(file, "its header says that the cache was never sealed")
    if hashlib.sha256(texts["tasks.json"]).hexdigest() != header.tasks_sha256:
        raise damaged(file, "its tasks are not those of its header")
    try:
        Tasks.from_json(texts["tasks.json"].decode())
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(file, f"tasks.json is not understood ({error!r})") from error
    try:
        entries = [Entry.model_validate_json(x) for x in texts["manifest.jsonl"].split(b"\n")[:-1]]
        bad = [Bad.model_validate_json(x) for x in texts["quarantine.jsonl"].split(b"\n")[:-1]]
    except ValueError as error:
        raise damaged(file, f"a line of a journal is not understood ({error})") from error
    listed = {(e.array, e.chunk): e for e in entries}
    found = Exported(file, h5, header, texts["tasks.json"], listed, bad)
    check_claims(found, len(entries))
    with careful(file):
        check_structure(found)
    return found


def _text(h5: h5py.File, name: str, file: Path) -> bytes:
    dataset = dataset_of(h5, name, file)
    info = h5py.check_string_dtype(dataset.dtype)
    fixed = info is not None and info.length is not None and dataset.shape == ()
    if not fixed or dataset.chunks is not None or dataset.dtype.itemsize > os.path.getsize(file):
        raise damaged(file, f"{name} is not stored as an export stores it")
    data, wanted = bytes(dataset[()]), dataset.attrs.get("sha256")
    if not isinstance(wanted, bytes) or hashlib.sha256(data).hexdigest() != wanted.decode():
        raise damaged(file, f"{name} is not the text that was written")
    return data


def _ending_nuls(dataset: h5py.Dataset, most: int) -> list[tuple[int, int]]:
    """Rows whose string ends in NUL characters, and in how many."""
    if ENDING_NULS not in dataset.attrs:
        return []
    attribute = dataset.attrs.get_id(ENDING_NULS)
    n = attribute.shape[0] if len(attribute.shape) == 2 else 0
    if attribute.shape != (n, 2) or attribute.dtype != np.dtype("<i8") or n > dataset.shape[0]:
        raise ValueError(f"{ENDING_NULS} is not what an export writes")
    rows = np.asarray(dataset.attrs[ENDING_NULS]).tolist()
    if any(row < 0 or n < 1 for row, n in rows) or sum(n for _, n in rows) > most:
        raise ValueError(f"{ENDING_NULS} is not what an export writes")
    return [(row, n) for row, n in rows]


def _parsed(data: bytes, place: str) -> Any:
    try:
        return parse_json(data.decode(), place)
    except UnicodeDecodeError as error:
        raise CacheCorrupt(f"{place} is not UTF-8 ({error}); {REMEDY}") from error
