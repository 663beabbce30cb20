"""The file HDF5 writes through: whole or absent, and safe when the disk is full."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache_builder.aside import new_file


class Disk:
    """The file HDF5 writes through. It keeps the first failure and pretends from then on.

    HDF5 does not survive an error while it closes a file: it would neither close nor forget it.
    """

    def __init__(self, number: int) -> None:
        self.number, self.place, self.end = number, 0, 0
        self.failure: BaseException | None = None

    def check(self) -> None:
        """Raise what failed."""
        if self.failure is not None:
            raise self.failure

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """As of any file."""
        self.place = place + (self.end if whence == os.SEEK_END else 0)
        return self.place

    def tell(self) -> int:
        """As of any file."""
        return self.place

    def write(self, data: Any) -> int:
        """All of it, or the failure is kept."""
        given = memoryview(data).cast("B")
        left = given
        try:
            while len(left) and self.failure is None:
                done = os.pwrite(self.number, left, self.place + len(given) - len(left))
                left = left[done:]
        except BaseException as error:
            self.failure = error
        self.place += len(given)
        self.end = max(self.end, self.place)
        return len(given)

    def readinto(self, out: Any) -> int:
        """As of any file; zeros behind its end."""
        view = memoryview(out).cast("B")
        data = os.pread(self.number, len(view), self.place)
        view[:] = data + bytes(len(view) - len(data))
        self.place += len(view)
        return len(view)

    def read(self, size: int) -> bytes:
        """As of any file; h5py asks whether it is there."""
        out = bytearray(size)
        self.readinto(out)
        return bytes(out)

    def truncate(self, size: int) -> int:
        """As of any file."""
        try:
            if self.failure is None:
                os.ftruncate(self.number, size)
        except BaseException as error:
            self.failure = error
        self.end = size
        return size

    def flush(self) -> None:
        """Nothing is buffered here."""


@contextmanager
def whole_or_absent(file: Path) -> Generator[Disk]:
    """A file under a temporary name, renamed once it is durable; removed after any failure."""
    with new_file(file) as number:
        disk = Disk(number)
        yield disk
        disk.check()
