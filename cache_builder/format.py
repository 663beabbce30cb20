"""The on-disk format: arrays and their chunks, the lines of the two journals.

Normative text: docs/cache-format.md. A chunk file is the plain little-endian array bytes, so its checksum is taken in
memory and any reader of zarr v3 understands it.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from cache_builder.errors import UnknownName
from cache_builder.spec import CacheSpec

SCHEMA = 2
"""Raised whenever an older reader would misread what a newer builder writes."""

FORMAT = "headstart feature cache"

AXES: dict[str, tuple[tuple[str, str], ...]] = {
    "pooled": (("embedding", "joint"),),
    "patches": (("patch", "patches"), ("width", "image_width")),
    "prefix": (("prefix", "prefix"), ("width", "image_width")),
    "block": (("row", "rows"), ("width", "image_width")),
    "tokens": (("width", "text_width"),),
    "states": (("width", "text_width"),),
}
"""Kind of stream → axes of one row after the first: (dimension name in zarr, key in `BackboneSpec.dims`)."""

OFFERED = {
    "image": ("pooled", "patches", "prefix", "block"),
    "crop": ("pooled",),
    "text": ("pooled", "tokens"),
    "word": ("states",),
}
"""Side → kinds of stream it may have. Views of an image have the kinds of an image."""

RAGGED = frozenset({"text/tokens", "text/ids", "word/states", "word/ids", "crop/pooled"})
"""Arrays whose first axis is not the rows they are read by, in every cache: row i is offsets[i] … offsets[i + 1]."""

DTYPES = {"fp16": "float16", "fp32": "float32"}

CHUNK_BYTES = 24 << 20
"""Aim for a chunk of patches: 16-32 MB read at the disk's full speed and fit a cache of few files."""

POOLED_CHUNKS = 16
"""A chunk of a small image stream spans this many chunks of patches: few files, little lost by a kill."""

MOST_ROWS = 4096
"""Rows of a chunk where no patches bound it; bounds what a kill can cost."""


