"""Several heads, settings or seeds trained on one cache in one pass: what they share is read once.

    rows that fit on the device or in memory      held once, for all runs of the sweep
    runs of the same batches (Batches)            step side by side on each batch; from disk, each chunk is read once
    other batch sizes, negatives or orders        one group after another, from the same rows
    a val split that does not fit in memory       read by each validation

A run ends in the same bits here as alone, where its rows are held in the same place: beside others they share one
limit of memory, and rows that no longer fit come in the order of a block shuffle (loader.py).

An interrupted sweep goes on where it stood: runs that are finished stay, those that stand at the same batch go on side
by side, under the limits of memory that they began under.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel

from cache_builder import FeatureCache
from heads import checkpoint, load_method, ranks, training_state
from heads.base import Context, Head, Needs
from heads.commands import train_command
from heads.config import parse
from heads.costs import costs
from heads.errors import ConfigError, HeadError
from heads.keeper import Keeper, Kept
from heads.learner import FitResult, Learner, seed_everything
from heads.loader import Loader
from heads.plans import Negatives, usual_negatives
from heads.run_files import (
    RECORD,
    Failed,
    Trained,
    anywhere,
    check_finished,
    check_places,
    check_same,
    read_trained,
    taken,
    write,
)
from heads.source import Source, check_roles, check_streams, context_of
from heads.tasks import KINDS, TaskData, TripletData, load_task, rows_of, splits_of, task_of
from heads.tensorboard import Events, open_for
from heads.train import fit_together
from heads.train_config import TrainConfig
from heads.validation import selection, validator


@dataclass(frozen=True, slots=True)
class Wanted:
    """A run that is to be made; fields as the arguments of `heads.runs.train_run`.

    `command` is the command line that makes it, where it is not `headstart train` alone.
    """

    method: str
    out: Path
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    label: str | None = None
    backbone: str | None = None
    command: str = ""


class Batches(NamedTuple):
    """What runs must have in common to take the same batches; `learned` is what they are trained on."""

    learned: str
    batch_size: int
    negatives: Negatives
    order_seed: int
    device: str


@dataclass(frozen=True, slots=True)
class Sound:
    """A request that was looked at, and is in order.

    Attributes:
        wanted: the request.
        task: what it is trained for.
        kind: the method's head.
        head_config, train: its settings.
        context: what its head is built from.

    """

    wanted: Wanted
    task: str
    kind: type[Head]
    head_config: Any
    train: TrainConfig
    context: Context

    @property
    def learns(self) -> bool:
        """Does it want a train split?"""
        return self.kind.trained_by(self.head_config) != "none"

    @property
    def learned(self) -> str:
        """The task whose train split it is trained on."""
        return self.kind.learns_from(self.head_config) or self.task

    @property
    def needs(self) -> Needs:
        """Streams it reads when it scores."""
        return self.kind.needs(self.head_config)

    @property
    def training_needs(self) -> Needs:
        """Streams of its batches."""
        return self.kind.training_needs(self.head_config)

    @property
    def batches(self) -> Batches:
        """What it must have in common with others to take the same batches."""
        config = self.train
        order = config.seed if config.order_seed is None else config.order_seed
        device = str(config.torch_device())
        return Batches(self.learned, config.batch_size, config.negatives, order, device)

    def command(self, cache: FeatureCache) -> str:
        """The command that makes this run by itself; empty where none can say its settings."""
        wanted = self.wanted
        configs = {"head": self.head_config, "train": self.train}
        settings = {
            name: _without_defaults(configs[name], values)
            for name, values in wanted.settings.items()
        }
        return wanted.command or train_command(
            wanted.method,
            wanted.out.absolute(),
            cache=cache.place.absolute(),
            task=self.task,
            settings=settings,
            backbone=wanted.backbone,
            threads=torch.get_num_threads(),
        )

    def build(self) -> Head:
        """Its head, freshly drawn."""
        seed_everything(self.train.seed)
        return self.kind(self.head_config, self.context).to(self.train.torch_device())


def _without_defaults(config: BaseModel, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings less those None that say what is so anyway, since no command line has a word for None."""
    fields = type(config).model_fields
    return {
        key: value
        for key, value in values.items()
        if value is not None or fields[key].get_default(call_default_factory=True) is not None
    }


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
    if head.trained_by(head_config) != "none":
        check_streams(cache, head.training_needs(head_config), method)
    if task in cache.tasks.kinds:
        check_roles(needs, task, method)
        check_streams(cache, needs, method)
    if wanted.backbone is not None:
        checkpoint.refuse_unused(bool(needs.live), method)
    context = head.prepare(head_config, context_of(cache, wanted.backbone), cache)
    return Sound(wanted, task, head, head_config, train, context)


