"""One builder per cache, and what a builder leaves that was stopped while it laid out the folder.

In a folder the lock is the kernel's: it is freed when its holder ends, however it ends. An object store has no such
lock; there the holder puts an object `lock` anew every few seconds, and whoever finds one watches whether it changes.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cache_builder.durable import make_folder
from cache_builder.errors import CacheCorrupt, CacheError, CacheLocked, CacheNotFound
from cache_builder.format import FORMAT, Entry, is_stream
from cache_builder.journal import Journal
from cache_builder.place import Folder, Place

if TYPE_CHECKING:
    from cache_builder.bucket import Bucket

OWN = (
    "zarr.json",
    "tasks.json",
    "manifest.jsonl",
    "manifest-*.jsonl",
    "quarantine.jsonl",
    "quarantine-*.jsonl",
    "builds.jsonl",
    "builds-*.jsonl",
    "lock",
    "claims/",
    *("image/", "crop/", "text/", "word/", "readout/"),
    "*.part",
)
"""What a builder puts into a cache."""

BEAT = 10.0
"""Seconds between two signs of life of who holds the lock of an object store."""


@contextmanager
def locked(place: Place) -> Generator[None]:
    """Hold the builder's lock of a cache, making the folder if need be.

    Raises:
        CacheLocked: another process holds it; names it.
        CacheNotFound: the place holds something else, which is not touched.
    """
    names = place.names()
    foreign = place.exists() and "lock" not in names and not _has_header(place)
    if foreign and (names or (isinstance(place, Folder) and not place.path.is_dir())):
        raise CacheNotFound(
            f"{place} exists and is not a feature cache, so nothing is built into it; choose a path that is free"
        )
    # a place that is no folder is a bucket, whose class would bring obstore
    with _flock(place) if isinstance(place, Folder) else _beating(place):  # pyright: ignore[reportArgumentType]
        yield


@contextmanager
def _flock(place: Folder) -> Generator[None]:
    make_folder(place.path)
    with _lock_file(place.path / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "its name is not written yet"
            raise CacheLocked(
                f"{place} is being built by another process ({holder}); wait for it, or stop it and repeat the command"
            ) from None
        file.truncate(0)
        file.write(_who())
        file.flush()
        yield


def _lock_file(path: Path) -> TextIO:
    """The lock, open: no link leads a builder to write elsewhere, and no pipe makes it wait."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return open(handle, "r+")
        os.close(handle)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
    raise CacheCorrupt(f"{path} is no regular file, as the lock of a cache is; remove it")


@contextmanager
def _beating(bucket: "Bucket") -> Generator[None]:
    """The lock of an object store: taken if there is none, or if its holder gave no sign of life for three beats."""
    tag = _put(bucket, "create")
    if tag is None:
        silent = _silent_holder(bucket)
        tag = _put(bucket, "create" if silent is None else {"e_tag": silent})
        if tag is None:
            raise CacheLocked(
                f"{bucket} was just taken over by another process; wait for it and repeat the command"
            )
    over = threading.Event()

    def sign() -> None:
        nonlocal tag
        while tag is not None and not over.wait(BEAT):
            with suppress(CacheError):  # the next beat may get through
                tag = _put(bucket, {"e_tag": tag})
                bucket.lost = tag is None

    thread = threading.Thread(target=sign, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        # the thread may have found it lost
        if tag is not None and not bucket.lost:  # pyright: ignore[reportUnnecessaryComparison]
            bucket.remove("lock")


def _put(bucket: "Bucket", mode: Any) -> str | None:
    """Put the lock under a condition: its new tag, or None if the condition did not hold."""
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    mine = f"{_who()} {bucket.token}".encode()
    data = mine + b" " + secrets.token_hex(4).encode()

    def put() -> str | None:
        try:
            return bucket.store.put("lock", data, mode=mode)["e_tag"]
        except (AlreadyExistsError, PreconditionError):
            # A request that was repeated because its answer got lost meets what it has put itself.
            found = bucket.store.get("lock")
            return found.meta["e_tag"] if bytes(found.bytes()).startswith(mine) else None

    try:
        return bucket.asked("lock", put)
    except FileNotFoundError:
        return None


def _silent_holder(bucket: "Bucket") -> str | None:
    """The tag of a lock that nobody signs any more; None if its holder has finished meanwhile.

    Raises:
        CacheLocked: somebody does.
    """
    try:
        found = bucket.asked("lock", lambda: bucket.store.get("lock"))
        holder = bytes(found.bytes()).decode(errors="replace").rsplit(" ", 2)[0]
        tag = found.meta["e_tag"]
        deadline = time.monotonic() + 3 * BEAT
        while time.monotonic() < deadline:
            time.sleep(BEAT / 2)
            if bucket.asked("lock", lambda: bucket.store.head("lock"))["e_tag"] != tag:
                raise CacheLocked(
                    f"{bucket} is being built by another process ({holder}); wait for it, or stop it and repeat the "
                    "command"
                )
    except FileNotFoundError:
        return None
    return tag


def _who() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _has_header(place: Place) -> bool:
    """Whether the root zarr.json is a cache's, as in a copy made without the lock."""
    try:
        return json.loads(place.read("zarr.json"))["attributes"]["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def has_embeddings(place: Place) -> bool:
    """Whether a chunk of an embedding stream was finished: creation writes none, so there has been a header."""
    if "manifest.jsonl" not in place.names():
        return False
    try:
        return any(is_stream(e.array) for e in Journal(place, "manifest", Entry).lines())
    except CacheCorrupt:
        return True


def is_remnant(place: Place) -> bool:
    """Whether a builder was stopped while it laid out this place: nothing foreign is in it, and no embedding."""
    names = place.names()
    if not names or (isinstance(place, Folder) and "lock" not in names) or has_embeddings(place):
        return False
    return all(any(fnmatch(name, own) for own in OWN) for name in names)


def clear_remnant(place: Place) -> None:
    """Remove what such a builder left, except the lock."""
    for name in place.names():
        if name != "lock":
            place.remove(name)
