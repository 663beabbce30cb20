"""The on-disk format: arrays and their chunks, the lines of the two journals.

Normative text: docs/cache-format.md. A chunk file is the plain little-endian array bytes, so its checksum is taken in
memory and any reader of zarr v3 understands it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from cache_builder.errors import UnknownName
from cache_builder.spec import CacheSpec

SCHEMA = 1
"""Raised whenever an older reader would misread what a newer builder writes."""

FORMAT = "headstart feature cache"

STREAMS: dict[str, tuple[tuple[str, str], ...]] = {
    "image/pooled": (("embedding", "joint"),),
    "image/patches": (("patch", "patches"), ("width", "image_width")),
    "image/prefix": (("prefix", "prefix"), ("width", "image_width")),
    "text/pooled": (("embedding", "joint"),),
    "text/tokens": (("width", "text_width"),),
}
"""Stream → axes of one row after the first: (dimension name in zarr, key in `BackboneSpec.dims`)."""

RAGGED = frozenset({"text/tokens", "text/ids"})
"""Arrays whose first axis is tokens, not texts: row i is offsets[i] … offsets[i + 1]."""

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


def row_shape(stream: str, dims: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of one row of a stream (of one token, if ragged) under a backbone's dimensions."""
    if stream not in STREAMS:
        known = ", ".join(STREAMS)
        raise UnknownName(f"no stream {stream!r} in the cache format (known: {known})")
    lacking = [key for _, key in STREAMS[stream] if key not in dims]
    if lacking:
        raise UnknownName(
            f"stream {stream!r} needs {', '.join(lacking)} in the backbone's spec.dims, which has {', '.join(dims)}"
        )
    return tuple(dims[key] for _, key in STREAMS[stream])


def plan(
    spec: CacheSpec,
    readout: Mapping[str, tuple[int, ...]],
    n_tokens: int,
    n_vocabulary: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, Layout]:
    """Every array of a cache, by name.

    Args:
        spec: what the cache will hold.
        readout: name → shape.
        n_tokens: stored tokens of all texts together.
        n_vocabulary: token ids the tokenizer knows.
        chunk_bytes: aim for the largest chunks.
    """
    n = {"image": spec.dataset.n_images, "text": spec.dataset.n_texts}
    found = [
        _layout("image/id", (n["image"],), n["image"], "string", ("image",)),
        _layout("text/id", (n["text"],), n["text"], "string", ("text",)),
        _layout("text/string", (n["text"],), n["text"], "string", ("text",)),
    ]
    found += [
        _layout(f"readout/{name}", shape, max(shape, default=1), "float32", _axes(shape))
        for name, shape in sorted(readout.items())
    ]
    if "text/tokens" in spec.streams:
        found.append(_layout("text/offsets", (n["text"] + 1,), n["text"] + 1, "int64", ("bound",)))
        found.append(_layout("text/ids", (n_tokens,), chunk_bytes // 4, "int32", ("token",)))
        found.append(
            _layout("text/vocabulary", (n_vocabulary,), n_vocabulary, "string", ("piece",))
        )
    dtype = DTYPES[spec.storage]
    item = np.dtype(dtype).itemsize
    most = MOST_ROWS
    if "image/patches" in spec.streams:
        patch_bytes = math.prod(row_shape("image/patches", spec.backbone.dims)) * item
        most = POOLED_CHUNKS * max(1, chunk_bytes // patch_bytes)
    for stream in spec.streams:
        shape = row_shape(stream, spec.backbone.dims)
        side = stream.split("/")[0]
        first, count = ("token", n_tokens) if stream in RAGGED else (side, n[side])
        chunk = chunk_bytes // max(1, math.prod(shape) * item)
        if stream not in RAGGED:
            chunk = min(chunk, most if side == "image" else MOST_ROWS)
        dims = (first, *(axis for axis, _ in STREAMS[stream]))
        found.append(_layout(stream, (count, *shape), chunk, dtype, dims))
    return {layout.name: layout for layout in found}


def _layout(
    name: str, shape: tuple[int, ...], chunk: int, dtype: str, dims: tuple[str, ...]
) -> Layout:
    rows = shape[0] if shape else 1
    return Layout(name=name, shape=shape, chunk=max(1, min(chunk, rows)), dtype=dtype, dims=dims)


def _axes(shape: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(f"axis_{i}" for i in range(len(shape)))


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
