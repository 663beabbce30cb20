"""A cache of random embeddings of any size, made in seconds: no backbone, no pictures."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder import FeatureCache
from cache_builder.cache import Contents
from cache_builder.datasets.base import (
    CompositionExample,
    CompositionTask,
    MatchingExample,
    Tasks,
)
from cache_builder.format import CHUNK_BYTES
from cache_builder.spec import BackboneSpec, CacheSpec, DatasetSpec

TEXT_WIDTH, JOINT, TOKENS = 512, 512, 9


def make_cache(
    path: Path, n: int, row: tuple[int, int] = (49, 768), storage: str = "fp16"
) -> FeatureCache:
    """Patches of `row` (N, W) for n images, with n captions of as many items; by default ViT-B/32's sizes."""
    random = np.random.default_rng(0)
    images, texts = ([f"{kind}{i}" for i in range(n)] for kind in "it")
    examples = (
        MatchingExample(f"m{i}", tuple(images[i : i + 2]), (texts[i], texts[i + 1]), "any", "train")
        for i in range(0, n, 2)
    )
    width = {"image": row[1], "text": TEXT_WIDTH}
    readout: dict[str, Any] = {"logit_scale": np.float32(4.6)}
    for side, w in width.items():
        readout[f"{side}/norm.weight"], readout[f"{side}/norm.bias"] = np.ones(w), np.zeros(w)
        readout[f"{side}/proj"], readout[f"{side}/eps"] = random.normal(size=(w, JOINT)), 1e-5
    arrays: dict[str, Any] = {"image/id": images, "text/id": texts, "text/string": texts}
    arrays["text/ids"] = np.zeros(n * TOKENS, np.int32)
    arrays["text/offsets"] = np.arange(n + 1, dtype=np.int64) * TOKENS
    arrays |= {f"readout/{name}": np.asarray(v, np.float32) for name, v in readout.items()}
    contents = Contents(Tasks(two_by_two=tuple(examples)), arrays)
    streams = ("image/patches", "image/pooled", "text/pooled", "text/tokens")
    cache = FeatureCache.create(path, _spec(n, n, row, storage, streams), contents)
    for stream, chunk in cache.pending():
        layout = cache.layout(stream)
        values = random.standard_normal(layout.chunk_shape, np.float32).astype(layout.dtype)
        cache.write_chunk(stream, chunk, values)
    cache.seal()
    return FeatureCache.open(path)


def make_repeated_cache(
    path: Path, n: int, row: tuple[int, int], chunk_bytes: int = CHUNK_BYTES
) -> FeatureCache:
    """A labelled cache of n images that takes the disk space of one chunk: all chunks are links to the same file."""
    images = [f"i{i}" for i in range(n)]
    pairs = (("red", "cube"), ("red", "ball"))
    examples = tuple(CompositionExample(image, *pairs[0], "train") for image in images)
    task = CompositionTask(examples, {"train": pairs}, dict(zip(pairs, ("t0", "t1"), strict=True)))
    texts = ["t0", "t1"]
    arrays: dict[str, Any] = {"image/id": images, "text/id": texts, "text/string": texts}
    spec = _spec(n, 2, row, "fp16", ("image/patches", "text/pooled"))
    contents = Contents(Tasks(czsl=task), arrays)
    cache = FeatureCache.create(path, spec, contents, chunk_bytes=chunk_bytes)
    for stream in spec.streams:
        cache.write_chunk(stream, 0, np.ones(cache.layout(stream).chunk_shape, np.float16))
    first = cache.chunks.manifest["image/patches", 0]
    for chunk in range(1, cache.layout("image/patches").n_chunks):
        file = cache.chunks.file("image/patches", chunk)
        file.parent.mkdir(parents=True)
        os.link(cache.chunks.file("image/patches", 0), file)
        cache.chunks.list(first.model_copy(update={"chunk": chunk}), sync=False)
    cache = FeatureCache.open(path, allow_building=True)
    cache.seal()
    return cache


def _spec(n: int, n_texts: int, row: tuple[int, int], storage: str, streams: Any) -> CacheSpec:
    dims = {"patches": row[0], "image_width": row[1], "text_width": TEXT_WIDTH}
    dims |= {"joint": JOINT, "context": TOKENS}
    words = ("checkpoint", "weights", "preprocessing", "tokenizer", "layer")
    known = dict.fromkeys((*words, "activation", "compute"), "random")
    data = DatasetSpec(name="none", digest="random", decode="none", n_images=n, n_texts=n_texts)
    return CacheSpec(
        backbone=BackboneSpec(family="none", dims=dims, versions={}, **known),
        dataset=data,
        streams=streams,
        storage=storage,
    )


def evict(cache: FeatureCache, stream: str = "image/patches") -> None:
    """Drop the chunk files of a stream from the page cache, so that the next read is the disk's."""
    for chunk in range(cache.layout(stream).n_chunks):
        handle = os.open(cache.chunks.file(stream, chunk), os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
