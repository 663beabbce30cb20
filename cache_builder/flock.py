"""A lock on a file that may be removed by whoever held it before."""

import fcntl
import os
from pathlib import Path


def takes(number: int, path: Path) -> bool:
    """Lock an open file, without waiting; False where somebody has it, or had it and took its name away.

    Args:
        number: of the open file; the kernel frees the lock when it is closed, or its process ends.
        path: where it was opened: another file may have the name by now, which others lock.
    """
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(number), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False
