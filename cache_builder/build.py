"""The one pass: every image and text once through a frozen backbone, into a cache that a kill cannot spoil.

Rows are cut into a fixed partition of batches, recorded in the cache. Whatever chunks are missing, the batches that
touch them are encoded in order and their rows scattered into open chunks; a chunk is written when its last row has
arrived. Ragged text, chunks of different lengths, resuming, several processes, and equal bits however often a build was
interrupted, are all this one rule. passes.py has the pipeline.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import numpy as np

from cache_builder.append import grown_contents, grown_spec, next_place, same_but_for_samples
from cache_builder.backbones.base import Backbone
from cache_builder.build_log import continued, timed
from cache_builder.cache import Contents, FeatureCache
from cache_builder.contents import contents
from cache_builder.datasets.base import Dataset
from cache_builder.durable import exchange
from cache_builder.errors import BadInput, CacheError, CacheIncomplete
from cache_builder.format import CHUNK_BYTES
from cache_builder.header import StorageReport, check_spec, read_header
from cache_builder.loading import unusable
from cache_builder.lock import locked
from cache_builder.passes import Passes
from cache_builder.place import Folder, Place, at
from cache_builder.request import cache_spec
from cache_builder.sample import LOSSY, passes, reports, sampled
from cache_builder.spec import CacheSpec
from cache_builder.storage import MODES, STATISTICS
from cache_builder.takeup import taken_up
from cache_builder.units import Engine, share

log = logging.getLogger(__name__)

INNER_ROWS = 32
"""Rows of an inner chunk on an object store, where others may want to read less than a chunk."""


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
    append: bool = False,
    strict: bool = False,
    progress: bool = True,
    workers: int = 2,
    engine: Engine | None = None,
    stop: Event | None = None,
    backbone_name: str = "",
    chunk_bytes: int = CHUNK_BYTES,
    inner_rows: int | None = None,
) -> FeatureCache:
    """Encode a data set into a cache; repeating the call after any interruption finishes it.

    An image is quarantined, for the life of the cache, only for what its file is: missing, forbidden, unsafe by name,
    or no picture. Where reading fails for another reason (no descriptors, no memory, a failing disk), the build stops.
    Pictures of the same bytes are encoded once and stored for every id.

    Args:
        dataset, backbone: what to encode, and with what.
        path: folder of the cache, or URL of a prefix of an object store: new, or a cache of exactly the same spec.
        streams: what to store; all that the backbone offers by default. Besides, `image/block_<k>` (what enters
            block k), `image/pixels` (8-bit levels of the resized picture), `image/view_<view>/…` of these (see
            cache_builder/views.py), and `crop/pooled`.
        batch_size: rows encoded together. A cache begun with another one keeps it, and the log says so.
        storage: `fp16`, `fp32`, `bf16`, `int8-channel`, `fp8-token`, `pool2x2` or `lossless`; see storage.py.
        crops: which windows `crop/pooled` holds: `all` or `fast`.
        order_seed: seed of the permutation image → row.
        append: the path holds a sealed cache of some of these samples; add the others to it.
        strict: fail at the first image that cannot be used, instead of quarantining it.
        progress: show tqdm bars.
        workers: threads that decode and preprocess.
        engine: other processes that help; see engines.py.
        stop: once set, the chunk in hand is finished and `KeyboardInterrupt` raised.
        backbone_name: as `load_backbone` took it; recorded, so that messages can name the command that resumes.
        chunk_bytes: aim for the largest chunks of a new cache.
        inner_rows: chunks of a new cache are shards of inner chunks of so many rows; 0 for plain chunks. By default 0
            in a folder and 32 on an object store.

    Returns:
        The sealed cache, open for reading.

    Raises:
        CacheMismatch: the path holds a cache of something else; names every field.
        CacheLocked: another process is building it.
        BadInput: `strict` and an image cannot be used; or not one of the images can be used.
        BadOutput: the backbone gave numbers that cannot be stored.
        CacheError: an image could not be read, and its file may not be to blame; what is finished is kept.
    """
    place = at(path)
    spec = cache_spec(
        dataset, backbone, streams=streams, storage=storage, crops=crops, order_seed=order_seed
    )
    if batch_size < 1 or workers < 1 or order_seed < 0:
        raise CacheError(
            f"batch_size {batch_size} and workers {workers} must be at least 1, order_seed {order_seed} at least 0"
        )
    if inner_rows is None:
        inner_rows = 0 if isinstance(place, Folder) else INNER_ROWS
    work = Build(dataset, backbone, strict, progress, workers, engine, stop)
    fresh = Fresh(batch_size, backbone_name, chunk_bytes, inner_rows)
    if append:
        read_header(place)  # there must be a cache, or nothing is touched
    with locked(place):
        if append:
            work.append(place, spec, fresh)
        else:
            work.finish(place, spec, fresh, None)
    return FeatureCache.open(place)


@dataclass(frozen=True, slots=True)
class Fresh:
    """How a new cache is laid out."""

    batch_size: int
    backbone_name: str
    chunk_bytes: int
    inner_rows: int


@dataclass(frozen=True, slots=True)
class Build:
    """One call of `build`: the arguments that all its steps need."""

    dataset: Dataset
    backbone: Backbone
    strict: bool
    progress: bool
    workers: int
    engine: Engine | None
    stop: Event | None

    def finish(
        self, place: Place, spec: CacheSpec, fresh: Fresh, previous: FeatureCache | None
    ) -> None:
        """Create the cache or take it up where it was left, fill what is missing, and seal it."""
        begun = time.monotonic()
        cache = taken_up(place, lambda header: check_spec(place, header.spec, spec))
        if cache is None:
            cache = self._created(place, spec, fresh, previous)
        elif (size := cache.header.batch_size) != fresh.batch_size:
            log.warning(
                "%s was begun in batches of %d and keeps them, not %d",
                place,
                size,
                fresh.batch_size,
            )
        if previous is not None and cache.state == "building":
            cache.chunks.share(previous.chunks, cache.header.embedded())
        if self.strict and cache.quarantined:
            first = unusable(*next(iter(cache.quarantined.items())))
            raise BadInput(
                f"{first} (in quarantine since an earlier build; remove {place} to try it again)"
            )
        _ = cache.tasks  # refused if they are damaged
        if cache.pending():
            cache.check_repairable()
            if cache.state == "sealed":
                cache.unseal()  # a chunk's file was lost or cut: repair
            passes = Passes(
                cache,
                self.dataset,
                self.backbone,
                self.workers,
                self.strict,
                self.progress,
                previous,
                self.stop,
            )
            device, helped = str(self.backbone.device), self.engine is not None
            with timed(place, begun, device=device, workers=self.workers, helped=helped):
                if self.engine is None:
                    passes.run_all()
                else:
                    with self.engine.helping(passes):
                        share(passes)
        if cache.state == "sealed":
            log.info("%s is finished and holds exactly this: nothing to do", place)
        else:
            _check_usable(cache)
            cache.seal()
            with place.alone():
                place.remove("claims/")

    def append(self, place: Place, wanted: CacheSpec, fresh: Fresh) -> None:
        """Build the next generation of a sealed cache beside it, then let them change places."""
        if not isinstance(place, Folder):
            raise CacheError(
                f"{place} lies on an object store, where nothing can change places in one step; append to a cache in a "
                "folder, or build a new one"
            )
        cache = FeatureCache.open(place, allow_building=True)
        beside = Folder(next_place(place.path))
        check_spec(place, cache.spec, same_but_for_samples(cache, wanted))
        if cache.spec.dataset == wanted.dataset:
            log.info("%s holds all of these samples: nothing to append", place)
            self.finish(place, cache.spec, fresh, None)  # a repair, where chunks were lost
        else:
            if lost := cache.pending():
                raise CacheIncomplete(
                    f"{place} lost {len(lost)} chunks, the first is chunk {lost[0][1]} of {lost[0][0]}; mend it before "
                    f"anything is added: bring back the data set of {cache.spec.dataset.n_images} images as it was, "
                    "repeat the build, then append"
                )
            # What is copied is compared: a damage must not get a checksum of its own.
            cache = FeatureCache.open(place, check="read")
            spec = grown_spec(cache, wanted)
            if not _continues(beside, spec):
                _clear(beside.path)  # of other samples, or the generation before
            with locked(beside):
                fresh = replace(fresh, batch_size=cache.header.batch_size)
                self.finish(beside, spec, fresh, cache)
                exchange(place.path, beside.path)
        _clear(beside.path)  # the generation before

    def _created(
        self, place: Place, spec: CacheSpec, fresh: Fresh, previous: FeatureCache | None
    ) -> FeatureCache:
        """A new cache with all that is known before the first forward pass."""
        if previous is None:
            known = contents(spec, self.dataset, self.backbone, progress=self.progress)
        else:
            known = grown_contents(previous, spec, self.dataset, self.backbone, self.progress)
        self._say_what_is_cut(spec, known)
        if self.strict and known.bad:
            raise BadInput(unusable(known.bad[0].id, known.bad[0].reason))
        known, report = self._measured(spec, known, previous)
        cache = FeatureCache.create(
            place,
            spec,
            known,
            batch_size=fresh.batch_size,
            counts=self.dataset.counts,
            root=self.dataset.root,
            options=self.dataset.options,
            backbone_name=fresh.backbone_name,
            chunk_bytes=fresh.chunk_bytes,
            inner_rows=fresh.inner_rows,
            report=report,
            previous=previous,
        )
        if previous is not None:
            continued(place, previous.place)
        return cache

    def _measured(
        self, spec: CacheSpec, known: Contents, previous: FeatureCache | None
    ) -> tuple[Contents, dict[str, StorageReport]]:
        """What a lossy storage costs, on a sample, and the statistics that it is centred by."""
        if spec.storage not in LOSSY:
            return known, {}
        if previous is not None:
            return known, previous.header.report
        sample = sampled(spec, self.dataset, self.backbone)
        report = reports(sample, spec.storage)
        if not passes(report):
            log.warning(
                "storage %s distorts these embeddings more than is usual: %s",
                spec.storage,
                "; ".join(
                    f"{name}: whitened cosine {r.white_mean:.4f}, at worst {r.white_min:.4f}"
                    for name, r in report.items()
                ),
            )
        if not MODES[spec.storage].centred:
            return known, report
        found = sample.moments.found()
        arrays = dict(known.arrays)
        for name, both in found.items():
            arrays |= {name + end: v.numpy() for end, v in zip(STATISTICS, both, strict=True)}
        return Contents(known.tasks, arrays, known.bad), report

    def _say_what_is_cut(self, spec: CacheSpec, known: Contents) -> None:
        """A text that does not fit is cut as the library does it; nobody should have to guess how many are."""
        texts, most = [t.text for t in self.dataset.texts], spec.backbone.dims.get("context", 0)
        if not texts or not any(name.startswith("text/") for name in spec.streams):
            return
        n = len(texts)
        if "text/offsets" in known.arrays:
            # Tokenised already: who was cut has as many tokens as there may be.
            strings, lengths = known.arrays["text/string"], np.diff(known.arrays["text/offsets"])
            texts = [strings[i] for i in np.flatnonzero(lengths >= most).tolist()]
        if cut := self.backbone.truncated(texts) if texts else 0:
            log.warning("%d of %d texts have more than %d tokens and are cut", cut, n, most)


def _continues(beside: Folder, spec: CacheSpec) -> bool:
    """Is this where the next generation was begun, or may it be begun here?"""
    try:
        return read_header(beside).spec == spec
    except CacheIncomplete:
        return True
    except CacheError:
        return not beside.exists()


def _clear(folder: Path) -> None:
    """Remove what only an append makes; whoever appends holds the lock of the cache beside it."""
    if folder.exists():
        shutil.rmtree(folder)


def _check_usable(cache: FeatureCache) -> None:
    bad, n = cache.quarantined, cache.spec.dataset.n_images
    if n and len(bad) == n:
        raise BadInput(
            f"not one of the {n} images can be used; the first: {unusable(*next(iter(bad.items())))}. "
            f"Repair them, remove {cache.place} and repeat"
        )
