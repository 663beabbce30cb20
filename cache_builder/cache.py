"""FeatureCache: a folder any zarr opens, that knows what it holds, whether it is whole and whether it is intact.

    caches/demo.zarr
      zarr.json          header: schema, spec, fingerprint, state, layouts     image/patches/c/<i>/0/0   chunk files
      manifest.jsonl     one line per finished chunk, with its crc32c          readout/…                 frozen tensors
      quarantine.jsonl   images that could not be used                         tasks.json                what to ask
Format: docs/cache-format.md. numpy only; no torch. Letters: B rows asked for, V text width.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cache_builder import format as fmt
from cache_builder.chunks import Values
from cache_builder.datasets.base import Tasks
from cache_builder.errors import CacheCorrupt, CacheError, CacheIncomplete, UnknownName
from cache_builder.format import Bad, Layout
from cache_builder.header import Header, StorageReport, check_spec, read_header, write_header
from cache_builder.metadata import metadata_files
from cache_builder.place import Place, at
from cache_builder.rows import Rows
from cache_builder.spec import CacheSpec
from cache_builder.splits import split_labels
from cache_builder.verify import VerifyReport, quarantine_problem, verify


@dataclass(frozen=True, slots=True)
class Contents:
    """All of a cache but its embeddings: what is known before the first forward pass.

    Attributes:
        tasks: what can be asked.
        arrays: name → values, strings or numbers: `image/id`, `text/id`, `text/string`, `readout/…`, and, for ragged
            streams, where each row's entries begin (`text/offsets`, `word/offsets`, `crop/offsets`, …). See
            docs/cache-format.md.
        bad: images that are known already to be unusable.
    """

    tasks: Tasks
    arrays: Mapping[str, Values]
    bad: Sequence[Bad] = ()


class FeatureCache(Rows):
    """Streams of a data set under one frozen backbone, keyed by id. Get one by `open`; `create` is the builder's.

    Attributes:
        place: the folder, or the prefix of an object store.
        header: the root group's attributes.
        chunks: files and manifest.
    """

    @classmethod
    def create(
        cls,
        path: str | Path | Place,
        spec: CacheSpec,
        contents: Contents,
        *,
        batch_size: int = 64,
        counts: Mapping[str, str] | None = None,
        root: str = "",
        options: Mapping[str, Any] | None = None,
        backbone_name: str = "",
        chunk_bytes: int = fmt.CHUNK_BYTES,
        inner_rows: int = 0,
        report: Mapping[str, StorageReport] | None = None,
        previous: "FeatureCache | None" = None,
    ) -> "FeatureCache":
        """Lay out a new cache in state `building`, with everything in it but the embeddings.

        The builder holds the lock. The header is written last, so a place without one is a creation cut short.

        Args:
            path: a place that is absent or empty but for the lock.
            spec, contents: what it will hold, and what is known already.
            batch_size: rows encoded together; this partition decides the last bits.
            counts: what the data set's reader found, for people.
            root, options: where and how the data set was read, to find its pictures again.
            backbone_name: as it was asked for, to find its weights again.
            chunk_bytes: aim for the largest chunks of a new cache.
            inner_rows: make chunks shards of inner chunks of so many rows, for object stores; 0 for plain chunks.
            report: what the storage costs, as measured.
            previous: the cache that this one continues: its rows come first, and its chunks are kept as long.
        """
        for side in ("image", "text"):
            _check_unique(spec, side, contents.arrays[f"{side}/id"])
        small = {name: _plain(values) for name, values in contents.arrays.items()}
        known = {
            name: (np.shape(v), str(v.dtype) if isinstance(v, np.ndarray) else "string")
            for name, v in small.items()
        }
        totals = {
            name.removesuffix("/offsets"): int(np.asarray(v)[-1])
            for name, v in small.items()
            if name.endswith("/offsets")
        }
        layouts = fmt.plan(spec, known, totals, chunk_bytes, inner_rows)
        if previous is not None:
            layouts = {n: _continued(la, previous.header.arrays) for n, la in layouts.items()}
        tasks = contents.tasks.to_json().encode()
        header = Header(
            state="building",
            fingerprint=spec.fingerprint(),
            spec=spec,
            batch_size=batch_size,
            arrays=layouts,
            tasks_sha256=hashlib.sha256(tasks).hexdigest(),
            counts=dict(counts or {}),
            root=root,
            options=dict(options or {}),
            backbone_name=backbone_name,
            report=dict(report or {}),
        )
        return cls.lay_out(path, header, tasks, small, contents.bad)

    @classmethod
    def lay_out(
        cls,
        path: str | Path | Place,
        header: Header,
        tasks: bytes,
        known: Mapping[str, Values],
        bad: Sequence[Bad],
    ) -> "FeatureCache":
        """A new cache under a given header, in state `building`, with everything in it but the embeddings.

        Args:
            path: as of `create`.
            header: with the layout of every array.
            tasks: all bytes of `tasks.json`.
            known: arrays written now; numbers little-endian.
            bad: images in quarantine.
        """
        place = at(path)
        for name, text in metadata_files(header.arrays):
            place.write(name, text, sync=False)
        place.write("tasks.json", tasks, sync=False)
        for journal in ("manifest.jsonl", "quarantine.jsonl"):
            place.write(journal, b"", sync=False)
        cache = cls(place, header)
        for one in bad:
            cache._bad_images.append(one, sync=False)
        for name, values in known.items():
            cache.chunks.write_all(name, values)
        place.sync_all()
        write_header(place, header)
        return cache

    @classmethod
    def open(
        cls,
        path: str | Path | Place,
        *,
        expected: CacheSpec | None = None,
        allow_building: bool = False,
        check: Literal["open", "read"] = "open",
    ) -> "FeatureCache":
        """Open a cache, after checking version, completeness and, if given, the spec.

        Args:
            path: the folder, or the URL of a prefix of an object store, e.g. `s3://bucket/demo.zarr`.
            expected: refuse any other content.
            allow_building: accept a cache whose build has not finished.
            check: "open" compares sizes as chunks are read; "read" also compares each chunk's checksum when first read.

        Raises:
            CacheNotFound, CacheTooNew, CacheTooOld, CacheIncomplete, CacheMismatch, CacheCorrupt: see their messages.
        """
        place = at(path)
        cache = cls(place, read_header(place), check)
        missing, total = cache.chunks.n_missing, cache.chunks.total
        if not allow_building and (missing or cache.state != "sealed"):
            raise CacheIncomplete(
                f"{place} is not finished: {total - missing} of {total} chunks are there; repeat the build to resume: "
                f"{cache.chunks.command}"
            )
        if cache.state == "sealed" and not allow_building:
            cache.check_journals()
        if expected is not None:
            check_spec(place, cache.spec, expected)
        return cache

    def asking(self, tasks: Tasks) -> "FeatureCache":
        """The same rows, of which only this is asked: e.g. what another cache can be asked too."""
        return FeatureCache(self.place, self.header, self.chunks.check, asked=tasks)

    def check_journals(self) -> None:
        """Are the journals of a sealed cache those that were sealed?

        Raises:
            CacheCorrupt: they were edited, or lost a line.
        """
        if problem := quarantine_problem(self.chunks, self.header):
            raise CacheCorrupt(
                f"{problem}; restore it from a backup, or remove the cache and build it again"
            )
        if not self.chunks.n_missing and self.header.digest != self.digest():
            raise CacheCorrupt(
                f"{self.place}: its content digest is {self.digest()[:12]}, but {str(self.header.digest)[:12]} was "
                "sealed: the manifest was edited; restore it from a backup, or remove the cache and build it again"
            )

    def check_repairable(self) -> None:
        """Is all that is pending of embeddings? `CacheIncomplete` if not: other arrays are written at creation only."""
        own = self.header.embedded()
        lost = [f"{array} ({chunk})" for array, chunk in self.pending() if array not in own]
        if lost:
            raise CacheIncomplete(
                f"{self.place} lost {', '.join(lost)}, which only a new build writes: remove the cache and repeat"
            )

    def pending(self) -> list[tuple[str, int]]:
        """Chunks still to be written, as (array, chunk)."""
        return self.chunks.pending()

    def write_chunk(self, array: str, chunk: int, values: NDArray[Any]) -> None:
        """Write a whole chunk, padding included, durably; then list it as finished."""
        self.chunks.write(array, chunk, values)

    def quarantine(self, bad: Bad) -> None:
        """Record an image that cannot be used."""
        self._bad_images.append(bad)

    def settle(self) -> None:
        """Bring together what several builders have recorded; only for the lock holder, when no helper is left."""
        with self.place.alone():
            self.chunks.settle()
            self._bad_images.merge(list({bad.id: bad for bad in self._bad_images.lines()}.values()))

    def seal(self) -> None:
        """Declare the cache finished; the header then carries the content digest."""
        self.settle()
        if lost := self.pending():
            raise CacheIncomplete(
                f"{len(lost)} chunks of {self.place} are damaged or missing, the first is chunk {lost[0][1]} of "
                f"{lost[0][0]}; repeat the build: {self.chunks.command}"
            )
        quarantine = hashlib.sha256(self.place.read("quarantine.jsonl")).hexdigest()
        self._rewrite(state="sealed", digest=self.digest(), quarantine_sha256=quarantine)

    def unseal(self) -> None:
        """Open a sealed cache for repair."""
        self._rewrite(state="building", digest=None, quarantine_sha256=None)

    def _rewrite(self, **changes: Any) -> None:
        self.header = self.header.model_copy(update=changes)
        write_header(self.place, self.header)

    def stored_bytes(self, stream: str) -> int:
        """What a stream takes on disk, with its scales and without the padding of its last chunk."""
        arrays = [name for name in (stream, f"{stream}_scale") if name in self.header.arrays]
        return sum(map(self.chunks.stored_bytes, arrays))

    def digest(self) -> str:
        """sha256 over the fingerprint, the tasks, every chunk's checksum and the quarantined ids.

        Equal whether the cache was built at once or in pieces, and wherever it lies.
        """
        body = [
            self.fingerprint,
            self.header.tasks_sha256,
            [[*key, e.crc32c, e.bytes] for key, e in sorted(self.chunks.manifest.items())],
            sorted(self.quarantined),
        ]
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def verify(self, progress: bool = False) -> VerifyReport:
        """Read every chunk and compare it with what was written; also metadata, tasks, completeness and digest."""
        return verify(self.chunks, self.header, self.digest(), progress)

    def numpy(
        self, stream: str, split: str, *, task: str | None = None, allow_missing: bool = False
    ) -> NDArray[np.float32]:
        """A stream of the images of a split, in the order of its examples, for scikit-learn and the like: (n, …).

            x, y = cache.numpy("image/pooled", "train"), cache.labels("train")["attr"]

        Args:
            stream: one of images, of rows of one shape.
            split, task: as of `labels`.
            allow_missing: leave out quarantined images, here and in `labels`, instead of refusing.

        Raises:
            UnknownName: no such stream, split or task; or the rows are no images, or differ in shape.
            UnknownIds: an image is quarantined.
        """
        if stream in self.streams and not stream.startswith("image/"):
            raise UnknownName(
                f"a split is one of images, and rows of {stream} are none: use read or read_ragged with "
                "rows(side, ids)"
            )
        if stream in self.streams and self.is_ragged(stream):
            raise UnknownName(
                f"{stream} is ragged, its rows differ in length and make no array: use read_ragged(stream, "
                'rows("image", ids)), or image/pooled, one vector an image'
            )
        ids = self.labels(split, task=task, allow_missing=allow_missing)["id"]
        return self.read(stream, self.rows("image", ids.tolist())).astype(np.float32)

    def labels(
        self, split: str, *, task: str | None = None, allow_missing: bool = False
    ) -> dict[str, NDArray[Any]]:
        """What the examples of a split say of their images: name → strings (n,), row by row as `numpy`.

        Args:
            split: e.g. "train".
            task: whose split; None is czsl, the one with labels, or else the only task there is.
            allow_missing: leave out quarantined images.

        Returns:
            `id`, the image ids; with czsl also `attr`, `obj` and `pair`.

        Raises:
            UnknownName: no such split or task, or several tasks and none was named.
        """
        found = split_labels(self.tasks, split, task)
        if allow_missing:
            kept = np.array([image not in self._bad for image in found["id"].tolist()])
            found = {name: values[kept] for name, values in found.items()}
        return found


def _continued(layout: Layout, before: Mapping[str, Layout]) -> Layout:
    """An array that grows keeps its chunks, if it had several: they can be shared."""
    old = before.get(layout.name)
    if old is None or old.n_chunks < 2 or not layout.shape:
        return layout
    return Layout.model_validate(layout.model_dump() | {"chunk": old.chunk, "inner": old.inner})


def _plain(values: Values) -> Values:
    """Numbers as little-endian arrays, strings as they are."""
    if not isinstance(values, np.ndarray):
        return values
    return np.asarray(values, values.dtype.newbyteorder("<"), order="C")


def _check_unique(spec: CacheSpec, side: str, ids: Sequence[Any] | NDArray[Any]) -> None:
    twice = [i for i, n in Counter(ids).items() if n > 1]
    if twice:
        raise CacheError(
            f"{len(twice)} {side} ids of {spec.dataset.name} occur more than once, the first is {twice[0]!r}; "
            "ids must be unique, because everything is joined by them"
        )
