"""The chunks of a cache: which are finished, what one holds unless it was damaged, and how one is written."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cache_builder.durable import (
    append_line,
    as_bytes,
    crc32c,
    file_crc32c,
    read_lines,
    write_durably,
)
from cache_builder.errors import CacheCorrupt, CacheIncomplete, UnknownName
from cache_builder.format import Entry, Layout, encode_strings

Values = NDArray[Any] | Sequence[str]


class Chunks:
    """All arrays of one cache as chunk files, and the manifest that lists the finished ones.

    Attributes:
        path: the cache's folder.
        layouts: array → layout.
        manifest: (array, chunk) → its line; a chunk written again counts as written last.
        check: "open" compares a file's size with the manifest; "read" also its checksum, the first time.
        command: what repairs the cache, for messages.
    """

    def __init__(
        self,
        path: Path,
        layouts: Mapping[str, Layout],
        *,
        check: Literal["open", "read"] = "open",
        command: str = "",
    ) -> None:
        self.path, self.layouts, self.check, self.command = path, layouts, check, command
        lines = read_lines(path / "manifest.jsonl", Entry)
        self.manifest = {(e.array, e.chunk): e for e in lines if e.array in layouts}
        self._compared: set[tuple[str, int]] = set()

    @property
    def total(self) -> int:
        """Chunks of a finished cache."""
        return sum(layout.n_chunks for layout in self.layouts.values())

    def layout(self, array: str) -> Layout:
        """Shape, chunks and type of an array."""
        if array not in self.layouts:
            known = ", ".join(self.layouts)
            raise UnknownName(f"{self.path} has no array {array!r} (it has: {known})")
        return self.layouts[array]

    def file(self, array: str, chunk: int) -> Path:
        """Where a chunk lies."""
        return self.path / self.layout(array).file(chunk)

    def unlisted(self) -> list[tuple[str, int]]:
        """Chunks that the manifest lacks."""
        every = [(la.name, c) for la in self.layouts.values() for c in range(la.n_chunks)]
        return [key for key in every if key not in self.manifest]

    def pending(self) -> list[tuple[str, int]]:
        """Chunks to be written: unlisted, or listed but with a file that is gone or of another size."""
        lost = [key for key, entry in self.manifest.items() if self._size(*key) != entry.bytes]
        return sorted({*self.unlisted(), *lost})

    def _size(self, array: str, chunk: int) -> int | None:
        try:
            return self.file(array, chunk).stat().st_size
        except FileNotFoundError:
            return None

    def open_chunk(self, array: str, chunk: int) -> int:
        """A file descriptor of a finished chunk; the caller closes it.

        Raises:
            CacheIncomplete: not in the manifest, or its file is gone. Never zeros.
            CacheCorrupt: of another size, or (see `check`) of another checksum, than was written.
        """
        file, entry = self.file(array, chunk), self.manifest.get((array, chunk))
        try:
            if entry is None:
                raise FileNotFoundError
            handle = os.open(file, os.O_RDONLY)
        except FileNotFoundError:
            raise CacheIncomplete(
                f"chunk {chunk} of {array} is missing from {self.path}; repeat the build to fill it in: {self.command}"
            ) from None
        try:
            size = os.fstat(handle).st_size
            if size != entry.bytes:
                raise CacheCorrupt(
                    f"chunk {chunk} of {array} has {size:,} bytes, {entry.bytes:,} were written; remove {file} and "
                    f"repeat the build: {self.command}"
                )
            if self.check == "read" and (array, chunk) not in self._compared:
                self.compare(handle, entry)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def compare(self, handle: int, entry: Entry) -> None:
        """Read a whole open chunk and refuse it if its checksum is not the one written."""
        found = file_crc32c(handle)
        if found != entry.crc32c:
            raise CacheCorrupt(
                f"chunk {entry.chunk} of {entry.array} is damaged: its crc32c is {found}, {entry.crc32c} was written; "
                f"remove {self.file(entry.array, entry.chunk)} and repeat the build: {self.command}"
            )
        self._compared.add((entry.array, entry.chunk))

    def read_whole(self, array: str) -> bytes:
        """All bytes of an array of one chunk, always compared with their checksum; of an empty array, none."""
        assert self.layout(array).n_chunks <= 1
        if not self.layout(array).n_chunks:
            return b""
        with os.fdopen(self.open_chunk(array, 0), "rb") as file:
            self.compare(file.fileno(), self.manifest[array, 0])
            return file.read()

    def write(self, array: str, chunk: int, values: NDArray[Any]) -> None:
        """Write a whole chunk, padding included, durably; then list it."""
        layout = self.layout(array)
        assert values.shape == layout.chunk_shape
        assert values.dtype == np.dtype(layout.dtype)
        self._write(layout, chunk, as_bytes(np.ascontiguousarray(values)))

    def write_all(self, array: str, values: Values) -> None:
        """Write every chunk of an array known as a whole, strings or numbers; a `sync_tree` must follow."""
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
                self._write(layout, chunk, as_bytes(full), sync=False)

    def _write(
        self, layout: Layout, chunk: int, data: bytes | NDArray[np.uint8], *, sync: bool = True
    ) -> None:
        write_durably(self.path / layout.file(chunk), data, sync=sync)
        entry = Entry(array=layout.name, chunk=chunk, bytes=len(data), crc32c=crc32c(data))
        append_line(self.path / "manifest.jsonl", entry, sync=sync)
        self.manifest[layout.name, chunk] = entry
