"""What the runs of a sweep read: splits joined with their rows once, and rows that are held once for all of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

from cache_builder import FeatureCache
from heads.base import Head, Needs
from heads.loader import Loader
from heads.plans import usual_negatives
from heads.source import Source
from heads.tasks import TaskData, TripletData, load_task, rows_of, splits_of
from heads.validation import selection, validator
from heads.wanted import Batches, Sound


class Splits:
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


class SharedRows:
    """The rows of both splits, held once, and what each run sees of them."""

    def __init__(self, runs: Sequence[Sound], data: Splits) -> None:
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


def settled(run: Sound, data: Splits) -> Sound:
    """Replace "auto" and None by what they mean for these data, so that the record says what was done."""
    negatives, select = run.train.negatives, run.train.select
    train, held_out = data.train(run), data.held_out(run)
    if negatives == "auto":
        negatives = "none" if train is None else usual_negatives(train)
    if select is None and held_out is not None:
        select = selection(held_out)
    settled = run.train.model_copy(update={"negatives": negatives, "select": select})
    return replace(run, train=settled)
