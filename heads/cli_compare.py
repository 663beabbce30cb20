"""The verb `compare`: methods × backbones × seeds on identical samples, in one report.

headstart compare --caches clip.zarr pe.zarr --methods zero_shot csp trident --task czsl --seeds 5
headstart compare --plan comparison.toml
headstart compare --ablate simfp --caches clip.zarr pe.zarr --seeds 5
"""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cache_builder.cli_ending import Verbs
from heads.errors import ConfigError, HeadError

if TYPE_CHECKING:
    from cache_builder import FeatureCache
    from eval.comparison import Comparison
    from heads.ablation import Ablation
    from heads.compare_engines import Engine

SEEDS = 5


def add_verb(verbs: Verbs) -> None:
    """Add the verb."""
    compare = verbs.add_parser(
        "compare",
        help="methods, or a method's ablation, on several caches and seeds, in one report",
        description="Train every row under every seed on every cache, score once on test, and write OUT/report.html, "
        ".md and .csv: a leaderboard with intervals and corrected differences, what each row costs, and, for each "
        "ordering that a paper claims, whether it holds here. Caches must hold identical samples. Repeat the command "
        "after a stop: it goes on.",
    )
    compare.add_argument(
        "--caches",
        "--cache",
        type=Path,
        nargs="+",
        action="extend",
        metavar="CACHE",
        help="feature caches of one data set, a backbone each",
    )
    rows = compare.add_mutually_exclusive_group(required=True)
    rows.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="files of heads/methods, or dotted modules of your own",
    )
    rows.add_argument(
        "--plan",
        "--ablate",
        metavar="FILE",
        help="a .toml that lists the rows (form: heads/ablation.py), or the name of a packaged one: a method for its "
        "ablation, a task for all its methods",
    )
    compare.add_argument(
        "--task",
        help="of --methods: czsl, matching, two_by_two, retrieval or composed; needed if the caches have several",
    )
    compare.add_argument(
        "--world",
        nargs="+",
        choices=("closed", "open"),
        default=["closed"],
        help="of --methods and czsl: candidate pairs (default: closed)",
    )
    compare.add_argument(
        "--rerank",
        type=int,
        metavar="K",
        help="of --methods and retrieval: heads score only the K best by cached cosine",
    )
    compare.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="METHOD=FILE",
        help="of --methods: TOML with the tables [head] and [train], such as a recipe; a method without one has its "
        "defaults, which are of the size of its paper",
    )
    compare.add_argument("--seeds", type=int, help=f"per trained row (default: {SEEDS})")
    compare.add_argument(
        "--out",
        type=Path,
        help="directory of runs and report (default: runs/compare-TASK, or runs/ablate-NAME)",
    )
    compare.add_argument("--rows", nargs="+", metavar="LABEL", help="of --plan: only these rows")
    compare.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one setting for all rows, e.g. train.epochs=2; may be repeated, goes before what files say; head.… is "
        "for rows of a plan's own method",
    )
    compare.add_argument(
        "--intersect",
        action="store_true",
        help="of caches that do not hold the same samples, compare on those that all of them hold and can use",
    )
    compare.add_argument(
        "--pictures",
        type=int,
        default=0,
        metavar="N",
        help="draw for N examples where heads look, and what composed queries get, of the first seed of every row that "
        "has something to show; and show the pictures of what goes wrong most. Reads the data set's images again",
    )
    compare.add_argument(
        "--workers", type=int, help="processes side by side, a core each (default: all cores)"
    )
    compare.add_argument(
        "--devices", nargs="+", metavar="DEVICE", help="a process each instead, e.g. cuda:0 cuda:1"
    )
    compare.add_argument(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="ray: on a Ray cluster, which sees the same paths (pip install 'headstart[ray]')",
    )
    compare.add_argument("--address", help="of the Ray cluster (default: one on this machine)")
    compare.set_defaults(func=_compare)


def _compare(args: argparse.Namespace) -> None:
    from eval.report import report
    from heads.ablation import LEGEND, plan, read
    from heads.compare import compare
    from heads.config import read_settings
    from heads.samples import on_shared, refuse_differences

    if (args.seeds is not None and args.seeds < 1) or (
        args.workers is not None and args.workers < 1
    ):
        raise ConfigError("--seeds and --workers are numbers from 1")
    if args.pictures < 0:
        raise ConfigError(f"--pictures {args.pictures}: a number from 0")
    engine = _engine(args)
    ablation = None if args.methods else read(args.plan)
    caches = _open(args.caches or [Path(path) for path in (ablation.caches if ablation else ())])
    if args.intersect:
        caches = on_shared(caches)
    else:
        refuse_differences(caches)
    ablation = ablation or _of_methods(args, caches)
    made = plan(ablation, caches, rows=args.rows, settings=read_settings(None, args.set))
    for sentence in made.left_out:
        print(sentence, flush=True)
    name = f"compare-{ablation.task}" if args.methods else f"ablate-{Path(args.plan).stem}"
    out = args.out or Path("runs", name)
    command = _command(args, out)
    compared = compare(
        {name: caches[name] for name in made.entries},
        made.entries,
        range(args.seeds or ablation.seeds or SEEDS),
        out,
        engine=engine,
        command=command,
    )
    if not compared.runs:
        raise HeadError(f"no run was made. {'; '.join(compared.failures)}")
    notes = [*made.left_out, *compared.failures, *_asked(caches), f"Made by: {command}"]

    def draw(comparisons: "Sequence[Comparison]") -> None:
        from heads.drawing import draw_comparison

        if args.pictures:
            notes.extend(draw_comparison(comparisons, compared.runs, caches, args.pictures))

    paths = report(
        compared.runs,
        out / "report.html",
        title=f"Comparison: {Path(args.plan).stem if args.plan else ablation.task}",
        orderings=made.orderings,
        legend=LEGEND,
        notes=notes,
        draw=draw,
    )
    print(next(p for p in paths if p.suffix == ".md").read_text(encoding="utf-8"))
    for path in paths:
        print(f"wrote {path}")
    if compared.failures:
        raise HeadError(
            f"{len(compared.failures)} runs failed, all others are in the report. {'; '.join(compared.failures)}"
        )


