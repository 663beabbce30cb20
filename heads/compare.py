"""Backbones × methods × seeds on identical samples: every combination trained and scored once.

Each combination becomes an ordinary run directory, `OUT/<backbone>/<label>-seed<n>`, so `eval` reads a comparison
exactly as it reads runs made by hand. Heads without randomness run under the first seed only.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from cache_builder import FeatureCache
from heads import load_method
from heads.errors import ConfigError
from heads.runs import score_run, train_run

THREADS = 1
"""Of each worker: small heads gain nothing from a second one, and the same count gives the same bits everywhere."""


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
    """One combination, in words that another process understands."""

    cache: str
    entry: Entry
    seed: int
    out: Path
    threads: int


def compare(
    caches: Mapping[str, FeatureCache],
    entries: Sequence[Entry] | Mapping[str, Sequence[Entry]],
    seeds: Sequence[int],
    out: str | Path,
    *,
    workers: int = 1,
) -> list[Path]:
    """Train and score every combination; returns the run directories.

    Args:
        caches: backbone's name → its cache. All must hold the same samples.
        entries: the rows; by backbone's name where not all have the same, as some lack a joint space.
        seeds: for heads that are trained by gradient; others take the first.
        out: parent of the run directories, which must not exist yet.
        workers: processes that train side by side and share the CPU's cores; the results do not depend on their number.

    Raises:
        ConfigError: caches of different samples, or two entries of one label.
    """
    _check_same_samples(caches)
    rows = entries if isinstance(entries, Mapping) else dict.fromkeys(caches, entries)
    for labels in ([entry.label for entry in rows[name]] for name in caches):
        if len(set(labels)) < len(labels):
            raise ConfigError(
                f"entries need labels of their own, but these were given: {', '.join(labels)}"
            )
    jobs = [
        Job(
            cache.place.absolute(),
            entry,
            seed,
            Path(out, name, f"{entry.label}-seed{seed}"),
            THREADS,
        )
        for name, cache in caches.items()
        for entry in rows[name]
        for seed in _seeds(entry, seeds)
    ]
    # Fresh processes: a forked one would inherit torch's thread pools in whatever state they are.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_run, job): job for job in jobs}
        with tqdm(total=len(jobs), desc="training and scoring", unit="run") as bar:
            for done in as_completed(running):
                done.result()
                bar.set_postfix_str(running[done].out.name)
                bar.update()
    return [job.out for job in jobs]


def _run(job: Job) -> None:
    torch.set_num_threads(job.threads)
    threadpool_limits(
        job.threads
    )  # scikit-learn's BLAS too: its idle threads spin and slow the worker beside it
    cache = FeatureCache.open(job.cache, check="read")
    entry = job.entry
    trained = train_run(
        cache,
        entry.method,
        job.out,
        task=entry.task,
        settings={"head": dict(entry.head), "train": {**entry.train, "seed": job.seed}},
        label=entry.label,
        progress=False,
    )
    for asked in entry.asked:
        score_run(
            job.out,
            task=asked.task,
            world=asked.world,
            rerank=asked.rerank,
            cache=cache,
            head=trained.head,
        )


def _seeds(entry: Entry, seeds: Sequence[int]) -> Sequence[int]:
    return seeds if load_method(entry.method).Head.training_kind == "gradient" else seeds[:1]


def _check_same_samples(caches: Mapping[str, FeatureCache]) -> None:
    digests = {name: cache.spec.dataset.digest for name, cache in caches.items()}
    first, *others = digests
    for other in others:
        if digests[other] != digests[first]:
            raise ConfigError(
                f"{caches[first].path} and {caches[other].path} hold different samples (data set digests "
                f"{digests[first][:8]} and {digests[other][:8]}); build both from the same data set"
            )
