"""The fast path: chunk files read straight into kept, page-aligned buffers.

An uncompressed zarr v3 chunk *is* the array's bytes, so `preadv` reaches the speed of a memory copy while the store
stays standard.
Shards are read likewise, being the same bytes with an index behind them; a compressed chunk is read whole.
"""

import mmap
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cache_builder.chunks import Chunks
from cache_builder.codec import decompress
from cache_builder.durable import as_bytes
from cache_builder.errors import CacheCorrupt
from cache_builder.metadata import metadata_problem
from cache_builder.place import File

WHOLE_SHARE = 0.25
"""From this share of a chunk's bytes on, one read of all of it beats many small ones."""

SMALL_RUN = 16 << 10
"""Bytes. Runs shorter than this cost more as system calls than as copies out of a whole chunk."""


@runtime_checkable
class Chunked(Protocol):
    """A cache, as far as a reader cares."""

    chunks: Chunks


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An uninitialised array that starts on a page: `preadv` into it is 4-5 times faster than into numpy's own.

    numpy starts large arrays 16 bytes into a page, which the kernel's copy dislikes (measured; docs/design.md).
    """
    kind = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    memory = np.empty(size + mmap.PAGESIZE, np.uint8)
    start = -memory.ctypes.data % mmap.PAGESIZE
    return memory[start : start + size].view(kind).reshape(shape)


class ChunkReader:
    """Reads one array of a cache. Holds no buffer and no file, so threads may share it.

    Attributes:
        dtype: as stored.
        row_shape: shape of one row (of one token, where the array is ragged).
        n_rows, n_chunks, chunk_rows: extent; the last chunk may hold fewer rows.

    Raises:
        CacheCorrupt: the array is not stored as the header says; the message says in what it differs.
    """

    def __init__(self, cache: Chunked, stream: str) -> None:
        self.chunks, self.stream = cache.chunks, stream
        self.layout = self.chunks.layout(stream)
        problem = metadata_problem(self.chunks.place, self.layout)
        if problem or self.layout.dtype == "string" or not self.layout.shape:
            self.chunks.check_unchanged()
            raise CacheCorrupt(
                f"{stream} of {self.chunks.place} cannot be read chunk by chunk: "
                f"{problem or 'strings and single numbers have no rows'}; restore "
                "the file, or remove the cache and build it again"
            )
        self.dtype = np.dtype(self.layout.dtype)
        self.n_rows, *rest = self.layout.shape
        self.row_shape = tuple(rest)
        self.chunk_rows, self.n_chunks = self.layout.chunk, self.layout.n_chunks

    def read_chunk(self, chunk: int, out: NDArray[Any]) -> int:
        """Read all rows of a chunk into the start of `out`.

        Args:
            chunk: 0 … n_chunks - 1.
            out: C-contiguous, of `dtype`, at least as long as the chunk has rows; page-aligned is fastest.

        Returns:
            The number of rows, less than `chunk_rows` in the last chunk.
        """
        start, stop = self.layout.bounds(chunk)
        self._read(chunk, [(0, stop - start, 0)], out)
        return stop - start

    def read_rows(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Read rows in any order, repeats included, into the start of `out`."""
        if not len(rows):
            return
        if rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
            self._read_span(int(rows[0]), len(rows), out)
            return
        order = np.argsort(rows, kind="stable")
        chunks = rows[order] // self.chunk_rows
        edges = np.flatnonzero(np.diff(chunks)) + 1
        scratch = None
        for part in np.split(order, edges):
            chunk = int(rows[part[0]] // self.chunk_rows)
            start, stop = self.layout.bounds(chunk)
            inside = rows[part] - start
            cuts = np.flatnonzero((np.diff(inside) != 1) | (np.diff(part) != 1)) + 1
            run_bytes = len(part) * self.layout.row_bytes / (len(cuts) + 1)
            if len(part) >= WHOLE_SHARE * (stop - start) or (len(cuts) and run_bytes < SMALL_RUN):
                if scratch is None:
                    scratch = aligned_empty((self.chunk_rows, *self.row_shape), self.dtype)
                self.read_chunk(chunk, scratch)
                out[part] = scratch[inside]
            else:
                heads = [0, *cuts.tolist()]
                sizes = np.diff([*heads, len(part)]).tolist()
                spans = zip(inside[heads].tolist(), sizes, part[heads].tolist(), strict=True)
                self._read(chunk, list(spans), out)

    def _read_span(self, first: int, count: int, out: NDArray[Any]) -> None:
        """Consecutive rows, chunk after chunk."""
        for chunk in range(first // self.chunk_rows, (first + count - 1) // self.chunk_rows + 1):
            start, stop = self.layout.bounds(chunk)
            low, high = max(first, start), min(first + count, stop)
            self._read(chunk, [(low - start, high - low, low - first)], out)

    def _read(self, chunk: int, spans: list[tuple[int, int, int]], out: NDArray[Any]) -> None:
        """Copy spans (row within the chunk, rows, row of `out`) of one chunk."""
        if out.dtype != self.dtype or out.shape[1:] != self.row_shape or not out.flags.c_contiguous:
            raise ValueError(
                f"out is {out.dtype}{list(out.shape)}, but {self.stream} needs contiguous {self.dtype} rows of "
                f"shape {list(self.row_shape)}"
            )
        size = self.layout.row_bytes
        target = as_bytes(out)
        parts = [(row, _part(target, at * size, count * size)) for row, count, at in spans]
        file = self.chunks.open_chunk(self.stream, chunk)
        try:
            if self.layout.compressed:
                self._unpack(file, parts)
            else:
                for row, part in parts:
                    file.read_into(part, row * size)
        finally:
            file.close()

    def _unpack(self, file: File, spans: list[tuple[int, NDArray[np.uint8]]]) -> None:
        """Spans of a compressed chunk, which can only be read whole."""
        packed = np.empty(file.size, np.uint8)
        file.read_into(packed, 0)
        size = self.layout.row_bytes
        whole = np.empty(self.chunk_rows * size, np.uint8)
        decompress(self.layout, packed.tobytes(), whole)
        for row, part in spans:
            part[:] = whole[row * size : row * size + len(part)]


def _part(target: NDArray[np.uint8], start: int, size: int) -> NDArray[np.uint8]:
    """Where a span goes.

    Raises:
        ValueError: beyond the end.
    """
    found = target[start : start + size]
    if len(found) != size:
        raise ValueError(f"out has {len(target):,} bytes, too few for {start + size:,}")
    return found
