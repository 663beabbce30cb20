"""Writing so that a crash cannot lie, and checking what was written.

A file is whole or absent: temporary file, fsync, rename, fsync of the folder.
"""

import ctypes
import os
import secrets
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray


def crc32c(data: bytes | NDArray[Any]) -> str:
    """CRC-32C of a buffer, as eight hexadecimal digits."""
    return f"{int(google_crc32c.value(data)):08x}"


def as_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """The memory of a contiguous array, without a copy."""
    return values.reshape(-1).view(np.uint8)


def write_durably(file: Path, data: bytes | NDArray[np.uint8], *, sync: bool = True) -> None:
    """Write a file so that it is whole or absent, whatever happens, and still there after a power cut.

    Args:
        file: missing folders above it are made.
        data: all of its bytes.
        sync: False leaves the fsyncs to whoever writes many files.
    """
    make_folder(file.parent, sync=sync)
    # Two processes may write the same file: each has a temporary name of its own.
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "wb") as out:
            # a numpy array is a buffer before Python 3.12 too, where no type says so
            out.write(memoryview(data))  # pyright: ignore[reportArgumentType]
            out.flush()
            if sync:
                os.fsync(out.fileno())
        part.rename(file)
    except BaseException:
        part.unlink(missing_ok=True)  # a full disk needs the room
        raise
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


def exchange(one: Path, other: Path) -> None:
    """Let two folders of one file system change names, in one step.

    Raises:
        OSError: the system or the file system cannot do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    here, both_change = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    failed = libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), both_change)
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, f"{os.strerror(code)}: cannot exchange", str(one), None, str(other))
    sync_folder(one.parent)
