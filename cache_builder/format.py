"""The on-disk format: arrays and their chunks, the lines of the two journals.

Normative text: docs/cache-format.md. A chunk file is the plain little-endian array bytes, so its checksum is taken in
memory and any reader of zarr v3 understands it. A shard is the same with an index behind it.
"""

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from cache_builder.errors import UnknownName
from cache_builder.spec import CacheSpec
from cache_builder.storage import STATISTICS, Mode, mode_of, pooled_patches

SCHEMA = 4
"""Raised whenever an older reader would misread what a newer builder writes."""

FORMAT = "headstart feature cache"

Side = Literal["image", "text", "crop", "word"]
"""What the builder goes through one by one; the first part of a stream's name."""

AXES: dict[str, tuple[tuple[str, str], ...]] = {
    "pooled": (("embedding", "joint"),),
    "patches": (("patch", "patches"), ("width", "image_width")),
    "prefix": (("prefix_token", "prefix"), ("width", "image_width")),
    "block": (("row", "rows"), ("width", "image_width")),
    "pixels": (
        ("channel", "channels"),
        ("pixel_height", "image_size"),
        ("pixel_width", "image_size"),
    ),
    "tokens": (("width", "text_width"),),
    "states": (("width", "text_width"),),
}
"""Kind of stream → axes of one row after the first: (dimension name in zarr, key in `BackboneSpec.dims`).

`rows` and `channels` follow from the others. `width` is W; xarray opens a group only if equal names have equal sizes.
"""

CHANNELS = 3
"""Red, green, blue."""

OFFERED = {
    "image": ("pooled", "patches", "prefix", "block", "pixels"),
    "crop": ("pooled",),
    "text": ("pooled", "tokens"),
    "word": ("states",),
}
"""Side → kinds of stream it may have. Views of an image have the kinds of an image."""

RAGGED = frozenset({"text/tokens", "text/ids", "word/states", "word/ids", "crop/pooled"})
"""Arrays whose first axis is not the rows they are read by, in every cache: row i is offsets[i] … offsets[i + 1]."""

CHUNK_BYTES = 24 << 20
"""Aim for a chunk of patches: 16-32 MB read at the disk's full speed and fit a cache of few files."""

POOLED_CHUNKS = 16
"""A chunk of a small image stream spans this many chunks of patches: few files, little lost by a kill."""

MOST_ROWS = 4096
"""Rows of a chunk where no patches bound it; bounds what a kill can cost."""


MOST_CHUNKS = 10**7
"""Of one array; 240 TB of patches."""

NAME = r"^(image|text|crop|word|readout)(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+$"
"""Of an array: nothing that leads out of the cache."""


class Layout(BaseModel):
    """One array: what its zarr.json says.

    Attributes:
        chunk: rows per chunk, along the first axis; other axes are never cut.
        dtype: zarr data type: float16, float32, int8, uint8, uint16, int32, int64 or string.
        dims: dimension names.
        torch_dtype: what the numbers are, where zarr has no such type: bfloat16, float8_e4m3fn.
        inner: rows of an inner chunk, where a chunk is a shard.
        compressed: chunks are compressed without loss (blosc: bitshuffle, zstd).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME)
    shape: tuple[NonNegativeInt, ...]
    chunk: int = Field(ge=1)
    dtype: Literal["float16", "float32", "int8", "uint8", "uint16", "int32", "int64", "string"]
    dims: tuple[str, ...]
    torch_dtype: Literal["", "bfloat16", "float8_e4m3fn"] = ""
    inner: NonNegativeInt = 0
    compressed: bool = False

    @model_validator(mode="after")
    def _possible(self) -> "Layout":
        """No array is larger than what can be addressed, or has more chunks than can be listed."""
        rows = max(self.chunk, *self.shape[:1], 1)
        if rows * math.prod(max(1, n) for n in self.shape[1:]) * 8 >= 2**63:
            raise ValueError(f"{self.name} has the shape {self.shape}, more than can be addressed")
        if self.n_chunks > MOST_CHUNKS:
            raise ValueError(f"{self.name} has {self.n_chunks} chunks, more than {MOST_CHUNKS}")
        if self.inner and (self.chunk % self.inner or not self.shape):
            raise ValueError(
                f"{self.name} has shards of {self.chunk} rows in parts of {self.inner}"
            )
        if self.dtype == "string" and len(self.shape) != 1:
            raise ValueError(f"{self.name} has strings along {len(self.shape)} axes")
        return self

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
        """All of its zarr.json."""
        text = self.dtype == "string"
        fill: object = "" if text else 0.0 if self.dtype.startswith("float") else 0
        grid = {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}}
        found: dict[str, Any] = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": grid,
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill,
            "codecs": [{"name": "vlen-utf8", "configuration": {}}] if text else self._codecs(),
            "attributes": {"torch_dtype": self.torch_dtype} if self.torch_dtype else {},
            "storage_transformers": [],
        }
        return found | ({"dimension_names": list(self.dims)} if self.dims else {})

    def _codecs(self) -> list[dict[str, Any]]:
        size = np.dtype(self.dtype).itemsize
        plain: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
        if size == 1:
            plain = {"name": "bytes"}  # a byte has no order, and zarr says none
        if self.compressed:
            settings = {
                "typesize": size,
                "cname": "zstd",
                "clevel": 5,
                "shuffle": "bitshuffle",
                "blocksize": 0,
            }
            return [plain, {"name": "blosc", "configuration": settings}]
        if self.inner:
            index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
            shard = {
                "chunk_shape": [self.inner, *self.shape[1:]],
                "codecs": [plain],
                "index_codecs": index,
            }
            return [
                {"name": "sharding_indexed", "configuration": {**shard, "index_location": "end"}}
            ]
        return [plain]


class Entry(BaseModel):
    """A line of manifest.jsonl: a finished chunk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    array: str
    chunk: int
    bytes: int
    crc32c: str


