"""Writing so that a crash cannot lie, and checking what was written.

A file is whole or absent: temporary file, fsync, rename, fsync of the folder. A journal grows by fsynced lines; a torn
last line is none.
"""

import os
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from cache_builder.errors import CacheCorrupt

BLOCK = 8 << 20
"""Bytes read at once for a checksum."""

Line = TypeVar("Line", bound=BaseModel)


def crc32c(data: bytes | NDArray[Any]) -> str:
    """CRC-32C of a buffer, as eight hexadecimal digits."""
    return f"{int(google_crc32c.value(data)):08x}"


def file_crc32c(handle: int) -> str:
    """CRC-32C of a whole open file, block by block."""
    crc, at = 0, 0
    while block := os.pread(handle, BLOCK, at):
        crc, at = google_crc32c.extend(crc, block), at + len(block)
    return f"{crc:08x}"


def as_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """The memory of a contiguous array, without a copy."""
    return values.reshape(-1).view(np.uint8)


def write_durably(file: Path, data: bytes | NDArray[np.uint8], *, sync: bool = True) -> None:
    """Write a file so that it is whole or absent, whatever happens, and still there after a power cut.

    Args:
        file: missing folders above it are made.
        data: all of its bytes.
        sync: False leaves the fsyncs to one `sync_tree` after many files.
    """
    make_folder(file.parent, sync=sync)
    part = file.with_name(f"{file.name}.part")
    with open(part, "wb") as out:
        out.write(memoryview(data))  # pyright: ignore[reportArgumentType]
        out.flush()
        if sync:
            os.fsync(out.fileno())
    part.rename(file)
    if sync:
        sync_folder(file.parent)


def make_folder(folder: Path, *, sync: bool = True) -> None:
    """`mkdir -p`, made durable."""
    if not folder.is_dir():
        make_folder(folder.parent, sync=sync)
        folder.mkdir(exist_ok=True)
        if sync:
            sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make all files below a folder durable, and their names."""
    for below, _, files in os.walk(folder):
        for name in files:
            sync_folder(Path(below) / name)  # fsync takes files and folders alike
        sync_folder(Path(below))


def append_line(file: Path, line: BaseModel, *, sync: bool = True) -> None:
    """Add a line to a journal and make it durable, unless a `sync_tree` follows."""
    with open(file, "ab") as out:
        out.write(line.model_dump_json().encode() + b"\n")
        out.flush()
        if sync:
            os.fsync(out.fileno())


def heal(file: Path) -> None:
    """Cut a last line that was torn by a crash, so that the next one starts afresh."""
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(file, whole)


def read_lines(file: Path, kind: type[Line]) -> list[Line]:
    """Lines of a journal; a torn last one is no line."""
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        raise CacheCorrupt(
            f"{file} is gone; restore it from a backup, or remove the cache and build it again"
        ) from None
    try:
        return [kind.model_validate_json(line) for line in lines]
    except ValueError as error:
        raise CacheCorrupt(
            f"{file} has a line that is not a {kind.__name__.lower()} record ({str(error).splitlines()[0]}); "
            "restore the file from a backup, or remove the cache and build it again"
        ) from error
