"""Rows of a cache as `Features`: from memory where they fit, else read when asked for.

Values leave as float32 on the wished device; in memory they stay as stored, usually half that size. Ragged text is
padded to the longest row asked for:

    values  [ a a a | b | c c ]   offsets [0 3 4 6]        take(b, a)  →  tokens [b . .]   mask [1 0 0]
                                                                                 [a a a]        [1 1 1]
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cache_builder import FeatureCache
from heads.base import Context, Needs
from heads.errors import MissingStream
from heads.features import Features

DERIVED = {"text/ids": "text/tokens", "text/mask": "text/tokens"}
"""Streams that come with another one."""


def quarter_of_free_memory() -> int:
    """A quarter of the memory the system calls available, in bytes; 1 GiB where it does not say."""
    try:
        with open("/proc/meminfo") as lines:
            sizes = dict(line.split(":") for line in lines)
        return int(sizes["MemAvailable"].split()[0]) * 1024 // 4
    except (OSError, KeyError, ValueError):
        return 1 << 30


def check_streams(cache: FeatureCache, needs: Needs, who: str) -> None:
    """Refuse a cache that lacks a stream in `needs`.

    Raises:
        MissingStream: names the streams, and the command that builds a cache with them.
    """
    asked = {DERIVED.get(s, s) for s in needs.queries | needs.candidates}
    missing = sorted(asked - set(cache.streams))
    if missing:
        backbone = cache.spec.backbone
        held = (
            f"{who} reads {', '.join(missing)}, but {cache.path} holds {', '.join(cache.streams)}"
        )
        if "joint" not in backbone.dims and any(s.endswith("/pooled") for s in missing):
            raise MissingStream(
                f"{held}; family {backbone.family} has no joint space, so no pooled embeddings: choose a method that "
                "reads tokens, for instance tf_local, or another backbone"
            )
        command = cache.header.command(Path("NEW.zarr"), sorted(asked | set(cache.streams)))
        raise MissingStream(f"{held}; build a cache that has it: {command}")


def context_of(cache: FeatureCache) -> Context:
    """The facts a head is built from: shapes of all streams, readout, and the czsl vocabularies if there are any."""
    czsl = cache.tasks.czsl
    return Context(
        shapes={stream: tuple(cache.shape(stream)) for stream in cache.streams},
        readout={name: torch.from_numpy(value) for name, value in cache.readout().items()},
        attrs=czsl.attrs if czsl else (),
        objs=czsl.objs if czsl else (),
    )


class Dense:
    """One fixed-shape stream; `rows=None` leaves it on disk."""

    def __init__(self, cache: FeatureCache, stream: str, rows: np.ndarray | None) -> None:
        self.cache, self.stream, self.rows = cache, stream, rows
        self.values = None if rows is None else torch.from_numpy(cache.read(stream, rows))
        self.kept: Tensor | None = None

    def take(self, rows: np.ndarray) -> Tensor:
        """Values of `rows`, as stored, valid until the next call; rows may repeat."""
        if self.values is None or self.rows is None:
            unique, inverse = np.unique(rows, return_inverse=True)
            values = torch.from_numpy(self.cache.read(self.stream, unique))
            return values.index_select(0, torch.from_numpy(inverse))
        at = _positions(self.rows, rows)
        if self.values.dtype == torch.float32:
            return self.values.index_select(0, at)
        # Whoever asks widens this to float32, a copy, so the buffer can be kept: allocating costs as much as gathering.
        if self.kept is None or len(self.kept) < len(at):
            self.kept = torch.empty((len(at), *self.values.shape[1:]), dtype=self.values.dtype)
        return torch.index_select(self.values, 0, at, out=self.kept[: len(at)])


class Ragged:
    """One ragged stream, e.g. `text/tokens` or `text/ids`; `rows=None` leaves it on disk."""

    def __init__(self, cache: FeatureCache, stream: str, rows: np.ndarray | None) -> None:
        self.cache, self.stream, self.rows = cache, stream, rows
        if rows is not None:
            values, offsets = cache.read_ragged(stream, rows)
            self.values, self.offsets = torch.from_numpy(values), torch.from_numpy(offsets)

    def take(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Values of `rows` padded with 0 to the longest of them, and True where a token is real."""
        if self.rows is None:
            unique, inverse = np.unique(rows, return_inverse=True)
            values, offsets = map(torch.from_numpy, self.cache.read_ragged(self.stream, unique))
            return _padded(values, offsets, torch.from_numpy(inverse))
        return _padded(self.values, self.offsets, _positions(self.rows, rows))


