"""Runs → comparisons: rows that answer the same question, with numbers, intervals, chance lines and differences.

A comparison answers one question (data set, task, split, world, items) at one k and on one kind of curve; the score
space is a fact of every row. Seeds are aggregated, with an interval over items and seeds, and kept one by one.
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval import bootstrap, composed, czsl, matching, pairwise, retrieval
from eval.any_table import Table
from eval.bootstrap import Distribution, Interval
from eval.composed import Ranks
from eval.composed_table import ComposedScores
from eval.composition import Composition, CompositionScores
from eval.costs import costs_of
from eval.czsl import CurveKind
from eval.draws import clusters
from eval.errors import EvalWarning
from eval.matching import MatchingScores
from eval.pairwise import Pairs
from eval.remarks import remarks
from eval.runs import Group, Question, Run, questions

COLUMNS: dict[str, tuple[str, ...]] = {
    "czsl": ("auc", "best_hm", "best_seen", "best_unseen", "pair_acc", "attr_acc", "obj_acc"),
    "matching": ("group_score", "i2t", "t2i", "accuracy/mean_of_types", "accuracy"),
    "retrieval": ("recall@1", "recall@5", "recall@10", "map@10"),
}
"""Metrics of the main table, where they exist; the first of each is the headline."""

HEADLINES = (
    *("auc", "best_seen", "best_unseen", "group_score", "accuracy/mean_of_types", "accuracy"),
    *("avg", "recall@1/macro_4", "recall@1", "map@5"),
)
"""The first that a table has is what differences are taken of; its first metric, where it has none of them."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric of one row.

    Attributes:
        seeds: value of each seed, fractions.
        low, high: 95 % interval over items and seeds; None for the legacy curve.

    """

    seeds: tuple[float, ...]
    low: float | None = None
    high: float | None = None

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.seeds))

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else None


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One backbone × method.

    Attributes:
        group: its runs.
        values: every metric of each seed, fractions.
        cells: metrics that all seeds have.
        gain: the headline's difference to zero-shot on the same items.
        resampled: what intervals and differences to other rows are made of; None for the legacy curve.
        ranks: of each composed table, whose rows lie on disk; None of the others.

    """

    group: Group
    values: tuple[Mapping[str, float], ...]
    cells: Mapping[str, Cell]
    gain: Interval | None = None
    resampled: Distribution | None = None
    ranks: tuple[Ranks | None, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """One table: a question, k and the kind of curve, with its rows.

    Attributes:
        question: what is asked.
        k: top-k of CZSL; 1 elsewhere.
        curve: "exact" or "legacy" for CZSL; None elsewhere.
        rows: by backbone, zero-shot first, else in the order of the runs.
        chance: metric → what random scores get.
        counts: how many items of what, in words.
        notes: warnings about the numbers.
        pairs: every difference of the headline between two rows; None for one row, and for the legacy curve.

    """

    question: Question
    k: int
    curve: CurveKind | None
    rows: tuple[Row, ...]
    chance: Mapping[str, float]
    counts: str
    notes: tuple[str, ...] = ()
    pairs: Pairs | None = None

    @property
    def headline(self) -> str:
        """The metric that differences are taken of."""
        return _headline(self.rows[0].cells)

    @property
    def columns(self) -> list[str]:
        """Metrics of the main table: the task's own, then the headline by category.

        Of composed retrieval: all, but only the headline by category where the categories are the data's own.
        """
        cells = self.rows[0].cells
        by_category = [f"{self._base}/{category}" for category in self.categories]
        if self.question.kind == "composed":
            own = [m for m in cells if "/" not in m or m.partition("/")[0] not in cells]
            return own + by_category
        return [m for m in COLUMNS[self.question.kind] if m in cells] + by_category

    @property
    def categories(self) -> list[str]:
        """Types and categories that the headline is also given for, sorted; not the means over them."""
        cells = self.rows[0].cells
        start = f"{self._base}/"
        found = [
            m.removeprefix(start) for m in cells if m.startswith(start) and self._base in cells
        ]
        return sorted(name for name in found if not is_mean(name))

    @property
    def _base(self) -> str:
        """The headline over all items, whatever mean over them the headline is."""
        return self.headline.partition("/")[0]

    @property
    def seeds(self) -> str:
        """How many seeds the rows have, in words: "1 seed", "1–3 seeds"."""
        numbers = sorted({len(row.group.runs) for row in self.rows})
        span = "–".join(str(n) for n in dict.fromkeys((numbers[0], numbers[-1])))
        return f"{span} seed{'s' * (span != '1')}"

    @property
    def title(self) -> str:
        """Everything that a number needs beside it."""
        parts = [self.question.words()]
        if self.curve:
            parts += [f"k = {self.k}", f"{self.curve} curve"]
        return " · ".join(parts)

    def name(self, metric: str) -> str:
        """The metric with its k, e.g. auc@3."""
        return f"{metric}@{self.k}" if self.curve and self.k > 1 else metric

    def is_below_chance(self, row: Row, metric: str) -> bool:
        """Is the mean over seeds lower than random scores get, by more than the last bits of a sum?"""
        return metric in self.chance and row.cells[metric].mean < self.chance[metric] - 1e-9


def is_mean(group: str) -> bool:
    """Is what stands behind a metric's slash a mean over types or categories, and not one of them?"""
    return group == matching.TYPE_MEAN or re.fullmatch(r"macro_\d+", group) is not None


def _headline(cells: Mapping[str, Any]) -> str:
    """The metric that differences are taken of."""
    return next((m for m in HEADLINES if m in cells), next(iter(cells)))


def compare(runs: Sequence[Run], *, k: int = 1) -> list[Comparison]:
    """One comparison a question; CZSL twice, on the exact and on the legacy curve."""
    comparisons: list[Comparison] = []
    for asked, groups in questions(runs).items():
        first = groups[0].tables[0]
        curve: CurveKind | None = "exact" if asked.kind == "czsl" else None
        found = [[_ranks(table) for table in group.tables] for group in groups]
        rows = _rows(groups, k, found)
        lines, notes = chance(first, k, found[0][0]), _notes(groups)
        pairs = _pairs(rows)
        comparisons.append(Comparison(asked, k, curve, rows, lines, counts(first), notes, pairs))
        if isinstance(first, CompositionScores) and k <= first.seen.sum():
            comparisons.append(_legacy(comparisons[-1], k))
    return comparisons


def _ranks(table: Table) -> Ranks | None:
    """Of a composed table, whose rows lie on disk: they are read once for all that follows."""
    return composed.ranks(table) if isinstance(table, ComposedScores) else None


def _notes(groups: Sequence[Group]) -> tuple[str, ...]:
    """What the tables say about themselves, each sentence once with the rows that it is true of."""
    found: dict[str, list[str]] = {}
    for group in groups:
        for note in dict.fromkeys(note for table in group.tables for note in remarks(table)):
            found.setdefault(note, []).append(group.label)
    return tuple(f"{', '.join(labels)}: {note}" for note, labels in found.items())


def _rows(
    groups: Sequence[Group], k: int, found: Sequence[Sequence[Ranks | None]]
) -> tuple[Row, ...]:
    """Metrics with intervals, and differences to the same backbone's zero-shot, if it has one; all on shared draws."""
    resampled = [
        bootstrap.distribution(group.tables, k=k, found=known)
        for group, known in zip(groups, found, strict=True)
    ]
    own = Counter(g.backbone for g in groups if g.is_baseline)
    baselines = {
        g.backbone: (g.tables[0], d)
        for g, d in zip(groups, resampled, strict=True)
        if g.is_baseline and own[g.backbone] == 1
    }
    rows: list[Row] = []
    for group, mine, known in zip(groups, resampled, found, strict=True):
        values = tuple(evaluate(t, k, r) for t, r in zip(group.tables, known, strict=True))
        ranges = bootstrap.percentiles(mine)
        cells = {
            m: Cell(
                tuple(v[m] for v in values),
                *((ranges[m].low, ranges[m].high) if m in ranges else ()),
            )
            for m in values[0]
            if all(m in v for v in values)
        }
        gain = None
        if group.backbone in baselines and not group.is_baseline:
            table, theirs = baselines[group.backbone]
            bootstrap.same_items(group.tables[0], table)
            gain = bootstrap.percentiles(bootstrap.subtract(mine, theirs))[_headline(cells)]
        rows.append(Row(group, values, cells, gain, mine, tuple(known)))
    return tuple(rows)


def _pairs(rows: Sequence[Row]) -> Pairs | None:
    """Differences of the headline between all rows, which are on the same items by their question."""
    for row in rows[1:]:
        bootstrap.same_items(rows[0].group.tables[0], row.group.tables[0])
    shown = [row.resampled for row in rows if row.resampled is not None]
    items = len(np.unique(clusters(rows[0].group.tables[0])))
    return pairwise.pairs(
        shown, _headline(rows[0].cells), [row.group.varies for row in rows], items
    )


def _legacy(exact: Comparison, k: int) -> Comparison:
    """The same rows on the curve that published numbers come from; no intervals."""
    rows: list[Row] = []
    notes: dict[str, list[str]] = {}
    for row in exact.rows:
        tables = [t for t in row.group.tables if isinstance(t, CompositionScores)]
        results = [_quietly_legacy(t, k) for t in tables]
        for note in dict.fromkeys(note for _, found in results for note in found):
            notes.setdefault(note, []).append(row.group.label)
        values = tuple(r for r, _ in results)
        names = [m for m in values[0] if all(m in v for v in values)]
        cells = {m: Cell(tuple(v[m] for v in values)) for m in names}
        rows.append(Row(row.group, values, cells))
    chance = {m: v for m, v in exact.chance.items() if m not in ("auc", "best_hm")}
    return Comparison(
        exact.question,
        k,
        "legacy",
        tuple(rows),
        chance,
        exact.counts,
        notes=exact.notes + tuple(f"{', '.join(labels)}: {note}" for note, labels in notes.items()),
    )


def _quietly_legacy(table: CompositionScores, k: int) -> tuple[dict[str, float], list[str]]:
    """Legacy metrics, and the warnings as text: on a page they belong under the table."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EvalWarning)
        values = czsl.evaluate(table, k=k, curve="legacy")
    return values, [str(w.message) for w in caught]


def evaluate(table: Table, k: int = 1, found: Ranks | None = None) -> dict[str, float]:
    """The task's own `evaluate`, on the exact curve and with its default K; `found` as of `composed.evaluate`."""
    if isinstance(table, Composition):
        return czsl.evaluate(table, k=k)
    if isinstance(table, ComposedScores):
        return composed.evaluate(table, found=found)
    return (
        matching.evaluate(table) if isinstance(table, MatchingScores) else retrieval.evaluate(table)
    )


def chance(table: Table, k: int = 1, found: Ranks | None = None) -> dict[str, float]:
    """What random scores get; `found` as of `composed.evaluate`."""
    if isinstance(table, Composition):
        return czsl.chance(table, k=k)
    if isinstance(table, ComposedScores):
        return composed.chance(table, found=found)
    return matching.chance(table) if isinstance(table, MatchingScores) else retrieval.chance(table)


def counts(table: Table) -> str:
    """How many items of what."""
    if isinstance(table, Composition):
        n_seen, n_unseen = table.counts
        return (
            f"{n_seen} images of seen and {n_unseen} of unseen pairs; {int(table.seen.sum())} seen and "
            f"{int((~table.seen).sum())} unseen candidates"
        )
    if isinstance(table, MatchingScores):
        types = f" of {len(table.types)} types" if table.types else ""
        return f"{len(table.scores)} items in {len(table.categories)} categories{types}"
    if isinstance(table, ComposedScores):
        galleries = ", ".join(name for name in table.queries.gallery_names if name)
        ranked = f"gallery {galleries}" if galleries else "own candidates"
        return (
            f"{len(table.ids)} queries of protocol {table.queries.protocol}, {table.shape[1]} candidates; "
            f"{ranked}"
        )
    return f"{table.shape[0]} queries, {table.shape[1]} candidates"


def metrics(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Every metric of every table: backbone → method → seed → task → numbers, as fractions.

    A task is `<data set>/<kind>[/<variant>]/<split>[/<world>]`; its entry names space, k and items, holds `metrics`,
    `chance` and `costs`, as far as run.json says them, and for CZSL `legacy_metrics`.

    Args:
        comparisons: what `compare` gives: a legacy curve behind the exact one.

    """
    nested: dict[str, Any] = {}
    for c in comparisons:
        key = c.question.key()
        for row in c.rows:
            group = row.group
            seeds = nested.setdefault(group.backbone, {}).setdefault(group.method, {})
            for run, values in zip(group.runs, row.values, strict=True):
                tasks = seeds.setdefault(str(run.seed), {})
                longer = f"{key}/{c.question.items}"  # where one task has tables of several items
                if c.curve == "legacy":
                    tasks[longer if longer in tasks else key]["legacy_metrics"] = values
                    continue
                entry = {"space": group.space, "k": c.k, "items": c.counts}
                entry |= {"metrics": values, "chance": c.chance, "costs": costs_of(run)}
                tasks[key if key not in tasks else longer] = entry
    return nested
