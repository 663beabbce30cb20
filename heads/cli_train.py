"""`headstart train`: one head on a cache, or several heads, settings and seeds in one pass over it."""

import argparse
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from cache_builder.cli_ending import Verbs

if TYPE_CHECKING:
    from heads.run_files import Trained

MOVED = "where the cache's backbone lies now, for methods that run its text tower"


def add_verb(verbs: Verbs) -> None:
    """Add `train`."""
    train = verbs.add_parser(
        "train",
        help="train heads on a cache",
        description="Train METHOD on the train split, keep the weights best on val, and write a run directory. With "
        "several methods or --sweep, train all combinations in one pass: what they read of the cache is read once, and "
        "those of equal batches step side by side.",
    )
    train.add_argument(
        "method", nargs="+", help="a file of heads/methods, or a dotted module of your own"
    )
    train.add_argument("--cache", type=Path, required=True, help="the feature cache to train on")
    train.add_argument(
        "--task",
        help="czsl, matching, two_by_two, retrieval or composed; needed if the cache has several that METHOD scores",
    )
    train.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="[METHOD=]FILE",
        help="TOML with the tables [head] and [train]; METHOD=FILE, repeated, where several methods are named",
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one setting, e.g. train.lr=3e-4 or head.variant=global; may be repeated, overrides --config",
    )
    train.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE,…",
        help="a run for each value, e.g. train.seed=0,1,2; repeated, for each combination. Runs of several seeds take "
        "the batches of the first one (train.order_seed), unless --own-order is given; heads without randomness run "
        "under the first seed alone",
    )
    train.add_argument(
        "--own-order",
        action="store_true",
        help="with --sweep train.seed: each seed shuffles for itself, as it does alone; batches are then not shared",
    )
    train.add_argument("--seed", type=int, help="short for --set train.seed=N")
    train.add_argument(
        "--out",
        type=Path,
        help="run directory (default: runs/METHOD-CACHE-TASK-seedN), of several runs the folder above them (default: "
        "runs/sweep-CACHE-TASK); must be new, but for --resume",
    )
    train.add_argument(
        "--save-every",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help="write where the training stands into the run directory whenever so many minutes have passed, at the next "
        "step's end; it is removed when the run is finished (default: 10; 0: only when Ctrl-C asks to stop)",
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with what the same command began and did not finish, to the same weights bit for bit on the same "
        "machine; finished runs stay as they are, and those of which nothing was written yet start from the beginning",
    )
    train.add_argument(
        "--tensorboard",
        action="store_true",
        help="tell every step and validation to TensorBoard too, in RUN/tensorboard; needs headstart[tensorboard]",
    )
    train.add_argument("--backbone", metavar="FAMILY:CHECKPOINT", help=MOVED)
    train.set_defaults(func=_train)


