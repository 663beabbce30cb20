"""Rows of a cache as `Features`: from the device or from memory where they fit, else read when asked for.

Values leave as float32 (pixels: uint8) on the wished device (`gather.py`); held, they stay as stored, usually half that
size. `image/block_-<k>` is read from the array of that block (`block_names.py`). Ragged streams are padded to the
longest row asked for:

    values  [ a a a | b | c c ]   offsets [0 3 4 6]        take(b, a)  →  tokens [b . .]   mask [1 0 0]
                                                                                 [a a a]        [1 1 1]
"""

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cache_builder import FeatureCache
from heads import ranks, segments, strings
from heads.base import Context, Needs
from heads.block_names import array_of, counted_from_end
from heads.coded import Coded, read_stored
from heads.errors import MissingStream
from heads.features import Features
from heads.gather import Gatherer

DERIVED = {
    "text/ids": "text/tokens",
    "text/mask": "text/tokens",
    segments.STREAM: segments.PARTS_OF,
}
"""Streams that come with another one, or are made of it."""

ROWS = {"crop": "image", "segment": "text"}
"""Whose rows these are: a picture has its crops, a caption its parts."""

Side = Literal["image", "text"]


_beside = 1


def share_memory(processes: int) -> None:
    """Say that so many processes of this machine train beside each other, this one among them, each by itself."""
    global _beside
    _beside = processes


