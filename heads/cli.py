"""`headstart`: train · score · words · compare · list · demo, and the verbs of the other rooms.

Nothing heavy is imported here: `headstart --help` answers at once, torch comes with the verb that needs it.
"""

import argparse
import ast
import importlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from cache_builder import cli as cache_cli
from cache_builder.cli_ending import Verbs, run
from cache_builder.errors import CacheError
from eval import cli as eval_cli
from eval.errors import ScoreTableError
from heads import (
    cli_compare,
    cli_completion,
    cli_feasibility,
    cli_merge,
    cli_push,
    cli_train,
    cli_words,
)
from heads.errors import HeadError

SHELVES = {
    "backbones": "cache_builder.backbones",
    "datasets": "cache_builder.datasets",
    "methods": "heads.methods",
}
"""What can be listed, and the folder whose files it is."""

LEGEND = """\
N patches × width W, prefix rows, joint dim D, at most L text rows × width V, blocks image/text; KiB of patches and
prefix rows of one image at fp16, GiB of those of 100,000 images. Computed from open_clip's configurations; those of
transformers' names from a config.json on this machine, or else from what the family's file says of them"""
"""Below the table of backbones."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; a user's error is one sentence on stderr and exit status 1, a traceback means a bug."""
    return run(_parser(), argv, (CacheError, ScoreTableError, HeadError))


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs of this room."""
    cli_train.add_verb(verbs)

    score = verbs.add_parser(
        "score",
        help="score a split with a trained head",
        description="Write RUN/scores-SPLIT….zarr, which `headstart metrics` and `headstart report` read.",
    )
    score.add_argument("run", type=Path, help="a run directory made by `headstart train`")
    score.add_argument("--split", default="test", help="train, val or test (default: test)")
    score.add_argument(
        "--world", choices=("closed", "open"), default="closed", help="candidate pairs of czsl"
    )
    score.add_argument("--task", help="another task of the cache than the one trained on")
    score.add_argument("--cache", type=Path, help="another cache of the same backbone")
    score.add_argument(
        "--rerank",
        type=int,
        metavar="K",
        help="retrieval: the head scores only the K best by cached cosine",
    )
    score.add_argument(
        "--allow-missing",
        action="store_true",
        help="leave out examples whose image is quarantined; marks the table partial",
    )
    score.add_argument(
        "--block", type=int, default=1024, help="queries and candidates held at once"
    )
    cli_feasibility.add_open_world(score)
    score.add_argument(
        "--pictures",
        type=int,
        default=0,
        metavar="N",
        help="also draw for N examples where the head looks, if its method has maps, and which experts serve which "
        "attribute, if it has some; or of composed queries what it answers; reads the data set's images again",
    )
    score.add_argument("--backbone", metavar="FAMILY:CHECKPOINT", help=cli_train.MOVED)
    score.set_defaults(func=_score)

    cli_words.add_verbs(verbs)
    cli_compare.add_verb(verbs)
    cli_merge.add_verb(verbs)
    cli_push.add_verb(verbs)

    shelf = verbs.add_parser(
        "list",
        help="backbones, datasets or methods, or the settings of one",
        description="A plugin is a file: list all of a kind, or say what one is and which settings it takes.",
    )
    shelf.add_argument("what", choices=tuple(SHELVES))
    shelf.add_argument("name", nargs="?", help="one of them, or a dotted module of your own")
    shelf.set_defaults(func=_list)

    demo = verbs.add_parser(
        "demo",
        help="the whole path on the bundled backbones and toy_world",
        description="Build a cache per backbone, train heads under three seeds, score, compare, write OUT/report.html.",
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    demo.add_argument(
        "--scale", type=float, default=1.0, help="size of toy_world; below 1 for a quick look"
    )
    demo.add_argument(
        "--epochs",
        type=int,
        default=4,
        help="per trained head (default: 4; the README's table: 20)",
    )
    demo.add_argument(
        "--backbones",
        nargs="+",
        metavar="FAMILY",
        help="whose bundled model takes part (default: clip siglip2 pe llava)",
    )
    demo.add_argument("--seeds", type=int, default=3, help="per trained head (default: 3)")
    demo.set_defaults(func=_demo)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headstart",
        description="Cache a frozen vision-language backbone once, then train and compare small heads in seconds.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    cache_cli.add_verbs(verbs)
    add_verbs(verbs)
    cli_feasibility.add_verbs(verbs)
    eval_cli.add_verbs(verbs)
    cli_completion.add_verb(verbs, _parser)
    return parser


def _score(args: argparse.Namespace) -> None:
    from cache_builder import FeatureCache
    from eval import score_io
    from heads.pictures import check_has_pictures
    from heads.run_files import read_run
    from heads.runs import score_run

    record = read_run(args.run)
    task = args.task or record["task"]
    if args.pictures and task != "composed":
        check_has_pictures(record["method"], task)
    paths = score_run(
        args.run,
        split=args.split,
        world=args.world,
        cache=FeatureCache.open(args.cache, check="read") if args.cache else None,
        task=args.task,
        rerank=args.rerank,
        allow_missing=args.allow_missing,
        block=args.block,
        backbone=args.backbone,
        **cli_feasibility.open_world(args),
    )
    overlap = None
    for path in paths:
        print(f"wrote {path}; next: headstart metrics {path}")
        meta = score_io.load(path).meta
        overlap = meta.get("train_overlap")
        if dropped := meta.get("dropped"):
            print(f"left out {len(dropped)} examples whose image is quarantined; marked partial")
    if overlap:
        print(overlap["says"])
    if args.pictures:
        _draw(args, paths)


def _draw(args: argparse.Namespace, tables: Sequence[Path]) -> None:
    from cache_builder import FeatureCache
    from heads.drawing import draw
    from heads.run_files import read_run
    from heads.runs import trained_cache

    record = read_run(args.run)
    cache = FeatureCache.open(args.cache, check="read") if args.cache else trained_cache(record)
    task = args.task or record["task"]
    given = {"task": task, "split": args.split, "n": args.pictures, "backbone": args.backbone}
    for path in draw(args.run, cache, tables=tables, **given):
        print(f"wrote {path}")


def _list(args: argparse.Namespace) -> None:
    from cache_builder.plugins import find, names

    shelf = SHELVES[args.what]
    if args.name is None:
        for name in names(shelf):
            folder = Path(next(iter(importlib.import_module(shelf).__path__)))
            text = ast.get_docstring(ast.parse((folder / f"{name}.py").read_text())) or ""
            print(f"{name:14} {text.split(chr(10) * 2)[0]}", flush=True)
            if args.what == "backbones":
                print(
                    *(f"{line}\n" for line in _costs(find(shelf, name))), sep="", end="", flush=True
                )
        if args.what == "backbones":
            print(LEGEND)
        return
    module = find(shelf, args.name)
    print(inspect.getdoc(module))
    print()
    if args.what == "methods":
        for key, field in module.Config.model_fields.items():
            print(f"--set head.{key}={field.default!r:12} {field.description}")
    elif args.what == "backbones":
        if lines := _costs(module):
            print("\n".join([*lines, LEGEND]))
    elif args.what == "datasets":
        for key, parameter in inspect.signature(module.load).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                print(f"--set {key}={parameter.default!r}")


def _costs(family: ModuleType) -> list[str]:
    """Lines of the table of a family's published checkpoints; none if its file offers no cards."""
    if not (hasattr(family, "PUBLISHED") and hasattr(family, "card")):
        return []
    rows = [{"checkpoint": name, **family.card(name).columns()} for name in family.PUBLISHED]
    if not rows:
        return []
    rows.insert(0, {title: title for title in rows[0]})
    widths = {title: max(len(row[title]) for row in rows) for title in rows[0]}
    cells = [[row[title].rjust(width) for title, width in widths.items()] for row in rows]
    for row, line in zip(rows, cells, strict=True):
        line[0] = row["checkpoint"].ljust(len(line[0]))
    return [f"  {'  '.join(line)}" for line in cells]


def _demo(args: argparse.Namespace) -> None:
    from heads import demo

    given = {"scale": args.scale, "epochs": args.epochs, "seeds": args.seeds}
    made = demo.run(args.out, **given, backbones=args.backbones or demo.BACKBONES)
    print(made.table)
    for what, path in made.files.items():
        print(f"{what}: {path}")


if __name__ == "__main__":
    sys.exit(main())
