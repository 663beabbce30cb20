"""`headstart train`: one head on a cache, or several heads, settings and seeds in one pass over it."""

import argparse
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

MOVED = "where the cache's backbone lies now, for methods that run its text tower"


def add_verb(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
        "--task", help="czsl, matching, two_by_two or retrieval; needed if the cache has several"
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
        "runs/sweep-CACHE-TASK); must be new",
    )
    train.add_argument("--backbone", metavar="FAMILY:CHECKPOINT", help=MOVED)
    train.set_defaults(func=_train)


def _train(args: argparse.Namespace) -> None:
    from cache_builder import FeatureCache
    from heads.config import parse
    from heads.errors import TrainingDiverged
    from heads.sweep import Trained, Wanted, train_runs
    from heads.tasks import task_of
    from heads.train_config import TrainConfig

    points = _points(args)
    cache = FeatureCache.open(args.cache, check="read")
    task = task_of(cache, args.task)
    if len(points) == 1:
        method, settings, _ = points[0]
        seed = parse(TrainConfig, settings["train"], "train").seed
        default = Path("runs", f"{method}-{args.cache.stem}-{task}-seed{seed}")
        places = [args.out or default]
    else:
        folder = args.out or Path("runs", f"sweep-{args.cache.stem}-{task}")
        places = [folder / name for _, _, name in points]
    wanted = [
        Wanted(method, place, settings, backbone=args.backbone)
        for (method, settings, _), place in zip(points, places, strict=True)
    ]
    found = train_runs(cache, wanted, task=task)
    done = [run for run in found if isinstance(run, Trained)]
    if done:
        for split, n in done[0].record["dropped"].items():
            if n:
                print(f"left out {n} {split} examples whose image is quarantined")
    for run in done:
        _say(run, task)
    failed = [
        (place, run)
        for place, run in zip(places, found, strict=True)
        if isinstance(run, TrainingDiverged)
    ]
    if failed and len(found) == 1:
        raise failed[0][1]
    if failed:
        what = "; ".join(f"{place}: {error}" for place, error in failed)
        raise TrainingDiverged(
            f"{len(failed)} of {len(found)} runs diverged, the others are kept. {what}"
        )
    if len(done) == 1:
        print(f"wrote {done[0].path}; next: headstart score {done[0].path} --split test")
    else:
        print(
            f"wrote {len(done)} runs into {places[0].parent}; next: headstart score RUN --split test"
        )


def _say(run: Any, task: str) -> None:
    record = run.record
    wait = record["data_wait_seconds"] / max(record["seconds"], 1e-9)
    beside = f", beside {record['beside']} others" if record["beside"] else ""
    print(
        f"{record['method']} · {task} · seed {record['seed']}: {record['parameters']:,} parameters, {record['steps']} "
        f"steps in {record['seconds']:.1f} s ({wait:.0%} waiting for data{beside})"
    )
    if run.result.best:
        metric = record["train"]["select"]
        best = run.result.best
        print(f"best val {metric} {best[metric]:.4f} at step {best['step']}")


def _points(args: argparse.Namespace) -> list[tuple[str, dict[str, dict[str, Any]], str]]:
    """Every run that is asked for: method, settings, and its directory's name among several."""
    from heads import load_method
    from heads.config import read_settings
    from heads.errors import ConfigError

    if twice := sorted({m for m in args.method if args.method.count(m) > 1}):
        raise ConfigError(
            f"{twice[0]} is named twice; use --sweep for several settings of one method"
        )
    configs = _configs(args.config, args.method)
    axes = [_axis(text) for text in args.sweep]
    keys = [key for key, _ in axes]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"--sweep {twice[0]} is given twice; put all its values into one")
    seeds = dict(axes).get("train.seed")
    if args.own_order and not seeds:
        raise ConfigError(
            "--own-order is about the seeds of --sweep train.seed=…, and there are none"
        )
    fixed = [] if args.seed is None else [f"train.seed={args.seed}"]
    out = []
    for method in args.method:
        draws = load_method(method).Head.training_kind == "gradient"
        for values in product(*(values for _, values in axes)):
            if seeds and not draws and values[keys.index("train.seed")] != seeds[0]:
                continue  # without randomness, one seed says it all
            chosen = [f"{key}={value}" for (key, _), value in zip(axes, values, strict=True)]
            settings = read_settings(configs.get(method), [*args.set, *fixed, *chosen])
            if seeds and not args.own_order:
                first = read_settings(None, [f"train.seed={seeds[0]}"])["train"]["seed"]
                settings["train"].setdefault("order_seed", first)
            out.append((method, settings, _name(method, axes, values)))
    return out


def _configs(given: Sequence[str], methods: Sequence[str]) -> dict[str, Path]:
    """Method → its TOML file."""
    from heads.errors import ConfigError

    found: dict[str, Path] = {}
    for text in given:
        method, equals, file = text.partition("=")
        if not equals and len(methods) == 1:
            method, file = methods[0], text
        elif method not in methods:
            raise ConfigError(
                f"--config {text!r} is not METHOD=FILE for one of the methods named ({', '.join(methods)})"
            )
        if method in found:
            raise ConfigError(f"{method} has two --config files, {found[method]} and {file}")
        found[method] = Path(file)
    return found


def _axis(text: str) -> tuple[str, list[str]]:
    """`KEY=A,B` → KEY and its values; commas inside brackets or quotes do not separate."""
    from heads.errors import ConfigError

    key, equals, values = text.partition("=")
    found = [v.strip() for v in re.findall(r"""(?:\[[^\]]*\]|"[^"]*"|'[^']*'|[^,])+""", values)]
    if not equals or not found or len(set(found)) < len(found):
        raise ConfigError(
            f"--sweep {text!r} is not of the form KEY=VALUE,VALUE,… with values that differ, e.g. train.seed=0,1,2"
        )
    return key.strip(), found


def _name(method: str, axes: Sequence[tuple[str, list[str]]], values: Sequence[str]) -> str:
    """e.g. `csp-dropout=0.5-seed0`."""
    parts = [method]
    for (key, _), value in zip(axes, values, strict=True):
        short = key.rpartition(".")[2]
        plain = re.sub(r"[^\w.]+", "_", value).strip("_")
        parts.append(f"seed{plain}" if key == "train.seed" else f"{short}={plain}")
    return "-".join(parts)
