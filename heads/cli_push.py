"""`headstart push`: a run as a repository of the Hugging Face hub."""

import argparse
from pathlib import Path

from cache_builder.cli_ending import Verbs


def add_verb(verbs: Verbs) -> None:
    """Add `push`."""
    push = verbs.add_parser(
        "push",
        help="a run to the Hugging Face hub, with a model card",
        description="Upload RUN's weights, configuration, run.json and a model card made of them and of its score "
        "tables, as one commit. run.json names paths of this machine. If there is a RUN/README.md, it is the card. The "
        "card that is made states no licence; it replaces one that an earlier push made, but none that was edited.",
    )
    push.add_argument("run", type=Path, help="a run directory made by `headstart train`")
    push.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub; made if need be")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.set_defaults(func=_push)


def _push(args: argparse.Namespace) -> None:
    from heads.hub import push_run

    done = push_run(args.run, args.repo, private=args.private or None)
    print(f"pushed {args.run}: {done.commit}")
    if done.kept_card:
        print(
            f"the README.md of {args.repo} is not as headstart made it, so it was left alone and may describe other "
            "weights; remove it there and push again for a new one, or put your own into the run"
        )
