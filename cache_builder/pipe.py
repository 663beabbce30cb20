"""A command whose output nobody reads any more, as in `headstart info CACHE | head -1`, ends quietly.

Other Unix tools are ended by SIGPIPE. Here that would also end a build when one of its helpers dies, or a connection,
so the error is caught instead: only of standard output and standard error, any other broken pipe stays an error.
"""

import os
import select
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TextIO

UNREAD = 141
"""Exit status of such a command, as shells have it of one that SIGPIPE ended."""


@contextmanager
def quiet_when_unread() -> Generator[None]:
    """Around a whole command.

    Raises:
        SystemExit: nobody reads its output.
    """
    try:
        yield
    except BrokenPipeError:
        unread = _unread(sys.stdout) or _unread(sys.stderr)
        if not _flush() or unread:
            raise SystemExit(UNREAD) from None
        raise
    except BaseException:
        _flush()
        raise
    if not _flush():
        raise SystemExit(UNREAD)


def _unread(stream: TextIO) -> bool:
    """Is it a pipe that nobody can read from any more?"""
    found = select.poll()
    try:
        found.register(stream.fileno(), 0)
    except OSError:  # no file, as where tests catch the output
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in found.poll(0))


def _flush() -> bool:
    """Was all output taken? What nobody reads goes nowhere, or Python would complain when it exits."""
    taken = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            taken = False
    return taken
