"""What a cache knows besides its embeddings: ids, strings, offsets, words, grids, tasks, quarantine, readout.

All of it was written when the cache was laid out. Strings, offsets and the readout are always compared with their
checksums; token ids, as embeddings, under check="read".
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cache_builder import format as fmt
from cache_builder.chunks import Chunks, Values
from cache_builder.codec import decode_strings
from cache_builder.datasets.base import Tasks
from cache_builder.errors import CacheCorrupt, UnknownIds, UnknownName
from cache_builder.format import Bad, Layout, Side
from cache_builder.header import Header
from cache_builder.journal import Journal
from cache_builder.place import Place, folder_of
from cache_builder.reader import ChunkReader, aligned_empty
from cache_builder.spec import CacheSpec
from cache_builder.verify import read_tasks


class Catalogue:
    """Of one cache.

    Args:
        place: the folder, or the prefix of an object store.
        header: the root group's attributes.
        check: as of `FeatureCache.open`.
        writer: whose journals are written; nobody's name is the lock holder's.
        asked: what is asked of these rows in place of all that can be; None for all of it.
    """

    def __init__(
        self,
        place: Place,
        header: Header,
        check: Literal["open", "read"] = "open",
        writer: str = "",
        asked: Tasks | None = None,
    ) -> None:
        self.place, self.header, self.asked = place, header, asked
        self.chunks = Chunks(
            place,
            header.arrays,
            check=check,
            command=header.command(place),
            fingerprint=header.fingerprint,
            writer=writer,
        )
        self._bad_images = Journal(place, "quarantine", Bad, writer)

    @property
    def path(self) -> Path:
        """The folder; `CacheError` if the cache lies on an object store."""
        return folder_of(self.place)

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
        return self._strings("image/id")

    @cached_property
    def text_ids(self) -> list[str]:
        """Text ids in row order, the data set's own."""
        return self._strings("text/id")

    @cached_property
    def texts(self) -> list[str]:
        """The strings, in row order."""
        return self._strings("text/string")

    def vocabulary(self) -> list[str]:
        """The string of every token id, so that `text/ids` can be read by people.

        Raises:
            UnknownName: the cache holds no `text/tokens`, hence no token ids.
        """
        self.layout("text/vocabulary")
        return self._strings("text/vocabulary")

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
        return self._strings("word/id")

    @cached_property
    def word_strings(self) -> list[str]:
        """What was encoded: the parts of all words, one after the other."""
        return self._strings("word/string")

    @property
    def word_parts(self) -> NDArray[np.int64]:
        """Word i has parts word_parts[i] … word_parts[i + 1] - 1, the rows of `word/states`; nearly always one."""
        return self._numbers("word/parts")

    def grid(self, home: str = "image") -> NDArray[np.int32]:
        """Rows and columns of patches of every image (n, 2), of a backbone that keeps the picture's shape.

        Args:
            home: `image`, or a view as `image/view_flip`.
        """
        return self._measures(f"{home}/grid")

    def boxes(self) -> NDArray[np.int32]:
        """Left, upper, right, lower of every crop (crops, 4), in pixels of the resized picture."""
        return self._measures("crop/box")

    def crop_owners(self) -> NDArray[np.int64]:
        """The image row of every crop, (crops,)."""
        return self._crop_owners

    @cached_property
    def _crop_owners(self) -> NDArray[np.int64]:
        sizes = np.diff(self.offsets("crop/box"))
        return np.repeat(np.arange(len(sizes)), sizes)

    def _measures(self, name: str) -> NDArray[np.int32]:
        """An array of numbers of every picture or crop; read once, since every unit of a shared build asks for it."""
        if name not in self._kept_measures:
            found = np.frombuffer(self.chunks.read_whole(name), "<i4")
            self._kept_measures[name] = found.reshape(self.layout(name).shape)
        return self._kept_measures[name]

    @cached_property
    def _kept_measures(self) -> dict[str, NDArray[np.int32]]:
        return {}

    def n_rows(self, side: Side) -> int:
        """Rows of a side: images, texts, crops, or parts of words."""
        if side == "crop":
            return int(self.offsets("crop/pooled")[-1])
        if side == "word":
            return len(self.offsets("word/states")) - 1
        dataset = self.spec.dataset
        return dataset.n_images if side == "image" else dataset.n_texts

    def copies(self) -> NDArray[np.int64] | None:
        """Images copies[u] … copies[u + 1] - 1 are of files with the same bytes; None if all are of different ones."""
        return self._numbers("image/copies") if "image/copies" in self.header.arrays else None

    def generation_ends(self, side: Side) -> list[int]:
        """How many rows a side had each time before samples were appended."""
        ends = self.spec.generations
        if side == "crop":
            return [int(self.offsets("crop/pooled")[images]) for images, _, _ in ends]
        at = {"image": 0, "text": 1, "word": 2}[side]
        return [end[at] for end in ends]

    def _strings(self, name: str) -> list[str]:
        return decode_strings(self.chunks.read_whole(name), self.layout(name).shape[0])

    def _numbers(self, name: str) -> NDArray[np.int64]:
        """An array that counts: from 0 to the length of what it counts, never falling."""
        if name not in self._kept:
            values = np.frombuffer(self.chunks.read_whole(name), "<i8").astype(np.int64)
            end = self._counted(name)
            if not (
                len(values)
                and values[0] == 0
                and values[-1] == end
                and (np.diff(values) >= 0).all()
            ):
                raise CacheCorrupt(
                    f"{name} of {self.place} does not count from 0 to {end}; remove the cache and build it again"
                )
            self._kept[name] = values
        return self._kept[name]

    def _counted(self, name: str) -> int:
        """Length of the arrays that an array of offsets cuts into rows."""
        home = name.rpartition("/")[0]
        if name == "word/parts":
            return self.layout("word/string").shape[0]
        if name == "image/copies":
            return self.spec.dataset.n_images
        arrays = self.header.arrays
        ragged = [s for s in self.streams if s.rpartition("/")[0] == home and self.is_ragged(s)]
        cut = next(a for a in (f"{home}/ids", f"{home}/box", *ragged) if a in arrays)
        return arrays[cut].shape[0]

    @cached_property
    def _kept(self) -> dict[str, NDArray[np.int64]]:
        return {}

    @cached_property
    def tasks(self) -> Tasks:
        """What can be asked of these rows; examples name rows by id. `CacheCorrupt` if the file was changed."""
        return self.asked or Tasks.from_json(read_tasks(self.chunks, self.header))

    @property
    def quarantined(self) -> dict[str, str]:
        """Image id → why it could not be used."""
        return {bad.id: bad.reason for bad in self._bad_images.lines()}

    def bad_images(self) -> list[Bad]:
        """What is in quarantine, with rows."""
        return self._bad_images.lines()

    def known_arrays(self) -> dict[str, Values]:
        """All arrays but the embeddings and their scales, by name."""
        found: dict[str, Values] = {}
        for name, layout in self.header.arrays.items():
            if name in self.header.embedded():
                continue
            if layout.dtype == "string":
                found[name] = self._strings(name)
            elif not layout.shape:
                found[name] = np.frombuffer(self.chunks.read_whole(name), layout.dtype).reshape(())
            else:
                found[name] = self.stored(name, np.arange(layout.shape[0]))
        return found

    def rows(self, side: Literal["image", "text", "word"], ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of ids, in their order; ids may repeat.

        Raises:
            UnknownIds: some are not in the cache, or are quarantined images; names the first three and the count.
        """
        if side not in self._index:
            raise UnknownName(f"{self.place} holds no words: build with the stream word/states")
        index, bad = self._index[side], self._bad if side == "image" else {}
        wrong = [i for i in dict.fromkeys(ids) if i not in index or i in bad]
        if wrong:
            named = ", ".join(f"{i!r}" + (f" ({bad[i]})" if i in bad else "") for i in wrong[:3])
            broken = sum(i in bad for i in wrong)
            raise UnknownIds(
                f"{len(wrong)} of the {len(set(ids))} {side} ids asked for cannot be read from {self.place} "
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

    def stored(self, array: str, places: NDArray[np.int64]) -> NDArray[Any]:
        """Numbers as they lie on disk, of places along an array's first axis."""
        layout = self.layout(array)
        out = aligned_empty((len(places), *layout.shape[1:]), layout.dtype)
        ChunkReader(self, array).read_rows(places, out)
        return out
