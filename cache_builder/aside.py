"""A file or a folder that appears whole, or not at all: written aside, made durable, then renamed.

    photos.h5.headstart-part  ── all of it written and synced ──▶  photos.h5

A kill leaves what lies aside, under a name that nothing else has; whoever writes there next replaces it. The lock of a
folder lies beside it, so that it is held until the folder has its name.
"""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from cache_builder.durable import make_folder, sync_folder
from cache_builder.errors import CacheLocked, CacheMismatch
from cache_builder.flock import takes

PART = ".headstart-part"
"""Ends the name of an export that is not finished."""

HELD = "-lock"
"""Ends the name of the file beside a folder aside that is held by whoever writes there."""


@contextmanager
def new_file(file: Path) -> Generator[int]:
    """An open file aside; renamed when the block is left, removed after any failure.

    Raises:
        CacheLocked: another process writes it.
        CacheMismatch: the name was taken meanwhile.
    """
    make_folder(file.parent)
    part = file.with_name(f"{file.name}{PART}")
    number = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        _lock(number, part, file)
        try:
            os.ftruncate(number, 0)
            yield number
            os.fsync(number)
            _check_free(file)
            part.rename(file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    finally:
        os.close(number)
    sync_folder(file.parent)


@contextmanager
def new_folder(folder: Path) -> Generator[Path]:
    """An empty folder aside, for plain files; renamed when the block is left, removed after any failure.

    Raises:
        CacheLocked: another process writes it.
        CacheMismatch: the name was taken meanwhile.
    """
    make_folder(folder.parent)
    part = folder.with_name(f"{folder.name}{PART}")
    held = part.with_name(f"{part.name}{HELD}")
    number = os.open(held, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        _lock(number, held, folder)
        try:
            part.mkdir(exist_ok=True)
            for old in part.iterdir():
                old.unlink()
            yield part
            for file in part.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            sync_folder(part)
            _check_free(folder)
            part.rename(folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        finally:
            held.unlink(missing_ok=True)
    finally:
        os.close(number)
    sync_folder(folder.parent)


def _check_free(target: Path) -> None:
    if target.exists():
        raise CacheMismatch(
            f"{target} was made by somebody else meanwhile and is kept; choose another name, or remove it"
        )


def _lock(number: int, part: Path, target: Path) -> None:
    """Be the only one who writes here; the kernel forgets it when this process ends."""
    if not takes(number, part):
        raise CacheLocked(
            f"another process is exporting to {target}; wait for it, or stop it and repeat the command"
        )
