"""A comparison as data: rows that differ in method or in a few fields, and the orderings that somebody claims of them.

    method = "simfp"                        a file of heads/methods, or a dotted module, of rows that name none
    task = "czsl"                           what every row is trained on
    asked = [{ task = "czsl" }, { task = "czsl", world = "open" }]     what is scored, once, on test; if nothing is
                                              said, the task itself
    caches = ["caches/a.zarr", …]           where the command line names none; from where the command is given
    seeds = 5                               likewise
    [head]  [train]                         what all rows share
    [family.llava]                          [head] fields that one family of backbones needs otherwise
    [[row]]                                 label, and `head` and `train` fields that differ; with a `method` of its own
    label = "no_fusion"                       a row takes nothing from [head] and [family], but has `family` itself
    head = { fusion = "none" }
    [[ordering]]                            better, than: labels; metric; world, where it is claimed of one alone;
                                              source: who claims it, and how that is known
    better = "inter"                          (P paper, C released code, T third-party notes, D deduced, O our choice)
    than = "no_fusion"
    metric = "best_hm"
    source = "…"

The packaged ones are heads/ablations/<method>.toml, one method's parts, and heads/comparisons/<task>.toml, all methods
of a task; they are read by name, and a path names one of your own. `of_methods` makes one of a command line.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cache_builder import FeatureCache
from eval.comparison import COLUMNS
from eval.orderings import Ordering
from heads.base import Head
from heads.compare import Entry, Question
from heads.config import nearest, parse, read_settings
from heads.errors import ConfigError, MissingStream
from heads.tasks import task_of
from heads.wanted import Wanted, sound

LEGEND = "In brackets: P paper, C its released code, T third-party notes, D deduced, O ours."
"""Of the packaged sources, for people."""

KINDS = {"two_by_two": "matching"}
"""Task → what eval calls its tables, where the two differ."""

METRICS: Mapping[str, Sequence[str]] = {
    **COLUMNS,
    "composed": ("recall@1", "recall@5", "recall@10", "map@5", "map@10", "recall_subset@1", "avg"),
}
"""What a claim may be about, by what eval calls the table."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Asked(_Table):
    """What a trained row is asked on the test split."""

    task: str
    world: Literal["closed", "open"] = "closed"
    rerank: int | None = Field(
        default=None, ge=1, description="retrieval: only so many best by cached cosine are scored"
    )


class Row(_Table):
    """One row of the ablation."""

    label: str = Field(pattern=r"^[\w.+-]+$", description="its name in tables and on disk")
    method: str | None = Field(default=None, description="another one than the ablation's")
    head: dict[str, Any] = {}
    train: dict[str, Any] = {}
    family: dict[str, dict[str, Any]] = Field(
        default={},
        description="with a method of its own: head fields that a family needs otherwise",
    )


class Claim(_Table):
    """Somebody's ordering of two rows."""

    better: str
    than: str
    metric: str
    source: str = Field(min_length=1, description="who claims it, and how that is known")
    world: Literal["closed", "open"] | None = Field(
        default=None, description="where it was claimed; none: wherever the metric is"
    )


