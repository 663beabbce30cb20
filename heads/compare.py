"""Backbones × methods × seeds on identical samples: every combination trained and scored once.

Each combination becomes an ordinary run directory, `OUT/<backbone>/<label>-seed<n>`, so `eval` reads a comparison
exactly as it reads runs made by hand. Heads without randomness run under the first seed only.

    samples    caches that do not hold the same are refused; on_shared (samples.py) makes them ask the same
    a pass     all rows of one backbone, task and seed: trained side by side (sweep.py), so that what they read is read
               once, then scored; who does it, compare_engines.py knows
    resume     a finished run of the same request is kept, and scored where it was not yet; one that was interrupted
               goes on from where its training stood
"""

import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any, NoReturn

import torch
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from cache_builder import FeatureCache
from cache_builder.datasets.base import Tasks
from eval.errors import ScoreTableError
from heads.base import Head
from heads.compare_engines import STOP, Engine, Processes
from heads.errors import ConfigError
from heads.run_files import RECORD, Trained, alone
from heads.runs import score_paths, score_run
from heads.samples import refuse_differences, refuse_unusable
from heads.sweep import check_standing, train_runs
from heads.sweep_grid import trained_by
from heads.wanted import Wanted

THREADS = 1
"""Of each worker: small heads gain nothing from a second one, and the same count gives the same bits everywhere."""

BEAT = 2.0
"""Seconds between two looks at what is trained."""

SAVE_EVERY = 10.0
"""Minutes between two writings of where a training stands."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a trained head is asked on the test split."""

    task: str
    world: str = "closed"
    rerank: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One method under one configuration, as one row of the comparison.

    Attributes:
        label: its name in tables and on disk; unique within a comparison.
        method: a file of `heads/methods`, or a dotted module.
        task: what it is trained on.
        asked: what it is scored on; may differ from `task` as long as the head knows how.
        head, train: settings, as in the tables of a recipe.
    """

    label: str
    method: str
    task: str
    asked: tuple[Question, ...]
    head: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """One combination, in words that another process understands.

    Attributes:
        cache: where it lies.
        entry, seed: what is trained on it.
        out: the run's directory.
        asked: what is asked of the cache, as `Tasks.to_json` writes it, where that is only a part.
        command: the command line of the comparison.
    """

    cache: str
    entry: Entry
    seed: int
    out: Path
    asked: str | None = None
    command: str = ""

    def wanted(self, device: str | None = None) -> Wanted:
        """The run as `train_runs` takes it, on a device if one is named."""
        there = {} if device is None else {"device": device}
        settings: dict[str, dict[str, Any]] = {
            "head": dict(self.entry.head),
            "train": {**self.entry.train, "seed": self.seed, **there},
        }
        entry = self.entry
        return Wanted(entry.method, self.out, settings, entry.label, None, self.command)


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison made.

    Attributes:
        runs: directories of the runs, in order.
        failures: sentences about runs that failed, as by a loss or a score that is not finite.

    """

    runs: list[Path]
    failures: list[str]


def compare(
    caches: Mapping[str, FeatureCache],
    entries: Sequence[Entry] | Mapping[str, Sequence[Entry]],
    seeds: Sequence[int],
    out: str | Path,
    *,
    engine: Engine | None = None,
    command: str = "",
) -> Compared:
    """Train and score every combination; one that fails in training does not hold up the others.

    Args:
        caches: backbone's name → its cache. All must hold the same samples, or ask the same (`samples.on_shared`).
        entries: the rows; by backbone's name where not all have the same, as some lack a joint space.
        seeds: for heads that are trained by gradient; others take the first.
        out: parent of the run directories. What an interrupted comparison left there is kept; the rest is made.
        engine: who trains; one process of this machine by default. The results do not depend on it, where devices are
            equal.
        command: the command line of this comparison, for the records of runs that no single one makes.

    Raises:
        ConfigError: caches of different samples, or two entries of one label.
        RunExists: a run directory holds something else than was asked for.
    """
    asked = {name: cache.asked and cache.asked.to_json() for name, cache in caches.items()}
    if len(set(asked.values())) > 1 or None in asked.values():
        refuse_differences(caches)
    rows = entries if isinstance(entries, Mapping) else dict.fromkeys(caches, entries)
    for labels in ([entry.label for entry in rows[name]] for name in caches):
        if len(set(labels)) < len(labels):
            raise ConfigError(
                f"entries need labels of their own, but these were given: {', '.join(labels)}"
            )
    for name, cache in caches.items():
        for task in dict.fromkeys(q.task for entry in rows[name] for q in entry.asked):
            refuse_unusable(cache, task, "test")
    out = Path(out).absolute()  # wherever a worker stands
    jobs = [
        Job(
            cache.place.absolute(),
            entry,
            seed,
            out / name / f"{entry.label}-seed{seed}",
            asked[name],
            command if cache.asked is not None else "",
        )
        for name, cache in caches.items()
        for entry in rows[name]
        for seed in _seeds(entry, seeds)
    ]
    if not jobs:
        raise ConfigError("there is nothing to compare: no entry was given")
    opened = {cache.place.absolute(): cache for cache in caches.values()}
    passes: dict[tuple[str, str, int], list[Job]] = {}
    for job in jobs:
        passes.setdefault((job.cache, job.entry.task, job.seed), []).append(job)
    for (place, task, _), part in passes.items():
        check_standing(opened[place], [job.wanted() for job in part], task)
    failures: dict[Path, str] = {}
    bar = tqdm(total=len(jobs), desc="trained", unit="run")
    with alone(out, "another comparison is at work in"), bar, _beating(bar, jobs):
        for part, failed in (engine or Processes()).run(_run, list(passes.values())):
            failures |= failed
            bar.set_postfix_str(f"{part[0].out.parent.name}, seed {part[0].seed}")
    made = [job.out for job in jobs if job.out not in failures]
    return Compared(made, [failures[job.out] for job in jobs if job.out in failures])