class Bad(BaseModel):
    """A line of quarantine.jsonl: an image that could not be used. Its row is filled with NaN, its pixels with 0."""

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


@lru_cache(maxsize=256)  # asked for every stream of every batch
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


def row_shape(name: str, dims: Mapping[str, int], storage: str = "fp16") -> tuple[int, ...]:
    """Shape of one row of a stream (of one token or patch, if ragged) under a backbone's dimensions."""
    found = stream(name)
    axes = AXES[found.kind]
    if is_ragged(name, dims) and found.side == "image":
        axes = axes[1:]
    if storage == "pool2x2" and found.kind == "patches":
        dims = {**dims, "patches": pooled_patches(dims)}
    known = {**dims, "rows": dims.get("prefix", 0) + dims.get("patches", 0), "channels": CHANNELS}
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
    inner_rows: int = 0,
) -> dict[str, Layout]:
    """Every array of a cache, by name.

    Args:
        spec: what the cache will hold.
        known: arrays written at creation: name → shape and dtype.
        totals: home of a ragged stream → entries along its first axis: tokens, patches, crops.
        chunk_bytes: aim for the largest chunks.
        inner_rows: chunks are shards of inner chunks of so many rows; 0 for plain chunks.
    """
    dims, storage = spec.backbone.dims, spec.storage
    found: list[Layout] = []
    for name, (shape, dtype) in sorted(known.items()):
        chunk = _known_chunk(name, shape, chunk_bytes)
        found.append(_layout(name, shape, chunk, Mode(dtype), _known_axes(name, shape)))
    most = MOST_ROWS
    if "image/patches" in spec.streams and not is_ragged("image/patches", dims):
        patches = "image/patches"
        item = np.dtype(mode_of(storage, "patches").dtype).itemsize
        patch_bytes = math.prod(row_shape(patches, dims, storage)) * item
        most = POOLED_CHUNKS * max(1, chunk_bytes // patch_bytes)
    counts = {"image": spec.dataset.n_images, "text": spec.dataset.n_texts}
    for name in spec.streams:
        shape, this = row_shape(name, dims, storage), stream(name)
        mode, ragged = mode_of(storage, this.kind), is_ragged(name, dims)
        first = FIRST_AXIS[this.side] if ragged else this.side
        if ragged and this.view:
            first = f"{this.view}_{first}"  # of another length than the image's own
        count = totals[this.home] if ragged else counts[this.side]
        chunk = chunk_bytes // max(1, math.prod(shape) * np.dtype(mode.dtype).itemsize)
        if not ragged or this.side == "crop":
            chunk = min(chunk, most if this.side == "image" else MOST_ROWS)
        axes = (first, *(a for a, _ in AXES[this.kind][-len(shape) :]))
        found.append(_layout(name, (count, *shape), chunk, mode, axes, inner_rows))
        if mode.scaled:
            scale, of_scale = f"{name}_scale", (count, *shape[:-1])
            found.append(
                _layout(scale, of_scale, found[-1].chunk, Mode("float32"), axes[:-1], inner_rows)
            )
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
    if last.endswith(STATISTICS):
        return ("width",)
    if side == "readout" or last not in named:
        # No two arrays share an axis: xarray opens a group only if equal names have equal sizes.
        own = name.removeprefix("readout/").replace("/", ".")
        return tuple(f"{own}_{i}" for i in range(len(shape)))
    return named[last]


def _layout(
    name: str,
    shape: tuple[int, ...],
    chunk: int,
    mode: Mode,
    dims: tuple[str, ...],
    inner: int = 0,
) -> Layout:
    """An array; a shard holds whole inner chunks, at least one, unless the array is smaller than that."""
    rows = shape[0] if shape else 1
    chunk = max(1, min(chunk, rows))
    inner = min(inner, chunk)
    chunk -= chunk % inner if inner else 0
    claims = {"name": name, "shape": shape, "chunk": chunk, "dims": dims, "inner": inner}
    stored = {"dtype": mode.dtype, "torch_dtype": mode.torch_dtype, "compressed": mode.compressed}
    return Layout.model_validate(claims | stored)