def _of_methods(args: argparse.Namespace, caches: dict[str, "FeatureCache"]) -> "Ablation":
    """What --methods, --task, --world, --rerank and --config ask for."""
    from heads import load_method
    from heads.ablation import of_methods
    from heads.sweep_grid import config_files
    from heads.tasks import KINDS, task_of

    if args.rows:
        raise ConfigError("--rows chooses among the rows of --plan; name the --methods you want")
    if head := [s for s in args.set if s.strip().startswith("head.")]:
        raise ConfigError(
            f"--set {head[0]} is for one method, but --methods are compared; put it into a file: --config METHOD=FILE"
        )
    among = frozenset(KINDS).intersection(*(load_method(m).Head.tasks for m in args.methods))
    if not among:
        raise ConfigError(f"{', '.join(args.methods)} have no task in common; compare them apart")
    tasks = {task_of(cache, args.task, among) for cache in caches.values()}
    task = tasks.pop()
    if task != "czsl" and args.world != ["closed"]:
        raise ConfigError(f"--world is of czsl, and {task} is compared; leave it out")
    if task != "retrieval" and args.rerank is not None:
        raise ConfigError(f"--rerank is of retrieval, and {task} is compared; leave it out")
    configs = config_files(args.config, args.methods)
    return of_methods(args.methods, task, worlds=args.world, rerank=args.rerank, configs=configs)


def _engine(args: argparse.Namespace) -> "Engine":
    from heads.compare_engines import Processes, Ray

    if args.engine == "ray":
        if args.devices or args.workers:
            raise ConfigError(
                "--workers and --devices are of this machine; a Ray cluster knows its own: leave them out"
            )
        return Ray(args.address)
    if args.address:
        raise ConfigError("--address is of a Ray cluster; add --engine ray")
    if args.devices and args.workers:
        raise ConfigError("--devices has a process each; leave --workers out")
    return Processes(args.workers or os.cpu_count() or 1, tuple(args.devices or ()))


def _command(args: argparse.Namespace, out: Path) -> str:
    """What makes the same again: every option but those of who works, with the values in force."""
    words = ["headstart", "compare"]
    words += ["--caches", *map(str, args.caches)] if args.caches else []
    if args.plan:
        words += ["--plan", args.plan, *(["--rows", *args.rows] if args.rows else [])]
    else:
        words += ["--methods", *args.methods]
        words += ["--task", args.task] if args.task else []
        words += ["--world", *args.world] if args.world != ["closed"] else []
        words += ["--rerank", str(args.rerank)] if args.rerank else []
    for flag, values in (("--config", args.config), ("--set", args.set)):
        words += [word for value in values for word in (flag, value)]
    words += ["--seeds", str(args.seeds)] if args.seeds else []
    words += ["--intersect"] if args.intersect else []
    words += ["--pictures", str(args.pictures)] if args.pictures else []
    return shlex.join([*words, "--out", str(out)])


def _asked(caches: dict[str, "FeatureCache"]) -> list[str]:
    """What is said of caches that were asked only a part."""
    asked = [cache for cache in caches.values() if cache.asked is not None]
    if not asked:
        return []
    held = ", ".join(f"{n} {c.spec.dataset.n_images:,}" for n, c in caches.items())
    return [
        "The caches do not hold the same samples; compared is what all of them hold (--intersect). "
        f"Images in the caches: {held}."
    ]


def _open(paths: Sequence[Path]) -> dict[str, "FeatureCache"]:
    """Caches by the name of their folder, which names their runs' folder too."""
    from cache_builder import FeatureCache

    if not paths:
        raise ConfigError("no cache is named: --caches A.zarr B.zarr, or `caches` in the plan")
    caches: dict[str, FeatureCache] = {}
    for path in paths:
        if path.stem in caches:
            raise ConfigError(
                f"two caches are called {path.stem}, which names the folder of their runs; rename one"
            )
        caches[path.stem] = FeatureCache.open(path, check="read")
    return caches
