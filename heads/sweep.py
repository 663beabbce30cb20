"""Several heads, settings or seeds trained on one cache in one pass: what they share is read once.

    rows that fit on the device or in memory      held once, for all runs of the sweep
    runs of the same batches (Batches)            step side by side on each batch; from disk, each chunk is read once
    other batch sizes, negatives or orders        one group after another, from the same rows
    a val split that does not fit in memory       read by each validation

A run ends in the same bits here as alone, where its rows are held in the same place: beside others they share one
limit of memory, and rows that no longer fit come in the order of a block shuffle (loader.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

from cache_builder import FeatureCache
from heads import checkpoint, load_method
from heads.base import Context, Head, Needs
from heads.config import parse
from heads.errors import ConfigError, HeadError
from heads.learner import Learner, seed_everything
from heads.loader import Loader
from heads.plans import Negatives, usual_negatives
from heads.run_files import Failed, Trained, check_places, taken, write
from heads.source import Source, check_streams, context_of
from heads.tasks import TaskData, load_task, rows_of, splits_of, task_of
from heads.train import fit_together
from heads.train_config import TrainConfig
from heads.validation import selection, validator


@dataclass(frozen=True, slots=True)
class Wanted:
    """A run that is to be made; fields as the arguments of `heads.runs.train_run`."""

    method: str
    out: Path
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    label: str | None = None
    backbone: str | None = None


class Batches(NamedTuple):
    """What runs must have in common to take the same batches."""

    batch_size: int
    negatives: Negatives
    order_seed: int
    device: str


@dataclass(frozen=True, slots=True)
class Sound:
    """A request that was looked at, and is in order.

    Attributes:
        wanted: the request.
        kind: the method's head.
        head_config, train: its settings.
        context: what its head is built from.

    """

    wanted: Wanted
    kind: type[Head]
    head_config: Any
    train: TrainConfig
    context: Context

    @property
    def learns(self) -> bool:
        """Does it want a train split?"""
        return self.kind.training_kind != "none"

    @property
    def needs(self) -> Needs:
        """Streams it reads."""
        return self.kind.needs(self.head_config)

    @property
    def batches(self) -> Batches:
        """What it must have in common with others to take the same batches."""
        config = self.train
        order = config.seed if config.order_seed is None else config.order_seed
        return Batches(config.batch_size, config.negatives, order, str(config.torch_device()))

    def build(self) -> Head:
        """Its head, freshly drawn."""
        seed_everything(self.train.seed)
        return self.kind(self.head_config, self.context).to(self.train.torch_device())


def sound(cache: FeatureCache, wanted: Wanted, task: str) -> Sound:
    """Look at a request: its method, its settings, the streams it wants.

    Raises:
        ConfigError, MissingStream, CheckpointMismatch: what is wrong with it.
    """
    method, module = wanted.method, load_method(wanted.method)
    head = module.Head
    head_config = parse(module.Config, wanted.settings.get("head", {}), "head")
    train = parse(TrainConfig, wanted.settings.get("train", {}), "train")
    if task not in head.tasks:
        raise ConfigError(f"{method} works on {', '.join(sorted(head.tasks))}, not on {task}")
    needs = head.needs(head_config)
    check_streams(cache, needs, method)
    if wanted.backbone is not None:
        checkpoint.refuse_unused(bool(needs.live), method)
    context = head.prepare(head_config, context_of(cache, wanted.backbone), cache)
    return Sound(wanted, head, head_config, train, context)


def train_runs(
    cache: FeatureCache, wanted: Sequence[Wanted], *, task: str | None = None, progress: bool = True
) -> list[Trained | Failed]:
    """Train methods on a cache's train split, select on its val split, and keep each result in its `out`.

    Args:
        cache: a sealed feature cache.
        wanted: the runs; one that fails in training does not hold up the others, and leaves nothing.
        task: "czsl", "matching", "two_by_two" or "retrieval"; None takes the cache's only one.
        progress: show bars.

    Returns:
        The runs in their order, or why one failed.

    Raises:
        RunExists, ConfigError, TaskError, MissingStream, CheckpointMismatch: see their messages. Nothing is written
            before all requests are known to be sound, and a run's files only when its training has ended.
    """
    check_places([w.out for w in wanted])
    task = task_of(cache, task)
    runs = [sound(cache, w, task) for w in wanted]
    learns = any(run.learns for run in runs)
    data = load_task(cache, task, "train", allow_missing=True) if learns else None
    has_val = "val" in splits_of(cache, task)
    held_out = load_task(cache, task, "val", allow_missing=True) if has_val else None
    runs = [_settled(run, data, held_out) for run in runs]
    sources = _Sources(runs, data, held_out)
    learners = [Learner(run.build(), run.train, sources.validation(run)) for run in runs]
    groups: dict[Batches, list[int]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(run.batches, []).append(i)
    loaders = {
        common: sources.loader(common, [runs[i] for i in groups[common]]) for common in groups
    }
    done: dict[int, Trained | Failed] = {}
    # Made only now that nothing is wrong with the requests, but before training: an unwritable place shows at once.
    with taken([run.wanted.out for run in runs]):
        for common, members in groups.items():
            group = [learners[i] for i in members]
            results = fit_together(group, loaders[common], progress=progress)
            for i, learner, result in zip(members, group, results, strict=True):
                run, out = runs[i], runs[i].wanted.out
                if isinstance(result, HeadError):
                    done[i] = Failed(out, result)
                    continue
                facts = {
                    **({"label": run.wanted.label} if run.wanted.label else {}),
                    "task": task,
                    "asked": run.wanted.settings,
                    "examples": _sizes(run, data, held_out, dropped=False),
                    "dropped": _sizes(run, data, held_out, dropped=True),
                    "selected_on": f"val {run.train.select}" if held_out and run.learns else None,
                    "beside": len(members) - 1,
                    "held": sources.places(run),
                }
                done[i] = write(out, learner.head, run.train, result, cache, facts)
    return [done[i] for i in range(len(runs))]


class _Sources:
    """The rows of both splits, held once, and what each run sees of them."""

    def __init__(
        self, runs: Sequence[Sound], data: TaskData | None, held_out: TaskData | None
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
                if run.batches.device == device and (split == "val" or run.learns)
            ]
            images, texts = rows_of(data)
            self.sources[split, device] = Source(
                data.cache, reduce(or_, uses), images, texts, device=device
            )
        return self.sources[split, device]

    def loader(self, common: Batches, runs: Sequence[Sound]) -> Loader | None:
        """Batches for a group of runs; None where nothing is trained."""
        learning = [run.needs for run in runs if run.learns]
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

    def places(self, run: Sound) -> dict[str, list[str]]:
        """Where the rows of a run's train split are held; others may share them."""
        if self.data is None or not run.learns:
            return {}
        source = self._source("train", self.data, run.batches.device).only(run.needs)
        everywhere = {*source.queries, *source.candidates}
        elsewhere = {*source.on_device, *source.on_disk}
        return {
            "device": sorted(source.on_device),
            "memory": sorted(everywhere - elsewhere),
            "disk": sorted(source.on_disk),
        }

    def validation(self, run: Sound) -> Callable[[Head], dict[str, float]] | None:
        """`validate` of a run, if there is a val split."""
        if self.held_out is None:
            return None
        source = self._source("val", self.held_out, run.batches.device)
        return validator(self.held_out, source.only(run.needs))


def _settled(run: Sound, data: TaskData | None, held_out: TaskData | None) -> Sound:
    """Replace "auto" and None by what they mean for these data, so that the record says what was done."""
    negatives, select = run.train.negatives, run.train.select
    if negatives == "auto":
        negatives = usual_negatives(data) if data is not None and run.learns else "none"
    if select is None and held_out is not None:
        select = selection(held_out)
    train = run.train.model_copy(update={"negatives": negatives, "select": select})
    return replace(run, train=train)


def _sizes(
    run: Sound, data: TaskData | None, held_out: TaskData | None, *, dropped: bool
) -> dict[str, int]:
    splits = {"train": data if run.learns else None, "val": held_out}
    return {
        name: 0 if split is None else len(split.dropped if dropped else split)
        for name, split in splits.items()
    }
