"""How a command ends: status 0; 1 and one sentence for a user's error; 130 after Ctrl-C; a traceback means a bug.

`eval` names no other room and ends its commands alike by lines of its own (eval/cli.py).
"""

import argparse
import sys
from collections.abc import Sequence

from cache_builder.cli_build import INTERRUPTED
from cache_builder.pipe import quiet_when_unread


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
