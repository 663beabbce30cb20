"""Where a cache lies: a folder, or a prefix of an object store. Files are whole or absent; journals grow by lines.

at("caches/demo.zarr")        Folder    temporary file, fsync, rename, fsync of the folder
at("s3://bucket/demo.zarr")   Bucket    one request puts an object whole or not at all (bucket.py)
"""

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from cache_builder.durable import make_folder, sync_folder, write_durably
from cache_builder.errors import CacheCorrupt, CacheError

MOST_BYTES = 1 << 30
"""Of a file that is read as a whole: headers, journals, tasks."""

HELPERS = "claims/helpers"
"""What helpers hold a shared lock of."""

URL = re.compile(r"(s3|gs|az):/+(.+)")
"""Of an object store. One slash is enough: pathlib swallows the other."""


@runtime_checkable
class File(Protocol):
    """An open file of a cache."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def read_into(self, target: NDArray[np.uint8], offset: int) -> None:
        """Fill `target` with the bytes from `offset` on; `CacheCorrupt` if the file ends before, or the disk fails."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


@runtime_checkable
class Place(Protocol):
    """A tree of files, by names with forward slashes. Reading what is not there raises `FileNotFoundError`."""

    @property
    def name(self) -> str:
        """Its last part, e.g. `demo.zarr`."""
        ...

    def absolute(self) -> str:
        """How any other process finds it."""
        ...

    def exists(self) -> bool:
        """Is there anything?"""
        ...

    def read(self, name: str) -> bytes:
        """All of a file."""
        ...

    def open(self, name: str) -> File:
        """A file, to read parts of; whoever opens it closes it."""
        ...

    def sizes(self, names: Sequence[str]) -> Mapping[str, int]:
        """Bytes of those of the named files that are there."""
        ...

    def names(self) -> list[str]:
        """Files at the top, and folders with a slash behind them."""
        ...

    def write(self, name: str, data: bytes | NDArray[np.uint8], *, sync: bool = True) -> None:
        """Write a file so that it is whole or absent; `sync=False` leaves making it durable to `sync_all`."""
        ...

    def link(self, other: "Place", name: str) -> bool:
        """Have a file of another place under the same name without copying it; False if that cannot be."""
        ...

    def append(self, name: str, line: bytes, *, sync: bool = True) -> None:
        """Add a line to a journal that nobody else writes."""
        ...

    def heal(self, name: str) -> None:
        """Cut what a crash left of a journal's last line, so that the next one starts afresh."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all below it; what is not there is no error."""
        ...

    def claimed(self, name: str) -> AbstractContextManager[bool]:
        """Whether this process may work on what `name` stands for, while the context lasts."""
        ...

    def helping(self) -> AbstractContextManager[None]:
        """For a helper: say that journals are being written, while the context lasts."""
        ...

    def alone(self) -> AbstractContextManager[None]:
        """For the lock holder: wait until no helper is left that could still write, e.g. of a builder that died."""
        ...

    def sync_all(self) -> None:
        """Make everything durable."""
        ...

    def sweep(self) -> None:
        """Remove what writes that a crash cut short have left; only while nobody writes."""
        ...

    def zarr_store(self) -> Any:
        """The same place for zarr, to read from."""
        ...


def at(where: "str | Path | Place") -> Place:
    """The place that a path or URL names."""
    if not isinstance(where, (str, Path)):
        return where
    found = URL.fullmatch(str(where))
    if not found:
        return Folder(Path(where))
    from cache_builder.bucket import Bucket  # obstore is an optional dependency

    return Bucket.named(f"{found[1]}://{found[2]}")


