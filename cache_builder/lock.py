"""One builder per cache: a lock that the kernel frees when its holder ends, however it ends."""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from cache_builder.durable import make_folder
from cache_builder.errors import CacheLocked, CacheNotFound
from cache_builder.format import FORMAT, is_stream

OWN = frozenset(
    {"zarr.json", "tasks.json", "manifest.jsonl", "quarantine.jsonl"}
    | {"image", "crop", "text", "word", "readout"}
)
"""What a builder puts into the folder of a cache, beside the lock."""

ZARR_PART = "zarr.*.partial"
"""What zarr leaves of a root `zarr.json` that it was writing when it was killed."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the builder's lock of a cache folder, making the folder if need be.

    Raises:
        CacheLocked: another process holds it; names it.
        CacheNotFound: the path holds something else, which is not touched.
    """
    foreign = path.exists() and not (path / "lock").is_file() and not _has_header(path)
    if foreign and (not path.is_dir() or any(path.iterdir())):
        raise CacheNotFound(
            f"{path} exists and is not a feature cache, so nothing is built into it; choose a path that is free"
        )
    make_folder(path)
    with open(path / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "its name is not written yet"
            raise CacheLocked(
                f"{path} is being built by another process ({holder}); wait for it, or stop it and repeat the command"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _has_header(path: Path) -> bool:
    """Whether the root zarr.json is a cache's, as in a copy made without the lock."""
    try:
        return json.loads((path / "zarr.json").read_bytes())["attributes"]["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def has_embeddings(path: Path) -> bool:
    """Whether a chunk of an embedding stream was begun: creation writes none, so there has been a header."""
    journal = (path / "manifest.jsonl").is_file()
    begun = (Path(folder) for folder, below, _ in os.walk(path) if "c" in below)
    return journal and any(is_stream(array.relative_to(path).as_posix()) for array in begun)


def is_remnant(path: Path) -> bool:
    """Whether a builder was stopped while it laid out this folder: its lock is there, nothing foreign, no embedding."""
    if not (path / "lock").is_file() or has_embeddings(path):
        return False
    names = {p.name for p in path.iterdir() if not fnmatch(p.name, ZARR_PART)}
    return names <= OWN | {"lock", *(f"{name}.part" for name in OWN)}


def clear_remnant(path: Path) -> None:
    """Remove what such a builder left, except the lock."""
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()
