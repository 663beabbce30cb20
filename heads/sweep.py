"""Several heads, settings or seeds trained on one cache in one pass: what they share is read once.

    rows that fit on the device or in memory      held once, for all runs of the sweep
    runs of the same batches (Batches)            step side by side on each batch; from disk, each chunk is read once
    other batch sizes, negatives or orders        one group after another, from the same rows

A run ends in the same bits here as alone, where its rows are held in the same place: beside others they share one
limit of memory, and rows that no longer fit come in the order of a block shuffle (loader.py).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

from cache_builder import FeatureCache
from heads import checkpoint, load_method
from heads.base import Context, Head, Needs
from heads.config import describe_cache, git_commit, parse, versions
from heads.errors import ConfigError, RunExists, TrainingDiverged
from heads.loader import Loader
from heads.plans import Negatives, usual_negatives
from heads.source import Source, check_streams, context_of
from heads.tasks import TaskData, load_task, rows_of, splits_of, task_of
from heads.train import fit_together
from heads.train_config import TrainConfig
from heads.training import FitResult, Training, seed_everything
from heads.validation import selection, validator


@dataclass(frozen=True, slots=True)
class Wanted:
    """A run that is to be made; fields as the arguments of `heads.runs.train_run`."""

    method: str
    out: Path
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    label: str | None = None
    backbone: str | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run.

    Attributes:
        path: its directory.
        head: with the best weights, in evaluation mode.
        result: history and best validation.
        record: what `run.json` says.

    """

    path: Path
    head: Head
    result: FitResult
    record: dict[str, Any] = field(default_factory=dict)


class Batches(NamedTuple):
    """What runs must have in common to take the same batches."""

    batch_size: int
    negatives: Negatives
    order_seed: int
    device: str


@dataclass(frozen=True, slots=True)
class _Run:
    """A run whose request is known to be sound."""

    wanted: Wanted
    head_config: Any
    train: TrainConfig
    context: Context
    kind: type[Head]

    @property
    def needs(self) -> Needs:
        return self.kind.needs(self.head_config)

    @property
    def batches(self) -> Batches:
        config = self.train
        order = config.seed if config.order_seed is None else config.order_seed
        return Batches(config.batch_size, config.negatives, order, str(config.torch_device()))

    def build(self) -> Head:
        seed_everything(self.train.seed)
        return self.kind(self.head_config, self.context).to(self.train.torch_device())


def train_runs(
    cache: FeatureCache, wanted: Sequence[Wanted], *, task: str | None = None, progress: bool = True
) -> list[Trained | TrainingDiverged]:
    """Train methods on a cache's train split, select on its val split, and keep each result in its `out`.

    Args:
        cache: a sealed feature cache.
        wanted: the runs; a run that diverges does not hold up the others, and leaves an empty directory.
        task: "czsl", "matching", "two_by_two" or "retrieval"; None takes the cache's only one.
        progress: show bars.

    Returns:
        The runs in their order, or why one diverged.

    Raises:
        RunExists, ConfigError, TaskError, MissingStream, CheckpointMismatch: see their messages. Nothing is written
            before all requests are known to be sound, and a run's files only when its training has ended.
    """
    _check_places([w.out for w in wanted])
    task = task_of(cache, task)
    runs = [_sound(cache, w, task) for w in wanted]
    learns = any(run.kind.training_kind != "none" for run in runs)
    data = load_task(cache, task, "train", allow_missing=True) if learns else None
    has_val = "val" in splits_of(cache, task)
    held_out = load_task(cache, task, "val", allow_missing=True) if has_val else None
    runs = [_settled(run, data, held_out) for run in runs]
    built = [run.build() for run in runs]
    # Made only now that nothing is wrong with the requests, but before training: an unwritable place shows at once.
    for run in runs:
        run.wanted.out.mkdir(parents=True, exist_ok=True)
    sources = _Sources(runs, data, held_out)
    done: dict[Path, Trained | TrainingDiverged] = {}
    for common, group in _groups(runs):
        batches = sources.loader(common, [runs[i] for i in group])
        trainings = [Training(built[i], runs[i].train, sources.validation(runs[i])) for i in group]
        results = fit_together(trainings, batches, progress=progress)
        for i, result in zip(group, results, strict=True):
            out = runs[i].wanted.out
            if isinstance(result, TrainingDiverged):
                done[out] = result
                continue
            record = {
                **_record(runs[i], built[i], result, task, data, held_out),
                "data_wait_seconds": round(batches.waited, 3) if batches else 0.0,
                "beside": len(group) - 1,
                "cache": describe_cache(cache),
            }
            _write(out, built[i], result, record)
            done[out] = Trained(out, built[i], result, record)
    return [done[run.wanted.out] for run in runs]


