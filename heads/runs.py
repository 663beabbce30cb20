"""Train a run into a directory of its own, and score it from there.

    runs/tf_local-photos-matching-seed42/
      config.json model.safetensors run.json history.jsonl      the trained head (run_files.py)
      scores-test.zarr …                                        score tables for `eval`

A directory that holds anything is never trained into, and a score table never overwritten.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

from cache_builder import FeatureCache
from cache_builder.errors import CacheError
from eval import score_io
from eval.any_table import Table
from eval.czsl_summary import KEEP
from eval.feasibility import Feasibility
from heads import checkpoint
from heads.base import Head
from heads.commands import score_command
from heads.config import describe_cache
from heads.errors import (
    CheckpointMismatch,
    ConfigError,
    HeadError,
    RunExists,
    TaskError,
)
from heads.overlap import TrainOverlap, train_overlap
from heads.run_files import Failed, Trained, read_run
from heads.score import Direction, score, score_both, score_open, source_of
from heads.sweep import train_runs
from heads.tasks import CompositionData, RetrievalData, load_task
from heads.wanted import Wanted

DIRECTIONS: tuple[Direction, ...] = ("t2i", "i2t")


def train_run(
    cache: FeatureCache,
    method: str,
    out: str | Path,
    *,
    task: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    label: str | None = None,
    backbone: str | None = None,
    progress: bool = True,
    save_every: float = 0.0,
    resume: bool = False,
    stop: Event | None = None,
) -> Trained:
    """Train a method on a cache's train split, select on its val split, and keep the result in `out`.

    A head without training needs no train split, and reads none.

    Args:
        cache: a sealed feature cache.
        method: a file of `heads/methods`, or the dotted name of a module with `Config` and `Head`.
        out: the run's directory; refused if it already holds anything.
        task: one of `heads.tasks.KINDS`; None takes the only one that the cache has and the method scores.
        settings: {"head": {…}, "train": {…}} as `read_settings` returns.
        label: its name in tables; None leaves that to the method's name and what differs in its configuration.
        backbone: where the cache's backbone lies now, `family:checkpoint`, for a method that runs a side of it; None is
            where it lay when the cache was built.
        progress: show a bar.
        save_every, resume, stop: as for `train_runs`.

    Raises:
        RunExists, ConfigError, TaskError, MissingStream, CheckpointMismatch, TrainingDiverged: see their messages.
            Nothing is written before training has ended, unless `save_every` or `stop` ask for it.
    """
    wanted = Wanted(method, Path(out), settings or {}, label, backbone)
    kept: dict[str, Any] = {"save_every": save_every, "resume": resume, "stop": stop}
    (found,) = train_runs(cache, [wanted], task=task, progress=progress, **kept)
    if isinstance(found, Failed):
        raise found.error
    return found


def score_run(
    run: str | Path,
    *,
    split: str = "test",
    world: str = "closed",
    cache: FeatureCache | None = None,
    task: str | None = None,
    rerank: int | None = None,
    allow_missing: bool = False,
    block: int = 1024,
    head: Head | None = None,
    backbone: str | None = None,
    feasibility: Feasibility | None = None,
    keep: int = KEEP,
    dense: bool = False,
) -> list[Path]:
    """Score a run on a split and write its tables into its directory: one, or one per direction for retrieval.

    Args:
        run: the run's directory.
        split, world, task: what to score; `task` is the trained one unless given.
        cache: where from; None opens the one trained on. The tables of another one carry its name, and in `meta` and
            run record as `train_overlap` what of it was trained on (see `heads/overlap.py`).
        rerank: for retrieval: the head scores only the K best by cached cosine.
        allow_missing: drop examples of quarantined images, which marks the table partial.
        block: queries and candidates held at once.
        head: the run's head, if it is already loaded.
        backbone: where the backbone lies that the head runs a side of; None is where it lay in training.
        feasibility, keep: for an open world: as for `score_open`.
        dense: for an open world: keep every score instead, images × pairs in memory, as the legacy curve and the
            compatibility modes of feasibility need.

    Returns:
        The paths of the tables, e.g. `RUN/scores-test.zarr`, `RUN/scores-test-t2i.zarr`,
        `RUN/scores-OTHERCACHE-test.zarr`.

    Raises:
        RunExists: a table is already there.
        CheckpointMismatch, MissingStream, TaskError, CacheError: the head or the data are not what is asked for.
    """
    run = Path(run)
    record = read_run(run)
    cache = cache or trained_cache(record)
    task = task or record["task"]
    is_open = world == "open" and task == "czsl"
    if (feasibility is not None or dense) and not is_open:
        raise TaskError("feasibility and dense are for open worlds of czsl; this is another table")
    scored = describe_cache(cache)
    paths = score_paths(run, cache, split=split, world=world, task=task, rerank=rerank)
    for path in paths.values():
        if path.exists():
            raise RunExists(f"{path} already exists; remove it to score again")
    if head is not None and backbone is not None:
        raise ConfigError("a head that is loaded already has its backbone; leave `backbone` out")
    head = head or checkpoint.load(run, backbone=backbone)
    data = load_task(cache, task, split, world, allow_missing=allow_missing)
    source = source_of(head, data)
    seen = _seen_before(record, scored, cache, data.kind, split)
    facts = {} if seen is None else {"train_overlap": seen.to_json()}
    said: dict[str, Any] = dict(facts)
    if feasibility is None and cache.asked is None:  # which no command line says
        said["command"] = score_command(
            run.absolute(),
            split=split,
            world=world,
            task=task if task != record["task"] else None,
            rerank=rerank,
            cache=scored["path"] if scored["path"] != record["cache"]["path"] else None,
            dense=dense,
            keep=keep if is_open and keep != KEEP else None,
            allow_missing=allow_missing,
            backbone=backbone,
        )
    shared: dict[str, Any] = {"block": block, "source": source}
    tables: dict[Direction | None, Table]
    if isinstance(data, RetrievalData):
        both = score_both(head, data, rerank=rerank, **shared)
        tables = {"t2i": both.t2i, "i2t": both.i2t}
    elif isinstance(data, CompositionData) and is_open and not dense:
        tables = {None: score_open(head, data, feasibility=feasibility, keep=keep, **shared)}
    else:
        tables = {None: score(head, data, rerank=rerank, **shared)}
    for direction, path in paths.items():
        table = replace(tables[direction], meta={**tables[direction].meta, **said})
        score_io.save(table, path, run={"run": run.name, **record, "cache": scored, **facts})
    return list(paths.values())


def score_paths(
    run: str | Path,
    cache: FeatureCache,
    *,
    split: str = "test",
    world: str = "closed",
    task: str | None = None,
    rerank: int | None = None,
) -> dict[Direction | None, Path]:
    """Where `score_run` writes: the table of each direction of retrieval, or of None for other tasks.

    Args and errors as for `score_run`.
    """
    record = read_run(run)
    trained: str = record["task"]
    task = task or trained
    directions: Sequence[Direction | None] = DIRECTIONS if task == "retrieval" else (None,)
    other = cache.digest() != record["cache"]["digest"]
    parts: list[str] = [
        *([cache.place.name.removesuffix(".zarr")] if other else []),
        *([task] if task != trained else []),
        split,
        *(["open"] if world == "open" and task == "czsl" else []),
    ]
    paths: dict[Direction | None, Path] = {}
    for direction in directions:
        words = [*parts, *([direction] if direction else [])]
        words += [f"rerank{rerank}"] if rerank else []
        paths[direction] = Path(run, f"scores-{'-'.join(words)}.zarr")
    return paths


def _seen_before(
    record: Mapping[str, Any], scored: Mapping[str, Any], cache: FeatureCache, task: str, split: str
) -> TrainOverlap | None:
    """What of another data set was trained on; None where nothing was trained, or the data set is the same."""
    if not record.get("examples", {}).get("train"):
        return None
    if record["cache"]["dataset"]["digest"] == scored["dataset"]["digest"]:
        return None
    try:
        trained = trained_cache(record)
        learned = record.get("learned", record["task"])
        return train_overlap(trained, learned, cache, task, split)
    except (CacheError, HeadError, OSError) as error:
        return TrainOverlap(None, why=str(error))


def trained_cache(record: Mapping[str, Any]) -> FeatureCache:
    """Open the cache that a run was trained on; chunks are compared with their checksums as they are read.

    Raises:
        CheckpointMismatch: what lies at its path now holds something else.
    """
    cache = FeatureCache.open(record["cache"]["path"], check="read")
    found, trained = cache.digest(), record["cache"]["digest"]
    if found != trained:
        raise CheckpointMismatch(
            f"{cache.place} is no longer the cache this run was trained on: its content digest is {found[:12]}, it was "
            f"{trained[:12]}; name the cache to score on (--cache), or train again"
        )
    return cache
