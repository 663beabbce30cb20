"""The one pass: every image and text once through a frozen backbone, into a cache that a kill cannot spoil.

    files ── decode, look, prepare ──▶ stack ──▶ encode ──▶ cast, check, scatter ──▶ whole chunks: crc, fsync ──▶ disk
             `workers` threads        1 thread  this one   1 thread                 1 thread

Rows are cut into a fixed partition of batches, recorded in the cache. Whatever chunks are missing, the batches that
touch them are encoded in order and their rows scattered into open chunks; a chunk is written when its last row has
arrived. Ragged text, chunks of different lengths, resuming, and equal bits however often a build was interrupted, are
all this one rule. Every hand-over is bounded, so memory does not grow with the data set.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from cache_builder.backbones.base import Backbone, Pixels
from cache_builder.cache import FeatureCache
from cache_builder.contents import contents
from cache_builder.datasets.base import Dataset
from cache_builder.durable import heal
from cache_builder.errors import BadInput, BadOutput, CacheError, CacheIncomplete
from cache_builder.filler import Batch, Filler
from cache_builder.format import CHUNK_BYTES, stream
from cache_builder.header import check_spec, read_header
from cache_builder.loading import AHEAD, Loading, each, pool, unusable
from cache_builder.lock import clear_remnant, is_remnant, locked
from cache_builder.request import cache_spec
from cache_builder.spec import CacheSpec
from cache_builder.views import VIEWS, crop_boxes, resize_for_crops

log = logging.getLogger(__name__)


def build(
    dataset: Dataset,
    backbone: Backbone,
    path: str | Path,
    *,
    streams: Sequence[str] | None = None,
    batch_size: int = 64,
    storage: str = "fp16",
    crops: str = "all",
    order_seed: int = 0,
    strict: bool = False,
    progress: bool = True,
    workers: int = 2,
    backbone_name: str = "",
    chunk_bytes: int = CHUNK_BYTES,
) -> FeatureCache:
    """Encode a data set into a cache; repeating the call after any interruption finishes it.

    An image is quarantined, for the life of the cache, only for what its file is: missing, forbidden, unsafe by name,
    or no picture. Where reading fails for another reason (no descriptors, no memory, a failing disk), the build stops.

    Args:
        dataset, backbone: what to encode, and with what.
        path: folder of the cache: new, or a cache of exactly the same spec.
        streams: what to store; all that the backbone offers by default. Besides, `image/block_<k>` (what enters
            block k), `image/view_<view>/…` of these (see cache_builder/views.py), and `crop/pooled`.
        batch_size: rows encoded together. A cache begun with another one keeps it, and the log says so.
        storage: `fp16` or `fp32`.
        crops: which windows `crop/pooled` holds: `all` or `fast`.
        order_seed: seed of the permutation image → row.
        strict: fail at the first image that cannot be used, instead of quarantining it.
        progress: show tqdm bars.
        workers: threads that decode and preprocess.
        backbone_name: as `load_backbone` took it; recorded, so that messages can name the command that resumes.
        chunk_bytes: aim for the largest chunks of a new cache.

    Returns:
        The sealed cache, open for reading.

    Raises:
        CacheMismatch: the path holds a cache of something else; names every field.
        CacheLocked: another process is building it.
        BadInput: `strict` and an image cannot be used; or not one of the images can be used.
        BadOutput: the backbone gave numbers that cannot be stored.
        CacheError: an image could not be read, and its file may not be to blame; what is finished is kept.
    """
    path = Path(path)
    spec = cache_spec(
        dataset, backbone, streams=streams, storage=storage, crops=crops, order_seed=order_seed
    )
    if batch_size < 1 or workers < 1 or order_seed < 0:
        raise CacheError(
            f"batch_size {batch_size} and workers {workers} must be at least 1, order_seed {order_seed} at least 0"
        )
    with locked(path):
        cache = _resumed(path, spec, batch_size)
        if cache is None:
            _say_what_is_cut(spec, dataset, backbone)
            known = contents(spec, dataset, backbone, progress=progress)
            if strict and known.bad:
                raise BadInput(unusable(known.bad[0].id, known.bad[0].reason))
            cache = FeatureCache.create(
                path,
                spec,
                known,
                batch_size=batch_size,
                counts=dataset.counts,
                root=dataset.root,
                options=dataset.options,
                backbone_name=backbone_name,
                chunk_bytes=chunk_bytes,
            )
        if strict and cache.quarantined:
            first = unusable(*next(iter(cache.quarantined.items())))
            raise BadInput(
                f"{first} (in quarantine since an earlier build; remove {path} to try it again)"
            )
        if cache.pending():
            _check_small(cache)
            if cache.state == "sealed":
                cache.unseal()  # a chunk's file was lost or cut: repair
            _encode_texts(cache, backbone, progress)
            _encode_words(cache, backbone, progress)
            _encode_pictures(cache, dataset, backbone, workers, strict, progress)
        if cache.state == "sealed":
            log.info("%s is finished and holds exactly this: nothing to do", path)
        else:
            _check_usable(cache)
            cache.seal()
    return FeatureCache.open(path)


def _say_what_is_cut(spec: CacheSpec, dataset: Dataset, backbone: Backbone) -> None:
    """A text that does not fit is cut as the library does it; nobody should have to guess how many are."""
    if dataset.texts and any(name.startswith("text/") for name in spec.streams):
        cut = backbone.truncated([t.text for t in dataset.texts])
        if cut:
            n, most = len(dataset.texts), spec.backbone.dims["context"]
            log.warning("%d of %d texts have more than %d tokens and are cut", cut, n, most)


def _resumed(path: Path, spec: CacheSpec, batch_size: int) -> FeatureCache | None:
    """The cache begun here, or None where creation has still to happen (or to happen again)."""
    try:
        header = read_header(path)
    except CacheIncomplete:
        assert is_remnant(path)
        clear_remnant(path)
        return None
    for journal in ("manifest.jsonl", "quarantine.jsonl"):
        heal(path / journal)
    cache = FeatureCache(path, header)
    check_spec(path, header.spec, spec)
    if header.batch_size != batch_size:
        begun = header.batch_size
        log.warning("%s was begun in batches of %d and keeps them, not %d", path, begun, batch_size)
    return cache


def _check_small(cache: FeatureCache) -> None:
    """Arrays written at creation cannot be encoded again."""
    lost = [f"{array} ({chunk})" for array, chunk in cache.pending() if array not in cache.streams]
    if lost:
        raise CacheIncomplete(
            f"{cache.path} lost {', '.join(lost)}, which only a new build writes: remove the cache and repeat"
        )


def _check_usable(cache: FeatureCache) -> None:
    bad, n = cache.quarantined, cache.spec.dataset.n_images
    if n and len(bad) == n:
        raise BadInput(
            f"not one of the {n} images can be used; the first: {unusable(*next(iter(bad.items())))}. "
            f"Repair them, remove {cache.path} and repeat"
        )


def _encode_texts(cache: FeatureCache, backbone: Backbone, progress: bool) -> None:
    """Fill the missing chunks of the text streams."""
    with Filler(cache, "text") as filler:

        def batch(rows: range) -> Batch:
            ids = backbone.tokenize([cache.texts[r] for r in rows])
            return Batch(rows, ids, np.ones(len(rows), bool))

        _run(filler, map(batch, filler.batches), backbone.encode_texts, backbone.device, progress)


def _encode_words(cache: FeatureCache, backbone: Backbone, progress: bool) -> None:
    """Fill the missing chunks of the word streams; rows are parts of words."""
    with Filler(cache, "word") as filler:
        if not filler.batches:
            return
        parts = cache.word_strings

        def batch(rows: range) -> Batch:
            ids = backbone.tokenize_words([parts[r] for r in rows])
            return Batch(rows, ids, np.ones(len(rows), bool))

        _run(filler, map(batch, filler.batches), backbone.encode_words, backbone.device, progress)


def _encode_pictures(
    cache: FeatureCache,
    dataset: Dataset,
    backbone: Backbone,
    workers: int,
    strict: bool,
    progress: bool,
) -> None:
    """Fill the missing chunks of the image streams, views included, then those of the crops."""
    by_id = {record.id: record for record in dataset.images}
    records = [by_id[i] for i in cache.image_ids]
    found = [stream(s) for s in cache.streams]
    blocks: dict[str, list[int]] = defaultdict(list)
    for one in found:
        if one.block is not None:
            blocks[one.key.rpartition("/")[0]].append(one.block)
    views = sorted({one.view for one in found if one.view is not None})
    plain = any(one.side == "image" and one.view is None for one in found)

    def looks(row: int, image: Image) -> dict[str, Image]:
        shown = {f"view_{view}": VIEWS[view].apply(image) for view in views}
        return {"": image, **shown} if plain else shown

    def encode(inputs: Mapping[str, Pixels]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for home, pixels in inputs.items():
            asked = {"blocks": blocks[home]} if blocks[home] else {}
            streams = backbone.encode_images(pixels, **asked)
            out |= {f"{home}/{k}" if home else k: v for k, v in streams.items()}
        return out

    load = Loading(cache, records, backbone, workers, strict)
    with Filler(cache, "image") as filler:
        owner = np.arange(filler.n_rows)
        with closing(load.batches(filler, owner, looks)) as batches:
            _run(filler, batches, encode, backbone.device, progress)
    with Filler(cache, "crop") as filler:
        if not filler.batches:
            return
        boxes, owner, bounds = cache.boxes(), cache.crop_owners(), cache.offsets("crop/box")
        rule = cache.spec.rules["crop"].partition(":")[0]

        def resized(row: int, image: Image) -> Image:
            planned = boxes[bounds[row] : bounds[row + 1]]
            if not np.array_equal(planned, crop_boxes(*image.size, rule)):
                raise BadOutput(
                    f"image {records[row].id!r} has another size ({image.width} × {image.height}) than when its crops "
                    "were planned: it has changed since; restore it, or remove the cache and repeat"
                )
            return resize_for_crops(image)

        def window(row: int, image: Image) -> dict[str, Image]:
            return {"": image.crop(tuple(boxes[row].tolist()))}

        # Closed also after an error, so that no thread outlives the lock.
        with closing(load.batches(filler, owner, window, resized)) as batches:
            _run(filler, batches, encode, backbone.device, progress)


def _run(
    filler: Filler,
    batches: Iterable[Batch],
    encode: Callable[[Any], dict[str, Tensor]],
    device: str,
    progress: bool,
) -> None:
    """Encode batch after batch in this thread, while others prepare the next one and store the last."""
    rows = sum(map(len, filler.batches))
    storing: deque[Future[None]] = deque()
    with (
        tqdm(
            desc=f"{filler.side}s",
            total=filler.n_rows,
            initial=filler.n_rows - rows,
            unit=filler.side,
            disable=not progress,
        ) as bar,
        pool(1, "store") as store,
    ):
        for batch in batches:
            outputs = None
            if batch.inputs is not None:
                with torch.inference_mode():
                    outputs = encode(each(batch.inputs, lambda t: t.to(device, non_blocking=True)))
            storing.append(store.submit(filler.take, batch, outputs))
            if len(storing) > AHEAD:
                storing.popleft().result()
            bar.update(len(batch.rows))
        while storing:
            storing.popleft().result()
