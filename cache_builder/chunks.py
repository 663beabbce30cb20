"""The chunks of a cache: which are finished, what one holds unless it was damaged, and how one is written."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cache_builder.codec import encode_chunk, encode_strings, file_bytes
from cache_builder.durable import crc32c
from cache_builder.errors import CacheCorrupt, CacheIncomplete, CacheMismatch, UnknownName
from cache_builder.format import Entry, Layout, is_stream
from cache_builder.journal import Journal
from cache_builder.place import File, Place, folder_of

Values = NDArray[Any] | Sequence[str]

BLOCK = 8 << 20
"""Bytes read at once for a checksum."""


class Chunks:
    """All arrays of one cache as chunk files, and the manifest that lists the finished ones.

    Attributes:
        place: where the cache lies.
        layouts: array → layout.
        manifest: (array, chunk) → its line; a chunk written again counts as written last.
        check: "open" compares a file's size with the manifest; "read" also its checksum, the first time.
        command: what repairs the cache, for messages.
        fingerprint: of the header that these chunks belong to.
    """

    def __init__(
        self,
        place: Place,
        layouts: Mapping[str, Layout],
        *,
        check: Literal["open", "read"] = "open",
        command: str = "",
        fingerprint: str = "",
        writer: str = "",
    ) -> None:
        self.place, self.layouts, self.command = place, layouts, command
        self.check: Literal["open", "read"] = check
        self.fingerprint = fingerprint
        self.journal = Journal(place, "manifest", Entry, writer)
        self.manifest: dict[tuple[str, int], Entry] = {}
        self.refresh()
        self._compared: set[tuple[str, int]] = set()

    def refresh(self) -> None:
        """Read the manifest again: others may have finished chunks."""
        lines, sizes = self.journal.lines(), {n: file_bytes(la) for n, la in self.layouts.items()}
        for entry in lines:
            layout = self.layouts.get(entry.array)
            if layout is None or not 0 <= entry.chunk < layout.n_chunks:
                self._refuse_line(entry, "which this cache does not have")
            elif sizes[entry.array] not in (None, entry.bytes):
                self._refuse_line(
                    entry, f"with {entry.bytes} bytes, but it has {sizes[entry.array]}"
                )
        self.manifest = {(e.array, e.chunk): e for e in lines}

    def _refuse_line(self, entry: Entry, why: str) -> None:
        self.check_unchanged()
        raise CacheCorrupt(
            f"the manifest of {self.place} lists chunk {entry.chunk} of {entry.array}, {why}: it was damaged, or "
            "the header; restore it from a backup, or remove the cache and build it again"
        )

    @property
    def total(self) -> int:
        """Chunks of a finished cache."""
        return sum(layout.n_chunks for layout in self.layouts.values())

    @property
    def n_missing(self) -> int:
        """How many of them the manifest lacks."""
        return self.total - len(self.manifest)

    def layout(self, array: str) -> Layout:
        """Shape, chunks and type of an array."""
        if array not in self.layouts:
            known = ", ".join(self.layouts)
            raise UnknownName(f"{self.place} has no array {array!r} (it has: {known})")
        return self.layouts[array]

    def stored_bytes(self, array: str) -> int:
        """Bytes of an array's rows, or of its files where they are compressed; no padding of a last chunk."""
        layout = self.layout(array)
        if layout.compressed or layout.dtype == "string":
            return sum(e.bytes for (name, _), e in self.manifest.items() if name == array)
        return layout.row_bytes * (layout.shape[0] if layout.shape else 1)

    def name(self, array: str, chunk: int) -> str:
        """Of a chunk's file, inside the cache."""
        return self.layout(array).file(chunk)

    def file(self, array: str, chunk: int) -> Path:
        """A chunk's file; `CacheError` if the cache lies on an object store."""
        return folder_of(self.place) / self.name(array, chunk)

    def unlisted(self) -> list[tuple[str, int]]:
        """Chunks that the manifest lacks."""
        every = [(la.name, c) for la in self.layouts.values() for c in range(la.n_chunks)]
        return [key for key in every if key not in self.manifest]

    def pending(self) -> list[tuple[str, int]]:
        """Chunks to be written: unlisted, or listed but with a file that is gone or of another size."""
        sizes = self.place.sizes([self.name(*key) for key in self.manifest])
        lost = [key for key, e in self.manifest.items() if sizes.get(self.name(*key)) != e.bytes]
        return sorted({*self.unlisted(), *lost})

    def is_pending(self, array: str, chunk: int) -> bool:
        """Is one chunk still to be written?"""
        entry, name = self.manifest.get((array, chunk)), self.name(array, chunk)
        return entry is None or self.place.sizes([name]).get(name) != entry.bytes

    def open_chunk(self, array: str, chunk: int) -> File:
        """A finished chunk's file; the caller closes it.

        Raises:
            CacheIncomplete: not in the manifest, or its file is gone. Never zeros.
            CacheCorrupt: of another size, or (see `check`) of another checksum, than was written.
        """
        name, entry = self.name(array, chunk), self.manifest.get((array, chunk))
        try:
            if entry is None:
                raise FileNotFoundError
            file = self.place.open(name)
        except FileNotFoundError:
            self.check_unchanged()
            again = is_stream(array.removesuffix("_scale"))
            remedy = f"repeat the build to fill it in: {self.command}"
            raise CacheIncomplete(
                f"chunk {chunk} of {array} is missing from {self.place}; "
                f"{remedy if again else 'only a new build writes it: remove the cache and build it again'}"
            ) from None
        try:
            if file.size != entry.bytes:
                self.check_unchanged()
                raise CacheCorrupt(
                    f"chunk {chunk} of {array} has {file.size:,} bytes, {entry.bytes:,} were written; remove "
                    f"{self.place}/{name} and repeat the build: {self.command}"
                )
            if self.check == "read" and (array, chunk) not in self._compared:
                self.compare(file, entry)
        except BaseException:
            file.close()
            raise
        return file

    def compare(self, file: File, entry: Entry) -> None:
        """Read a whole open chunk and refuse it if its checksum is not the one written."""
        found = _checksum(file)
        if found != entry.crc32c:
            self.check_unchanged()
            name = self.name(entry.array, entry.chunk)
            raise CacheCorrupt(
                f"chunk {entry.chunk} of {entry.array} is damaged: its crc32c is {found}, {entry.crc32c} was written; "
                f"remove {self.place}/{name} and repeat the build: {self.command}"
            )
        self._compared.add((entry.array, entry.chunk))

    def check_unchanged(self) -> None:
        """Before anything is called damaged: is this still the cache that was opened?

        Raises:
            CacheMismatch: samples were appended since, or it was built anew.
        """
        try:
            now = json.loads(self.place.read("zarr.json"))["attributes"]["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return
        if self.fingerprint and now != self.fingerprint:
            raise CacheMismatch(
                f"{self.place} was changed since it was opened (samples appended, or built anew); open it again"
            )

    def read_whole(self, array: str) -> bytes:
        """All bytes of an array of one chunk, always compared with their checksum; of an empty array, none."""
        assert self.layout(array).n_chunks <= 1
        return self.read_chunk(array, 0) if self.layout(array).n_chunks else b""

    def read_chunk(self, array: str, chunk: int) -> bytes:
        """All bytes of a chunk's file, always compared with their checksum."""
        file = self.open_chunk(array, chunk)
        try:
            data = np.empty(file.size, np.uint8)
            file.read_into(data, 0)
        finally:
            file.close()
        entry = self.manifest[array, chunk]
        if crc32c(data) != entry.crc32c:
            self.compare(_InMemory(data), entry)
        return data.tobytes()

    def settle(self) -> None:
        """Bring what several builders listed into one manifest; where they disagree, the file itself decides.

        Equal inputs give equal bytes, so they disagree only if devices, libraries or inputs differed. A file that
        agrees with nobody is damaged: its chunk is written again.
        """
        said: dict[tuple[str, int], list[Entry]] = {}
        for entry in self.journal.lines():
            lines = said.setdefault((entry.array, entry.chunk), [])
            if entry not in lines:
                lines.append(entry)
        agreed = [lines[0] for lines in said.values() if len(lines) == 1]
        for key, lines in said.items():
            if len(lines) > 1 and (found := self._found(*key)) in lines:
                agreed.append(found)
        self.journal.merge(agreed)
        self.refresh()

    def share(self, previous: "Chunks", embedded: Collection[str]) -> None:
        """Take over the chunks of embeddings that stay the same: whole ones of arrays with unchanged chunks.

        They are links to the same files; where that is impossible nothing is shared, and builders copy. The header must
        be there already: a place with embeddings and without one is damaged.
        """
        for name, layout in self.layouts.items():
            old = previous.layouts.get(name)
            if name not in embedded or old is None:
                continue
            if old.model_copy(update={"shape": layout.shape}) != layout:
                continue
            for chunk in range(old.shape[0] // old.chunk):
                key = name, chunk
                if key not in self.manifest and self.place.link(previous.place, self.name(*key)):
                    self.list(previous.manifest[key], sync=False)
        self.place.sync_all()

    def _found(self, array: str, chunk: int) -> Entry | None:
        """The line that a chunk's file deserves as it is now."""
        try:
            file = self.place.open(self.name(array, chunk))
        except FileNotFoundError:
            return None
        try:
            return Entry(array=array, chunk=chunk, bytes=file.size, crc32c=_checksum(file))
        finally:
            file.close()

    def write(self, array: str, chunk: int, values: NDArray[Any]) -> None:
        """Write a whole chunk, padding included, durably; then list it."""
        layout = self.layout(array)
        self._write(layout, chunk, encode_chunk(layout, values))

    def write_all(self, array: str, values: Values) -> None:
        """Write every chunk of an array known as a whole, strings or numbers; a `sync_all` must follow."""
        layout = self.layout(array)
        if not isinstance(values, np.ndarray):
            if layout.n_chunks:
                self._write(layout, 0, encode_strings(values), sync=False)
        elif not layout.shape:
            self._write(layout, 0, values.tobytes(), sync=False)
        else:
            for chunk in range(layout.n_chunks):
                start, stop = layout.bounds(chunk)
                full = np.zeros(layout.chunk_shape, values.dtype)
                full[: stop - start] = values[start:stop]
                self._write(layout, chunk, encode_chunk(layout, full), sync=False)

    def _write(
        self, layout: Layout, chunk: int, data: bytes | NDArray[np.uint8], *, sync: bool = True
    ) -> None:
        self.place.write(layout.file(chunk), data, sync=sync)
        self.list(
            Entry(array=layout.name, chunk=chunk, bytes=len(data), crc32c=crc32c(data)), sync=sync
        )

    def list(self, entry: Entry, *, sync: bool = True) -> None:
        """Declare a chunk finished, whose file is there."""
        self.journal.append(entry, sync=sync)
        self.manifest[entry.array, entry.chunk] = entry


def _checksum(file: File) -> str:
    """CRC-32C of a whole open file, block by block."""
    crc, block = 0, np.empty(min(BLOCK, file.size), np.uint8)
    for at in range(0, file.size, BLOCK):
        part = block[: min(BLOCK, file.size - at)]
        file.read_into(part, at)
        crc = google_crc32c.extend(crc, part.tobytes())
    return f"{crc:08x}"


class _InMemory:
    """Bytes that were read already, as a file."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.size = data, len(data)

    def read_into(self, target: NDArray[np.uint8], offset: int) -> None:
        target[:] = self.data[offset : offset + len(target)]

    def close(self) -> None: ...
