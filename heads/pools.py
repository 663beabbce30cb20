"""Block shuffle: whole chunks read into kept buffers while the pool before is used up.

    chunks, permuted   [7 2 9 | 0 5 1 | …]      a pool = k chunks, one page-aligned buffer
    buffers            A ◀ read 7 2 9           B ◀ read 0 5 1 (two threads) while A's rows go into batches

Each chunk is read once an epoch. A row's neighbours in a batch come from its own pool, so k bounds how well it is
mixed; rows were permuted once at build time, which keeps pools from being all of one class.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cache_builder import FeatureCache
from cache_builder.reader import ChunkReader, aligned_empty

READERS = 2
"""Threads that read; two keep a local disk busy."""

POOL_CHUNKS = 16
"""Chunks shuffled together, memory allowing: 16 of 24 MB mix a few thousand images of 200 patches."""


class PoolReader:
    """Reads one image stream of a cache in pools of permuted chunks.

    Args:
        cache: an open cache.
        stream: a fixed-shape stream, e.g. "image/patches".
        ram_limit: bytes that the two pools may take; a pool has at least one chunk, and at most `POOL_CHUNKS`.

    """

    def __init__(self, cache: FeatureCache, stream: str, ram_limit: int) -> None:
        self.stream = stream
        self.reader = reader = ChunkReader(cache, stream)
        chunk_bytes = reader.chunk_rows * math.prod(reader.row_shape) * reader.dtype.itemsize
        self.pool_chunks = min(POOL_CHUNKS, max(1, ram_limit // (2 * chunk_bytes)), reader.n_chunks)
        shape = (self.pool_chunks, reader.chunk_rows, *reader.row_shape)
        self.buffers = [aligned_empty(shape, reader.dtype) for _ in range(2)]

    def epoch(
        self, keys: Int[np.ndarray, " e"], batch: int, rng: np.random.Generator
    ) -> Iterator[tuple[Int[np.ndarray, " b"], Tensor]]:
        """Example numbers and their values, `batch` at a time; an example is keyed by the cache row `keys[i]`.

        Values are as stored, and valid until the next batch unless they are float32.
        A failed read is raised here, at the batch that needs it.
        """
        length = self.reader.chunk_rows
        chunk_of = keys // length
        chunks = rng.permutation(np.unique(chunk_of))
        pools = [chunks[i : i + self.pool_chunks] for i in range(0, len(chunks), self.pool_chunks)]
        index: list[np.ndarray] = []
        values, filled = self._empty(batch), 0
        with ThreadPoolExecutor(READERS, thread_name_prefix="pool") as threads:
            coming = self._read(threads, pools[0], 0)
            try:
                for number, pool in enumerate(pools):
                    for future in coming:
                        future.result()
                    if number + 1 < len(pools):
                        coming = self._read(threads, pools[number + 1], number + 1)
                    slot = {int(chunk): i for i, chunk in enumerate(pool)}
                    members = rng.permutation(np.flatnonzero(np.isin(chunk_of, pool)))
                    place = np.array([slot[c] for c in chunk_of[members].tolist()]) * length
                    place += keys[members] % length
                    buffer = torch.from_numpy(self.buffers[number % 2]).flatten(0, 1)
                    while len(members):
                        part = torch.from_numpy(place[: batch - filled])
                        into = values[filled : filled + len(part)]
                        torch.index_select(buffer, 0, part, out=into)
                        index.append(members[: len(part)])
                        members, place = members[len(part) :], place[len(part) :]
                        filled += len(part)
                        if filled == batch:
                            yield np.concatenate(index), values
                            index, filled = [], 0
                            # Half precision is widened by whoever asks, a copy: its buffer can be used again.
                            if values.dtype == torch.float32:
                                values = self._empty(batch)
                if index:
                    yield np.concatenate(index), values[:filled]
            finally:
                for future in coming:
                    future.cancel()

    def _empty(self, rows: int) -> Tensor:
        return torch.from_numpy(np.empty((rows, *self.reader.row_shape), self.reader.dtype))

    def _read(
        self, threads: ThreadPoolExecutor, pool: Int[np.ndarray, " k"], number: int
    ) -> list[Future]:
        buffer = self.buffers[number % 2]
        return [
            threads.submit(self.reader.read_chunk, int(chunk), buffer[i])
            for i, chunk in enumerate(pool)
        ]
