"""Pictures on their way to the encoder: opened, looked at, preprocessed and stacked by threads, in order.

Every hand-over is bounded, so memory does not grow with the data set.
"""

import errno
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import default_collate

from cache_builder.backbones.base import Backbone, Pixels
from cache_builder.cache import FeatureCache
from cache_builder.datasets.base import ImageRecord
from cache_builder.errors import BadInput, BadOutput, CacheError
from cache_builder.filler import Batch, Filler
from cache_builder.format import Bad

T = TypeVar("T")

AHEAD = 2
"""Batches that wait at each hand-over, beside the one being worked on."""

FILE_FAULTS = frozenset(
    getattr(errno, name)
    for name in [
        "ENOENT",
        "EISDIR",
        "ENOTDIR",
        "EACCES",
        "EPERM",
        "ELOOP",
        "ENAMETOOLONG",
        "EINVAL",
    ]
)
"""System errors that one file is to blame for. Any other, say EMFILE, ENOMEM or EIO, may be gone at the next try."""


Looks = Callable[[int, Image], Mapping[str, Image]]
"""A row and its picture → what is encoded of it, by the home of the streams."""


def attempt(name: str, action: Callable[[], T]) -> T | str:
    """What `action` makes of the image called `name`, or why its file is no usable picture.

    Raises:
        CacheError: it could not be read, and the file may not be to blame.
    """
    try:
        return action()
    except (OSError, ValueError) as error:
        # PIL's own OSErrors have no number: the picture is to blame.
        if isinstance(error, OSError) and error.errno not in {None, *FILE_FAULTS}:
            raise CacheError(
                f"image {name!r} could not be read ({error}), which may not be its file's fault, so the "
                "build stopped; what is finished is kept: mend the cause and repeat, or, if it is the file, remove that"
            ) from error
        return str(error) or type(error).__name__


def unusable(name: str, reason: str) -> str:
    """A sentence about an image."""
    return f"image {name!r} cannot be used: {reason}"


