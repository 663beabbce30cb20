"""Run directories: what a report reads, and which of them may stand in one table.

    runs/tf_local-photos-czsl-seed0/
      run.json             method, seed, cache (backbone, dataset, fingerprint, path), head and train (the
                           configuration), task, parameters, seconds, versions, commit; for scores from elsewhere
                           method, backbone, dataset and seed will do
      scores-<name>.zarr   score tables, any number
      history.jsonl        {"step": 10, "loss": 0.5} and {"step": 10, "validation": {"auc": 0.2}}, optional
      pictures/*.npz       image (H, W, 3) uint8, words, weights (words, rows, columns), and if known caption, score,
                           says, verdict, right; or strip (words, numbers), words, says; optional
      pictures/query-*.npz, routing.npz, modality.npz      of composed retrieval, optional: `eval.composed_pictures`
      pictures/failures*.npz                               items that go wrong, optional: `eval.album`
      pictures/*.png       optional

Tables share a comparison when data set, task, split, world and the very items are equal; seeds of one backbone, method
and configuration are one row of it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval import score_io
from eval.any_table import Table
from eval.composed_table import ComposedScores
from eval.errors import RunError
from eval.matching import MatchingScores

NOT_CONFIG = ("seed", "device", "out", "cache")
"""Settings that differ between runs of the same method without making it another one."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One trained (or untrained) head with what it scored.

    Attributes:
        path: its directory.
        facts: run.json.
        tables: file name → score table.
        history: lines of history.jsonl, in order.

    """

    path: Path
    facts: Mapping[str, Any]
    tables: Mapping[str, Table] = field(default_factory=dict[str, Table])
    history: Sequence[Mapping[str, Any]] = ()

    @property
    def pictures(self) -> list[Path]:
        """Files below pictures/ as they are now, sorted."""
        return sorted(p for p in self.path.glob("pictures/*") if p.suffix in (".png", ".npz"))

    @property
    def method(self) -> str:
        """File name of the method."""
        return str(self.facts["method"])

    @property
    def name(self) -> str:
        """What its row is called: the label it was given, else the method."""
        return str(self.facts.get("label") or self.method)

    @property
    def backbone(self) -> str:
        """The frozen model, as it is asked for on the command line."""
        return str(_backbone(self.facts))

    @property
    def dataset(self) -> str:
        """Name of the data set it was trained on; what a table was scored on is `scored_on`."""
        return str(_dataset(self.facts))

    @property
    def seed(self) -> int:
        """Of the training."""
        return int(self.facts["seed"])

    @property
    def config(self) -> dict[str, Any]:
        """Settings with dotted names that make this method what it is: no seeds, devices or paths."""
        named: dict[str, Any] = {n: self.facts.get(n) or {} for n in ("config", "head", "train")}
        named |= {"trained_on": self.facts.get("task"), "trained_data": self.dataset}
        flat = dict(_flat(named))
        return {key: value for key, value in flat.items() if key.split(".")[-1] not in NOT_CONFIG}


def _backbone(facts: Mapping[str, Any]) -> str | None:
    """`family:checkpoint`, from the record of the cache unless it is said outright."""
    cache: dict[str, Any] = facts.get("cache") or {}
    spec: dict[str, Any] = cache.get("backbone") or {}
    named = f"{spec['family']}:{spec['checkpoint']}" if "family" in spec else None
    return facts.get("backbone") or named


def _dataset(facts: Mapping[str, Any]) -> str | None:
    """Name of the data set, from the record of the cache unless it is said outright."""
    cache: dict[str, Any] = facts.get("cache") or {}
    spec: dict[str, Any] = cache.get("dataset") or {}
    return facts.get("dataset") or spec.get("name")


def scored_on(run: Run, table: Table) -> str:
    """Name of the data set whose items a table holds: its own record of the cache, else the run's data set."""
    return recorded_dataset(table) or run.dataset