class Ablation(_Table):
    """A file, as read; see the module's own text for what its tables mean."""

    method: str = ""
    task: str
    asked: tuple[Asked, ...] = Field(min_length=1)
    caches: tuple[str, ...] = ()
    seeds: int | None = Field(default=None, ge=1)
    row: tuple[Row, ...] = Field(min_length=1)
    ordering: tuple[Claim, ...] = ()
    head: dict[str, Any] = {}
    train: dict[str, Any] = {}
    family: dict[str, dict[str, Any]] = {}

    @property
    def labels(self) -> list[str]:
        """Of the rows, in order."""
        return [row.label for row in self.row]

    def orderings(self) -> list[Ordering]:
        """For `eval.orderings.judge`."""
        return [Ordering(c.better, c.than, c.metric, c.source, c.world) for c in self.ordering]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be trained.

    Attributes:
        entries: cache's name → rows that it can do, for `heads.compare.compare`; caches without any are not in it.
        orderings: those between rows that were asked for.
        left_out: sentences about rows that a cache cannot do: which, and why.

    """

    entries: dict[str, list[Entry]]
    orderings: list[Ordering]
    left_out: list[str]


FOLDERS = ("ablations", "comparisons")
"""Of packaged files; no name occurs in both."""


def names(folder: str = "ablations") -> list[str]:
    """Packaged files of a folder, sorted."""
    found = (files("heads") / folder).iterdir()
    return sorted(p.name.removesuffix(".toml") for p in found if p.name.endswith(".toml"))


def read(which: str) -> Ablation:
    """A packaged file by its name, or one by its path.

    Raises:
        ConfigError: no such plan, unreadable TOML, an unknown key, labels that occur twice, an ordering of rows
            that are not there or in a metric that nothing asked has.
        FileNotFoundError: a path at which there is no file.
    """
    if which.endswith(".toml"):
        place, text = which, Path(which).read_bytes()
    else:
        packaged = {name: folder for folder in FOLDERS for name in names(folder)}
        if which not in packaged:
            raise ConfigError(
                f"no plan {which!r}{nearest(which, packaged)}; packaged are {', '.join(packaged)}, and a path that "
                "ends in .toml names one of your own"
            )
        place = f"{which}.toml"
        text = (files("heads") / packaged[which] / place).read_bytes()
    try:
        found = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place} is not TOML: {error}") from error
    if "asked" not in found and "task" in found:
        found["asked"] = [{"task": found["task"]}]
    for key, model in {"asked": Asked, "row": Row, "ordering": Claim}.items():
        given = found.get(key, [])
        if not isinstance(given, list) or not all(isinstance(table, dict) for table in given):
            raise ConfigError(f"{key} in {place} must be a list of tables, but is {given!r}")
        found[key] = tuple(parse(model, t, f"{place} {key}[{i}]") for i, t in enumerate(given))
    ablation = parse(Ablation, found, place)
    _check(ablation, place)
    return ablation


def _check(ablation: Ablation, place: str) -> None:
    """What the fields cannot say one by one."""
    labels = ablation.labels
    for row in ablation.row:
        if not (row.method or ablation.method):
            raise ConfigError(
                f"row {row.label} of {place} names no method, nor does the file; write `method` into one of them"
            )
        if row.family and row.method is None:
            raise ConfigError(
                f"row {row.label} of {place} has a family of its own but no method; put it into [family]"
            )
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(f"{place} has two rows called {twice[0]}; labels tell rows apart")
    kinds = {KINDS.get(asked.task, asked.task) for asked in ablation.asked}
    if unknown := sorted(kinds - {*METRICS}):
        raise ConfigError(
            f"{place} asks for {unknown[0]!r}{nearest(unknown[0], [*METRICS, *KINDS])}; known are "
            f"{', '.join([*METRICS, *KINDS])}"
        )
    metrics = sorted({m.partition("/")[0] for kind in kinds for m in METRICS[kind]})
    for claim in ablation.ordering:
        if claim.better == claim.than:
            raise ConfigError(f"{place} orders {claim.better} above itself; name two rows")
        for label in (claim.better, claim.than):
            if label not in labels:
                raise ConfigError(
                    f"{place} orders {claim.better} and {claim.than}, but has no row {label!r}"
                    f"{nearest(label, labels)}"
                )
        if claim.metric.partition("/")[0] not in metrics:
            raise ConfigError(
                f"{place} orders rows by {claim.metric!r}{nearest(claim.metric, metrics)}; what is asked has "
                f"{', '.join(metrics)}"
            )


def of_methods(
    methods: Sequence[str],
    task: str,
    *,
    worlds: Sequence[str] = ("closed",),
    rerank: int | None = None,
    configs: Mapping[str, Path] | None = None,
) -> Ablation:
    """The comparison of whole methods, each with the settings of its file or else with its defaults.

    Args:
        methods: files of `heads/methods`, or dotted modules; a row each, called as the method is.
        task: trained for and asked.
        worlds: of czsl.
        rerank: of retrieval.
        configs: method → TOML with the tables [head] and [train], as `headstart train --config` takes it.

    Raises:
        ConfigError: a method that is named twice, or an unreadable file.
    """
    rows: list[dict[str, Any]] = []
    for method in methods:
        settings = read_settings((configs or {}).get(method))
        rows.append({"label": method.rpartition(".")[2], "method": method, **settings})
    named = worlds if task == "czsl" else ("closed",)
    found = {
        "task": task,
        "asked": tuple({"task": task, "world": w, "rerank": rerank} for w in named),
        "row": tuple(parse(Row, row, f"row {row['label']}") for row in rows),
    }
    ablation = parse(Ablation, found, "--methods")
    _check(ablation, "--methods")
    return ablation


def plan(
    ablation: Ablation,
    caches: Mapping[str, FeatureCache],
    *,
    rows: Sequence[str] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """Which rows to train on which cache; every head is built once, so that what cannot be is known before training.

    Args:
        ablation: as read.
        caches: name → cache.
        rows: labels of those wanted; None takes all.
        settings: {"head": {…}, "train": {…}} from the command line, over everything that the file says; `head` is for
            rows of the ablation's own method.

    Raises:
        ConfigError: a label that is not there, an unknown key or a wrong value in a row, or nothing left to train.
        TaskError: a cache without the task.
    """
    known = ablation.labels
    for label in rows or ():
        if label not in known:
            raise ConfigError(
                f"no row {label!r}{nearest(label, known)}; this ablation has {', '.join(known)}"
            )
    wanted = [row for row in ablation.row if rows is None or row.label in rows]
    entries: dict[str, list[Entry]] = {}
    left_out: list[str] = []
    for name, cache in caches.items():
        for task in (ablation.task, *(asked.task for asked in ablation.asked)):
            task_of(cache, task)
        reasons: dict[str, list[str]] = {}
        built: list[Head] = []  # kept for the loop, so that rows share one live backbone
        for row in wanted:
            entry = _entry(ablation, row, cache.spec.backbone.family, settings or {})
            why = _twin(entry, entries.get(name, ())) or _obstacle(entry, cache, built)
            if why is None:
                entries.setdefault(name, []).append(entry)
            else:
                reasons.setdefault(why, []).append(row.label)
        left_out += [_left_out(name, labels, why) for why, labels in reasons.items()]
    if not entries:
        raise ConfigError(f"no row can be trained; {left_out[0]}")
    chosen = {row.label for row in wanted}
    orderings = [o for o in ablation.orderings() if {o.better, o.than} <= chosen]
    return Plan(entries, orderings, left_out)


def _entry(
    ablation: Ablation, row: Row, family: str, settings: Mapping[str, Mapping[str, Any]]
) -> Entry:
    """A row's settings on a family: what all share, what the family needs, what differs, what the command line says."""
    head = {**row.head, **row.family.get(family, {})}
    if row.method is None:
        shared = {**ablation.head, **ablation.family.get(family, {})}
        head = {**shared, **head, **settings.get("head", {})}
    train = {**ablation.train, **row.train, **settings.get("train", {})}
    asked = tuple(Question(a.task, a.world, a.rerank) for a in ablation.asked)
    return Entry(row.label, row.method or ablation.method, ablation.task, asked, head, train)


def _twin(entry: Entry, others: Iterable[Entry]) -> str | None:
    """Why a row is no row of its own; None if it is."""
    for other in others:
        if replace(other, label=entry.label) == entry:
            return f"under these settings it is the same as row {other.label}"
    return None


def _obstacle(entry: Entry, cache: FeatureCache, built: list[Head]) -> str | None:
    """Why a cache's backbone cannot do a row; None if it can, and then its head is appended to `built`.

    Raises:
        ConfigError: a key or value that is wrong, or a task that the method does not know; names the row.
    """
    settings = {"head": entry.head, "train": entry.train}
    try:
        found = sound(cache, Wanted(entry.method, Path(entry.label), settings), entry.task)
        built.append(found.build())
    except MissingStream as error:
        return str(error)
    except ConfigError as error:
        raise ConfigError(f"row {entry.label}: {error}") from error
    return None


def _left_out(cache: str, labels: Sequence[str], why: str) -> str:
    what = f"row {labels[0]} is" if len(labels) == 1 else f"rows {', '.join(labels)} are"
    return f"{cache}: {what} left out, as {why}"