class Source:
    """The streams a head reads, of the rows one job uses.

    Args:
        cache: where they are.
        needs: the head's declaration.
        image_rows, text_rows: every row that will be asked for.
        ram_limit: bytes that may be held; streams are taken in while they fit, smallest first.
        device: where `images` and `texts` put their values.

    Attributes:
        on_disk: streams that did not fit, largest first.

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
    ) -> None:
        check_streams(cache, needs, "this head")
        self.cache, self.device = cache, device
        self.queries = _expanded(needs.queries, "image")
        self.candidates = _expanded(needs.candidates, "text")
        rows = {"image": np.unique(image_rows), "text": np.unique(text_rows)}
        left = quarter_of_free_memory() if ram_limit is None else ram_limit
        sizes = {s: self._bytes(s, rows[s.split("/")[0]]) for s in self.queries + self.candidates}
        self.streams: dict[str, Dense | Ragged] = {}
        disk: list[str] = []
        for stream, size in sorted(sizes.items(), key=lambda item: item[1]):
            fits = size <= left
            left -= size if fits else 0
            kind = Ragged if cache.is_ragged(stream) else Dense
            self.streams[stream] = kind(cache, stream, rows[stream.split("/")[0]] if fits else None)
            if not fits:
                disk.append(stream)
        self.on_disk = tuple(reversed(disk))

    def images(self, rows: np.ndarray, given: Mapping[str, Tensor] | None = None) -> Features:
        """Query streams of image rows; `given` holds streams that the caller has read already."""
        return self._features(self.queries, rows, given or {})

    def texts(self, rows: np.ndarray) -> Features:
        """Candidate streams of text rows."""
        return self._features(self.candidates, rows, {})

    def dense(self, stream: str, rows: np.ndarray) -> Tensor:
        """One fixed-shape stream, as stored, valid until it is read again."""
        found = self.streams[stream]
        assert isinstance(found, Dense)
        return found.take(rows)

    def _features(
        self, streams: Iterable[str], rows: np.ndarray, given: Mapping[str, Tensor]
    ) -> Features:
        out: dict[str, Tensor] = {}
        for stream in streams:
            found = self.streams[stream]
            if stream in given:
                out[stream] = self._ready(given[stream])
            elif isinstance(found, Ragged):
                values, mask = found.take(rows)
                out[stream] = self._ready(values)
                out[f"{stream.rpartition('/')[0]}/mask"] = mask.to(self.device)
            else:
                out[stream] = self._ready(found.take(rows))
        return Features(out)

    def _ready(self, values: Tensor) -> Tensor:
        """On the device, float32 or int64: transferred as stored, widened there."""
        values = values.to(self.device, non_blocking=True)
        return values.float() if values.is_floating_point() else values.long()

    def _bytes(self, stream: str, rows: np.ndarray) -> int:
        n = len(rows)
        if self.cache.is_ragged(stream):
            offsets = self.cache.offsets(stream)
            n = int((offsets[rows + 1] - offsets[rows]).sum())
        return n * self.cache.layout(stream).row_bytes


def _expanded(streams: frozenset[str], side: str) -> list[str]:
    """Streams to read for a role, sorted; the mask comes with its tokens."""
    wrong = sorted(s for s in streams if not s.startswith(f"{side}/"))
    if wrong:
        raise MissingStream(
            f"a head asks for {', '.join(wrong)} where rows are {side}s; in czsl, matching and retrieval queries are "
            "images and candidates are texts"
        )
    plain = streams - {"text/mask"}
    if "text/mask" in streams and not plain & {"text/tokens", "text/ids"}:
        plain |= {"text/ids"}
    return sorted(plain)


def _positions(held: np.ndarray, rows: np.ndarray) -> Int[Tensor, " b"]:
    """Where each of `rows` stands among the sorted rows held in memory."""
    at = np.searchsorted(held, rows)
    assert (held[at.clip(max=len(held) - 1)] == rows).all(), "a row was not announced"
    return torch.from_numpy(at)


def _padded(
    values: Tensor, offsets: Int[Tensor, " n_plus_1"], rows: Int[Tensor, " b"]
) -> tuple[Tensor, Bool[Tensor, "b l"]]:
    """Gather ragged rows into (B, L, …), zero where there is no token."""
    start, end = offsets[rows], offsets[rows + 1]
    longest = int((end - start).max()) if len(rows) else 0
    index = start[:, None] + torch.arange(longest)
    mask = index < end[:, None]
    flat = index.clamp(max=len(values) - 1).flatten()
    out = values.index_select(0, flat).unflatten(0, (len(rows), longest))
    out[~mask] = 0
    return out, mask
