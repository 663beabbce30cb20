"""`headstart feasibility`, and what `headstart score` asks about open worlds."""

import argparse
from pathlib import Path
from typing import Any

from cache_builder.cli_ending import Verbs


def add_verbs(verbs: Verbs) -> None:
    """Add the verb."""
    made = verbs.add_parser(
        "feasibility",
        help="how plausible unseen pairs are, for open worlds",
        description="Write rho of every attr × obj of CACHE's czsl task, from word vectors and its training pairs. "
        "Vectors come from a GloVe text file, or from the cache: text/pooled (means of prompts) or word/states.",
    )
    made.add_argument("cache", type=Path, help="a feature cache with a czsl task")
    source = made.add_mutually_exclusive_group()
    source.add_argument("--glove", type=Path, metavar="FILE", help="e.g. glove.6B.300d.txt")
    source.add_argument(
        "--words",
        metavar="STREAM",
        help="text/pooled or word/states (default: the first of them that the cache holds)",
    )
    source.add_argument(
        "--published", type=Path, metavar="FILE", help="a feasibility_….pt of the releases instead"
    )
    made.add_argument(
        "-o", "--out", type=Path, default=Path("feasibility.npz"), help="default: feasibility.npz"
    )
    made.set_defaults(func=_feasibility)


def add_open_world(score: argparse.ArgumentParser) -> None:
    """Add what `headstart score --world open` takes."""
    score.add_argument(
        "--feasibility",
        type=Path,
        metavar="FILE",
        help="open world: keep the best at every threshold of this file's grid (see headstart feasibility)",
    )
    score.add_argument(
        "--keep",
        type=int,
        metavar="K",
        help="open world: how many of the best of each image are kept, the largest k of metrics (default: 5)",
    )
    score.add_argument(
        "--dense",
        action="store_true",
        help="open world: keep every score, in memory, as the legacy curve needs",
    )


def open_world(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of these, for `score`."""
    from eval.feasibility import Feasibility

    given: dict[str, Any] = {"dense": True} if args.dense else {}
    if args.keep is not None:
        given["keep"] = args.keep
    if args.feasibility is not None:
        given["feasibility"] = Feasibility.load(args.feasibility)
    return given


def _feasibility(args: argparse.Namespace) -> None:
    from cache_builder import FeatureCache
    from heads.feasibility import feasibility_of, published

    cache = FeatureCache.open(args.cache, check="read")
    if args.published:
        made = published(args.published, cache)
    else:
        made = feasibility_of(cache, words=args.words, glove_file=args.glove)
    made.save(args.out)
    print(f"{len(made.attrs)} attrs × {len(made.objs)} objs, {made.source}")
    print(f"wrote {args.out}; next: headstart score RUN --world open --feasibility {args.out}")