def _run(jobs: Sequence[Job], device: str | None = None) -> dict[Path, str]:
    """Train and score a pass, or a part of one, on a device if one is named; returns what failed, and why."""
    torch.set_num_threads(THREADS)
    # scikit-learn's BLAS too: its idle threads spin and slow the worker beside it
    with threadpool_limits(THREADS):
        return _trained_and_scored(jobs, device)


def _trained_and_scored(jobs: Sequence[Job], device: str | None) -> dict[Path, str]:
    cache = FeatureCache.open(jobs[0].cache, check="read")
    if jobs[0].asked is not None:
        cache = cache.asking(Tasks.from_json(jobs[0].asked))
    if all((job.out / RECORD).exists() and not _unanswered(job, cache) for job in jobs):
        return {}
    # All of them, also those that are finished: what a pass reads decides where rows are held, hence the order.
    wanted = [job.wanted(device) for job in jobs]
    kept: dict[str, Any] = {"save_every": SAVE_EVERY, "resume": True, "stop": STOP}
    trained = train_runs(cache, wanted, task=jobs[0].entry.task, progress=False, **kept)
    heads: dict[Path, Head] = {}
    failures: dict[Path, str] = {}
    for job, run in zip(jobs, trained, strict=True):
        if isinstance(run, Trained):
            heads[job.out] = run.head
        else:
            failures[job.out] = f"{job.out}: {run.error}"
    for job in jobs:
        if job.out in failures:
            continue
        if STOP.is_set():
            raise KeyboardInterrupt
        try:
            _score(job, cache, heads.get(job.out))
        except ScoreTableError as error:
            failures[job.out] = f"{job.out}: {error}"
    return failures


def _score(job: Job, cache: FeatureCache, head: Head | None) -> None:
    """Every question that is not answered yet."""
    for options, places in _unanswered(job, cache):
        for place in places:  # one direction of two
            shutil.rmtree(place, ignore_errors=True)
        score_run(job.out, cache=cache, head=head, **options)


def _unanswered(job: Job, cache: FeatureCache) -> list[tuple[dict[str, Any], list[Path]]]:
    """Questions without their tables: as `score_run` takes them, and where the tables go."""
    found: list[tuple[dict[str, Any], list[Path]]] = []
    for asked in job.entry.asked:
        options: dict[str, Any] = {"task": asked.task, "world": asked.world, "rerank": asked.rerank}
        places = list(score_paths(job.out, cache, **options).values())
        if not all(place.exists() for place in places):
            found.append((options, places))
    return found


@contextmanager
def _beating(bar: "tqdm[NoReturn]", jobs: Sequence[Job]) -> Generator[None]:
    """Count the runs that are trained, whoever trains them, every few seconds: a pass may take hours."""
    ended = Event()

    def show() -> None:
        bar.n = sum((job.out / RECORD).exists() for job in jobs)
        bar.refresh()

    def tell() -> None:
        while not ended.wait(BEAT):
            show()

    thread = Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        show()


def _seeds(entry: Entry, seeds: Sequence[int]) -> Sequence[int]:
    return seeds if trained_by(entry.method, entry.head) == "gradient" else seeds[:1]
