"""Rows in, whole chunks out: batches are scattered into open chunks, each written when its last row is there."""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from cache_builder.cache import FeatureCache
from cache_builder.errors import BadOutput
from cache_builder.format import Layout, stream

FP16_MAX = 65504.0

Side = Literal["image", "text", "crop", "word"]
"""What the builder goes through one by one; the first part of a stream's name."""

QUEUED = 2
"""Chunks that may wait for the disk; bounds memory."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that are encoded together.

    Attributes:
        rows: of the cache.
        inputs: what the encoder takes, pixels or token ids, as long as `rows`; None if no row is usable.
        good: False where a row has no usable picture; a neighbour stands in, so that the others keep their bits.
    """

    rows: range
    inputs: Any
    good: Bool[np.ndarray, " b"]


class Filler:
    """The missing chunks of one side of a cache.

    Rows are what is encoded one by one: images, texts, crops, or parts of words.

    Attributes:
        batches: the rows to encode: those batches of the fixed partition that touch a missing chunk.
    """

    def __init__(self, cache: FeatureCache, side: Side) -> None:
        self.cache, self.side = cache, side
        self.layouts = [cache.layout(s) for s in cache.streams if s.startswith(f"{side}/")]
        self.missing = set(cache.pending())
        self.bounds = {
            la.name: cache.offsets(la.name)
            for la in self.layouts
            if cache.is_ragged(la.name) and side != "crop"
        }
        self.n_rows = _n_rows(cache, side) if self.layouts else 0
        size = cache.header.batch_size
        needed = np.zeros(-(-self.n_rows // size), bool)
        for layout in self.layouts:
            for chunk in range(layout.n_chunks):
                if (layout.name, chunk) in self.missing:
                    first, last = self._rows(layout, *layout.bounds(chunk))
                    needed[first // size : last // size + 1] = True
        self.batches = [
            range(b * size, min((b + 1) * size, self.n_rows)) for b in np.flatnonzero(needed)
        ]
        self._open: dict[tuple[str, int], tuple[NDArray[Any], int]] = {}
        self._writer = ThreadPoolExecutor(1, "write")
        self._queue: deque[Future[None]] = deque()

    def __enter__(self) -> "Filler":
        return self

    def __exit__(self, *error: object) -> None:
        """Let every chunk that is complete reach the disk, also after an error."""
        self._writer.shutdown(wait=True)
        while self._queue:
            failed = self._queue.popleft().exception()
            if failed and error[0] is None:
                raise failed

    def _rows(self, layout: Layout, start: int, stop: int) -> tuple[int, int]:
        """First and last row of the side that have a part in places start … stop - 1 of an array."""
        if layout.name not in self.bounds:
            return start, stop - 1
        ends = self.bounds[layout.name][1:]
        return int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop, "left"))

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
            chunks = range(start // layout.chunk, -(-stop // layout.chunk))
            wanted = [c for c in chunks if (layout.name, c) in self.missing]
            if wanted:
                values = self._stored(layout, batch, outputs)
                for chunk in wanted:
                    self._scatter(layout, chunk, values, start)

    def _scatter(self, layout: Layout, chunk: int, values: NDArray[Any], start: int) -> None:
        low, high = layout.bounds(chunk)
        first, last = max(start, low), min(start + len(values), high)
        key = layout.name, chunk
        if key not in self._open:
            # Rows beyond the end of the array keep the fill value: zarr stores the last chunk at full size.
            self._open[key] = np.zeros(layout.chunk_shape, layout.dtype), high - low
        buffer, left = self._open[key]
        buffer[first - low : last - low] = values[first - start : last - start]
        left -= last - first
        self._open[key] = buffer, left
        if not left:
            del self._open[key]
            self._queue.append(self._writer.submit(self.cache.write_chunk, *key, buffer))
            while len(self._queue) > QUEUED:
                self._queue.popleft().result()

    def _stored(
        self, layout: Layout, batch: Batch, outputs: Mapping[str, Tensor] | None
    ) -> NDArray[Any]:
        """The batch's part of an array, as it goes to disk."""
        bounds, rows = self.bounds.get(layout.name), batch.rows
        planned = None if bounds is None else np.diff(bounds[rows.start : rows.stop + 1])
        count = len(rows) if planned is None else int(planned.sum())
        if outputs is None:
            return np.full((count, *layout.shape[1:]), np.nan, layout.dtype)
        key = stream(layout.name).key
        if key not in outputs:
            raise BadOutput(
                f"the backbone offers {layout.name} but returned only {', '.join(outputs)}: its file is at fault"
            )
        values, good = outputs[key], batch.good
        if planned is not None:
            home = key.rpartition("/")[0]
            length = outputs[f"{home}/length" if home else "length"]
            values = self._real_rows(layout, batch, values, length, planned)
            good = np.repeat(good, planned)
        expected = (count, *layout.shape[1:])
        if tuple(values.shape) != expected:
            raise BadOutput(
                f"{layout.name}: the backbone returned shape {tuple(values.shape)}, its spec promises {expected}"
            )
        self._check(
            layout, values if good.all() else values[torch.from_numpy(good).to(values.device)]
        )
        dtype = torch.float16 if layout.dtype == "float16" else torch.float32
        stored = values.to(dtype).cpu().numpy()
        if not good.all():
            stored = np.where(good.reshape(-1, *[1] * (stored.ndim - 1)), stored, np.nan)
            stored = stored.astype(layout.dtype)
        return stored

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
            "--store fp32"
        )


def _n_rows(cache: FeatureCache, side: Side) -> int:
    if side in ("image", "text"):
        dataset = cache.spec.dataset
        return dataset.n_images if side == "image" else dataset.n_texts
    offsets = cache.offsets(f"{side}/offsets")
    return int(offsets[-1]) if side == "crop" else len(offsets) - 1