def quarter_of_free_memory() -> int:
    """A quarter of the memory the system calls available, in bytes; 1 GiB where it does not say.

    Of several processes that train together, or beside each other (`share_memory`), each has its part. Those that train
    together have the same: where rows are held decides their order.
    """
    try:
        with open("/proc/meminfo") as lines:
            sizes = dict(line.split(":") for line in lines)
        found = int(sizes["MemAvailable"].split()[0]) * 1024 // 4
    except (OSError, KeyError, ValueError):
        found = 1 << 30
    return ranks.least(found // ranks.n_ranks() // _beside)


def check_streams(cache: FeatureCache, needs: Needs, who: str) -> None:
    """Refuse a cache that lacks a stream in `needs`.

    Raises:
        MissingStream: names the streams, or what else is missing, and the command that builds a cache with them.
    """
    wanted = query_streams(cache, needs) | needs.candidates
    arrays = {s: array_of(cache, DERIVED.get(s, s)) for s in wanted - {strings.STREAM}}
    asked = set(arrays.values())
    missing = sorted(asked - set(cache.streams))
    streams = sorted(asked | set(cache.streams))
    if segments.STREAM in needs.candidates:
        command = segments.command(cache, streams)
    else:
        command = cache.header.command(Path("NEW.zarr"), streams)
    if missing:
        backbone = cache.spec.backbone
        named = {array: s for s, array in sorted(arrays.items()) if array != DERIVED.get(s, s)}
        reads = ", ".join(f"{m} (its {named[m]})" if m in named else m for m in missing)
        held = f"{who} reads {reads}, but {cache.place} holds {', '.join(cache.streams)}"
        if "joint" not in backbone.dims and needs.live:
            raise MissingStream(
                f"{held}; family {backbone.family} has no joint space, into which the towers lead that {who} runs: "
                "choose another backbone, or what reads a cache alone"
            )
        if any(s.endswith("/pixels") for s in missing) and "image_size" not in backbone.dims:
            raise MissingStream(
                f"{held}; under {backbone.family}:{backbone.checkpoint} pictures keep their shape, and pixels are "
                "stored of pictures of one size: choose what reads the states of a block (eva: head.cut), or another "
                "backbone"
            )
        if "joint" not in backbone.dims and any(s.endswith("/pooled") for s in missing):
            raise MissingStream(
                f"{held}; family {backbone.family} has no joint space, so no pooled embeddings: choose what reads "
                "tokens alone, as tf_local does with head.variant=local, head.top_sampled=0 and without --rerank, or "
                "another backbone"
            )
        if "image/prefix" in missing and not backbone.dims.get("prefix", 0):
            raise MissingStream(
                f"{held}; {backbone.family}:{backbone.checkpoint} has no class token, so no prefix rows: read "
                "image/pooled in its place (trident: head.global_stream=pooled), or choose another backbone"
            )
        raise MissingStream(f"{held}; build a cache that has it: {command}")
    if segments.STREAM in needs.candidates and not segments.has_segments(cache):
        raise MissingStream(
            f"{who} reads parts of captions, and {cache.place} has no text of any part; build a cache with them: "
            f"{command}"
        )


def check_roles(needs: Needs, task: str, who: str) -> None:
    """Refuse streams of the wrong rows: in composed retrieval queries are images with texts, and candidates images.

    Raises:
        MissingStream: names the streams, and what the rows of the task are.
    """
    composed = task == "composed"
    rows = {
        "queries": (needs.queries, ("image", "text") if composed else ("image",)),
        "candidates": (needs.candidates, ("image",) if composed else ("text",)),
    }
    for role, (streams, sides) in rows.items():
        if wrong := sorted(s for s in streams if side_of(s) not in sides):
            raise MissingStream(
                f"{who} reads {', '.join(wrong)} of {role}, but {role} of {task} are {' with '.join(sides)}s; choose "
                f"another task (--task) or other settings (headstart list methods {who})"
            )


def query_streams(cache: FeatureCache, needs: Needs) -> frozenset[str]:
    """Streams that queries have in this cache: `needs.queries`, less those that its backbone has no rows for."""
    bare = cache.spec.backbone.dims.get("prefix", 0) == 0
    none = {"image/prefix"} - set(cache.streams) if bare else set()
    return needs.queries - (needs.unless_none & none)


def context_of(cache: FeatureCache, backbone: str | None = None) -> Context:
    """The facts a head is built from: shapes of all streams, readout, backbone, and the czsl vocabularies if any.

    A block has its shape under both of its names, `image/block_20` and `image/block_-4`.

    Args:
        cache: an open feature cache.
        backbone: where its backbone lies now, `family:checkpoint`; None is where it lay when the cache was built.
    """
    czsl = cache.tasks.czsl
    spec = cache.spec.backbone
    names = {stream: stream for stream in cache.streams} | counted_from_end(cache)
    return Context(
        shapes={name: tuple(cache.shape(stream)) for name, stream in names.items()},
        readout={name: torch.from_numpy(value) for name, value in cache.readout().items()},
        attrs=czsl.attrs if czsl else (),
        objs=czsl.objs if czsl else (),
        backbone=spec,
        backbone_name=backbone or cache.header.backbone_name or f"{spec.family}:{spec.checkpoint}",
    )


def half_of_free_device_memory(device: torch.device) -> int:
    """Half of what a CUDA device has free, in bytes, the least of several; 0 for the CPU, whose memory is counted."""
    return ranks.least(torch.cuda.mem_get_info(device)[0] // 2) if device.type == "cuda" else 0


class Stream:
    """One stream; `rows=None` leaves it on disk.

    Args:
        cache, stream: what is read.
        rows: all that will be asked for, sorted.
        held: where they are kept, as stored.
        device: where batches are made.
    """

    def __init__(
        self,
        cache: FeatureCache,
        stream: str,
        rows: np.ndarray | None,
        held: torch.device,
        device: torch.device,
    ) -> None:
        self.cache, self.stream, self.rows = cache, stream, rows
        self.ragged = cache.is_ragged(stream)
        self.gather = Gatherer(device)
        if rows is not None:
            self.positions = Positions(rows)
            places, self.offsets = cache.places(stream, rows) if self.ragged else (rows, None)
            self.values = read_stored(cache, stream, places).to(held)

    def take(self, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Values of `rows`, which may repeat: (B, …), and no mask.

        Of a ragged stream padded with 0 to the longest of them, (B, L, …), and the mask (B, L), True where an entry is
        real.
        """
        if self.rows is not None:
            values, offsets, at = self.values, self.offsets, self.positions(rows)
        else:
            unique, inverse = np.unique(rows, return_inverse=True)
            if self.ragged:
                read, offsets = self.cache.read_ragged(self.stream, unique)
            else:
                read, offsets = self.cache.read(self.stream, unique), None
            values, at = torch.from_numpy(read), torch.from_numpy(inverse)
        if offsets is None:
            return self.gather.take(values, at), None
        return padded(self.gather, values, torch.from_numpy(offsets), at)


class Source:
    """The streams a head reads, of the rows one job uses.

    Queries are images, or (composed retrieval) images with texts; candidates are texts or images.

    Args:
        cache: where they are.
        needs: the head's declaration.
        image_rows, text_rows: every row that will be asked for.
        ram_limit: bytes that may be held in memory; streams are taken in while they fit, smallest first. None is a
            quarter of what is free.
        device: where `images` and `texts` put their values.
        device_limit: bytes that may be held on the device, tried before memory; None is half of what a CUDA device has
            free, and nothing on the CPU.

    Attributes:
        on_device: streams held on the device, smallest first.
        on_disk: streams that did not fit anywhere, largest first.
        limits: bytes that might be held on the device and in memory.

    """

    def __init__(
        self,
        cache: FeatureCache,
        needs: Needs,
        image_rows: np.ndarray,
        text_rows: np.ndarray,
        *,
        ram_limit: int | None = None,
        device: str | torch.device = "cpu",
        device_limit: int | None = None,
    ) -> None:
        check_streams(cache, needs, "this head")
        self.cache, self.device = cache, torch.device(device)
        self.queries, self.candidates = _roles(cache, needs)
        rows = {"image": np.unique(image_rows), "text": np.unique(text_rows)}
        rows["crop"] = rows["image"]
        cut = segments.Segments(cache, rows["text"]) if segments.STREAM in self.candidates else None
        if cut:
            rows["segment"] = cut.rows
        left = {
            "device": half_of_free_device_memory(self.device)
            if device_limit is None
            else device_limit,
            "memory": quarter_of_free_memory() if ram_limit is None else ram_limit,
        }
        self.limits = dict(left)
        read = {*self.queries, *self.candidates} - {strings.STREAM}
        sizes = {s: self._bytes(s, rows[s.split("/")[0]]) for s in sorted(read)}
        self.take: dict[str, Callable[[np.ndarray], tuple[Tensor, Tensor | None]]] = {}
        found: dict[str, list[str]] = {"device": [], "memory": [], "disk": []}
        for stream, size in sorted(sizes.items(), key=lambda item: item[1]):
            place = next((p for p in left if size <= left[p]), "disk")
            if place != "disk":
                left[place] -= size
            found[place].append(stream)
            held = torch.device("cpu") if place == "memory" else self.device
            wanted = None if place == "disk" else rows[stream.split("/")[0]]
            array = _stored(cache, stream)
            self.take[stream] = Stream(cache, array, wanted, held, self.device).take
        self.take[strings.STREAM] = self._strings
        if cut:
            self.take[segments.STREAM] = partial(cut.take, self.take[segments.STREAM])
        self.on_device = tuple(found["device"])
        self.on_disk = tuple(reversed(found["disk"]))

    def only(self, needs: Needs) -> "Source":
        """The same rows, held once, with the streams of `needs`, which must be among those of this source."""
        found = copy(self)
        found.queries, found.candidates = _roles(self.cache, needs)
        mine = {*found.queries, *found.candidates}
        assert mine <= {*self.queries, *self.candidates}, "a stream was not announced"
        found.on_device = tuple(s for s in self.on_device if s in mine)
        found.on_disk = tuple(s for s in self.on_disk if s in mine)
        return found

    def images(
        self,
        rows: np.ndarray,
        given: Mapping[str, Tensor] | None = None,
        texts: np.ndarray | None = None,
    ) -> Features:
        """Query streams of image rows, and of the text rows beside them where queries have both.

        Args:
            rows: image rows.
            given: streams that the caller has read already.
            texts: text rows, one for each of `rows`.
        """
        beside: dict[Side, np.ndarray] = {} if texts is None else {"text": texts}
        return self._features(self.queries, {"image": rows, **beside}, given or {})

    def texts(self, rows: np.ndarray) -> Features:
        """Candidate streams of text rows."""
        return self._features(self.candidates, {"text": rows}, {})

    def gallery(self, rows: np.ndarray) -> Features:
        """Candidate streams of image rows."""
        return self._features(self.candidates, {"image": rows}, {})

    def dense(self, stream: str, rows: np.ndarray) -> Tensor:
        """One fixed-shape stream of rows."""
        values, mask = self.take[stream](rows)
        assert mask is None
        return values

    def _features(
        self, streams: Iterable[str], rows: Mapping[Side, np.ndarray], given: Mapping[str, Tensor]
    ) -> Features:
        out: dict[str, Tensor] = {}
        for stream in streams:
            if stream in given:
                out[stream] = given[stream]
                continue
            out[stream], mask = self.take[stream](rows[side_of(stream)])
            if mask is not None:
                out[f"{stream.rpartition('/')[0]}/mask"] = mask
        return Features(out)

    def _strings(self, rows: np.ndarray) -> tuple[Tensor, None]:
        """What the texts say."""
        texts = self.cache.texts
        return strings.pack([texts[row] for row in rows]), None

    def _bytes(self, stream: str, rows: np.ndarray) -> int:
        n = len(rows)
        stream = _stored(self.cache, stream)
        if self.cache.is_ragged(stream):
            offsets = self.cache.offsets(stream)
            n = int((offsets[rows + 1] - offsets[rows]).sum())
        arrays = [a for a in (stream, f"{stream}_scale") if a in self.cache.header.arrays]
        return n * sum(self.cache.layout(a).row_bytes for a in arrays)


def _stored(cache: FeatureCache, stream: str) -> str:
    """The array of a cache that a stream is read from."""
    return segments.PARTS_OF if stream == segments.STREAM else array_of(cache, stream)


def side_of(stream: str) -> Side:
    """Whose rows a stream has."""
    home = stream.partition("/")[0]
    return "text" if ROWS.get(home, home) == "text" else "image"


def _roles(cache: FeatureCache, needs: Needs) -> tuple[list[str], list[str]]:
    """Streams to read of queries and of candidates, sorted; a mask comes with its tokens."""
    return _expanded(query_streams(cache, needs)), _expanded(needs.candidates)


def _expanded(streams: frozenset[str]) -> list[str]:
    plain = streams - {"text/mask"}
    if "text/mask" in streams and not plain & {"text/tokens", "text/ids"}:
        plain |= {"text/ids"}
    return sorted(plain)


class Positions:
    """Where each row that is held stands among those held; asking for another one is a bug."""

    def __init__(self, held: Int[np.ndarray, " h"]) -> None:
        self.place = np.full(int(held.max(initial=-1)) + 1, -1)
        self.place[held] = np.arange(len(held))

    def __call__(self, rows: Int[np.ndarray, " b"]) -> Int[Tensor, " b"]:
        """Positions of rows, in their order."""
        at = self.place[rows]
        assert (at >= 0).all(), "a row was not announced"
        return torch.from_numpy(at)


def padded(
    gather: Gatherer,
    values: Tensor | Coded,
    offsets: Int[Tensor, " n_plus_1"],
    rows: Int[Tensor, " b"],
) -> tuple[Tensor, Bool[Tensor, "b l"]]:
    """Gather ragged rows into (B, L, …), zero where there is no entry, and True where there is one."""
    start, end = offsets[rows], offsets[rows + 1]
    longest = int((end - start).max()) if len(rows) else 0
    index = start[:, None] + torch.arange(longest)
    absent = (index >= end[:, None]).to(gather.device)
    flat = index.clamp(max=len(values) - 1).flatten()
    out = gather.take(values, flat).unflatten(0, (len(rows), longest))
    out.masked_fill_(absent.view(*absent.shape, *(1,) * (out.ndim - 2)), 0)
    return out, ~absent
