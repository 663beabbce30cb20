"""Rows of a cache as numbers: of one shape or ragged, whatever they are stored as."""

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_builder.catalogue import Catalogue
from cache_builder.errors import UnknownName
from cache_builder.storage import decoded


class Rows(Catalogue):
    """What can be read of a cache; arguments as of `Catalogue`."""

    def read(self, stream: str, rows: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """Values of rows (all by default): (B, …). Quarantined images are NaN; `rows()` refuses them.

        Stored fp16 and fp32 come as they are, everything else as float32.
        """
        if stream in self.streams and self.is_ragged(stream):
            raise UnknownName(f"{stream} is ragged, its rows differ in length: use read_ragged")
        if stream not in self.streams:
            known = ", ".join(self.streams)
            raise UnknownName(f"{self.place} has no stream {stream!r} (it has: {known})")
        return self._read(stream, _checked_rows(rows, self.layout(stream).shape[0], stream))

    def read_ragged(
        self, stream: str, rows: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Values of rows one after the other, and offsets (B + 1,) where each begins.

        Args:
            stream: a ragged one, e.g. `text/tokens`, with values (total, V), or `text/ids`, with values (total,).
            rows: what `offsets` calls rows; all by default.
        """
        places, offsets = self.places(stream, rows)
        return self._read(stream, places), offsets

    def places(
        self, stream: str, rows: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the entries of rows of a ragged stream lie along its first axis, and offsets where each row begins."""
        self.layout(stream)
        if not self.is_ragged(stream):
            raise UnknownName(f"{stream} is not ragged: use read")
        bounds = self.offsets(stream)
        wanted = _checked_rows(rows, len(bounds) - 1, stream)
        starts = bounds[wanted]
        sizes = bounds[wanted + 1] - starts
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes), offsets

    def _read(self, array: str, places: NDArray[np.int64]) -> NDArray[Any]:
        stored, scale = self.stored(array, places), None
        if f"{array}_scale" in self.header.arrays:
            scale = self.stored(f"{array}_scale", places)
        return decoded(stored, self.layout(array).torch_dtype, scale, *self.statistics(array))

    def statistics(
        self, stream: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | tuple[None, None]:
        """Mean and standard deviation (W) of the channels that a stream's numbers were centred by; see storage.py."""
        if f"{stream}_std" not in self.header.arrays:
            return None, None
        if stream not in self._moments:
            mean, std = (
                np.frombuffer(self.chunks.read_whole(stream + end), "<f4").astype(np.float32)
                for end in ("_mean", "_std")
            )
            self._moments[stream] = mean, std
        return self._moments[stream]

    @cached_property
    def _moments(self) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        return {}


def _checked_rows(rows: NDArray[np.int64] | None, n: int, stream: str) -> NDArray[np.int64]:
    if rows is None:
        return np.arange(n)
    rows = np.asarray(rows)
    if rows.ndim != 1 or (len(rows) and not np.issubdtype(rows.dtype, np.integer)):
        raise IndexError(
            f"rows of {stream} are numbers, in one axis, not {rows.dtype}{list(rows.shape)}"
        )
    if len(rows) and not (rows.min() >= 0 and rows.max() < n):
        raise IndexError(f"{stream} has rows 0 … {n - 1}, asked for {rows.min()} … {rows.max()}")
    return rows
