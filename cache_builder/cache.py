"""FeatureCache: a folder any zarr opens, that knows what it holds, whether it is whole and whether it is intact.

    caches/demo.zarr
      zarr.json          header: schema, spec, fingerprint, state, layouts     image/patches/c/<i>/0/0   chunk files
      manifest.jsonl     one line per finished chunk, with its crc32c          readout/…                 frozen tensors
      quarantine.jsonl   images that could not be used                         tasks.json                what to ask
Format: docs/cache-format.md. numpy and zarr only; no torch. Letters: B rows asked for, V text width.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from cache_builder import format as fmt
from cache_builder.chunks import Chunks, Values
from cache_builder.datasets.base import Tasks
from cache_builder.durable import append_line, make_folder, read_lines, sync_tree, write_durably
from cache_builder.errors import CacheCorrupt, CacheError, CacheIncomplete, UnknownIds, UnknownName
from cache_builder.format import Bad, Layout
from cache_builder.header import Header, check_spec, read_header, write_header
from cache_builder.reader import ChunkReader, aligned_empty
from cache_builder.spec import CacheSpec
from cache_builder.verify import VerifyReport, read_tasks, verify


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


class FeatureCache:
    """Streams of a data set under one frozen backbone, keyed by id. Get one by `open`; `create` is the builder's.

    Attributes:
        path: the folder.
        header: the root group's attributes.
        chunks: files and manifest.
    """

    def __init__(self, path: Path, header: Header, check: Literal["open", "read"] = "open") -> None:
        self.path, self.header = path, header
        self.chunks = Chunks(path, header.arrays, check=check, command=header.command(path))

    @classmethod
    def create(
        cls,
        path: str | Path,
        spec: CacheSpec,
        contents: Contents,
        *,
        batch_size: int = 64,
        counts: Mapping[str, str] | None = None,
        root: str = "",
        options: Mapping[str, Any] | None = None,
        backbone_name: str = "",
        chunk_bytes: int = fmt.CHUNK_BYTES,
    ) -> "FeatureCache":
        """Lay out a new cache in state `building`, with everything in it but the embeddings.

        The builder holds the lock. The header is written last, so a folder without one is a creation cut short.

        Args:
            path: a folder that is absent or empty but for the lock.
            spec, contents: what it will hold, and what is known already.
            batch_size: rows encoded together; this partition decides the last bits.
            counts: what the data set's reader found, for people.
            root, options: where and how the data set was read, to find its pictures again.
            backbone_name: as it was asked for, to find its weights again.
            chunk_bytes: aim for the largest chunks.
        """
        path = Path(path)
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
        layouts = fmt.plan(spec, known, totals, chunk_bytes)
        make_folder(path)
        for layout in layouts.values():
            zarr.create_array(
                str(path),
                name=layout.name,
                shape=layout.shape,
                chunks=layout.chunk_shape,
                dtype="str" if layout.dtype == "string" else layout.dtype,
                compressors=None,
                dimension_names=layout.dims,
                config={"write_empty_chunks": True},
            )
        tasks = contents.tasks.to_json().encode()
        write_durably(path / "tasks.json", tasks, sync=False)
        for journal in ("manifest.jsonl", "quarantine.jsonl"):
            write_durably(path / journal, b"", sync=False)
        for bad in contents.bad:
            append_line(path / "quarantine.jsonl", bad, sync=False)
        chunks = Chunks(path, layouts)
        for name, values in small.items():
            chunks.write_all(name, values)
        sync_tree(path)  # zarr renames but never syncs
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
        )
        write_header(path, header)
        return cls(path, header)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        expected: CacheSpec | None = None,
        allow_building: bool = False,
        check: Literal["open", "read"] = "open",
    ) -> "FeatureCache":
        """Open a cache, after checking version, completeness and, if given, the spec.

        Args:
            path: the folder.
            expected: refuse any other content.
            allow_building: accept a cache whose build has not finished.
            check: "open" compares sizes as chunks are read; "read" also compares each chunk's checksum when first read.

        Raises:
            CacheNotFound, CacheTooNew, CacheTooOld, CacheIncomplete, CacheMismatch, CacheCorrupt: see their messages.
        """
        path = Path(path)
        cache = cls(path, read_header(path), check)
        missing, total = len(cache.chunks.unlisted()), cache.chunks.total
        if not allow_building and (missing or cache.state != "sealed"):
            raise CacheIncomplete(
                f"{path} is not finished: {total - missing} of {total} chunks are there; repeat the build to resume: "
                f"{cache.chunks.command}"
            )
        if expected is not None:
            check_spec(path, cache.spec, expected)
        return cache

    @property
    def spec(self) -> CacheSpec:
        """What the cache holds."""
        return self.header.spec

    @property
    def state(self) -> Literal["building", "sealed"]:
        """Whether the build has finished."""
        return self.header.state

    @property
    def fingerprint(self) -> str:
        """sha256 of the spec: equal fingerprints make the same claim; equal digests hold the same bytes."""
        return self.header.fingerprint

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the embedding streams, sorted; token ids come with `text/tokens` and `word/states`."""
        return self.spec.streams

    def layout(self, array: str) -> Layout:
        """Shape, chunks and type of an array."""
        return self.chunks.layout(array)

    def shape(self, stream: str) -> tuple[int, ...]:
        """Shape of one row; of a ragged stream (longest row possible, …)."""
        rest = self.layout(stream).shape[1:]
        if not self.is_ragged(stream):
            return rest
        side, dims = stream.split("/")[0], self.spec.backbone.dims
        if side in ("text", "word"):
            return (dims["context"], *rest)
        if side == "crop":
            return (int(np.diff(self.offsets(stream)).max(initial=0)), *rest)
        return (dims["most_patches"], *rest)

    def is_ragged(self, stream: str) -> bool:
        """Do its rows differ in length, so that `read_ragged` reads them?"""
        return fmt.is_ragged(stream, self.spec.backbone.dims)

    @cached_property
    def image_ids(self) -> list[str]:
        """Image ids in row order, a seeded permutation of the data set's."""
        return fmt.decode_strings(self.chunks.read_whole("image/id"))

    @cached_property
    def text_ids(self) -> list[str]:
        """Text ids in row order, the data set's own."""
        return fmt.decode_strings(self.chunks.read_whole("text/id"))

    @cached_property
    def texts(self) -> list[str]:
        """The strings, in row order."""
        return fmt.decode_strings(self.chunks.read_whole("text/string"))

    def vocabulary(self) -> list[str]:
        """The string of every token id, so that `text/ids` can be read by people.

        Raises:
            UnknownName: the cache holds no `text/tokens`, hence no token ids.
        """
        self.layout("text/vocabulary")
        return fmt.decode_strings(self.chunks.read_whole("text/vocabulary"))

    def offsets(self, stream: str) -> NDArray[np.int64]:
        """Row i of a ragged stream has entries offsets[i] … offsets[i + 1] - 1 along its first axis.

        Rows are texts (`text/tokens`, `text/ids`), parts of words (`word/states`, `word/ids`), or images (`crop/pooled`
        and `crop/box`; patches that keep the picture's shape).
        """
        return self._numbers(f"{stream.rpartition('/')[0]}/offsets")

    @cached_property
    def word_ids(self) -> list[str]:
        """Ids of the words of `word/states`, with their role: `attr:red`, `obj:cup`, `pair:red cup`."""
        self.layout("word/id")
        return fmt.decode_strings(self.chunks.read_whole("word/id"))

    @cached_property
    def word_strings(self) -> list[str]:
        """What was encoded: the parts of all words, one after the other."""
        return fmt.decode_strings(self.chunks.read_whole("word/string"))

    @property
    def word_parts(self) -> NDArray[np.int64]:
        """Word i has parts word_parts[i] … word_parts[i + 1] - 1, the rows of `word/states`; nearly always one."""
        return self._numbers("word/parts")

    def grid(self, home: str = "image") -> NDArray[np.int32]:
        """Rows and columns of patches of every image (n, 2), of a backbone that keeps the picture's shape.

        Args:
            home: `image`, or a view as `image/view_flip`.
        """
        name = f"{home}/grid"
        return np.frombuffer(self.chunks.read_whole(name), "<i4").reshape(self.layout(name).shape)

    def boxes(self) -> NDArray[np.int32]:
        """Left, upper, right, lower of every crop (crops, 4), in pixels of the resized picture."""
        return np.frombuffer(self.chunks.read_whole("crop/box"), "<i4").reshape(-1, 4)

    def crop_owners(self) -> NDArray[np.int64]:
        """The image row of every crop, (crops,)."""
        sizes = np.diff(self.offsets("crop/box"))
        return np.repeat(np.arange(len(sizes)), sizes)

    def _numbers(self, name: str) -> NDArray[np.int64]:
        if name not in self._kept:
            values = np.frombuffer(self.chunks.read_whole(name), "<i8")
            self._kept[name] = values.astype(np.int64)
        return self._kept[name]

    @cached_property
    def _kept(self) -> dict[str, NDArray[np.int64]]:
        return {}

    @cached_property
    def tasks(self) -> Tasks:
        """What can be asked of these rows; examples name rows by id. `CacheCorrupt` if the file was changed."""
        return Tasks.from_json(read_tasks(self.path, self.header))

    @property
    def quarantined(self) -> dict[str, str]:
        """Image id → why it could not be used."""
        return {bad.id: bad.reason for bad in read_lines(self.path / "quarantine.jsonl", Bad)}

    def rows(self, side: Literal["image", "text", "word"], ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of ids, in their order; ids may repeat.

        Raises:
            UnknownIds: some are not in the cache, or are quarantined images; names the first three and the count.
        """
        if side not in self._index:
            raise UnknownName(f"{self.path} holds no words: build with the stream word/states")
        index, bad = self._index[side], self._bad if side == "image" else {}
        wrong = [i for i in dict.fromkeys(ids) if i not in index or i in bad]
        if wrong:
            named = ", ".join(f"{i!r}" + (f" ({bad[i]})" if i in bad else "") for i in wrong[:3])
            broken = sum(i in bad for i in wrong)
            raise UnknownIds(
                f"{len(wrong)} of the {len(set(ids))} {side} ids asked for cannot be read from {self.path} "
                f"({len(wrong) - broken} unknown, {broken} quarantined): {named}{', …' if len(wrong) > 3 else ''}"
            )
        return np.fromiter((index[i] for i in ids), np.int64, len(ids))

    @cached_property
    def _index(self) -> dict[str, dict[str, int]]:
        sides = {"image": self.image_ids, "text": self.text_ids}
        sides |= {"word": self.word_ids} if "word/id" in self.header.arrays else {}
        return {side: {i: row for row, i in enumerate(ids)} for side, ids in sides.items()}

    @cached_property
    def _bad(self) -> dict[str, str]:
        return self.quarantined

    def readout(self) -> dict[str, NDArray[np.float32]]:
        """The backbone's frozen tensors between raw tokens and joint space, by name."""
        arrays = [la for la in self.header.arrays.values() if la.name.startswith("readout/")]
        values = {la: np.frombuffer(self.chunks.read_whole(la.name), la.dtype) for la in arrays}
        return {
            la.name.removeprefix("readout/"): found.astype(np.float32).reshape(la.shape)
            for la, found in values.items()
        }

    def read(self, stream: str, rows: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """Values of rows (all by default), as stored: (B, …). Quarantined images are NaN; `rows()` refuses them."""
        if stream in self.streams and self.is_ragged(stream):
            raise UnknownName(f"{stream} is ragged, its rows differ in length: use read_ragged")
        if stream not in self.streams:
            known = ", ".join(self.streams)
            raise UnknownName(f"{self.path} has no stream {stream!r} (it has: {known})")
        return self._read(stream, _checked_rows(rows, self.layout(stream).shape[0], stream))

    def read_ragged(
        self, stream: str, rows: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Values of rows one after the other, and offsets (B + 1,) where each begins.

        Args:
            stream: a ragged one, e.g. `text/tokens`, with values (total, V), or `text/ids`, with values (total,).
            rows: what `offsets` calls rows; all by default.
        """
        self.layout(stream)
        if not self.is_ragged(stream):
            raise UnknownName(f"{stream} is not ragged: use read")
        bounds = self.offsets(stream)
        wanted = _checked_rows(rows, len(bounds) - 1, stream)
        starts = bounds[wanted]
        sizes = bounds[wanted + 1] - starts
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)
        return self._read(stream, places), offsets

    def _read(self, array: str, places: NDArray[np.int64]) -> NDArray[Any]:
        layout = self.layout(array)
        if fmt.metadata_problem(self.path, layout) is None:
            out = aligned_empty((len(places), *layout.shape[1:]), layout.dtype)
            ChunkReader(self, array).read_rows(places, out)
            return out
        # Re-encoded by somebody, for instance with a codec: zarr reads it, but would turn a missing file into zeros.
        for chunk in np.unique(places // layout.chunk).tolist():
            os.close(self.chunks.open_chunk(array, chunk))
        found: Any = zarr.open_array(str(self.path), path=array, mode="r")
        if (found.shape, found.chunks) != (layout.shape, layout.chunk_shape):
            raise CacheCorrupt(f"{array} of {self.path} has another shape than its header says")
        return np.asarray(found.oindex[places])

    def pending(self) -> list[tuple[str, int]]:
        """Chunks still to be written, as (array, chunk)."""
        return self.chunks.pending()

    def write_chunk(self, array: str, chunk: int, values: NDArray[Any]) -> None:
        """Write a whole chunk, padding included, durably; then list it as finished."""
        self.chunks.write(array, chunk, values)

    def quarantine(self, bad: Bad) -> None:
        """Record an image that cannot be used."""
        append_line(self.path / "quarantine.jsonl", bad)

    def seal(self) -> None:
        """Declare the cache finished; the header then carries the content digest."""
        assert not self.pending(), "sealed too early"
        self._rewrite(state="sealed", digest=self.digest())

    def unseal(self) -> None:
        """Open a sealed cache for repair."""
        self._rewrite(state="building", digest=None)

    def _rewrite(self, **changes: Any) -> None:
        self.header = self.header.model_copy(update=changes)
        write_header(self.path, self.header)

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


def _checked_rows(rows: NDArray[np.int64] | None, n: int, stream: str) -> NDArray[np.int64]:
    if rows is None:
        return np.arange(n)
    if len(rows) and not (rows.min() >= 0 and rows.max() < n):
        raise IndexError(f"{stream} has rows 0 … {n - 1}, asked for {rows.min()} … {rows.max()}")
    return rows
