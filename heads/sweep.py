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
from collections.abc import Iterator, Sequence, Sized
from contextlib import nullcontext
from threading import Event
from typing import Any

from cache_builder import FeatureCache
from heads import load_method, ranks, training_state
from heads.costs import costs
from heads.errors import HeadError
from heads.keeper import Keeper, Kept
from heads.learner import FitResult, Learner
from heads.loader import Loader
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
from heads.shared_rows import SharedRows, Splits, settled
from heads.tasks import KINDS, task_of
from heads.tensorboard import Events, open_for
from heads.train import fit_together
from heads.wanted import Batches, Sound, Wanted, sound


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
    data = Splits(cache, task)
    runs = [settled(sound(cache, w, task), data) for w in wanted]
    done: dict[int, Trained | Failed] = {}
    for i, run in enumerate(runs):
        if run.wanted.out in finished:
            device, backbone = run.train.torch_device(), run.wanted.backbone
            if ranks.is_first():
                done[i] = read_trained(run.wanted.out, _belongs(run, cache), device, backbone)
            else:
                done[i] = Trained(run.wanted.out, run.build(), FitResult())
    sources = SharedRows(runs, data)
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
                facts = {
                    **_facts(run, cache, data),
                    "beside": len(groups[common]) - 1,
                    "processes": ranks.n_ranks(),
                    "held": sources.places(run),
                }
                done[i] = write(out, learner.head, run.train, result, cache, facts)
    return [done[i] for i in range(len(runs))]


def _facts(run: Sound, cache: FeatureCache, data: Splits) -> dict[str, Any]:
    """What a run's record says of what was asked and of the examples there were."""
    splits = {"train": data.train(run), "val": data.held_out(run)}
    return {
        **({"label": run.wanted.label} if run.wanted.label else {}),
        "task": run.task,
        **({"learned": run.learned} if run.learned != run.task else {}),
        "asked": run.wanted.settings,
        **({"command": line} if (line := run.command(cache)) else {}),
        "costs": costs(cache, run.needs | run.training_needs),
        "examples": {name: _n(split) for name, split in splits.items()},
        "dropped": {name: _n(split and split.dropped) for name, split in splits.items()},
        **data.filtered(run),
        "selected_on": data.selected_on(run),
    }


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
    data = Splits(cache, task)
    for w in wanted:
        if (w.out / RECORD).exists():
            check_finished(w.out, _belongs(settled(sound(cache, w, task), data), cache))


def _n(some: Sized | None) -> int:
    return 0 if some is None else len(some)