class Loading:
    """Pictures of rows, decoded, looked at and preprocessed by threads, in batches, in order.

    Rows that follow each other and look at one picture, as crops do, share it: a batch decodes a picture once.
    """

    def __init__(
        self,
        cache: FeatureCache,
        records: Sequence[ImageRecord],
        backbone: Backbone,
        workers: int,
        strict: bool,
    ) -> None:
        self.cache, self.records, self.backbone = cache, records, backbone
        self.workers, self.strict = workers, strict
        # Once bad, always bad: a row must not differ between streams.
        self.bad = set(cache.quarantined)

    def batches(
        self,
        filler: Filler,
        owner: NDArray[np.int64],
        looks: Looks,
        ready: Callable[[int, Image], Image] = lambda _, image: image,
    ) -> Generator[Batch, None, None]:
        """The batches that a filler needs; those behind are prepared while one is encoded.

        Args:
            filler: of the rows.
            owner: the image row that is opened for each row.
            looks: what is encoded of a row.
            ready: an image row and its picture → the picture that its rows look at.
        """
        with pool(self.workers, "decode") as decoders, pool(1, "stack") as stacker:

            def start(rows: range) -> Future[Batch]:
                owners = owner[rows.start : rows.stop].tolist()
                pictures = {i: _once(partial(self._open, i, ready)) for i in dict.fromkeys(owners)}
                loads = [
                    decoders.submit(self._load, row, i, pictures[i], looks)
                    for row, i in zip(rows, owners, strict=True)
                ]
                return stacker.submit(self._stack, rows, owners, loads)

            yield from _ahead(map(start, filler.batches))

    def _open(self, row: int, ready: Callable[[int, Image], Image]) -> Image | str | None:
        """The picture of an image row, or why there is none; None if that is known already."""
        record = self.records[row]
        if record.id in self.bad:
            return None
        found = attempt(record.id, record.open)
        return found if isinstance(found, str) else ready(row, found)

    def _load(
        self, row: int, owner: int, picture: Callable[[], Image | str | None], looks: Looks
    ) -> dict[str, Pixels] | str | None:
        """Pixels by home, or why there are none; None if that is known already."""
        image = picture()
        if image is None or isinstance(image, str):
            return image
        try:
            return {home: self.backbone.preprocess(one) for home, one in looks(row, image).items()}
        except CacheError:
            raise
        except Exception as error:  # a library's transform raises its own
            raise BadOutput(
                f"family {self.backbone.spec.family} could not preprocess image {self.records[owner].id!r} "
                f"({image.width} × {image.height}): {error}; its file is a picture, so the family is at fault, and the "
                "build stopped"
            ) from error

    def _stack(
        self,
        rows: range,
        owners: Sequence[int],
        loads: Sequence[Future[dict[str, Pixels] | str | None]],
    ) -> Batch:
        """A batch; unusable pictures are recorded before any chunk that holds their rows."""
        loaded = [future.result() for future in loads]
        for row, found in zip(owners, loaded, strict=True):
            if isinstance(found, str) and self.records[row].id not in self.bad:
                name = self.records[row].id
                if self.strict:
                    raise BadInput(unusable(name, found))
                if array := self._written(row):
                    raise CacheError(
                        f"{unusable(name, found)}, but it could be when {array} was written, and all its streams must "
                        f"agree; restore the file and repeat, or remove {self.cache.path} and build again"
                    )
                self.bad.add(name)
                self.cache.quarantine(Bad(id=name, reason=found, row=row))
        pixels = [found if isinstance(found, dict) else None for found in loaded]
        good = np.array([p is not None for p in pixels])
        some = next((p for p in pixels if p is not None), None)
        if some is None:
            return Batch(rows, None, good)
        # A neighbour stands in for a bad picture: a batch of another size might have other last bits.
        inputs = default_collate([some if p is None else p for p in pixels])
        return Batch(rows, each(inputs, Tensor.pin_memory) if self._pinned else inputs, good)

    def _written(self, row: int) -> str | None:
        """A stream of which a finished chunk holds numbers of an image row; None if there is none."""
        for name in self.cache.streams:
            side, layout = name.partition("/")[0], self.cache.layout(name)
            if side not in ("image", "crop"):
                continue
            first, last = row, row + 1
            if self.cache.is_ragged(name):
                first, last = self.cache.offsets(name)[row : row + 2].tolist()
            chunks = range(first // layout.chunk, -(-last // layout.chunk))
            if any((name, chunk) in self.cache.chunks.manifest for chunk in chunks):
                return name
        return None

    @property
    def _pinned(self) -> bool:
        return "cuda" in self.backbone.device


def _once(action: Callable[[], T]) -> Callable[[], T]:
    """`action`, done when first asked for and never again, whichever threads ask."""
    lock, found = Lock(), list[T]()

    def get() -> T:
        with lock:
            if not found:
                found.append(action())
            return found[0]

    return get


def each(inputs: Any, action: Callable[[Tensor], Tensor]) -> Any:
    """`action` on every tensor of what an encoder takes."""
    if isinstance(inputs, Mapping):
        return {name: each(value, action) for name, value in inputs.items()}
    return action(inputs)


def _ahead(futures: Iterator[Future[Batch]]) -> Iterator[Batch]:
    """Results in order, with the next ones already begun."""
    waiting: deque[Future[Batch]] = deque()
    for future in chain(futures, [None] * AHEAD):
        if future is not None:
            waiting.append(future)
        if waiting and (future is None or len(waiting) > AHEAD):
            yield waiting.popleft().result()


@contextmanager
def pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that, at an error or Ctrl-C, finish what they have begun and drop the rest."""
    made = ThreadPoolExecutor(threads, name)
    try:
        yield made
    finally:
        made.shutdown(wait=True, cancel_futures=True)