class Folder:
    """A folder of a file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Its last part."""
        return self.path.name

    def absolute(self) -> str:
        """The resolved path."""
        return str(self.path.resolve())

    def exists(self) -> bool:
        """Is there anything, be it a file?"""
        return self.path.exists()

    def read(self, name: str) -> bytes:
        """All of a file."""
        file = self.open(name)
        try:
            if file.size > MOST_BYTES:
                raise CacheCorrupt(
                    f"{self}/{name} has {file.size:,} bytes, more than {MOST_BYTES:,}"
                )
            data = np.empty(file.size, np.uint8)
            file.read_into(data, 0)
        finally:
            file.close()
        return data.tobytes()

    def open(self, name: str) -> "OpenFile":
        """A file, to read parts of."""
        return OpenFile(self.path / name, self.path)

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of those of the named files that are there."""
        found: dict[str, int] = {}
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                found[name] = (self.path / name).stat().st_size
        return found

    def names(self) -> list[str]:
        """Files at the top, and folders with a slash behind them."""
        try:
            return sorted(p.name + "/" * p.is_dir() for p in self.path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def write(self, name: str, data: bytes | NDArray[np.uint8], *, sync: bool = True) -> None:
        """Write a file so that it is whole or absent, and no folder that is a link leads it elsewhere."""
        if not _inside(self.path / name, self.path):
            raise CacheCorrupt(
                f"{self.path / name} leads out of {self}, as nothing in a cache does"
            )
        write_durably(self.path / name, data, sync=sync)

    def link(self, other: Place, name: str) -> bool:
        """A hard link, where both are folders of one file system."""
        if not isinstance(other, Folder):
            return False
        make_folder((self.path / name).parent, sync=False)
        try:
            os.link(other.path / name, self.path / name)
        except FileExistsError:
            return (other.path / name).samefile(self.path / name)
        except OSError:
            return False
        return True

    def append(self, name: str, line: bytes, *, sync: bool = True) -> None:
        """Add a line to a journal."""
        new = sync and not (self.path / name).exists()
        with open(self.path / name, "ab", buffering=0) as out:
            size = out.tell()
            try:
                # Whole or taken back: a torn line must not get another one behind it.
                left = line + b"\n"
                while left:
                    left = left[out.write(left) :]
                if sync:
                    os.fsync(out.fileno())
            except BaseException:
                os.ftruncate(out.fileno(), size)
                raise
        if new:
            sync_folder(self.path)

    def heal(self, name: str) -> None:
        """Cut a last line that was torn by a crash."""
        file = self.path / name
        data = file.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(file, whole)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all below it."""
        target = self.path / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    @contextmanager
    def claimed(self, name: str) -> Generator[bool]:
        """By the kernel's lock of a file, which ends with its holder."""
        make_folder((self.path / name).parent, sync=False)
        with open(self.path / name, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    @contextmanager
    def helping(self) -> Generator[None]:
        """By a shared lock of the kernel's."""
        make_folder(self.path / "claims", sync=False)
        with open(self.path / HELPERS, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    @contextmanager
    def alone(self) -> Generator[None]:
        """By the kernel's lock, for which this waits."""
        if not (self.path / HELPERS).exists():
            yield  # nobody has ever helped here
            return
        with open(self.path / HELPERS, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def sync_all(self) -> None:
        """Make all files durable, and their names."""
        make_folder(self.path)
        for below, _, files in os.walk(self.path):
            for name in files:
                sync_folder(Path(below) / name)  # fsync takes files and folders alike
            sync_folder(Path(below))

    def sweep(self) -> None:
        """Remove temporary files that a crash has left."""
        for part in self.path.rglob("*.part"):
            part.unlink(missing_ok=True)

    def zarr_store(self) -> str:
        """The same place for zarr."""
        return str(self.path)


def _inside(file: Path, root: Path) -> bool:
    """Does a file lie below `root` once all links above it are followed?"""
    return Path(os.path.realpath(file.parent)).is_relative_to(os.path.realpath(root))


class OpenFile:
    """A file of a folder, open for reading."""

    def __init__(self, path: Path, root: Path) -> None:
        """Open a regular file below `root`, without following a link out of it or waiting for a pipe."""
        self.path = path
        inside = _inside(path, root)
        try:
            self.handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from error
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise CacheCorrupt(f"{path} is a link or a socket, which no cache has") from error
            raise
        found = os.fstat(self.handle)
        self.size = found.st_size
        if not inside or not stat.S_ISREG(found.st_mode):
            os.close(self.handle)
            raise CacheCorrupt(f"{path} is no regular file inside {root}, as those of a cache are")

    def read_into(self, target: NDArray[np.uint8], offset: int) -> None:
        """`preadv` until all is there; the kernel may return less than asked."""
        while len(target):
            try:
                got = os.preadv(self.handle, [target.data], offset)
            except OSError as error:
                if error.errno == errno.EIO:
                    raise CacheCorrupt(
                        f"{self.path} cannot be read: the disk reports an input/output error"
                    ) from error
                raise
            if not got:
                raise CacheCorrupt(f"{self.path} ends at byte {offset}, before what was written")
            target, offset = target[got:], offset + got

    def close(self) -> None:
        """Let go of it."""
        os.close(self.handle)


def folder_of(place: Place) -> Path:
    """The folder of a place.

    Raises:
        CacheError: it is on an object store.
    """
    if isinstance(place, Folder):
        return place.path
    raise CacheError(f"{place} lies on an object store, not in a folder")
