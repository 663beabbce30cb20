"""The verb `words`: auxiliary attributes of a cache's train pairs, from a language model's answers or a stand-in.

headstart words CACHE --prompts prompts.jsonl                        one question a train pair, for any language model
headstart words CACHE --answers answers.jsonl --out auxiliary.jsonl  its answers: three usable words of five
headstart words CACHE --nearest --out auxiliary.jsonl                the nearest attributes, without a language model
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cache_builder.cli_ending import Verbs
from heads.errors import ConfigError

if TYPE_CHECKING:
    from cache_builder.datasets.base import Pair


def add_verbs(verbs: Verbs) -> None:
    """Add the verb."""
    words = verbs.add_parser(
        "words",
        help="auxiliary attributes of train pairs, for trident",
        description="Write what to ask a language model about every train pair of a cache, read its answers, or do "
        "without one: the nearest attributes of the vocabulary. The file made goes into --set head.auxiliary=FILE.",
    )
    words.add_argument(
        "cache", type=Path, help="with a czsl task; only its pairs and words are read"
    )
    how = words.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="write one question a train pair, as JSON lines",
    )
    how.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help='read answers: the lines of --prompts with "answer" in them, a text or a list of words',
    )
    how.add_argument(
        "--nearest",
        action="store_true",
        help="a lexical stand-in: of every pair the three attributes whose word vectors are closest to its own",
    )
    words.add_argument("--out", type=Path, help="file to write; never overwritten")
    words.add_argument(
        "--words",
        choices=("llava", "clip_text"),
        default="llava",
        help="word vectors of --nearest (default: llava)",
    )
    words.set_defaults(func=_words)


def _words(args: argparse.Namespace) -> None:
    from cache_builder import FeatureCache
    from cache_builder.auxiliary import KEPT, read_answers, write_auxiliary, write_prompts
    from heads.words import nearest, word_vectors

    cache = FeatureCache.open(args.cache, check="read")
    task = cache.tasks.czsl
    if task is None:
        raise ConfigError(f"{cache.place} has no czsl task, so no pairs to describe")
    pairs = task.pairs["train"]
    if args.prompts:
        n = write_prompts(pairs, args.prompts)
        print(
            f'wrote {n} prompts to {args.prompts}; put "answer": … into every line and read them with --answers'
        )
        return
    if args.out is None:
        raise ConfigError("name the file to write (--out)")
    if args.nearest:
        vectors = word_vectors(cache, args.words, [("attr", attr) for attr in task.attrs])
        found = nearest(vectors, task.attrs, pairs)
        write_auxiliary(found, "nearest", args.out)
        print("no language model was asked: these are the nearest attributes, a lexical stand-in")
    else:
        answers = read_answers(args.answers, pairs)
        found = answers.found
        write_auxiliary(found, "answers", args.out)
        for reason, n in sorted(answers.rejected.items()):
            print(f"rejected {n:6,}  {reason}")
        _print_short(answers.short, KEPT, found)
    print(f"wrote {args.out}: {len(found)} of {len(pairs)} train pairs have auxiliary attributes")
    if not args.nearest:
        print(
            f"next: add their words to the cache (headstart build … --set words={args.out} --append), and train with "
            f"--set head.auxiliary={args.out}"
        )


def _print_short(
    short: "Sequence[Pair]", kept: int, found: "Mapping[Pair, tuple[str, ...]]"
) -> None:
    """Pairs that were left with too few words."""
    if short:
        print(f"{len(short)} train pairs have fewer than {kept} words:")
    for pair in short:
        print(f"  {' '.join(pair)}: {', '.join(found.get(pair, ())) or 'none'}")