class Layout(BaseModel):
    """One array: what its zarr.json says.

    Attributes:
        chunk: rows per chunk, along the first axis; other axes are never cut.
        dtype: zarr data type: float16, float32, int32, int64 or string.
        dims: dimension names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...]
    chunk: int
    dtype: str
    dims: tuple[str, ...]

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of every chunk, the last one included: it is padded with the fill value."""
        return (self.chunk, *self.shape[1:]) if self.shape else ()

    @property
    def n_chunks(self) -> int:
        """Chunks along the first axis; none if the array is empty."""
        return -(-self.shape[0] // self.chunk) if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; meaningless for strings."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of all chunks on disk; 0 for strings, whose size depends on their content."""
        if self.dtype == "string":
            return 0
        return self.n_chunks * math.prod(self.chunk_shape) * np.dtype(self.dtype).itemsize

    def bounds(self, chunk: int) -> tuple[int, int]:
        """First row of a chunk and the row after its last real one."""
        start = chunk * self.chunk
        return start, min(start + self.chunk, self.shape[0] if self.shape else 1)

    def file(self, chunk: int) -> str:
        """Path of a chunk inside the cache: zarr's default keys."""
        index = (
            "".join(f"/{i}" for i in (chunk, *(0 for _ in self.shape[1:]))) if self.shape else ""
        )
        return f"{self.name}/c{index}"

    def metadata(self) -> dict[str, Any]:
        """The part of zarr.json that decides how bytes are read."""
        text = self.dtype == "string"
        fill: object = "" if text else 0.0 if self.dtype.startswith("float") else 0
        codec: dict[str, Any] = {"name": "vlen-utf8", "configuration": {}}
        plain = {"name": "bytes", "configuration": {"endian": "little"}}
        grid = {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": grid,
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill,
            "codecs": [codec if text else plain],
            "dimension_names": list(self.dims) or None,
        }


class Entry(BaseModel):
    """A line of manifest.jsonl: a finished chunk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    array: str
    chunk: int
    bytes: int
    crc32c: str


class Bad(BaseModel):
    """A line of quarantine.jsonl: an image that could not be used. Its row is filled with NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    reason: str
    row: int


class Stream(BaseModel):
    """The name of a stream, taken apart: `image/view_flip/block_3` is block 3 of the view `flip` of an image."""

    model_config = ConfigDict(frozen=True)

    name: str
    side: str
    home: str
    kind: str
    view: str | None = None
    block: int | None = None

    @property
    def key(self) -> str:
        """What the builder calls it: the name without the side."""
        return self.name.removeprefix(f"{self.side}/")


def stream(name: str) -> Stream:
    """Take a stream's name apart.

    Raises:
        UnknownName: the format has no such stream.
    """
    home, _, last = name.rpartition("/")
    side, below, view = home.partition("/")
    numbered = re.fullmatch(r"block_(0|[1-9][0-9]*)", last)
    kind = "block" if numbered else last
    viewed = re.fullmatch(r"view_([a-z0-9_]+)", view) if side == "image" else None
    if kind not in OFFERED.get(side, ()) or (below and not viewed) or last == "block":
        known = [f"{s}/{k}" for s, kinds in OFFERED.items() for k in kinds if k != "block"]
        raise UnknownName(
            f"no stream {name!r} in the cache format (known: {', '.join(known)}, image/block_<k>, and "
            "image/view_<view>/… of those of an image)"
        )
    return Stream(
        name=name,
        side=side,
        home=home,
        kind=kind,
        view=viewed[1] if viewed else None,
        block=int(numbered[1]) if numbered else None,
    )


def is_stream(name: str) -> bool:
    """Is an array one of embeddings, by its name?"""
    try:
        stream(name)
    except UnknownName:
        return False
    return True


def is_ragged(name: str, dims: Mapping[str, int]) -> bool:
    """Do rows of an array differ in length? Patches do where pictures keep their shape."""
    kept = "patches" not in dims and "most_patches" in dims
    return name in RAGGED or (
        kept and name.startswith("image/") and stream(name).kind in ("patches", "block")
    )


def row_shape(name: str, dims: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of one row of a stream (of one token or patch, if ragged) under a backbone's dimensions."""
    found = stream(name)
    axes = AXES[found.kind]
    if is_ragged(name, dims) and found.side == "image":
        axes = axes[1:]
    known = {**dims, "rows": dims.get("prefix", 0) + dims.get("patches", 0)}
    lacking = [key for _, key in axes if key not in known]
    if lacking:
        raise UnknownName(
            f"stream {name!r} needs {', '.join(lacking)} in the backbone's spec.dims, which has {', '.join(dims)}"
        )
    return tuple(known[key] for _, key in axes)


def plan(
    spec: CacheSpec,
    known: Mapping[str, tuple[tuple[int, ...], str]],
    totals: Mapping[str, int],
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, Layout]:
    """Every array of a cache, by name.

    Args:
        spec: what the cache will hold.
        known: arrays written at creation: name → shape and dtype.
        totals: home of a ragged stream → entries along its first axis: tokens, patches, crops.
        chunk_bytes: aim for the largest chunks.
    """
    dims = spec.backbone.dims
    found: list[Layout] = []
    for name, (shape, dtype) in sorted(known.items()):
        chunk = _known_chunk(name, shape, chunk_bytes)
        found.append(_layout(name, shape, chunk, dtype, _known_axes(name, shape)))
    dtype = DTYPES[spec.storage]
    item = np.dtype(dtype).itemsize
    most = MOST_ROWS
    if "image/patches" in spec.streams and not is_ragged("image/patches", dims):
        patch_bytes = math.prod(row_shape("image/patches", dims)) * item
        most = POOLED_CHUNKS * max(1, chunk_bytes // patch_bytes)
    counts = {"image": spec.dataset.n_images, "text": spec.dataset.n_texts}
    for name in spec.streams:
        shape, this = row_shape(name, dims), stream(name)
        ragged = is_ragged(name, dims)
        first = FIRST_AXIS[this.side] if ragged else this.side
        count = totals[this.home] if ragged else counts[this.side]
        chunk = chunk_bytes // max(1, math.prod(shape) * item)
        if not ragged or this.side == "crop":
            chunk = min(chunk, most if this.side == "image" else MOST_ROWS)
        axes = AXES[this.kind][-len(shape) :]
        found.append(_layout(name, (count, *shape), chunk, dtype, (first, *(a for a, _ in axes))))
    return {layout.name: layout for layout in found}


FIRST_AXIS = {"image": "patch", "crop": "crop", "text": "token", "word": "token"}
"""Side → what the first axis of its ragged streams counts."""


def _known_chunk(name: str, shape: tuple[int, ...], chunk_bytes: int) -> int:
    """Arrays known from the start are one chunk each, but for token ids, which may be many."""
    if name in ("text/ids", "word/ids"):
        return chunk_bytes // 4
    return max(shape, default=1) if name.startswith("readout/") else (shape or (1,))[0]


def _known_axes(name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Dimension names of an array known from the start."""
    home, _, last = name.rpartition("/")
    side = home.partition("/")[0]
    named = {
        "id": (side,),
        "string": ("part" if side == "word" else side,),
        "offsets": ("bound",),
        "parts": ("word_bound",),
        "ids": ("token",),
        "vocabulary": ("piece",),
        "grid": ("image", "rows_columns"),
        "box": ("crop", "edge"),
    }
    if side == "readout" or last not in named:
        return tuple(f"axis_{i}" for i in range(len(shape)))
    return named[last]


def _layout(
    name: str, shape: tuple[int, ...], chunk: int, dtype: str, dims: tuple[str, ...]
) -> Layout:
    rows = shape[0] if shape else 1
    return Layout(name=name, shape=shape, chunk=max(1, min(chunk, rows)), dtype=dtype, dims=dims)


def metadata_problem(cache: Path, layout: Layout) -> str | None:
    """In what an array's zarr.json differs from its layout, as words; None if it does not."""
    file = cache / layout.name / "zarr.json"
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        return f"{file} cannot be read ({error})"
    for key, value in layout.metadata().items():
        if found.get(key) != value:
            return f"{file} says {key} = {found.get(key)}, but the header says {value}"
    return None


def encode_strings(strings: Sequence[str]) -> bytes:
    """A chunk of zarr's `string` type: count, then length and UTF-8 bytes of each, all counts uint32."""
    parts = [len(strings).to_bytes(4, "little")]
    for string in strings:
        data = string.encode()
        parts += [len(data).to_bytes(4, "little"), data]
    return b"".join(parts)


def decode_strings(data: bytes) -> list[str]:
    """Inverse of `encode_strings`."""
    strings: list[str] = []
    at = 4
    for _ in range(int.from_bytes(data[:4], "little")):
        size = int.from_bytes(data[at : at + 4], "little")
        strings.append(data[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return strings
