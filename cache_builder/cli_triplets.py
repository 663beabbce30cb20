"""The verb `triplets`: a file of triplets from captions, by rule or by a language model that somebody else runs.

headstart triplets --dataset coco --root R --rules --out triplets.jsonl        by rule
headstart triplets --captions captions.jsonl --prompts prompts.jsonl           one question a caption, for any model
headstart triplets --captions captions.jsonl --answers answers.jsonl --out triplets.jsonl       what can be used of them
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cache_builder.cli_ending import Verbs
from cache_builder.errors import UnknownName

if TYPE_CHECKING:
    from cache_builder.triplet_files import Caption, Triplet


def add_triplets(verbs: Verbs) -> None:
    """Add the verb."""
    triplets = verbs.add_parser(
        "triplets",
        help="edits of captions, for composed retrieval",
        description="Turn captions of train and val into triplets: an image, an edit in words, and the caption of the "
        "edited picture; by rule, or from the answers of a language model. The file made goes into `headstart build … "
        "--set triplets=FILE`.",
    )
    source = triplets.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", help="captions of a data set; see `headstart list datasets`")
    source.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="captions of a file, .jsonl or .csv: image, caption (or captions, a list) and perhaps split (else train)",
    )
    triplets.add_argument("--root", type=Path, help="folder of the data set")
    triplets.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the data set, e.g. require_images=false; may be repeated",
    )
    how = triplets.add_mutually_exclusive_group(required=True)
    how.add_argument("--rules", action="store_true", help="edit captions by rule")
    how.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="write one question a caption, as JSON lines; never overwritten",
    )
    how.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help='read answers: the lines of --prompts with "answer" in them, a text with a JSON object, or the object',
    )
    triplets.add_argument("--seed", type=int, default=0, help="of --rules (default: 0)")
    triplets.add_argument("--out", type=Path, help="file to write; never overwritten")
    triplets.set_defaults(func=_triplets)


def _triplets(args: argparse.Namespace) -> None:
    from cache_builder.triplet_answers import read_answers, write_prompts
    from cache_builder.triplet_files import require_free, write_triplets
    from cache_builder.triplets import by_rules

    if args.captions and (args.root or args.set):
        raise UnknownName("--root and --set belong to --dataset, and a file of captions needs none")
    if not 0 <= args.seed < 10**9:
        raise UnknownName(f"--seed {args.seed}: it is a whole number from 0 to below 1,000,000,000")
    if args.prompts and args.out:
        raise UnknownName("--prompts names the file to write; leave --out for the triplets")
    if not args.prompts and args.out is None:
        raise UnknownName("name the file to write (--out)")
    require_free(args.prompts or args.out)  # before any work
    captions = _captions(args)
    if args.prompts:
        n = write_prompts(captions, args.prompts)
        print(
            f'wrote {n:,} prompts to {args.prompts}; put "answer": … into every line and read them with --answers'
        )
        return
    if args.rules:
        made = by_rules(captions, args.seed)
        if not made.triplets:
            raise UnknownName(
                f"no rule applies to any of the {made.captions:,} captions; the rules know common English words for "
                "what pictures show"
            )
        triplets = made.triplets
        _print_rejected("gave nothing", made.refused)
        print(f"{made.without:,} of {made.captions:,} captions have no triplet")
    else:
        answers = read_answers(args.answers, captions)
        triplets = answers.triplets
        _print_rejected("rejected", answers.rejected)
        print(f"{answers.unanswered:,} of {len(captions):,} captions have no triplet")
    write_triplets(triplets, args.out)
    _print_kinds(triplets)
    print(f"wrote {args.out}: {len(triplets):,} triplets")
    dataset = args.dataset or "DATASET"
    root = f" --root {args.root or 'ROOT'}" if args.root or args.captions else ""
    chosen = "".join(f" --set {setting}" for setting in args.set)
    print(
        f"next: headstart build --backbone FAMILY:CHECKPOINT --dataset {dataset}{root}{chosen} "
        f"--set triplets={args.out}"
    )


def _captions(args: argparse.Namespace) -> "Sequence[Caption]":
    """Captions of train and val; says how many of a file's are of test, and left out."""
    from cache_builder.triplet_files import LEARNED, read_captions

    if args.dataset:
        from cache_builder import load_dataset
        from cache_builder.cli_build import options_of
        from cache_builder.triplets import captions_of

        dataset = load_dataset(args.dataset, args.root, **options_of(args.dataset, args.set))
        found, others = captions_of(dataset), 0
        where = args.dataset
    else:
        listed = read_captions(args.captions)
        found = [c for c in listed if c.split in LEARNED]
        others, where = len(listed) - len(found), str(args.captions)
    if not found:
        raise UnknownName(
            f"{where} has no captions of {' or '.join(LEARNED)}, which triplets are made of"
        )
    if others:
        print(f"left out {others:,} captions of test: triplets are trained on")
    return found


def _print_rejected(what: str, reasons: Mapping[str, int]) -> None:
    for reason, n in sorted(reasons.items()):
        print(f"{what} {n:9,}  {reason}")


def _print_kinds(triplets: "Sequence[Triplet]") -> None:
    kinds = Counter((t.split, t.category or "without a category") for t in triplets)
    for (split, kind), n in sorted(kinds.items()):
        print(f"{split:5} {n:9,}  {kind}")
