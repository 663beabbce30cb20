"""Values to the bytes of a chunk's file and back: plain, as a shard, compressed, or strings.

plain        the array bytes
shard        the array bytes, then (offset, length) of every inner chunk as uint64, then the CRC-32C of that index
compressed   one blosc frame: bitshuffle, zstd
"""

from collections.abc import Sequence
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
from numpy.typing import NDArray

from cache_builder.durable import as_bytes
from cache_builder.errors import CacheCorrupt
from cache_builder.format import Layout


def encode_chunk(layout: Layout, values: NDArray[Any]) -> bytes | NDArray[np.uint8]:
    """The bytes of a chunk's file, of values of the chunk's whole shape."""
    assert values.shape == layout.chunk_shape
    assert values.dtype == np.dtype(layout.dtype)
    values = np.ascontiguousarray(values)
    if layout.compressed:
        return bytes(_blosc().encode(values))
    data = as_bytes(values)
    return np.concatenate([data, _index(layout)]) if layout.inner else data


def file_bytes(layout: Layout) -> int | None:
    """Bytes of every chunk's file, or None where they depend on what it holds."""
    if layout.compressed or layout.dtype == "string":
        return None
    tail = len(_index(layout)) if layout.inner else 0
    return int(np.prod(layout.chunk_shape, dtype=np.int64)) * np.dtype(layout.dtype).itemsize + tail


def decompress(layout: Layout, data: bytes, out: NDArray[np.uint8]) -> None:
    """The bytes of a whole compressed chunk into `out`.

    Raises:
        CacheCorrupt: `data` is no such frame, or of another length.
    """
    # A frame says how long it is, packed and unpacked; blosc would believe it.
    said = data[12:16], data[4:8]
    if said != tuple(n.to_bytes(4, "little") for n in (len(data), len(out))):
        raise CacheCorrupt(
            f"a chunk of {layout.name} is no frame of {len(out):,} bytes packed into {len(data):,}"
        )
    try:
        found = np.frombuffer(_blosc().decode(data), np.uint8)
    except (RuntimeError, ValueError) as error:
        raise CacheCorrupt(f"a chunk of {layout.name} cannot be decompressed ({error})") from error
    if len(found) != len(out):
        raise CacheCorrupt(f"a chunk of {layout.name} holds {len(found):,} bytes, not {len(out):,}")
    out[:] = found


def decode_chunk(layout: Layout, data: bytes) -> NDArray[np.uint8]:
    """The array bytes of a chunk, of the bytes of its file."""
    size = int(np.prod(layout.chunk_shape, dtype=np.int64)) * np.dtype(layout.dtype).itemsize
    if not layout.compressed:
        return np.frombuffer(data, np.uint8)[:size]  # without the index of a shard
    out = np.empty(size, np.uint8)
    decompress(layout, data, out)
    return out


def _blosc() -> Any:
    numcodecs.blosc.set_nthreads(1)  # the bytes of a frame depend on how many share the work
    return numcodecs.Blosc(cname="zstd", clevel=5, shuffle=numcodecs.Blosc.BITSHUFFLE)


def _index(layout: Layout) -> NDArray[np.uint8]:
    """Where the inner chunks of a shard lie: one after the other."""
    count = layout.chunk // layout.inner
    size = layout.inner * layout.row_bytes
    places = np.stack([np.arange(count) * size, np.full(count, size)], 1).astype("<u8")
    crc = int(google_crc32c.value(places.tobytes()))
    return np.frombuffer(places.tobytes() + crc.to_bytes(4, "little"), np.uint8)


def encode_strings(strings: Sequence[str]) -> bytes:
    """A chunk of zarr's `string` type: count, then length and UTF-8 bytes of each, all counts uint32."""
    parts = [len(strings).to_bytes(4, "little")]
    for string in strings:
        data = string.encode()
        parts += [len(data).to_bytes(4, "little"), data]
    return b"".join(parts)


def decode_strings(data: bytes, count: int) -> list[str]:
    """Inverse of `encode_strings`, of `count` strings.

    Raises:
        CacheCorrupt: `data` is not the encoding of so many.
    """
    strings: list[str] = []
    at = 4
    try:
        if (int.from_bytes(data[:4], "little") if data else 0) != count or 4 * count > len(data):
            raise ValueError("another count")
        for _ in range(count):
            size = int.from_bytes(data[at : at + 4], "little")
            at += 4 + size
            if at > len(data):
                raise ValueError("a string beyond the end")
            strings.append(data[at - size : at].decode())
        if data and at != len(data):
            raise ValueError("bytes behind the last string")
    except ValueError as error:  # UnicodeDecodeError is one
        raise CacheCorrupt(
            f"an array of {count} strings is damaged ({error}); remove the cache and build it again"
        ) from error
    return strings
