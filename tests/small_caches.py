"""Caches of a few kB, one of every kind, and everything a user can read from one: what the fault tests damage and kill.

A build of each takes some 50 ms in memory; every one has several chunks in most streams, and pictures in quarantine.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from stand_in import KeptStandIn, StandIn, WordStandIn, dataset

from cache_builder import FeatureCache, build
from cache_builder.datasets.base import Dataset, ImageRecord, RetrievalExample, Tasks, TextRecord
from cache_builder.errors import CacheError
from cache_builder.images import BadImage

SIZES = ((6, 6), (4, 9), (11, 2), (2, 2), (8, 6), (5, 12), (24, 2), (3, 3), (6, 4))
"""Width and height of pictures that keep their shape: 9, 8, 5, 1, 12, 12, 12, 1 and 6 patches."""


def shaped(headless: int = 3, cut: int = 5) -> Dataset:
    """Noise of many shapes; one picture cannot be measured, one can be measured and not decoded."""

    def measure(i: int) -> tuple[int, int]:
        if i == headless:
            raise BadImage(f"picture {i} has no header")
        return SIZES[i]

    def open_image(i: int) -> Image.Image:
        if i in (headless, cut):
            raise BadImage(f"picture {i} is cut off")
        (width, height), noise = SIZES[i], np.random.default_rng(i)
        return Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8))

    captions = tuple(f"i{i}#0" for i in range(len(SIZES)))
    return Dataset(
        name="shaped",
        images=tuple(
            ImageRecord(f"i{i}", lambda i=i: open_image(i), lambda i=i: measure(i))
            for i in range(len(SIZES))
        ),
        texts=tuple(TextRecord(c, f"caption of {c}") for c in captions),
        tasks=Tasks(retrieval=tuple(RetrievalExample(c[:2], (c,), "test") for c in captions)),
        decode="noise",
    )


def fixed(path: Path) -> FeatureCache:
    """One grid for all pictures, ragged texts."""
    return build(
        dataset(bad=(3, 8)), StandIn(), path, batch_size=4, chunk_bytes=100, progress=False
    )


def ragged(path: Path) -> FeatureCache:
    """Pictures that keep their shape, a block and a view."""
    streams = [*KeptStandIn.streams, "image/block_1", "image/view_flip/patches"]
    return build(
        shaped(),
        KeptStandIn(),
        path,
        streams=streams,
        batch_size=4,
        chunk_bytes=60,
        progress=False,
    )


def words(path: Path) -> FeatureCache:
    """Words, crops and a view of a few pictures."""
    return build(
        dataset(4, 4, bad=(2,)),
        WordStandIn(),
        path,
        streams=[*WordStandIn.streams, "crop/pooled", "image/view_flip/pooled", "image/block_0"],
        crops="fast",
        batch_size=32,
        chunk_bytes=1200,
        progress=False,
    )


def eight_bits(path: Path) -> FeatureCache:
    """Scales and statistics, in shards."""
    return build(
        dataset(bad=(3, 8)),
        StandIn(),
        path,
        storage="int8-channel",
        inner_rows=2,
        batch_size=4,
        chunk_bytes=100,
        progress=False,
    )


def compressed(path: Path) -> FeatureCache:
    """Chunks whose size depends on what they hold."""
    return build(
        shaped(),
        KeptStandIn(),
        path,
        storage="lossless",
        batch_size=4,
        chunk_bytes=60,
        progress=False,
    )


def smaller(path: Path) -> FeatureCache:
    """What samples are appended to."""
    whole = dataset(21, 14, bad=(3, 17))
    few = replace(
        whole, images=whole.images[:13], texts=whole.texts[:9], tasks=dataset(13, 9).tasks
    )
    return build(few, StandIn(), path, batch_size=4, chunk_bytes=100, progress=False)


def grown(path: Path) -> FeatureCache:
    """All samples of which `smaller` has some, appended where there is a cache."""
    return build(
        dataset(21, 14, bad=(3, 17)),
        StandIn(),
        path,
        append=path.exists(),
        batch_size=4,
        chunk_bytes=100,
        progress=False,
    )


def appended(path: Path) -> FeatureCache:
    """Two generations."""
    if not path.exists():
        smaller(path)
    return grown(path)


BUILDS: dict[str, Callable[[Path], FeatureCache]] = {
    "fixed": fixed,
    "ragged": ragged,
    "words": words,
    "eight bits": eight_bits,
    "compressed": compressed,
    "appended": appended,
}
"""Kind of cache → its build. A kind added here is damaged and killed like the others."""


def readings(cache: FeatureCache) -> dict[str, Callable[[], Any]]:
    """Everything a user can ask of an open cache, by name; embeddings under the name of their stream."""
    some: dict[str, Callable[[], Any]] = {
        "image ids": lambda: cache.image_ids,
        "text ids": lambda: cache.text_ids,
        "texts": lambda: cache.texts,
        "tasks": lambda: cache.tasks.to_json(),
        "quarantined": lambda: cache.quarantined,
        "readout": cache.readout,
        "digest": cache.digest,
        "header": lambda: cache.header.model_dump(mode="json"),
        "rows": lambda: cache.rows("image", sorted({*cache.image_ids} - {*cache.quarantined})),
    }
    arrays = cache.header.arrays
    for name in (n for n in arrays if n.endswith("/offsets")):
        some[f"{name} (bounds)"] = lambda n=name: cache.offsets(n)
    for home in (n.removesuffix("/grid") for n in arrays if n.endswith("/grid")):
        some[f"{home} grid"] = lambda h=home: cache.grid(h)
    if "crop/pooled" in arrays:
        some |= {"boxes": cache.boxes, "crop owners": cache.crop_owners}
    if "word/id" in arrays:
        some |= {"words": lambda: cache.word_ids, "word strings": lambda: cache.word_strings}
        some |= {"word parts": lambda: cache.word_parts}
    if "text/vocabulary" in arrays:
        some["vocabulary"] = cache.vocabulary
    for name in (*cache.streams, *(n for n in ("text/ids", "word/ids") if n in arrays)):
        read = cache.read_ragged if cache.is_ragged(name) else cache.read
        some[name] = lambda n=name, r=read: r(n)
    return some


def plain(value: Any) -> Any:
    """A value that compares bit for bit: NaN equals NaN, and a type differs from another."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, tuple):
        return tuple(plain(v) for v in value)
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return value


def observe(path: Path, check: Any) -> dict[str, Any]:
    """All that can be read, or the error in its place; only `{"open": error}` where it cannot be opened."""
    try:
        cache = FeatureCache.open(path, check=check)
        found = readings(cache)
    except Exception as error:
        return {"open": error}
    return {"open": None, **{name: _attempt(read) for name, read in found.items()}}


def _attempt(read: Callable[[], Any]) -> Any:
    try:
        return plain(read())
    except Exception as error:
        return error


def is_clear(value: Any) -> bool:
    """Is it a refusal a user can act on: one of this library's errors, in one line?"""
    return isinstance(value, CacheError) and "\n" not in str(value) and bool(str(value))
