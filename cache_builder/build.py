"""The one pass: every image and text once through a frozen backbone, into a cache that a kill cannot spoil.

    files ── decode, preprocess ──▶ stack ──▶ encode ──▶ cast, check, scatter ──▶ whole chunks: crc, fsync ──▶ disk
             `workers` threads     1 thread  this one   1 thread                 1 thread

Rows are cut into a fixed partition of batches, recorded in the cache. Whatever chunks are missing, the batches that
touch them are encoded in order and their rows scattered into open chunks; a chunk is written when its last row has
arrived. Ragged text, chunks of different lengths, resuming, and equal bits however often a build was interrupted, are
all this one rule. Every hand-over is bounded, so memory does not grow with the data set.
"""

import errno
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cache_builder.backbones.base import Backbone
from cache_builder.cache import Contents, FeatureCache
from cache_builder.datasets.base import Dataset, ImageRecord
from cache_builder.durable import heal
from cache_builder.errors import BadInput, CacheError, CacheIncomplete, UnknownName
from cache_builder.filler import Batch, Filler
from cache_builder.format import CHUNK_BYTES, DTYPES, Bad
from cache_builder.header import check_spec, read_header
from cache_builder.lock import clear_remnant, is_remnant, locked
from cache_builder.spec import CacheSpec, DatasetSpec

log = logging.getLogger(__name__)

AHEAD = 2
"""Batches that wait at each hand-over, beside the one being worked on."""

