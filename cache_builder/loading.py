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
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from torch.utils.data import default_collate

from cache_builder.backbones.base import Backbone, Pixels
from cache_builder.beside import Beside
from cache_builder.cache import FeatureCache
from cache_builder.datasets.base import ImageRecord
from cache_builder.errors import BadInput, BadOutput, CacheError
from cache_builder.filler import Batch, Filler
from cache_builder.format import Bad

S = TypeVar("S")
T = TypeVar("T")

AHEAD = 2
"""Batches that wait at each hand-over, beside the one being worked on."""

PARTS = 4
"""Tasks a thread and batch: fewer hand-overs than one a picture, better balanced than one a thread."""

ITEMS = 64
"""Of a task of `by_threads`."""

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

Loaded = dict[str, Pixels] | str | None
"""Pixels by home, or why there are none; None if that is known already."""

Todo = tuple[int, int, Callable[[], Image | str | None]]
"""A row, the image row that it looks at, and what opens that."""


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
        beside: Beside,
    ) -> None:
        self.cache, self.records, self.backbone, self.beside = cache, records, backbone, beside
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
                # Whatever looks at the same picture shares it; copies of a file are tried in turn.
                units = filler.units(rows)
                owners = [tuple(owner[unit.start : unit.stop].tolist()) for unit in units]
                pictures = {
                    images: _once(partial(self._open, images, ready)) for images in set(owners)
                }
                todo = [
                    (unit[0], images[0], pictures[images])
                    for unit, images in zip(units, owners, strict=True)
                ]
                size = -(-len(todo) // (PARTS * self.workers))
                parts = [todo[i : i + size] for i in range(0, len(todo), size)]
                loads = [decoders.submit(self._load_part, part, looks) for part in parts]
                return stacker.submit(self._stack, rows, owners, loads)

            yield from ahead(map(start, filler.batches))

    def _open(
        self, images: Sequence[int], ready: Callable[[int, Image], Image]
    ) -> Image | str | None:
        """The picture of image rows that are copies of one file, or why there is none; None if that is known."""
        reason = None
        for row in images:
            record = self.records[row]
            if record.id not in self.bad:
                found = attempt(record.id, record.open)
                if not isinstance(found, str):
                    return ready(row, found)
                reason = reason or found
        return reason

    def _load_part(self, todo: list[Todo], looks: Looks) -> list[Loaded]:
        """A few rows of a batch, in order; a picture is let go of with the last row that looks at it."""
        todo.reverse()
        return [self._load(*todo.pop(), looks) for _ in range(len(todo))]

    def _load(
        self, row: int, owner: int, picture: Callable[[], Image | str | None], looks: Looks
    ) -> Loaded:
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
        owners: Sequence[Sequence[int]],
        loads: Sequence[Future[list[Loaded]]],
    ) -> Batch:
        """A batch; unusable pictures are recorded before any chunk that holds their rows."""
        loaded = [one for future in loads for one in future.result()]
        for images, found in zip(owners, loaded, strict=True):
            if isinstance(found, str):
                for row in images:
                    self._refuse(row, found)
        pixels = [found if isinstance(found, dict) else None for found in loaded]
        sizes = [len(images) for images in owners]
        good = np.repeat(np.array([p is not None for p in pixels]), sizes)
        shared = np.repeat(np.arange(len(sizes)), sizes) if len(good) > len(sizes) else None
        some = next((p for p in pixels if p is not None), None)
        if some is None:
            return Batch(rows, None, good)
        # A neighbour stands in for a bad picture: a batch of another size might have other last bits.
        inputs = default_collate([some if p is None else p for p in pixels])
        return Batch(rows, self.beside.bring(inputs), good, shared)

    def _refuse(self, row: int, reason: str) -> None:
        """Put an image into quarantine, unless that would contradict what is stored."""
        name = self.records[row].id
        if name in self.bad:
            return
        if self.strict:
            raise BadInput(unusable(name, reason))
        # Helpers may have written its row; an image is in quarantine before a chunk that lacks it is listed.
        self.cache.chunks.refresh()
        array = self._written(row)
        if name in self.cache.quarantined:
            self.bad.add(name)
            return
        if array:
            raise CacheError(
                f"{unusable(name, reason)}, but it could be when {array} was written, and all its streams must "
                f"agree; restore the file and repeat, or remove {self.cache.place} and build again"
            )
        self.bad.add(name)
        self.cache.quarantine(Bad(id=name, reason=reason, row=row))

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


def _once(action: Callable[[], T]) -> Callable[[], T]:
    """`action`, done when first asked for and never again, whichever threads ask."""
    lock, found = Lock(), list[T]()

    def get() -> T:
        with lock:
            if not found:
                found.append(action())
            return found[0]

    return get


def ahead(futures: Iterator[Future[Batch]]) -> Iterator[Batch]:
    """Results in order, with the next ones already begun."""
    waiting: deque[Future[Batch]] = deque()
    for future in chain(futures, [None] * AHEAD):
        if future is not None:
            waiting.append(future)
        if waiting and (future is None or len(waiting) > AHEAD):
            yield waiting.popleft().result()


def by_threads(
    action: Callable[[S], T], items: Sequence[S], threads: int, name: str
) -> Iterator[T]:
    """`action` of every item, in order. A task is some items: a future each costs more than a look at a file."""

    def task(part: Sequence[S]) -> list[T]:
        return [action(item) for item in part]

    parts = [items[i : i + ITEMS] for i in range(0, len(items), ITEMS)]
    with ThreadPoolExecutor(threads, name) as made:
        for found in made.map(task, parts):
            yield from found


@contextmanager
def pool(threads: int, name: str) -> Generator[ThreadPoolExecutor]:
    """Threads that, at an error or Ctrl-C, finish what they have begun and drop the rest."""
    made = ThreadPoolExecutor(threads, name)
    try:
        yield made
    finally:
        made.shutdown(wait=True, cancel_futures=True)
