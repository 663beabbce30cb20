"""Block shuffle: whole chunks read into kept buffers while the pool before is used up.

    chunks, permuted   [7 2 9 | 0 5 1 | …]      a pool = k chunks, one page-aligned buffer
    buffers            A ◀ read 7 2 9           B ◀ read 0 5 1 (two threads) while A's rows go into batches

Each chunk is read once an epoch. A row's neighbours in a batch come from its own pool, so k bounds how well it is
mixed; rows were permuted once at build time, which keeps pools from being all of one class. For a CUDA device the
buffers are pinned, and a pool is transferred whole, as stored: its rows are gathered and widened there.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cache_builder import FeatureCache
from cache_builder.reader import ChunkReader
from heads.buffers import Buffers
from heads.coded import Coded, as_stored
from heads.gather import Gatherer
from heads.samplers import Drawn, PartnerSampler

READERS = 2
"""Threads that read; two keep a local disk busy."""

POOL_CHUNKS = 16
"""Chunks shuffled together, memory allowing: 16 of 24 MB mix a few thousand images of 200 patches."""


@dataclass(frozen=True, slots=True)
class Read:
    """One batch of a pooled stream.

    Attributes:
        index: numbers of its examples.
        values: of them, float32; uint8 of pixels.
        partners: who they were given, if that was asked for.
        partner_values: one tensor a kind of partner; a row of who is `elsewhere` is still to be read.

    """

    index: Int[np.ndarray, " b"]
    values: Tensor
    partners: Drawn | None
    partner_values: tuple[Tensor, ...]


class PoolReader:
    """Reads one image stream of a cache in pools of permuted chunks.

    Args:
        cache: an open cache.
        stream: a fixed-shape stream, e.g. "image/patches".
        keys: the cache row of every example.
        ram_limit: bytes that the two pools may take; a pool has at least one chunk, and at most `POOL_CHUNKS`.
        device: where batches are made.

    """

    def __init__(
        self,
        cache: FeatureCache,
        stream: str,
        keys: Int[np.ndarray, " e"],
        ram_limit: int,
        device: str | torch.device = "cpu",
    ) -> None:
        self.stream, self.keys = stream, keys
        self.cache = cache
        self.reader = reader = ChunkReader(cache, stream)
        scale = f"{stream}_scale"
        scaled = scale in cache.header.arrays
        self.readers = [reader, *([ChunkReader(cache, scale)] if scaled else [])]
        chunk_bytes = sum(r.chunk_rows * r.layout.row_bytes for r in self.readers)
        self.pool_chunks = min(POOL_CHUNKS, max(1, ram_limit // (2 * chunk_bytes)), reader.n_chunks)
        chunk_of = keys // reader.chunk_rows
        self.examples = np.argsort(chunk_of, kind="stable")  # chunk after chunk
        self.chunks, begins = np.unique(chunk_of[self.examples], return_index=True)
        self.bounds = np.append(begins, len(keys))
        self.gather = Gatherer(device)
        cuda = self.gather.device.type == "cuda"
        self.buffers = Buffers(keep=2 * len(self.readers), pinned=cuda)
        self.transferred = {0: torch.cuda.Event(), 1: torch.cuda.Event()} if cuda else {}

    def epoch(
        self,
        batch: int,
        rng: np.random.Generator,
        start: int = 0,
        partners: PartnerSampler | None = None,
    ) -> Iterator[Read]:
        """Example numbers and their values in float32 (pixels: uint8), `batch` at a time, from batch number `start` on.

        Pools that lie wholly before `start` are not read. A failed read is raised here, at the batch that needs it.
        With `partners`, those of every example come too, drawn among the examples of its pool.
        """
        left = len(self.keys) - start * batch
        index: list[np.ndarray] = []
        drawn: list[Drawn] = []
        out: list[Tensor] = []
        filled = 0
        for chunks, members, everyone, pool in self._pools(rng, start * batch):
            near = partners.among(everyone) if partners else None
            while len(members):
                size = min(batch, left + filled)
                out = out or [self.gather.empty(size, pool) for _ in range(3 if partners else 1)]
                n = min(size - filled, len(members))
                sets = [members[:n]]
                if partners:
                    drawn.append(partners.draw(members[:n], near))
                    # Who is elsewhere is read by itself, and overwrites the row that stands here for it.
                    at_hand = np.where(drawn[-1].elsewhere, members[:n, None], drawn[-1].example)
                    sets += list(at_hand.T)
                for values, some in zip(out, sets, strict=True):
                    place = torch.from_numpy(self._places(chunks, some))
                    self.gather.fill(values[filled : filled + n], pool, place)
                index.append(members[:n])
                members = members[n:]
                filled, left = filled + n, left - n
                if filled == size:
                    together = (
                        Drawn(*map(np.concatenate, zip(*drawn, strict=True))) if drawn else None
                    )
                    yield Read(np.concatenate(index), out[0], together, tuple(out[1:]))
                    index, drawn, out, filled = [], [], [], 0

    def _planned(
        self, rng: np.random.Generator, skip: int
    ) -> Iterator[tuple[Int[np.ndarray, " k"], Int[np.ndarray, " m"], Int[np.ndarray, " a"]]]:
        """Pool by pool, which of `chunks` it has and its examples: permuted, without the first `skip`; and all."""
        order = rng.permutation(len(self.chunks))
        for i in range(0, len(order), self.pool_chunks):
            pool = order[i : i + self.pool_chunks]
            spans = [self.examples[self.bounds[c] : self.bounds[c + 1]] for c in pool.tolist()]
            everyone = np.concatenate(spans)
            members = rng.permutation(everyone)
            if skip < len(members):
                yield pool, members[skip:], everyone
            skip = max(0, skip - len(members))

    def _pools(
        self, rng: np.random.Generator, skip: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, Tensor | Coded]]:
        """What `_planned` says of a pool, and the pool's rows: valid until the next pool."""
        planned = self._planned(rng, skip)
        for event in self.transferred.values():
            event.synchronize()  # the epoch before may have used these buffers in another turn
        # An epoch that somebody left unfinished may still be reading into its own.
        buffers = [[self._buffer(reader) for reader in self.readers] for _ in range(2)]
        with ThreadPoolExecutor(READERS, thread_name_prefix="pool") as threads:

            def read(pool: Int[np.ndarray, " k"], turn: int) -> list[Future[int]]:
                if turn in self.transferred:
                    self.transferred[turn].synchronize()
                chunks = self.chunks[pool].tolist()
                return [
                    threads.submit(reader.read_chunk, c, buffer.numpy()[i])
                    for reader, buffer in zip(self.readers, buffers[turn], strict=True)
                    for i, c in enumerate(chunks)
                ]

            coming: list[Future[int]] = []
            current, turn = next(planned, None), 0
            try:
                if current is not None:
                    coming = read(current[0], turn)
                while current is not None:
                    for future in coming:
                        future.result()
                    rows = self._on_device(buffers[turn], turn)
                    following = next(planned, None)
                    if following is not None:
                        coming = read(following[0], 1 - turn)
                    yield *current, rows
                    current, turn = following, 1 - turn
            finally:
                for future in coming:
                    future.cancel()

    def _places(
        self, pool: Int[np.ndarray, " k"], members: Int[np.ndarray, " m"]
    ) -> Int[np.ndarray, " m"]:
        """Row of the pool's buffer that each example lies in."""
        slot = np.empty(self.reader.n_chunks, np.int64)
        slot[self.chunks[pool]] = np.arange(len(pool))
        chunk, row = np.divmod(self.keys[members], self.reader.chunk_rows)
        return slot[chunk] * self.reader.chunk_rows + row

    def _buffer(self, reader: ChunkReader) -> Tensor:
        """Memory for the chunks of a pool."""
        shape = (self.pool_chunks, reader.chunk_rows, *reader.row_shape)
        return self.buffers.take(shape, torch.from_numpy(np.empty(0, reader.dtype)).dtype)

    def _on_device(self, buffers: list[Tensor], turn: int) -> Tensor | Coded:
        """A pool as rows, where its batches are made."""
        values, *scales = (buffer.flatten(0, 1).numpy() for buffer in buffers)
        rows = as_stored(self.cache, self.stream, values, scales[0] if scales else None)
        if turn in self.transferred:
            rows = rows.to(self.gather.device, non_blocking=True)
            self.transferred[turn].record(torch.cuda.current_stream(self.gather.device))
        return rows