def recorded_dataset(table: Table) -> str | None:
    """Name of the data set whose items a table holds, by its own record of the cache, if it has one."""
    record: dict[str, Any] = table.meta.get("run") or {}
    cache: dict[str, Any] = record.get("cache") or {}
    spec: dict[str, Any] = cache.get("dataset") or {}
    return spec.get("name")


@dataclass(frozen=True, slots=True, order=True)
class Question:
    """What a table answers. Numbers with different questions never share a table.

    Attributes:
        dataset: name of the data set it was scored on.
        kind: czsl, matching or retrieval.
        variant: "2×2" or "1×2" for matching, the direction for retrieval where it is known.
        split, world: of the score table; the world is empty outside CZSL.
        items: digest of labels, candidates and ids; of composed retrieval, of everything that is asked.

    """

    dataset: str
    kind: str
    variant: str
    split: str
    world: str
    items: str

    def words(self) -> str:
        """For people."""
        world = f"{self.world} world" if self.world else ""
        return " · ".join(
            w for w in (self.kind, self.variant, self.dataset, self.split, world) if w
        )

    def key(self) -> str:
        """For files, e.g. toy_world/czsl/test/closed; not unique where only the items differ."""
        return "/".join(
            w for w in (self.dataset, self.kind, self.variant, self.split, self.world) if w
        )


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Seeds of one backbone, method, config and score space.

    Attributes:
        backbone: the frozen model.
        method: its name, followed by the config that tells it from others of that name in this question.
        space: score space, a column of every table.
        runs, tables: one a seed, by seed.

    """

    backbone: str
    method: str
    space: str
    runs: tuple[Run, ...]
    tables: tuple[Table, ...]

    @property
    def label(self) -> str:
        """Names the row on a page."""
        return f"{self.method} · {self.backbone}"

    @property
    def is_baseline(self) -> bool:
        """Is this what the backbone does by itself?"""
        return self.runs[0].method == "zero_shot"

    @property
    def varies(self) -> bool:
        """Could another seed have come out otherwise? Not of a baseline, nor where nothing is trained by steps."""
        facts = self.runs[0].facts
        return not self.is_baseline and 0 not in (facts.get("parameters"), facts.get("steps"))


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """All runs, in the order given; a directory without run.json stands for the runs directly below it.

    Raises:
        RunError: no run at a path, or one that cannot be read; names the file.

    """
    runs: list[Run] = []
    for path in map(Path, paths):
        found = (
            [path]
            if (path / "run.json").exists()
            else sorted(p.parent for p in path.glob("*/run.json"))
        )
        if not found:
            raise RunError(
                f"no run at {path}: neither it nor a folder in it has a run.json; `headstart train` writes one"
            )
        runs += [read_run(p) for p in found]
    if not runs:
        raise RunError("there is no run to report on; name at least one run directory")
    return runs


def read_run(path: Path) -> Run:
    """One run directory.

    Raises:
        RunError: run.json or history.jsonl is not what it should be.
        ScoreTableError: a score table is damaged.

    """
    facts = _json(_text(path / "run.json"), f"{path / 'run.json'}")
    known = {"method": facts.get("method"), "seed": facts.get("seed")}
    known |= {"backbone": _backbone(facts), "dataset": _dataset(facts)}
    missing = [name for name, value in known.items() if value is None]
    if missing:
        raise RunError(
            f"{path / 'run.json'} does not say {', '.join(missing)}; it must say {', '.join(known)}"
        )
    if not isinstance(facts["seed"], int) or isinstance(facts["seed"], bool):
        raise RunError(
            f"{path / 'run.json'} says seed {facts['seed']!r}; it must be an integer, as the rows of a report are told "
            "apart by it"
        )
    history: list[Mapping[str, Any]] = []
    if (path / "history.jsonl").exists():
        lines = _text(path / "history.jsonl").splitlines()
        history = [
            _json(line, f"{path / 'history.jsonl'} line {i}") for i, line in enumerate(lines, 1)
        ]
    tables = {p.name: score_io.load(p) for p in sorted(path.glob("scores*.zarr"))}
    return Run(path, facts, tables, history)


def _text(path: Path) -> str:
    """A text file, or an error that names it."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8 text") from error


