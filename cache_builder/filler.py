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
from cache_builder.format import RAGGED, Layout

FP16_MAX = 65504.0

QUEUED = 2
"""Chunks that may wait for the disk; bounds memory."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that are encoded together.

    Attributes:
        rows: of the cache.
        inputs: pixels or token ids, first axis as long as `rows`; None if no row is usable.
        good: False where a row has no usable picture; its inputs are blank, so that its neighbours keep their bits.
    """

    rows: range
    inputs: Tensor | None
    good: Bool[np.ndarray, " b"]


class Filler:
    """The missing chunks of one side of a cache.

    Attributes:
        batches: the rows to encode: those batches of the fixed partition that touch a missing chunk.
    """

    def __init__(self, cache: FeatureCache, side: Literal["image", "text"]) -> None:
        self.cache, self.side = cache, side
        self.layouts = [cache.layout(s) for s in cache.streams if s.startswith(f"{side}/")]
        self.missing = set(cache.pending())
        dataset = cache.spec.dataset
        self.n_rows = dataset.n_images if side == "image" else dataset.n_texts
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
        if layout.name not in RAGGED:
            return start, stop - 1
        ends = self.cache.offsets[1:]
        return int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop, "left"))

    def take(self, batch: Batch, outputs: Mapping[str, Tensor] | None) -> None:
        """Store what the backbone made of a batch; None if it had nothing usable to encode.

        Raises:
            BadOutput: a value is not finite, does not fit the storage, or has an unexpected shape.
        """
        for layout in self.layouts:
            ragged = layout.name in RAGGED
            bounds = self.cache.offsets if ragged else None
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
        if outputs is None:
            return np.full((len(batch.rows), *layout.shape[1:]), np.nan, layout.dtype)
        name = layout.name.split("/")[1]
        if name not in outputs:
            raise BadOutput(
                f"the backbone offers {layout.name} but returned only {', '.join(outputs)}: its file is at fault"
            )
        values = outputs[name]
        if layout.name in RAGGED:
            values = self._real_tokens(layout, batch, values, outputs["length"])
            expected = (int(np.diff(self.cache.offsets[[batch.rows.start, batch.rows.stop]])[0]),)
        else:
            expected = (len(batch.rows),)
        expected = (*expected, *layout.shape[1:])
        if tuple(values.shape) != expected:
            raise BadOutput(
                f"{layout.name}: the backbone returned shape {tuple(values.shape)}, its spec promises {expected}"
            )
        self._check(
            layout,
            values if batch.good.all() else values[torch.from_numpy(batch.good).to(values.device)],
        )
        dtype = torch.float16 if layout.dtype == "float16" else torch.float32
        stored = values.to(dtype).cpu().numpy()
        if not batch.good.all():
            stored = np.where(batch.good.reshape(-1, *[1] * (stored.ndim - 1)), stored, np.nan)
            stored = stored.astype(layout.dtype)
        return stored

    def _real_tokens(self, layout: Layout, batch: Batch, values: Tensor, length: Tensor) -> Tensor:
        """Tokens of a padded batch one text after the other, without padding."""
        planned = np.diff(self.cache.offsets[batch.rows.start : batch.rows.stop + 1])
        if not np.array_equal(length.cpu().numpy(), planned):
            raise BadOutput(
                f"{layout.name}: the backbone gives other text lengths than when the build was planned "
                f"(rows {batch.rows.start} … {batch.rows.stop - 1}): its tokenizer is not deterministic"
            )
        real = torch.arange(values.shape[1], device=values.device) < length[:, None]
        return values[real]

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
