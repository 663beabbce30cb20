"""Going through one side of a cache: rows to batches, batches through the backbone, and what comes out to the disk.

    files ── decode, look, prepare ──▶ stack ──▶ encode ──▶ cast, check, scatter ──▶ whole chunks: crc, fsync ──▶ disk
             `workers` threads        1 thread  this one   1 thread                 1 thread
    texts ── tokenize, 1 thread ─────────────────▶

Every hand-over is bounded, so memory does not grow with the data set.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from cache_builder.backbones.base import Backbone
from cache_builder.beside import Beside, Told
from cache_builder.cache import FeatureCache
from cache_builder.contents import ragged_homes
from cache_builder.datasets.base import Dataset, ImageRecord
from cache_builder.encoders import PictureEncoder
from cache_builder.errors import BadOutput
from cache_builder.filler import SIDES, Batch, Filler
from cache_builder.format import Side
from cache_builder.loading import AHEAD, Loading, Looks, ahead, pool
from cache_builder.views import crop_boxes, resize_for_crops


@dataclass(frozen=True, slots=True)
class Passes:
    """How the missing chunks of a cache are filled.

    Attributes:
        cache, dataset, backbone: what is filled, with what.
        workers: threads that decode and preprocess.
        strict: fail at the first image that cannot be used.
        progress: show bars.
        previous: the cache that this one continues.
        stop: once set, the chunk in hand is finished, and `KeyboardInterrupt` raised.
    """

    cache: FeatureCache
    dataset: Dataset
    backbone: Backbone
    workers: int = 2
    strict: bool = False
    progress: bool = False
    previous: FeatureCache | None = None
    stop: Event | None = None

    def run_all(self) -> None:
        """Fill all that is missing."""
        for side in SIDES:
            self.run(side)

    def run(self, side: Side, only: Collection[tuple[str, int]] | None = None) -> None:
        """Fill what is missing of a side, or those of its chunks that are named."""
        with Filler(self.cache, side, only, self.previous) as filler:
            if not filler.batches:
                return
            match side:
                case "text":
                    strings, tokenize = self.cache.texts, self.backbone.tokenize
                    self._strings(filler, strings, tokenize, self.backbone.encode_texts)
                case "word":
                    strings, tokenize = self.cache.word_strings, self.backbone.tokenize_words
                    self._strings(filler, strings, tokenize, self.backbone.encode_words)
                case "image" | "crop":
                    self._pictures(filler)

    def _strings(
        self,
        filler: Filler,
        strings: list[str],
        tokenize: Callable[[list[str]], Int[Tensor, "b l"]],
        encode: Callable[[Any], dict[str, Tensor]],
    ) -> None:
        beside = Beside(self.backbone.device)

        def batch(rows: range) -> Batch:
            ids = tokenize([strings[r] for r in rows])
            return Batch(rows, beside.bring(ids), np.ones(len(rows), bool))

        with pool(1, "tokenize") as tokenizing:
            batches = ahead(tokenizing.submit(batch, rows) for rows in filler.batches)
            self._run(filler, batches, encode, beside)

    def _pictures(self, filler: Filler) -> None:
        """Images, views included, or their crops."""
        cache, beside = self.cache, Beside(self.backbone.device)
        by_id = {record.id: record for record in self.dataset.images}
        records = [by_id[i] for i in cache.image_ids]
        load = Loading(cache, records, self.backbone, self.workers, self.strict, beside)
        if filler.side == "image":
            encoder = PictureEncoder(cache.streams, self.backbone)
            owner = np.arange(filler.n_rows)
            batches = load.batches(filler, owner, self._measured(encoder, records))
        else:
            encoder = PictureEncoder(["image/pooled"], self.backbone)
            boxes, bounds = cache.boxes(), cache.offsets("crop/box")
            rule = cache.spec.rules["crop"].partition(":")[0]

            def resized(row: int, image: Image) -> Image:
                planned = boxes[bounds[row] : bounds[row + 1]]
                if not np.array_equal(planned, crop_boxes(*image.size, rule)):
                    raise BadOutput(
                        f"image {records[row].id!r} has another size ({image.width} × {image.height}) than when its "
                        "crops were planned: it has changed since; restore it, or remove the cache and repeat"
                    )
                return resize_for_crops(image)

            def window(row: int, image: Image) -> dict[str, Image]:
                return {"": image.crop(tuple(boxes[row].tolist()))}

            batches = load.batches(filler, cache.crop_owners(), window, resized)
        # Closed also after an error, so that no thread outlives the lock.
        with closing(batches):
            self._run(filler, batches, encoder.encode, beside)

    def _measured(self, encoder: PictureEncoder, records: Sequence[ImageRecord]) -> Looks:
        """The looks of a picture, refused if one has not the grid that was planned for it."""
        grids = {
            home.removeprefix("image").lstrip("/"): self.cache.grid(home)
            for home in ragged_homes(self.cache.spec)
            if home != "crop"
        }

        def looks(row: int, image: Image) -> dict[str, Image]:
            found = encoder.looks(row, image)
            for home, grid in grids.items():
                if self.backbone.grid(*found[home].size) != tuple(grid[row].tolist()):
                    raise BadOutput(
                        f"image {records[row].id!r} has another size ({image.width} × {image.height}) than when its "
                        "patches were planned: it has changed since; restore it, or remove the cache and repeat"
                    )
            return found

        return looks

    def _run(
        self,
        filler: Filler,
        batches: Iterable[Batch],
        encode: Callable[[Any], dict[str, Tensor]],
        beside: Beside,
    ) -> None:
        """Encode batch after batch in this thread, while others prepare the next one and store the last."""
        storing: deque[tuple[Told, Future[str]]] = deque()
        source = "the pictures" if filler.side in ("image", "crop") else "the tokenizer"
        meter, rows = Meter(), sum(map(len, filler.batches))
        with (
            tqdm(
                desc=f"{filler.side}s",
                total=filler.n_rows,
                initial=filler.n_rows - rows,
                unit=filler.side,
                disable=not self.progress,
            ) as bar,
            pool(1, "store") as store,
        ):
            coming = iter(batches)
            while (batch := meter.timed(source, lambda: next(coming, None))) is not None:
                outputs = None
                if batch.inputs is not None:
                    with torch.inference_mode():
                        inputs = beside.ready(batch.inputs)
                        outputs = meter.timed("the backbone", lambda i=inputs: encode(i))
                told = beside.told()
                work = beside.after(told, outputs, partial(_stored, filler, batch, outputs))
                storing.append((told, store.submit(work)))
                if len(storing) > AHEAD:
                    meter.until_stored(*storing.popleft())
                bar.set_postfix_str(meter.told(filler.stored_bytes), refresh=False)
                bar.update(len(batch.rows))
                if self.stop is not None and self.stop.is_set() and filler.ends_a_chunk(batch):
                    break
            while storing:
                meter.until_stored(*storing.popleft())
        if self.stop is not None and self.stop.is_set():
            raise KeyboardInterrupt


def _stored(filler: Filler, batch: Batch, outputs: Mapping[str, Tensor] | None) -> str:
    """Store a batch; what that took longest for."""
    begun, disk = time.monotonic(), filler.disk_seconds
    filler.take(batch, outputs)
    spent, disk = time.monotonic() - begun, filler.disk_seconds - disk
    return "the disk" if 2 * disk > spent else "the casting"


class Meter:
    """Where the seconds of the encoding thread go, and how many bytes a second are stored."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._spent: dict[str, float] = {}

    def timed(self, what: str, work: Callable[[], Any]) -> Any:
        """The result of some work, its seconds counted."""
        begun = time.monotonic()
        found = work()
        self._count(what, time.monotonic() - begun)
        return found

    def until_stored(self, told: Told, stored: Future[str]) -> None:
        """Wait until a batch is stored; before that the device must have encoded it."""
        self.timed("the backbone", told.wait)
        begun = time.monotonic()
        what = stored.result()
        self._count(what, time.monotonic() - begun)

    def _count(self, what: str, seconds: float) -> None:
        """Older ones count less and less."""
        self._spent = {name: 0.95 * spent for name, spent in self._spent.items()}
        self._spent[what] = self._spent.get(what, 0.0) + seconds

    def told(self, stored: int) -> str:
        """For a bar: bytes a second, and what is waited for most."""
        rate = stored / max(time.monotonic() - self._begun, 1e-9) / 1e6
        return f"{rate:.1f} MB/s, waits for {max(self._spent, key=self._spent.__getitem__)}"