def _json(text: str, where: str) -> dict[str, Any]:
    """An object, or an error that names the place."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RunError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{where} must be a JSON object, but is a {type(value).__name__}")
    return value


def question(run: Run, table: Table) -> Question:
    """What a run's table answers."""
    kind = score_io.kind(table)
    variant = str(table.meta.get("direction", ""))
    if isinstance(table, MatchingScores):
        variant = "2×2" if table.scores.ndim == 3 else "1×2"
    if filtered := table.meta.get("feasibility"):  # pairs were pruned: another set of candidates
        variant = f"{variant} {filtered['rule']}".strip()
    if table.meta.get("partial"):
        variant = (
            f"{variant} partial".strip()
        )  # examples were left out: not the split that others measure
    digest = hashlib.sha256(repr(table.shape).encode())
    for name in ("ids", "target", "pairs", "seen", "category", "positives"):
        values: NDArray[Any] = np.asarray(getattr(table, name, ()))
        digest.update(f"{name} {values.shape}".encode())
        digest.update(
            values.tobytes()
            if values.dtype.kind != "U"
            else "\0".join(values.ravel().tolist()).encode()
        )
    if isinstance(table, ComposedScores):
        digest.update(table.digest().encode())
    return Question(
        scored_on(run, table),
        kind,
        variant,
        table.split,
        table.world,
        digest.hexdigest()[:12],
    )


def questions(runs: Sequence[Run]) -> dict[Question, list[Group]]:
    """Every question the runs answer, with its rows; in sorted order, rows in the order of the runs.

    Raises:
        RunError: two runs are the same row and the same seed.

    """
    found: dict[Question, list[tuple[Run, Table]]] = {}
    for run in runs:
        for table in run.tables.values():
            found.setdefault(question(run, table), []).append((run, table))
    return {q: _groups(q, found[q]) for q in sorted(found)}


def _groups(asked: Question, answers: Sequence[tuple[Run, Table]]) -> list[Group]:
    """Rows of one question: runs that differ in their seed only are one row."""
    labels = _labels(answers)
    rows: dict[tuple[str, str, str], dict[int, tuple[Run, Table]]] = {}
    for (run, table), label in zip(answers, labels, strict=True):
        seeds = rows.setdefault((run.backbone, label, table.space), {})
        if run.seed in seeds:
            raise RunError(
                f"{seeds[run.seed][0].path} and {run.path} are both {label} on {run.backbone} with seed {run.seed} and "
                f"answer the same question ({asked.words()}); report on one of them"
            )
        seeds[run.seed] = (run, table)
    groups = [
        Group(
            backbone, label, space,
            tuple(seeds[s][0] for s in sorted(seeds)),
            tuple(seeds[s][1] for s in sorted(seeds)),
        )
        for (backbone, label, space), seeds in rows.items()
    ]  # fmt: skip
    backbones = list(dict.fromkeys(group.backbone for group in groups))
    return sorted(groups, key=lambda g: (backbones.index(g.backbone), not g.is_baseline))


def _labels(answers: Sequence[tuple[Run, Table]]) -> list[str]:
    """Names of the rows; where one name appears with several configurations, followed by what differs."""
    settings = [{**run.config, "rerank": table.meta.get("rerank")} for run, table in answers]
    labels: list[str] = []
    for (run, _), mine in zip(answers, settings, strict=True):
        same = [
            theirs
            for (other, _), theirs in zip(answers, settings, strict=True)
            if (other.name, other.backbone) == (run.name, run.backbone)
        ]
        keys = sorted({key for config in same for key in config})
        differ = [key for key in keys if any(config.get(key) != mine.get(key) for config in same)]
        words = ", ".join(f"{key.split('.')[-1]}={mine.get(key)}" for key in differ)
        labels.append(run.name + (f" ({words})" if words else ""))
    return labels


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings with dotted names."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
