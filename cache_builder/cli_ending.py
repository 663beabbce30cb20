"""What verbs are added to, and how a command ends: 0; 1 and one sentence for a user's error; 130 after Ctrl-C.

A traceback means a bug.

`eval` names no other room and ends its commands alike by lines of its own (eval/cli.py).
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from cache_builder.pipe import quiet_when_unread

INTERRUPTED = 130
"""Exit status of a command stopped by Ctrl-C, as shells have it."""


@runtime_checkable
class Verbs(Protocol):
    """What `ArgumentParser.add_subparsers` returns; argparse has no public name for it."""

    def add_parser(
        self,
        name: str,
        *,
        help: str,  # noqa: A002 (argparse's own name)
        description: str,
    ) -> argparse.ArgumentParser:
        """Add a verb."""
        ...


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    errors: tuple[type[Exception], ...],
) -> int:
    """Run the verb that was asked for; returns the exit status.

    Args:
        parser: its verbs set `func`, and `verb` is the name of the chosen one.
        argv: words of the command; None takes those of this process.
        errors: a user's, besides those of files; their texts are for them.
    """
    with quiet_when_unread():
        args = parser.parse_args(argv)
    try:
        with quiet_when_unread():
            args.func(args)
    except KeyboardInterrupt as stopped:
        what = str(stopped) or "stopped; what was finished is kept"
        print(f"\n{parser.prog} {args.verb}: {what}", file=sys.stderr)
        return INTERRUPTED
    except errors as error:
        print(f"{parser.prog} {args.verb}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"{parser.prog} {args.verb}: {what}", file=sys.stderr)
        return 1
    return 0
