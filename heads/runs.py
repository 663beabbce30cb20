"""A run: one head trained on one cache under one seed, kept in a directory of its own, and scored from there.

    runs/tf_local-photos-matching-seed42/
      config.json model.safetensors     the head (checkpoint.py)
      run.json                          resolved configuration, versions, commit, seed, cache, data, result
      history.jsonl                     every step and every validation
      scores-test.zarr …                score tables for `eval`

A directory that holds anything is never trained into, and a score table never overwritten.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cache_builder import FeatureCache
from cache_builder.errors import CacheError
from eval import score_io
from eval.any_table import Table
from eval.czsl import Composition
from eval.czsl import evaluate as evaluate_czsl
from eval.czsl_summary import KEEP
from eval.feasibility import Feasibility
from eval.matching import MatchingScores
from eval.matching import evaluate as evaluate_matching
from eval.retrieval import evaluate as evaluate_retrieval
from heads import checkpoint, load_method
from heads.base import Head
from heads.config import describe_cache, git_commit, parse, versions
from heads.errors import CheckpointMismatch, ConfigError, HeadError, RunExists, TaskError
from heads.loader import Loader
from heads.overlap import TrainOverlap, train_overlap
from heads.plans import usual_negatives
from heads.score import Direction, score, score_both, score_open, source_of
from heads.source import check_streams, context_of
from heads.tasks import (
    CompositionData,
    MatchingData,
    RetrievalData,
    TaskData,
    load_task,
    splits_of,
    task_of,
)
from heads.train import FitResult, fit, seed_everything
from heads.train_config import TrainConfig

DIRECTIONS: tuple[Direction, ...] = ("t2i", "i2t")


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run.

    Attributes:
        path: its directory.
        head: with the best weights, in evaluation mode.
        result: history and best validation.

    """

    path: Path
    head: Head
    result: FitResult
    record: dict[str, Any] = field(default_factory=dict)


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
) -> Trained:
    """Train a method on a cache's train split, select on its val split, and keep the result in `out`.

    A head without training needs no train split, and reads none.

    Args:
        cache: a sealed feature cache.
        method: a file of `heads/methods`, or the dotted name of a module with `Config` and `Head`.
        out: the run's directory; refused if it already holds anything.
        task: "czsl", "matching", "two_by_two" or "retrieval"; None takes the cache's only one.
        settings: {"head": {…}, "train": {…}} as `read_settings` returns.
        label: its name in tables; None leaves that to the method's name and what differs in its configuration.
        backbone: where the cache's backbone lies now, `family:checkpoint`, for a method that runs a side of it; None is
            where it lay when the cache was built.
        progress: show a bar.

    Raises:
        RunExists, ConfigError, TaskError, MissingStream, CheckpointMismatch, TrainingDiverged: see their messages.
            Nothing is written before training has ended.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise RunExists(f"{out} already exists; choose another --out, or remove it")
    module = load_method(method)
    settings = settings or {}
    head_config = parse(module.Config, settings.get("head", {}), "head")
    train_config = parse(TrainConfig, settings.get("train", {}), "train")
    task = task_of(cache, task)
    _check_task(module.Head, method, task)
    needs = module.Head.needs(head_config)
    check_streams(cache, needs, method)
    if backbone is not None:
        checkpoint.refuse_unused(bool(needs.live), method)
    trains = module.Head.training_kind != "none"
    context = module.Head.prepare(head_config, context_of(cache, backbone), cache)
    data = load_task(cache, task, "train", allow_missing=True) if trains else None
    validation = (
        load_task(cache, task, "val", allow_missing=True)
        if "val" in splits_of(cache, task)
        else None
    )
    train_config = _settled(train_config, data, validation)

    seed_everything(train_config.seed)
    head: Head = module.Head(head_config, context).to(train_config.torch_device())
    # Made only now that nothing is wrong with the request, but before training: an unwritable place shows at once.
    out.mkdir(parents=True, exist_ok=True)
    batches = None
    if data is not None:
        batches = Loader(
            data,
            head.needs(head_config),
            batch_size=train_config.batch_size,
            seed=train_config.seed,
            negatives=train_config.negatives,
            device=train_config.torch_device(),
        )
    validate = _validator(validation, head) if validation is not None else None
    result = fit(head, batches, train_config, validate=validate, progress=progress)
    record = {
        "method": checkpoint.method_name(head),
        **({"label": label} if label else {}),
        "task": task,
        "seed": train_config.seed,
        "head": head.config.model_dump(mode="json"),
        "train": train_config.model_dump(mode="json"),
        "device": str(train_config.torch_device()),
        "parameters": head.n_trained(),
        "examples": {
            "train": len(data) if data else 0,
            "val": len(validation) if validation else 0,
        },
        "dropped": {
            "train": len(data.dropped) if data else 0,
            "val": len(validation.dropped) if validation else 0,
        },
        "selected_on": f"val {train_config.select}" if validation is not None and trains else None,
        "best": result.best,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "data_wait_seconds": round(batches.waited, 3) if batches else 0.0,
        "versions": versions(),
        "commit": git_commit(),
        "cache": describe_cache(cache),
    }
    checkpoint.save(head, out)
    lines = "".join(f"{json.dumps(line)}\n" for line in result.history)
    (out / "history.jsonl").write_text(lines, encoding="utf-8")
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (out / "run.json").write_text(f"{text}\n", encoding="utf-8")
    return Trained(out, head, result, record)


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
    directions: Sequence[Direction | None] = DIRECTIONS if task == "retrieval" else (None,)
    is_open = world == "open" and task == "czsl"
    if (feasibility is not None or dense) and not is_open:
        raise TaskError("feasibility and dense are for open worlds of czsl; this is another table")
    scored = describe_cache(cache)
    parts = [
        *(
            [cache.place.name.removesuffix(".zarr")]
            if scored["digest"] != record["cache"]["digest"]
            else []
        ),
        *([task] if task != record["task"] else []),
        split,
        *(["open"] if is_open else []),
    ]
    paths = {}
    for direction in directions:
        words = [*parts, *filter(None, [direction, f"rerank{rerank}" if rerank else None])]
        paths[direction] = run / f"scores-{'-'.join(words)}.zarr"
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
        table = replace(tables[direction], meta={**tables[direction].meta, **facts})
        score_io.save(table, path, run={"run": run.name, **record, "cache": scored, **facts})
    return list(paths.values())


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
        return train_overlap(trained, record["task"], cache, task, split)
    except (CacheError, HeadError, OSError) as error:
        return TrainOverlap(None, why=str(error))


def read_run(run: str | Path) -> dict[str, Any]:
    """The record of a run.

    Raises:
        FileNotFoundError: not a run directory.
        CheckpointMismatch: its `run.json` is damaged.
    """
    path = Path(run) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{run} is no run: {path} is missing; make one with `headstart train`"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _ = record["task"], record["cache"]["path"], record["cache"]["digest"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointMismatch(
            f"{path} is no record of a run ({error!r}); train it again"
        ) from error
    return record


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


def metrics(head: Head, data: TaskData, **options: Any) -> dict[str, float]:
    """Score and evaluate at once: czsl's and matching's metrics, or both directions of retrieval with `rsum`.

    Args:
        head: trained or in training.
        data: a split of one task.
        options: passed on to `score`.
    """
    if isinstance(data, RetrievalData):
        both = score_both(head, data, **options)
        found: dict[str, float] = {}
        for direction, table in (("t2i", both.t2i), ("i2t", both.i2t)):
            values = evaluate_retrieval(table)
            found |= {f"{direction}_{name}": value for name, value in values.items()}
        recalls = [value for name, value in found.items() if "_recall@" in name]
        return found | {"rsum": sum(recalls)}
    scores = score(head, data, **options)
    if isinstance(scores, Composition):
        return evaluate_czsl(scores)
    assert isinstance(scores, MatchingScores)
    return evaluate_matching(scores)


def _validator(data: TaskData, head: Head):
    """`validate` for `fit`: the rows of the split are read once and kept."""
    source = source_of(head, data)
    return lambda head: metrics(head, data, source=source)


def _settled(
    config: TrainConfig, data: TaskData | None, validation: TaskData | None
) -> TrainConfig:
    """Replace "auto" and None by what they mean for these data, so that the record says what was done."""
    negatives = config.negatives
    if negatives == "auto":
        negatives = usual_negatives(data) if data else "none"
    select = config.select
    if select is None and validation is not None:
        select = _selection(validation)
    return config.model_copy(update={"negatives": negatives, "select": select})


def _selection(data: TaskData) -> str:
    """Validation metric that chooses the weights (docs/protocols.md, model selection)."""
    if isinstance(data, MatchingData):
        return "group_score" if data.kind == "two_by_two" else "accuracy"
    if isinstance(data, CompositionData):
        # Without images of both kinds there is no curve, and hence no area under it.
        return "auc" if len(set(data.seen[data.target].tolist())) == 2 else "pair_acc"
    return "rsum"


def _check_task(head: type[Head], method: str, task: str) -> None:
    if task not in head.tasks:
        raise ConfigError(f"{method} works on {', '.join(sorted(head.tasks))}, not on {task}")
