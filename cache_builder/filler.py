"""Rows in, whole chunks out: batches are scattered into open chunks, each written when its last row is there."""

import time
from collections import deque
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from cache_builder.cache import FeatureCache
from cache_builder.errors import BadOutput
from cache_builder.format import Layout, Side, stream
from cache_builder.quantise import pooled_2x2, quantised
from cache_builder.storage import mode_of

FP16_MAX = 65504.0

SIDES: tuple[Side, ...] = ("text", "word", "image", "crop")
"""In the order of building: pictures that cannot be used are known before their crops are asked for."""

QUEUED = 2
"""Chunks that may wait for the disk; bounds memory."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that are encoded together.

    Attributes:
        rows: of the cache.
        inputs: what the encoder takes, pixels or token ids; None if no row is usable.
        good: False where a row has no usable picture; a neighbour stands in, so that the others keep their bits.
        shared: which of the inputs each row has, where some have the same; None if each has its own.
    """

    rows: range
    inputs: Any
    good: Bool[np.ndarray, " b"]
    shared: Int[np.ndarray, " b"] | None = None


class Filler:
    """Missing chunks of one side of a cache.

    Rows are what is encoded one by one: images, texts, crops, or parts of words. Images that are copies of one file
    stand together and are one unit of encoding.

    Args:
        cache: to fill.
        side: of it.
        only: chunks to fill, of those that are missing; all by default.
        previous: the cache that this one continues; its rows are copied, not encoded.

    Attributes:
        batches: the rows to encode: those batches of the fixed partition that touch a missing chunk.
        stored_bytes: handed over so far.
        disk_seconds: that `take` has waited for the disk.
    """

    def __init__(
        self,
        cache: FeatureCache,
        side: Side,
        only: Collection[tuple[str, int]] | None = None,
        previous: FeatureCache | None = None,
    ) -> None:
        self.cache, self.previous = cache, previous
        self.side: Side = side
        self.layouts = [cache.layout(s) for s in cache.streams if s.startswith(f"{side}/")]
        # A unit of a shared build asks for its own chunks: a look at all of them for each would be quadratic.
        self.missing: set[tuple[str, int]] = set()
        if only is not None:
            self.missing = {key for key in only if cache.chunks.is_pending(*key)}
        elif self.layouts:
            self.missing = set(cache.pending())
        self.bounds = {
            la.name: cache.offsets(la.name)
            for la in self.layouts
            if cache.is_ragged(la.name) and side != "crop"
        }
        self.n_rows = cache.n_rows(side) if self.layouts else 0
        self.n_known = previous.n_rows(side) if previous and self.layouts else 0
        self.copies = cache.copies() if side == "image" and self.layouts else None
        self._missing = {la.name: self.missing_of(la) for la in self.layouts}
        self.cuts = self._partition()
        self.batches = [range(*self.cuts[b : b + 2].tolist()) for b in self._needed()]
        self.stored_bytes, self.disk_seconds = 0, 0.0
        self._open: dict[tuple[str, int], tuple[NDArray[Any], int]] = {}
        self._centre: dict[str, tuple[Tensor, Tensor]] = {}
        self._writer = ThreadPoolExecutor(1, "write")
        self._queue: deque[Future[None]] = deque()

    def __enter__(self) -> "Filler":
        self._copy_known()
        return self

    def __exit__(self, *error: object) -> None:
        """Let every chunk that is complete reach the disk, also after an error."""
        self._writer.shutdown(wait=True)
        while self._queue:
            failed = self._queue.popleft().exception()
            if failed and error[0] is None:
                raise failed

    def units(self, rows: range) -> list[range]:
        """The rows of a batch, those of one input together."""
        if self.copies is None:
            return [range(row, row + 1) for row in rows]
        first, last = np.searchsorted(self.copies, [rows.start, rows.stop])
        return [range(*self.copies[u : u + 2].tolist()) for u in range(int(first), int(last))]

    def _partition(self) -> NDArray[np.int64]:
        """Where each batch begins, and where the last one ends: fixed for the life of the cache.

        Every generation has batches of its own, of `batch_size` inputs each.
        """
        size, n = self.cache.header.batch_size, self.n_rows
        edges = [0, *self.cache.generation_ends(self.side), n] if n else [0, 0]
        if self.copies is not None:
            edges = np.searchsorted(self.copies, edges).tolist()
        starts = [np.arange(a, b, size) for a, b in pairwise(edges)]
        cuts = np.concatenate([*starts, edges[-1:]]).astype(np.int64)
        return cuts if self.copies is None else self.copies[cuts]

    def _needed(self) -> list[int]:
        """Batches that touch a missing chunk."""
        needed = np.zeros(len(self.cuts) - 1, bool)
        for layout in self.layouts:
            for chunk in self._missing[layout.name]:
                first, last = self.rows_of(layout, *layout.bounds(chunk))
                first = max(first, self.n_known)
                if first <= last:
                    at = np.searchsorted(self.cuts, [first, last], "right") - 1
                    needed[at[0] : at[1] + 1] = True
        return np.flatnonzero(needed).tolist()

    def missing_of(self, layout: Layout) -> set[int]:
        """Missing chunks of a stream or of its scales, which are cut alike."""
        names = {layout.name, f"{layout.name}_scale"}
        return {chunk for name, chunk in self.missing if name in names}

    def rows_of(self, layout: Layout, start: int, stop: int) -> tuple[int, int]:
        """First and last row of the side that have a part in places start … stop - 1 of an array."""
        if layout.name not in self.bounds:
            return start, stop - 1
        ends = self.bounds[layout.name][1:]
        return int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop, "left"))

    def _known_places(self, layout: Layout) -> int:
        """How many places of an array are copied from the cache before."""
        bounds = self.bounds.get(layout.name)
        return self.n_known if bounds is None else int(bounds[self.n_known])

    def _copy_known(self) -> None:
        """Begin chunks with rows of the cache before; those with no other are whole at once."""
        for layout in self.layouts:
            known = self._known_places(layout)
            for chunk in sorted(self._missing[layout.name]):
                if layout.bounds(chunk)[0] < known:
                    for suffix in self._suffixes(layout):
                        self._begin(self.cache.layout(layout.name + suffix), chunk, known)

    def _suffixes(self, layout: Layout) -> list[str]:
        """Of the arrays that one stream is stored in."""
        return ["", *(["_scale"] if f"{layout.name}_scale" in self.cache.header.arrays else [])]

    def _begin(self, layout: Layout, chunk: int, known: int) -> None:
        key, (low, high) = (layout.name, chunk), layout.bounds(chunk)
        if key not in self.missing:
            return
        # Rows beyond the end of the array keep the fill value: zarr stores the last chunk at full size.
        buffer, until = np.zeros(layout.chunk_shape, layout.dtype), min(high, known)
        if low < until:
            assert self.previous is not None
            buffer[: until - low] = self.previous.stored(layout.name, np.arange(low, until))
        self._open[key] = buffer, high - max(low, until)
        self._close_if_full(key)

    def take(self, batch: Batch, outputs: Mapping[str, Tensor] | None) -> None:
        """Store what the backbone made of a batch; None if it had nothing usable to encode.

        Raises:
            BadOutput: a value is not finite, does not fit the storage, or has an unexpected shape.
        """
        for layout in self.layouts:
            bounds = self.bounds.get(layout.name)
            start, stop = batch.rows.start, batch.rows.stop
            if bounds is not None:
                start, stop = int(bounds[start]), int(bounds[stop])
            wanted = set(range(start // layout.chunk, -(-stop // layout.chunk)))
            wanted &= self._missing[layout.name]
            if wanted:
                for suffix, values in self._stored(layout, batch, outputs).items():
                    self.stored_bytes += values.nbytes
                    part = self.cache.layout(layout.name + suffix)
                    for chunk in sorted(wanted):
                        self._scatter(part, chunk, values, start)

    def ends_a_chunk(self, batch: Batch) -> bool:
        """Does a missing chunk end in these rows, or none begin before the next ones?"""
        start, stop = batch.rows.start, batch.rows.stop
        for layout in self.layouts:
            bounds = self.bounds.get(layout.name)
            low, high = (start, stop) if bounds is None else (int(bounds[start]), int(bounds[stop]))
            end = high // layout.chunk
            if high == layout.shape[0] or low // layout.chunk < end:
                return True
        return False

    def _scatter(self, layout: Layout, chunk: int, values: NDArray[Any], start: int) -> None:
        key, (low, high) = (layout.name, chunk), layout.bounds(chunk)
        if key not in self.missing:
            return
        first, last = max(start, low), min(start + len(values), high)
        if key not in self._open:
            self._begin(layout, chunk, 0)
        buffer, left = self._open[key]
        buffer[first - low : last - low] = values[first - start : last - start]
        self._open[key] = buffer, left - (last - first)
        self._close_if_full(key)

    def _close_if_full(self, key: tuple[str, int]) -> None:
        buffer, left = self._open[key]
        if not left:
            del self._open[key]
            self._queue.append(self._writer.submit(self.cache.write_chunk, *key, buffer))
            begun = time.monotonic()
            while len(self._queue) > QUEUED:
                self._queue.popleft().result()
            self.disk_seconds += time.monotonic() - begun

    def _stored(
        self, layout: Layout, batch: Batch, outputs: Mapping[str, Tensor] | None
    ) -> dict[str, NDArray[Any]]:
        """The batch's part of a stream, as it goes to disk: its values, and their scales under `_scale`."""
        bounds, rows, this = self.bounds.get(layout.name), batch.rows, stream(layout.name)
        planned = None if bounds is None else np.diff(bounds[rows.start : rows.stop + 1])
        expected = (len(rows) if planned is None else int(planned.sum()), *layout.shape[1:])
        mode = mode_of(self.cache.spec.storage, this.kind)
        # A level cannot be NaN.
        nothing, dtype = (0, torch.uint8) if this.kind == "pixels" else (torch.nan, torch.float32)
        if outputs is None:
            values = torch.full(expected, nothing, dtype=dtype)
            good = np.zeros(expected[0], bool)
        else:
            values, good = self._values(layout, batch, outputs, planned)
            if self.cache.spec.storage == "pool2x2" and this.kind == "patches":
                values = pooled_2x2(values.float())
            if tuple(values.shape) != expected:
                raise BadOutput(
                    f"{layout.name}: the backbone returned shape {tuple(values.shape)}, its spec promises {expected}"
                )
            usable = torch.from_numpy(good).to(values.device)
            self._check(layout, values if good.all() else values[usable])
            if not good.all():
                usable = usable.reshape(-1, *[1] * (values.ndim - 1))
                values = torch.where(usable, values, nothing)
        mean, std = self._centred(layout.name, values.device) if mode.centred else (None, None)
        found = quantised(values, mode, mean, std)
        return {suffix: tensor.cpu().numpy() for suffix, tensor in found.items()}

    def _values(
        self,
        layout: Layout,
        batch: Batch,
        outputs: Mapping[str, Tensor],
        planned: NDArray[np.int64] | None,
    ) -> tuple[Tensor, NDArray[np.bool_]]:
        """What the backbone made of the batch's rows, and which of it is of usable inputs."""
        key = stream(layout.name).key
        if key not in outputs:
            raise BadOutput(
                f"the backbone offers {layout.name} but returned only {', '.join(outputs)}: its file is at fault"
            )
        values = _each_row(outputs[key], batch.shared)
        if planned is None:
            return values, batch.good
        home = key.rpartition("/")[0]
        length = _each_row(outputs[f"{home}/length" if home else "length"], batch.shared)
        values = self._real_rows(layout, batch, values, length, planned)
        return values, np.repeat(batch.good, planned)

    def _centred(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation of a stream's channels, where its values are."""
        if name not in self._centre:
            mean, std = self.cache.statistics(name)
            assert mean is not None
            assert std is not None
            self._centre[name] = torch.from_numpy(mean).to(device), torch.from_numpy(std).to(device)
        mean, std = self._centre[name]
        return mean.to(device), std.to(device)

    def _real_rows(
        self,
        layout: Layout,
        batch: Batch,
        values: Tensor,
        length: Tensor,
        planned: NDArray[np.int64],
    ) -> Tensor:
        """Entries of a padded batch one row after the other, without padding."""
        found = length.cpu().numpy()
        if not np.array_equal(found[batch.good], planned[batch.good]):
            raise BadOutput(
                f"{layout.name}: the backbone gives other lengths than when the build was planned (rows "
                f"{batch.rows.start} … {batch.rows.stop - 1}): its tokenizer is not deterministic, or a picture has "
                "changed since"
            )
        if planned.max(initial=0) > values.shape[1]:
            shape = (len(values), int(planned.max()), *values.shape[2:])
            widened = values.new_full(shape, torch.nan)
            widened[:, : values.shape[1]] = values
            values = widened
        want = torch.from_numpy(planned).to(values.device)
        return values[torch.arange(values.shape[1], device=values.device) < want[:, None]]

    def _check(self, layout: Layout, values: Tensor) -> None:
        """Refuse what would be stored as NaN or infinity."""
        if not values.numel():
            return
        low, high = (float(v) for v in values.aminmax())
        limit = FP16_MAX if layout.dtype == "float16" else torch.finfo(torch.float32).max
        if -limit <= low and high <= limit:  # False for NaN
            return
        if not np.isfinite([low, high]).all():
            raise BadOutput(
                f"{layout.name}: the backbone returned NaN or infinity for rows of usable inputs; its weights or its "
                f"compute dtype ({self.cache.spec.backbone.compute}) are at fault"
            )
        raise BadOutput(
            f"{layout.name} has values from {low:.6g} to {high:.6g}, beyond fp16's ±{FP16_MAX:.0f}; build with "
            "--store bf16 or --store fp32"
        )


def _each_row(values: Tensor, shared: NDArray[np.int64] | None) -> Tensor:
    """Values of inputs as values of rows."""
    if shared is None:
        return values
    return values.index_select(0, torch.from_numpy(shared).to(values.device))
