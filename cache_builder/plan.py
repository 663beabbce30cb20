"""What a cache of so many images and texts would be, from a checkpoint's shapes alone: its arrays, bytes and files.

Nothing is encoded and no weight is read. The layouts are those that `build` writes (format.py), padding of the last
chunk included, so bytes and files are counted wherever rows are of one length; what is only an upper bound says so.

Not counted, as nobody knows them before: ids, strings and tasks, the manifest (a line a file), quarantine; and the
readout, which does not grow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import ValidationError

from cache_builder.backbones.cards import Card
from cache_builder.codec import file_bytes
from cache_builder.errors import UnknownName
from cache_builder.format import (
    CHUNK_BYTES,
    MOST_CHUNKS,
    Layout,
    is_ragged,
    plan,
    row_shape,
    stream,
)
from cache_builder.spec import BackboneSpec, CacheSpec, DatasetSpec
from cache_builder.storage import pooled_patches
from cache_builder.views import SHORT, VIEWS, crop_boxes

Known = dict[str, tuple[tuple[int, ...], str]]

Mark = Literal["", "≤", "~"]

GB = 1e9
"""Bytes; what disks and clouds are sold by."""


@dataclass(frozen=True, slots=True)
class Samples:
    """What would be encoded.

    Attributes:
        images, texts: how many.
        tokens: stored rows of a text in the mean; None is as many as the tower takes, an upper bound.
        patches: of an image in the mean, where pictures keep their shape; None is the most, an upper bound.
        crops: rule of crop/pooled; a square picture's are counted.
        inner_rows: chunks are shards of inner chunks of so many rows; 0 for plain chunks.
    """

    images: int
    texts: int = 0
    tokens: float | None = None
    patches: float | None = None
    crops: str = "all"
    inner_rows: int = 0


@dataclass(frozen=True, slots=True)
class Planned:
    """A cache that nobody has built.

    Attributes:
        storage: mode of `--store`.
        samples: what it would hold.
        layouts: array → layout, of all that grows with the samples.
        mark: "" where bytes are counted, "≤" where they are an upper bound, "~" where square pictures stand for all.
    """

    storage: str
    samples: Samples
    layouts: Mapping[str, Layout]
    mark: Mark

    @property
    def files(self) -> int:
        """Chunk files, or objects of a bucket."""
        return sum(layout.n_chunks for layout in self.layouts.values())

    @property
    def bytes(self) -> int:
        """On disk: whole chunks; of compressed ones what they hold, an upper bound."""
        return sum(_bytes(layout) for layout in self.layouts.values())

    def bytes_each(self, side: str) -> float:
        """Of one image (with its views and crops) or one text, without padding."""
        sides = ("image", "crop") if side == "image" else (side,)
        count = self.samples.images if side == "image" else self.samples.texts
        mine = [la for la in self.layouts.values() if la.name.partition("/")[0] in sides]
        return sum(la.row_bytes * la.shape[0] for la in mine) / max(count, 1)


@dataclass(frozen=True, slots=True)
class Means:
    """What the work is done with; None where nobody has measured or said it.

    Attributes:
        rate: images a second that one device encodes.
        devices: that encode side by side.
        bandwidth: megabytes a second that the storage takes from all of them together.
        device_hour: price of an hour of one device.
        gb_month: price of a gigabyte (10⁹ bytes) kept for a month.
    """

    rate: float | None = None
    devices: int = 1
    bandwidth: float | None = None
    device_hour: float | None = None
    gb_month: float | None = None

    def device_hours(self, images: int) -> float | None:
        """Of encoding, on one device or shared out."""
        return None if self.rate is None else images / self.rate / 3600

    def encoding_hours(self, images: int) -> float | None:
        """By the clock, all devices together."""
        hours = self.device_hours(images)
        return hours / self.devices if hours is not None else None

    def writing_hours(self, size: int) -> float | None:
        """By the clock, where writing alone is what takes time."""
        return None if self.bandwidth is None else size / (self.bandwidth * 1e6) / 3600

    def building_hours(self, images: int, size: int) -> float | None:
        """By the clock: encoding and writing overlap, so the longer of the two, as far as it is known."""
        hours = self.encoding_hours(images)
        return None if hours is None else max(hours, self.writing_hours(size) or 0.0)

    def building_cost(self, images: int, size: int) -> float | None:
        """All devices, paid until everything is written."""
        hours = self.building_hours(images, size)
        if hours is None or self.device_hour is None:
            return None
        return hours * self.devices * self.device_hour

    def monthly_cost(self, size: int) -> float | None:
        """Keeping the cache."""
        return None if self.gb_month is None else size / GB * self.gb_month


def streams_of(card: Card, asked: Sequence[str] | None, texts: int) -> tuple[str, ...]:
    """The streams of such a build, sorted: all that `asked` names, or the backbone's own.

    Raises:
        UnknownName: the format or this checkpoint has no such stream.
    """
    dims = card.dims
    if asked is None:
        pooled, prefix = "joint" in dims, bool(dims["prefix"])
        own = {"image/patches": True, "image/prefix": prefix, "image/pooled": pooled}
        has_text = bool(texts) and "context" in dims
        own |= {"text/tokens": has_text, "text/pooled": has_text and pooled}
        return tuple(sorted(name for name, there in own.items() if there))
    for name in asked:
        found = stream(name)
        if found.side == "word":
            raise UnknownName(
                f"{name} is of the words of a czsl task, which a plan does not know: try `headstart build --dry-run`"
            )
        if found.view is not None and found.view not in VIEWS:
            raise UnknownName(f"{name} is of no known view (known: {', '.join(VIEWS)})")
        depth = card.depth.get(found.side, 0)
        if found.block is not None and found.block > depth:
            raise UnknownName(f"{name}: the {found.side} tower has the blocks 0 … {depth}")
        row_shape(name, dims)
    return tuple(sorted(set(asked)))


def planned(
    card: Card,
    name: str,
    streams: Sequence[str],
    samples: Samples,
    storage: str,
    chunk_bytes: int = CHUNK_BYTES,
) -> Planned:
    """The cache of such a build under one storage mode.

    Args:
        card: of the checkpoint.
        name: of the checkpoint, `family:checkpoint`.
        streams: as `streams_of` returns them.
        samples: what would be encoded.
        storage: mode of `--store`.
        chunk_bytes: as for `build`.

    Raises:
        UnknownName: the mode is not for these patches, or an array would have more chunks than can be listed.
    """
    if storage == "pool2x2":
        pooled_patches({} if is_ragged("image/patches", card.dims) else card.dims)
    family, _, checkpoint = name.partition(":")
    shapes = {"family": family, "checkpoint": checkpoint, "dims": dict(card.dims)}
    unknown = ("weights", "preprocessing", "tokenizer", "layer", "activation", "compute")
    spec = CacheSpec(
        backbone=BackboneSpec(**shapes, **dict.fromkeys(unknown, ""), versions={}),
        dataset=DatasetSpec(
            name="", digest="", decode="", n_images=samples.images, n_texts=samples.texts
        ),
        streams=tuple(streams),
        storage=storage,
    )
    totals, known, mark = _entries(card, streams, samples)
    try:
        layouts = plan(spec, known, totals, chunk_bytes, samples.inner_rows)
    except ValidationError as error:
        raise UnknownName(
            f"--store {storage}: an array of this cache would have more than {MOST_CHUNKS:,} chunks, or more bytes "
            "than can be addressed; share the images out among several caches"
        ) from error
    compressed = any(layout.compressed for layout in layouts.values())
    return Planned(storage, samples, layouts, mark or ("≤" if compressed else ""))


def _entries(
    card: Card, streams: Sequence[str], samples: Samples
) -> tuple[dict[str, int], Known, Mark]:
    """Home of every ragged stream → its entries; the arrays that say where they begin; what the numbers are."""
    totals: dict[str, int] = {}
    known: Known = {}
    marks: set[Mark] = set()
    for found in (stream(name) for name in streams if is_ragged(name, card.dims)):
        rows, each = samples.images, samples.patches
        most = float(card.dims.get("most_patches", 0))
        mark: Mark = "≤"
        if found.side == "text":
            rows, each, most = samples.texts, samples.tokens, float(card.dims["context"])
        elif found.side == "crop":
            each, most, mark = None, float(len(crop_boxes(SHORT, SHORT, samples.crops))), "~"
        if each is None:
            marks.add(mark)
        total = totals[found.home] = round(rows * (most if each is None else each))
        known[f"{found.home}/offsets"] = ((rows + 1,), "int64")
        if found.side == "text":
            known["text/ids"] = ((total,), "int32")
        elif found.side == "crop":
            known["crop/box"] = ((total, 4), "int32")
        else:
            known[f"{found.home}/grid"] = ((rows, 2), "int32")
    return totals, known, "~" if "~" in marks else "≤" if marks else ""


def _bytes(layout: Layout) -> int:
    """Of all files of an array."""
    each = file_bytes(layout)
    held = int(np.prod(layout.shape, dtype=np.int64)) * np.dtype(layout.dtype).itemsize
    return held if each is None else each * layout.n_chunks