def train_runs(
    cache: FeatureCache,
    wanted: Sequence[Wanted],
    *,
    task: str | None = None,
    progress: bool = True,
    save_every: float = 0.0,
    resume: bool = False,
    stop: Event | None = None,
    tensorboard: bool = False,
) -> list[Trained | Failed]:
    """Train methods on a cache's train split, select on its val split, and keep each result in its `out`.

    Args:
        cache: a sealed feature cache.
        wanted: the runs; one that fails in training does not hold up the others, and leaves nothing.
        task: one of `heads.tasks.KINDS`; None takes the only one that the cache has and the methods score.
        progress: show bars.
        save_every: minutes between two writings of where the training stands; 0 writes only when `stop` is set.
        resume: go on with what was interrupted, to the bits of an undisturbed training, and take what is finished as it
            is; what was not begun starts.
        stop: once set, the step in hand is finished, the state written and `KeyboardInterrupt` raised.
        tensorboard: tell the history of each run to TensorBoard while it grows (tensorboard.py).

    Returns:
        The runs in their order, or why one failed.

    Raises:
        RunExists, ConfigError, TaskError, MissingStream, CheckpointMismatch: see their messages. Nothing is written
            before all requests are known to be sound, and a run's files only when its training has ended.
    """
    finished = {w.out for w in wanted if resume and (w.out / RECORD).exists()}
    if ranks.is_first():
        check_places([w.out for w in wanted if w.out not in finished], resume=resume)
    among = frozenset(KINDS).intersection(*(load_method(w.method).Head.tasks for w in wanted))
    task = task_of(cache, task, among)
    data = _Data(cache, task)
    runs = [_settled(sound(cache, w, task), data) for w in wanted]
    done: dict[int, Trained | Failed] = {}
    for i, run in enumerate(runs):
        if run.wanted.out in finished:
            device, backbone = run.train.torch_device(), run.wanted.backbone
            if ranks.is_first():
                done[i] = read_trained(run.wanted.out, _belongs(run, cache), device, backbone)
            else:
                done[i] = Trained(run.wanted.out, run.build(), FitResult())
    sources = _Sources(runs, data)
    learners = {
        i: Learner(run.build(), run.train, sources.validation(run))
        for i, run in enumerate(runs)
        if i not in done
    }
    telling = learners if tensorboard and ranks.is_first() else ()
    events = {i: Events(runs[i].wanted.out) for i in telling}
    groups: dict[Batches, list[int]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(run.batches, []).append(i)
    parts: list[tuple[Batches, list[int], Loader | None, Keeper]] = []
    for common, everyone in groups.items():
        for members, found in _abreast(runs, [i for i in everyone if i in learners]):
            # Its rows are those of all runs, also of finished ones: they decide where rows are held, hence the order.
            batches = sources.loader(common, [runs[i] for i in everyone], found and found.room)
            belongs = {i: _belongs(runs[i], cache, batches) for i in members}
            if found is not None:
                for i in members:
                    out = runs[i].wanted.out
                    check_same(out, found.states[out][1]["belongs"], belongs[i])
            kept = [
                Kept(learners[i], runs[i].wanted.out, belongs[i], events.get(i))
                for i in members
                if learners[i].head.training_by == "gradient"
            ]
            room = {} if batches is None else batches.room
            keeper = Keeper(kept, every=save_every, stop=stop, found=found, room=room)
            parts.append((common, members, batches, keeper))
    # Made only now that nothing is wrong with the requests, but before training: an unwritable place shows at once.
    places = [runs[i].wanted.out for i in learners]
    ranks.wait()  # one process changes what all of them have read
    with (
        taken(places, resume=resume) if ranks.is_first() else nullcontext(),
        open_for(events.values(), RECORD),
    ):
        for common, members, batches, keeper in parts:
            if ranks.anywhere(flag=stop is not None and stop.is_set()):
                raise KeyboardInterrupt
            group = [learners[i] for i in members]
            results = fit_together(group, batches, progress=progress, keeper=keeper)
            for i, learner, result in zip(members, group, results, strict=True):
                run, out = runs[i], runs[i].wanted.out
                if isinstance(result, HeadError):
                    done[i] = Failed(out, result)
                    if ranks.is_first():
                        training_state.clear(out)
                    if i in events:
                        events[i].forget()
                    continue
                if not ranks.is_first():
                    done[i] = Trained(out, learner.head, result)
                    continue
                if i in events:
                    events[i].end(result.history)
                splits = {"train": data.train(run), "val": data.held_out(run)}
                facts = {
                    **({"label": run.wanted.label} if run.wanted.label else {}),
                    "task": task,
                    **({"learned": run.learned} if run.learned != task else {}),
                    "asked": run.wanted.settings,
                    **({"command": line} if (line := run.command(cache)) else {}),
                    "costs": costs(cache, run.needs | run.training_needs),
                    "examples": {name: _n(split) for name, split in splits.items()},
                    "dropped": {
                        name: _n(split and split.dropped) for name, split in splits.items()
                    },
                    **data.filtered(run),
                    "selected_on": data.selected_on(run),
                    "beside": len(groups[common]) - 1,
                    "processes": ranks.n_ranks(),
                    "held": sources.places(run),
                }
                done[i] = write(out, learner.head, run.train, result, cache, facts)
    return [done[i] for i in range(len(runs))]


def _abreast(
    runs: Sequence[Sound], members: Sequence[int]
) -> Iterator[tuple[list[int], training_state.Found | None]]:
    """Of runs that take the same batches, those that stand at the same one, and what they go on from."""
    begun: set[int] = set()
    for found in training_state.find([runs[i].wanted.out for i in members]):
        part = [i for i in members if runs[i].wanted.out in found.states]
        begun.update(part)
        yield part, found
    if new := [i for i in members if i not in begun]:
        yield new, None


def _belongs(run: Sound, cache: FeatureCache, batches: Loader | None = None) -> dict[str, Any]:
    """What must be the same when a run goes on; `batches`, while it is trained."""
    facts = {
        "method": run.wanted.method,
        "task": run.task,
        "learned": run.learned,
        "asked": run.wanted.settings,
        "head": run.head_config.model_dump(mode="json"),
        "train": run.train.model_dump(mode="json"),
        "device": run.train.torch_device().type,
        "processes": ranks.n_ranks(),
        "cache": {
            "fingerprint": cache.fingerprint,
            "digest": cache.digest(),
            "asked": cache.asked and cache.asked.digest(),
        },
        **({} if batches is None else {"order": batches.order}),
    }
    return json.loads(json.dumps(anywhere(facts)))


def check_standing(cache: FeatureCache, wanted: Sequence[Wanted], task: str) -> None:
    """Refuse requests that are not sound, or in whose place something else was finished.

    Args as of `train_runs`.

    Raises:
        RunExists, ConfigError, MissingStream, CheckpointMismatch: see their messages.
    """
    data = _Data(cache, task)
    for w in wanted:
        if (w.out / RECORD).exists():
            check_finished(w.out, _belongs(_settled(sound(cache, w, task), data), cache))


class _Data:
    """The splits that runs are trained and validated on, each joined with its rows once."""

    def __init__(self, cache: FeatureCache, task: str) -> None:
        self.cache, self.task = cache, task
        self.loaded: dict[tuple[str, str], TaskData] = {}

    def train(self, run: Sound) -> TaskData | None:
        """What a run is trained on; None for a head without training."""
        return self._load(run.learned, "train") if run.learns else None

    def held_out(self, run: Sound) -> TaskData | None:
        """What a run is validated on: its task's val split, or else that of its triplets, if there is one."""
        for kind in dict.fromkeys((self.task, *({run.learned} & {"triplets"}))):
            if "val" in splits_of(self.cache, kind):
                return self._load(kind, "val")
        return None

    def filtered(self, run: Sound) -> dict[str, Any]:
        """How many train examples were left out as not worth training on, by reason; nothing where none can be."""
        train = self.train(run)
        return {"filtered": train.filtered} if isinstance(train, TripletData) else {}

    def selected_on(self, run: Sound) -> str | None:
        """What chose a run's weights, in words."""
        held_out = self.held_out(run)
        if held_out is None or not run.learns:
            return None
        of = "" if held_out.kind == self.task else f" of {held_out.kind}"
        return f"val {run.train.select}{of}"

    def _load(self, kind: str, split: str) -> TaskData:
        if (kind, split) not in self.loaded:
            self.loaded[kind, split] = load_task(self.cache, kind, split, allow_missing=True)
        return self.loaded[kind, split]


class _Sources:
    """The rows of both splits, held once, and what each run sees of them."""

    def __init__(self, runs: Sequence[Sound], data: _Data) -> None:
        self.data, self.runs = data, runs
        self.sources: dict[tuple[str, str, str], Source] = {}

    def _source(self, data: TaskData, device: str, room: Mapping[str, int] | None = None) -> Source:
        """Rows of a split on a device, with the streams of all runs there that use it; held under limits, if given."""
        key = (data.kind, data.split, device)
        if key not in self.sources:
            runs = [run for run in self.runs if run.batches.device == device]
            uses = [_read(run, data) for run in runs if any(mine is data for mine in self._of(run))]
            images, texts = rows_of(data)
            limits = {
                "ram_limit": None if room is None else room["memory"],
                "device_limit": None if room is None else room["device"],
            }
            self.sources[key] = Source(
                data.cache, reduce(or_, uses), images, texts, device=device, **limits
            )
        return self.sources[key]

    def _of(self, run: Sound) -> tuple[TaskData | None, ...]:
        return self.data.train(run), self.data.held_out(run)

    def loader(
        self, common: Batches, runs: Sequence[Sound], room: Mapping[str, int] | None = None
    ) -> Loader | None:
        """Batches for a group of runs; None where nothing is trained. With `room`, under limits that once were."""
        learning = [run for run in runs if run.learns]
        data = self.data.train(learning[0]) if learning else None
        if data is None:
            return None
        needs = reduce(or_, (run.training_needs for run in learning))
        return Loader(
            data,
            needs,
            batch_size=common.batch_size,
            seed=common.order_seed,
            negatives=common.negatives,
            ram_limit=None if room is None else room["pools"],
            device=common.device,
            source=self._source(data, common.device, room).only(needs),
        )

    def places(self, run: Sound) -> dict[str, list[str]]:
        """Where the rows of a run's train split are held; others may share them."""
        data = self.data.train(run)
        if data is None:
            return {}
        source = self._source(data, run.batches.device).only(run.training_needs)
        everywhere = {*source.queries, *source.candidates}
        elsewhere = {*source.on_device, *source.on_disk}
        return {
            "device": sorted(source.on_device),
            "memory": sorted(everywhere - elsewhere),
            "disk": sorted(source.on_disk),
        }

    def validation(self, run: Sound) -> Callable[[Head], dict[str, float]] | None:
        """`validate` of a run, if there is a val split."""
        data = self.data.held_out(run)
        if data is None:
            return None
        source = self._source(data, run.batches.device)
        return validator(data, source.only(_read(run, data)))


def _read(run: Sound, data: TaskData) -> Needs:
    """Streams that a run reads of a split: those of its batches where it is what it learns from."""
    return run.training_needs if data.kind == run.learned else run.needs


def _settled(run: Sound, data: _Data) -> Sound:
    """Replace "auto" and None by what they mean for these data, so that the record says what was done."""
    negatives, select = run.train.negatives, run.train.select
    train, held_out = data.train(run), data.held_out(run)
    if negatives == "auto":
        negatives = "none" if train is None else usual_negatives(train)
    if select is None and held_out is not None:
        select = selection(held_out)
    settled = run.train.model_copy(update={"negatives": negatives, "select": select})
    return replace(run, train=settled)


def _n(some: Sized | None) -> int:
    return 0 if some is None else len(some)
