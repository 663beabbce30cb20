"""The verb `completion`: a script that completes the words of `headstart` in a shell, made from the parser itself.

Verbs, options and choices are the parser's; a path completes to files, and a plugin to the names of its folder. The
script is static: pressing the tab key starts no Python, and a plugin that was added is known once it is made again.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from cache_builder.cli_ending import Verbs

SHELLS = ("bash", "zsh", "fish", "tcsh")

NAMED = {
    "method": "heads.methods",
    "dataset": "cache_builder.datasets",
    "backbone": "cache_builder.backbones",
    "backbones": "cache_builder.backbones",
}
"""Argument → the folder whose files it names."""


def add_verb(
    verbs: Verbs,
    parser: Callable[[], argparse.ArgumentParser],
) -> None:
    """Add the verb; `parser` makes the whole command's anew."""
    verb = verbs.add_parser(
        "completion",
        help="a script that completes commands in a shell",
        description="Print a script that completes verbs, options, files and the names of plugins. In bash: "
        'eval "$(headstart completion bash)"; in zsh: headstart completion zsh > _headstart, in a folder of $fpath; '
        "in fish: headstart completion fish > ~/.config/fish/completions/headstart.fish",
    )
    verb.add_argument("shell", choices=SHELLS)

    def show(args: argparse.Namespace) -> None:
        _print(parser(), args.shell)

    verb.set_defaults(func=show)


def _print(parser: argparse.ArgumentParser, shell: str) -> None:
    import shtab

    colon = r"\:" if shell == "zsh" else ":"  # zsh ends a list of words at a bare one
    for action in _actions(parser):
        if offered := _names(action, colon):
            action.choices = offered  # of this parser only, which parses nothing: a user's own module is a name too
        elif action.type is Path:
            setattr(action, "complete", shtab.FILE)  # noqa: B010
    print(shtab.complete(parser, shell=shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of every verb; argparse has no public way to ask for them."""
    for action in vars(parser)["_actions"]:
        verbs = getattr(action, "choices", None)
        if isinstance(verbs, dict):
            for verb in verbs.values():
                yield from _actions(verb)
        else:
            yield action


def _names(action: argparse.Action, colon: str) -> tuple[str, ...]:
    """What there is to name; of a backbone with a checkpoint the bundled one, whose name shows the form."""
    from cache_builder.plugins import names

    shelf = NAMED.get(action.dest)
    if shelf is None:
        return ()
    whole = action.dest == "backbone"
    return tuple(f"{name}{colon}demo" if whole else name for name in names(shelf))
