"""The verb `compare`: rows × backbones × seeds on identical samples, and whether the orderings hold that are claimed.

headstart compare --ablate simfp --cache clip.zarr --cache pe.zarr --seeds 5 --out runs/ablate-simfp
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from heads.errors import ConfigError, HeadError

if TYPE_CHECKING:
    from cache_builder import FeatureCache


def add_verb(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb."""
    compare = verbs.add_parser(
        "compare",
        help="the rows of a method's ablation on several caches and seeds, in one report",
        description="Train every row of an ablation under every seed on every cache, score once on test, and write "
        "OUT/report.html, .md and .csv: metrics with intervals, and for each ordering that a paper claims whether it "
        "holds here.",
    )
    compare.add_argument(
        "--ablate",
        required=True,
        metavar="METHOD",
        help="whose rows: a file of heads/ablations, or the path of a .toml of your own",
    )
    compare.add_argument(
        "--cache",
        type=Path,
        action="append",
        required=True,
        help="a feature cache; may be repeated, all of the same data set",
    )
    compare.add_argument("--seeds", type=int, default=5, help="per trained row (default: 5)")
    compare.add_argument(
        "--out", type=Path, help="directory of runs and report (default: runs/ablate-METHOD)"
    )
    compare.add_argument("--rows", nargs="+", metavar="LABEL", help="only these rows")
    compare.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one setting for all rows, e.g. train.epochs=2; may be repeated, goes before what the ablation says",
    )
    compare.add_argument(
        "--workers", type=int, help="processes side by side, a core each (default: all cores)"
    )
    compare.set_defaults(func=_compare)


def _compare(args: argparse.Namespace) -> None:
    from eval.report import report
    from heads.ablation import LEGEND, plan, read
    from heads.compare import compare
    from heads.config import read_settings

    if args.seeds < 1 or (args.workers is not None and args.workers < 1):
        raise ConfigError("--seeds and --workers are numbers from 1")
    ablation = read(args.ablate)
    caches = _open(args.cache)
    made = plan(ablation, caches, rows=args.rows, settings=read_settings(None, args.set))
    for sentence in made.left_out:
        print(sentence, flush=True)
    name = Path(args.ablate).stem
    out = args.out or Path("runs", f"ablate-{name}")
    compared = compare(
        {name: caches[name] for name in made.entries},
        made.entries,
        range(args.seeds),
        out,
        workers=args.workers or os.cpu_count() or 1,
    )
    if not compared.runs:
        raise HeadError(f"no run was made. {'; '.join(compared.failures)}")
    paths = report(
        compared.runs,
        out / "report.html",
        title=f"Ablation: {name}",
        orderings=made.orderings,
        notes=[LEGEND, *made.left_out, *compared.failures],
    )
    print(next(p for p in paths if p.suffix == ".md").read_text(encoding="utf-8"))
    for path in paths:
        print(f"wrote {path}")
    if compared.failures:
        raise HeadError(
            f"{len(compared.failures)} runs failed, all others are in the report. {'; '.join(compared.failures)}"
        )


def _open(paths: Sequence[Path]) -> dict[str, "FeatureCache"]:
    """Caches by the name of their folder, which names their runs' folder too."""
    from cache_builder import FeatureCache

    caches: dict[str, FeatureCache] = {}
    for path in paths:
        if path.stem in caches:
            raise ConfigError(
                f"two caches are called {path.stem}, which names the folder of their runs; rename one"
            )
        caches[path.stem] = FeatureCache.open(path, check="read")
    return caches