class _Sources:
    """The rows of both splits, held once, and what each run sees of them."""

    def __init__(
        self, runs: Sequence[_Run], data: TaskData | None, held_out: TaskData | None
    ) -> None:
        self.data, self.held_out = data, held_out
        self.sources: dict[tuple[str, str], Source] = {}
        self.runs = runs

    def _source(self, split: str, data: TaskData, device: str) -> Source:
        """Rows of a split on a device, with the streams of all runs there that use it."""
        if (split, device) not in self.sources:
            uses = [
                run.needs
                for run in self.runs
                if run.batches.device == device
                and (split == "val" or run.kind.training_kind != "none")
            ]
            images, texts = rows_of(data)
            self.sources[split, device] = Source(
                data.cache, reduce(or_, uses), images, texts, device=device
            )
        return self.sources[split, device]

    def loader(self, common: Batches, runs: Sequence[_Run]) -> Loader | None:
        """Batches for a group of runs; None where nothing is trained."""
        learning = [run.needs for run in runs if run.kind.training_kind != "none"]
        if self.data is None or not learning:
            return None
        source = self._source("train", self.data, common.device)
        needs = reduce(or_, learning)
        return Loader(
            self.data,
            needs,
            batch_size=common.batch_size,
            seed=common.order_seed,
            negatives=common.negatives,
            device=common.device,
            source=source.only(needs),
        )

    def validation(self, run: _Run):
        """`validate` of a run, if there is a val split."""
        if self.held_out is None:
            return None
        source = self._source("val", self.held_out, run.batches.device)
        return validator(self.held_out, source.only(run.needs))


def _sound(cache: FeatureCache, wanted: Wanted, task: str) -> _Run:
    """A request that was looked at: its method, its settings, the streams it wants."""
    method, head = wanted.method, load_method(wanted.method).Head
    head_config = parse(load_method(method).Config, wanted.settings.get("head", {}), "head")
    train = parse(TrainConfig, wanted.settings.get("train", {}), "train")
    if task not in head.tasks:
        raise ConfigError(f"{method} works on {', '.join(sorted(head.tasks))}, not on {task}")
    needs = head.needs(head_config)
    check_streams(cache, needs, method)
    if wanted.backbone is not None:
        checkpoint.refuse_unused(bool(needs.live), method)
    context = head.prepare(head_config, context_of(cache, wanted.backbone), cache)
    return _Run(wanted, head_config, train, context, head)


def _settled(run: _Run, data: TaskData | None, held_out: TaskData | None) -> _Run:
    """Replace "auto" and None by what they mean for these data, so that the record says what was done."""
    negatives, select = run.train.negatives, run.train.select
    if negatives == "auto":
        learns = data is not None and run.kind.training_kind != "none"
        negatives = usual_negatives(data) if learns else "none"
    if select is None and held_out is not None:
        select = selection(held_out)
    train = run.train.model_copy(update={"negatives": negatives, "select": select})
    return replace(run, train=train)


def _groups(runs: Sequence[_Run]) -> Iterator[tuple[Batches, list[int]]]:
    """Numbers of the runs that take the same batches, in order of first appearance."""
    found: dict[Batches, list[int]] = {}
    for i, run in enumerate(runs):
        found.setdefault(run.batches, []).append(i)
    yield from found.items()


def _check_places(places: Sequence[Path]) -> None:
    for out in places:
        if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
            raise RunExists(f"{out} already exists; choose another --out, or remove it")
    if twice := sorted({str(out) for out in places if places.count(out) > 1}):
        raise ConfigError(f"several runs would be kept in {twice[0]}; give each a place of its own")


def _record(
    run: _Run,
    head: Head,
    result: FitResult,
    task: str,
    data: TaskData | None,
    held_out: TaskData | None,
) -> dict[str, Any]:
    """What is known of a run, beside its cache and its waiting."""
    selects = held_out is not None and head.training_kind != "none"
    splits = {"train": data if head.training_kind != "none" else None, "val": held_out}
    return {
        "method": checkpoint.method_name(head),
        **({"label": run.wanted.label} if run.wanted.label else {}),
        "task": task,
        "seed": run.train.seed,
        "head": head.config.model_dump(mode="json"),
        "train": run.train.model_dump(mode="json"),
        "device": str(run.train.torch_device()),
        "parameters": head.n_trained(),
        "examples": {name: len(split) if split else 0 for name, split in splits.items()},
        "dropped": {name: len(split.dropped) if split else 0 for name, split in splits.items()},
        "selected_on": f"val {run.train.select}" if selects else None,
        "best": result.best,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "versions": versions(),
        "commit": git_commit(),
    }


def _write(out: Path, head: Head, result: FitResult, record: Mapping[str, Any]) -> None:
    """The record comes last: a directory with one is a finished run."""
    checkpoint.save(head, out)
    lines = "".join(f"{json.dumps(line)}\n" for line in result.history)
    (out / "history.jsonl").write_text(lines, encoding="utf-8")
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (out / "run.json").write_text(f"{text}\n", encoding="utf-8")