FILE_FAULTS = frozenset(
    {
        *(errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM),
        *(errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
    }
)
"""System errors that one file is to blame for. Any other, say EMFILE, ENOMEM or EIO, may be gone at the next try."""


def build(
    dataset: Dataset,
    backbone: Backbone,
    path: str | Path,
    *,
    streams: Sequence[str] | None = None,
    batch_size: int = 64,
    storage: str = "fp16",
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
        streams: what to store; all that the backbone offers by default.
        batch_size: rows encoded together. A cache begun with another one keeps it, and the log says so.
        storage: `fp16` or `fp32`.
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
    spec = cache_spec(dataset, backbone, streams=streams, storage=storage, order_seed=order_seed)
    if batch_size < 1 or workers < 1:
        raise CacheError(f"batch_size {batch_size} and workers {workers} must be at least 1")
    with locked(path):
        cache = _resumed(path, spec, batch_size)
        if cache is None:
            cache = _created(path, spec, dataset, backbone, backbone_name, batch_size, chunk_bytes)
        if strict and cache.quarantined:
            first = _unusable(*next(iter(cache.quarantined.items())))
            raise BadInput(
                f"{first} (in quarantine since an earlier build; remove {path} to try it again)"
            )
        if cache.pending():
            _check_small(cache)
            if cache.state == "sealed":
                cache.unseal()  # a chunk's file was lost or cut: repair
            _encode_texts(cache, backbone, progress)
            _encode_images(cache, dataset, backbone, workers, strict, progress)
        if cache.state == "sealed":
            log.info("%s is finished and holds exactly this: nothing to do", path)
        else:
            _check_usable(cache)
            cache.seal()
    return FeatureCache.open(path)


def cache_spec(
    dataset: Dataset,
    backbone: Backbone,
    *,
    streams: Sequence[str] | None = None,
    storage: str = "fp16",
    order_seed: int = 0,
) -> CacheSpec:
    """What the cache of such a build claims to be."""
    wanted = tuple(sorted(backbone.streams if streams is None else set(streams)))
    unknown = [s for s in wanted if s not in backbone.streams]
    if unknown or not wanted:
        raise UnknownName(
            f"{backbone.spec.family} does not offer the streams {', '.join(unknown) or '(none asked for)'}; it offers "
            f"{', '.join(sorted(backbone.streams))}"
        )
    if storage not in DTYPES:
        raise UnknownName(f"no storage {storage!r} (known: {', '.join(DTYPES)})")
    found = DatasetSpec(
        name=dataset.name,
        digest=dataset.digest(),
        decode=dataset.decode,
        n_images=len(dataset.images),
        n_texts=len(dataset.texts),
    )
    return CacheSpec(
        backbone=backbone.spec,
        dataset=found,
        streams=wanted,
        storage=storage,
        order_seed=order_seed,
    )


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


def _created(
    path: Path,
    spec: CacheSpec,
    dataset: Dataset,
    backbone: Backbone,
    backbone_name: str,
    batch_size: int,
    chunk_bytes: int,
) -> FeatureCache:
    """A new cache: rows permuted, texts tokenised, so that all offsets are known before the first forward pass."""
    order = np.random.default_rng(spec.order_seed).permutation(len(dataset.images))
    texts = [t.text for t in dataset.texts]
    ids, lengths, vocabulary = np.zeros(0, np.int32), np.zeros(0, np.int64), list[str]()
    if "text/tokens" in spec.streams:
        ids, lengths = _tokens(backbone, texts, batch_size)
        vocabulary = backbone.vocabulary()
    contents = Contents(
        image_ids=[dataset.images[i].id for i in order],
        text_ids=[t.id for t in dataset.texts],
        texts=texts,
        tasks=dataset.tasks,
        readout={k: v.detach().float().cpu().numpy() for k, v in backbone.readout().items()},
        token_ids=ids,
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        vocabulary=vocabulary,
    )
    return FeatureCache.create(
        path,
        spec,
        contents,
        batch_size=batch_size,
        counts=dataset.counts,
        root=dataset.root,
        options=dataset.options,
        backbone_name=backbone_name,
        chunk_bytes=chunk_bytes,
    )


def _tokens(
    backbone: Backbone, texts: Sequence[str], batch_size: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Ids of all tokens to store, one text after the other, and how many each text has."""
    ids: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
    lengths: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for start in range(0, len(texts), batch_size):
        batch = backbone.tokenize(texts[start : start + batch_size])
        length = backbone.lengths(batch)
        ids.append(batch[torch.arange(batch.shape[1]) < length[:, None]].numpy().astype(np.int32))
        lengths.append(length.numpy().astype(np.int64))
    return np.concatenate(ids), np.concatenate(lengths)


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
            f"not one of the {n} images can be used; the first: {_unusable(*next(iter(bad.items())))}. "
            f"Repair them, remove {cache.path} and repeat"
        )


def _unusable(name: str, reason: str) -> str:
    return f"image {name!r} cannot be used: {reason}"


def _encode_texts(cache: FeatureCache, backbone: Backbone, progress: bool) -> None:
    """Fill the missing chunks of the text streams."""
    with Filler(cache, "text") as filler:

        def batch(rows: range) -> Batch:
            ids = backbone.tokenize([cache.texts[r] for r in rows])
            return Batch(rows, ids, np.ones(len(rows), bool))

        _run(filler, map(batch, filler.batches), backbone.encode_texts, backbone.device, progress)


def _encode_images(
    cache: FeatureCache,
    dataset: Dataset,
    backbone: Backbone,
    workers: int,
    strict: bool,
    progress: bool,
) -> None:
    """Fill the missing chunks of the image streams."""
    by_id = {record.id: record for record in dataset.images}
    records = [by_id[i] for i in cache.image_ids]
    bad = set(cache.quarantined)  # once bad, always bad: a row must not differ between streams

    def load(record: ImageRecord) -> Tensor | str:
        """Pixels, or why there are none."""
        try:
            return backbone.preprocess(record.open())
        except (OSError, ValueError) as error:
            # PIL's own OSErrors have no number: the picture is to blame.
            if isinstance(error, OSError) and error.errno not in {None, *FILE_FAULTS}:
                raise CacheError(
                    f"image {record.id!r} could not be read ({error}), which may not be its file's fault, so the "
                    f"build stopped; what is finished lies in {cache.path}: mend the cause and repeat, or, if it is "
                    "the file, remove that"
                ) from error
            return str(error) or type(error).__name__

    def stack(rows: range, loads: Sequence[Future[Tensor | str] | None]) -> Batch:
        """A batch; unusable pictures are recorded before any chunk that holds their rows."""
        loaded = [future and future.result() for future in loads]
        for row, found in zip(rows, loaded, strict=True):
            if isinstance(found, str) and strict:
                raise BadInput(_unusable(records[row].id, found))
            if isinstance(found, str):
                cache.quarantine(Bad(id=records[row].id, reason=found, row=row))
        pixels = [found if isinstance(found, Tensor) else None for found in loaded]
        good = np.array([p is not None for p in pixels])
        some = next((p for p in pixels if p is not None), None)
        if some is None:
            return Batch(rows, None, good)
        inputs = torch.stack([torch.zeros_like(some) if p is None else p for p in pixels])
        return Batch(rows, inputs.pin_memory() if "cuda" in backbone.device else inputs, good)

    with _pool(workers, "decode") as decoders, _pool(1, "stack") as stacker:

        def start(rows: range) -> Future[Batch]:
            loads = [
                None if records[r].id in bad else decoders.submit(load, records[r]) for r in rows
            ]
            return stacker.submit(stack, rows, loads)

        with Filler(cache, "image") as filler:
            batches = _ahead(map(start, filler.batches))
            _run(filler, batches, backbone.encode_images, backbone.device, progress)


def _run(
    filler: Filler,
    batches: Iterable[Batch],
    encode: Callable[[Tensor], dict[str, Tensor]],
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
        _pool(1, "store") as store,
    ):
        for batch in batches:
            outputs = None
            if batch.inputs is not None:
                with torch.inference_mode():
                    outputs = encode(batch.inputs.to(device, non_blocking=True))
            storing.append(store.submit(filler.take, batch, outputs))
            if len(storing) > AHEAD:
                storing.popleft().result()
            bar.update(len(batch.rows))
        while storing:
            storing.popleft().result()


def _ahead(futures: Iterator[Future[Batch]]) -> Iterator[Batch]:
    """Results in order, with the next ones already begun."""
    waiting: deque[Future[Batch]] = deque()
    for future in chain(futures, [None] * AHEAD):
        if future is not None:
            waiting.append(future)
        if waiting and (future is None or len(waiting) > AHEAD):
            yield waiting.popleft().result()


@contextmanager
def _pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that, at an error or Ctrl-C, finish what they have begun and drop the rest."""
    pool = ThreadPoolExecutor(threads, name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