def _train(args: argparse.Namespace) -> None:
    from cache_builder import FeatureCache
    from heads import load_method, ranks
    from heads.config import parse
    from heads.errors import ConfigError, HeadError
    from heads.run_files import Failed, Trained
    from heads.sweep import train_runs
    from heads.sweep_grid import config_files, points
    from heads.tasks import KINDS, task_of
    from heads.train_config import TrainConfig
    from heads.wanted import Wanted

    if not 0 <= args.save_every < float("inf"):
        raise ConfigError(
            f"--save-every is {args.save_every}, but takes minutes, or 0 for Ctrl-C alone"
        )
    configs = config_files(args.config, args.method)
    sets = [*args.set, *([] if args.seed is None else [f"train.seed={args.seed}"])]
    asked = points(args.method, configs, sets, args.sweep, own_order=args.own_order)
    cache = FeatureCache.open(args.cache, check="read")
    among = frozenset(KINDS).intersection(*(load_method(name).Head.tasks for name in args.method))
    task = task_of(cache, args.task, among)
    if len(asked) == 1:
        seed = parse(TrainConfig, asked[0].settings["train"], "train").seed
        default = Path("runs", f"{asked[0].method}-{args.cache.stem}-{task}-seed{seed}")
        places = [args.out or default]
    else:
        folder = args.out or Path("runs", f"sweep-{args.cache.stem}-{task}")
        places = [folder / point.name for point in asked]
    wanted = [
        Wanted(point.method, place, point.settings, backbone=args.backbone)
        for point, place in zip(asked, places, strict=True)
    ]
    device = parse(TrainConfig, asked[0].settings["train"], "train").device
    finished = 0
    with _until_ctrl_c(places) as stop, ranks.joined(device):
        first = ranks.is_first()
        if args.resume and first:
            finished = _say_standing(places)
        found = train_runs(
            cache,
            wanted,
            task=task,
            progress=first,
            save_every=args.save_every,
            resume=args.resume,
            stop=stop,
            tensorboard=args.tensorboard,
        )
    if not first:
        return
    done = [run for run in found if isinstance(run, Trained)]
    for split in ("train", "val"):
        if n := max((run.record["dropped"][split] for run in done), default=0):
            print(f"left out {n} {split} examples whose image is quarantined")
    for run in done:
        _say(run)
    failed = [run for run in found if isinstance(run, Failed)]
    if failed and len(found) == 1:
        raise failed[0].error
    if failed:
        what = "; ".join(f"{run.path}: {run.error}" for run in failed)
        raise HeadError(f"{len(failed)} of {len(found)} runs failed, the others are kept. {what}")
    wrote = f"{len(done) - finished} runs into {places[0].parent}"
    which = "RUN" if len(places) > 1 else str(places[0])
    if len(places) == 1:
        wrote = which if not finished else "nothing anew"
    print(f"wrote {wrote}; next: headstart score {which} --split test")


def _say_standing(places: list[Path]) -> int:
    """Say what there is to go on with; returns how many runs are finished already."""
    from heads import training_state
    from heads.run_files import RECORD

    finished = [out for out in places if (out / RECORD).exists()]
    begun = training_state.find([out for out in places if out not in finished])
    steps = [state["step"] for part in begun for _, state in part.states.values()]
    if len(places) > 1:
        new = len(places) - len(finished) - len(steps)
        print(
            f"of {len(places)} runs {len(finished)} are finished, {len(steps)} go on, {new} start"
        )
    elif finished:
        print(f"{places[0]} is finished already")
    elif steps:
        print(f"{places[0]} goes on after step {steps[0]}")
    else:
        print(f"nothing was written in {places[0]} yet: its training starts from the beginning")
    return len(finished)


@contextmanager
def _until_ctrl_c(places: list[Path]) -> Generator[Event]:
    """An event that the first Ctrl-C sets; the second interrupts at once. Either way says how to go on."""

    def first(*_: object) -> None:
        print(
            "\nfinishing the step in hand; Ctrl-C again stops at once", file=sys.stderr, flush=True
        )
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    stop = Event()
    before = signal.signal(signal.SIGINT, first)
    try:
        yield stop
    except KeyboardInterrupt:
        where = places[0] if len(places) == 1 else places[0].parent
        if not any(out.exists() for out in places):
            raise KeyboardInterrupt("stopped before anything was written") from None
        raise KeyboardInterrupt(
            f"stopped; where the training stands lies in {where}. Repeat the command with --resume to go on from there."
        ) from None
    finally:
        signal.signal(signal.SIGINT, before)


def _say(run: "Trained") -> None:
    """What became of a run, in a line or two."""
    record = run.record
    wait = record["data_wait_seconds"] / max(record["seconds"], 1e-9)
    beside = f", beside {record['beside']} others" if record["beside"] else ""
    print(
        f"{record['method']} · {record['task']} · seed {record['seed']}: {record['parameters']:,} parameters, "
        f"{record['steps']} steps in {record['seconds']:.1f} s ({wait:.0%} waiting for data{beside})"
    )
    for reason, n in record.get("filtered", {}).items():
        if n:
            print(f"left out {n:,} train triplets: {reason}")
    remarks = record.get("remarks", {}).items()
    if said := [f"{v:.2%} {k}" if isinstance(v, float) else f"{v:,} {k}" for k, v in remarks if v]:
        print(", ".join(said))
    if run.result.best:
        metric, best = record["train"]["select"], run.result.best
        print(f"best val {metric} {best[metric]:.4f} at step {best['step']}")
