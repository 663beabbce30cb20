"""How far a number would move with other test items and other seeds: intervals, and paired differences.

Percentile bootstrap (Efron 1979). One resample draws the items again with replacement, the *same* draw for every table
of a comparison, and draws the training seeds again with replacement; a metric is recomputed on it. Items of CZSL are
images, drawn within the seen- and the unseen-labelled ones, whose numbers the split fixes; the curve is recomputed from
each image's threshold (`eval.curve.hit_rates`), since its area is not a mean over images. Queries of retrieval that
share a right answer (the captions of one image) are drawn together (`clusters`): their hits go together, and as items
of their own they would make the interval too narrow. In both directions of retrieval an image is drawn with its
captions. Composed queries are drawn within FashionIQ's categories and GeneCIS' tasks, those that share a target
together. Means over types and categories are worked out again from every draw's own shares.

Our choice over `scipy.stats.bootstrap`: shared draws across tables and metrics, counts instead of index arrays (the
curves of 1,000 resamples are one cumulative sum), and no BCa, whose jackknife needs as many curves as there are images.

Not for: fewer than about 30 items (or clusters), or rates at 0 or 1, where resampling cannot leave the edge and an
interval of width zero means "no variation seen", not "certain". With two or three seeds their variance is
underestimated; read the listed values of each seed too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from eval import composed, curve, czsl, matching, retrieval
from eval.any_table import Resampled
from eval.composed import Ranks
from eval.composed_table import ComposedScores
from eval.composition import Composition
from eval.draws import clusters, draws, strata
from eval.errors import ScoreTableError
from eval.matching import MatchingScores
from eval.retrieval import BothDirections


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with the range that resampling gives it.

    Attributes:
        estimate: on the items as they are, averaged over seeds; fractions.
        low, high: percentiles of the resampled values.
        level: share of the resampled values between them.

    """

    estimate: float
    low: float
    high: float
    level: float = 0.95

    @property
    def excludes_zero(self) -> bool:
        """True where a difference is larger than its uncertainty."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True, eq=False)
class Distribution:
    """Resampled metrics of one method.

    Attributes:
        estimate: metric → its value on the items as they are, averaged over seeds.
        values: metric → (R,) values, items and seeds drawn.
        items: the same with every seed once, so that only items vary.
        seeds: metric → (S,) values of each seed on the items as they are; empty of a difference.

    """

    estimate: dict[str, float]
    values: dict[str, Float[np.ndarray, " r"]]
    items: dict[str, Float[np.ndarray, " r"]]
    seeds: dict[str, Float[np.ndarray, " s"]] = field(default_factory=dict)


def intervals(
    tables: Sequence[Resampled],
    *,
    k: int = 1,
    ks: Sequence[int] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    found: Sequence[Ranks | None] = (),
) -> dict[str, Interval]:
    """Interval of every metric, averaged over the tables of several training seeds (or of one).

    Args:
        tables: one table a seed, on identical items.
        k: top-k of CZSL.
        ks: the K of retrieval and composed retrieval; None takes the default.
        level: e.g. 0.95.
        resamples: number of draws.
        seed: of the draws.
        found: of composed tables, their `composed.ranks` where they are known, one a table.

    Raises:
        ScoreTableError: the tables do not hold the same items.

    """
    resampled = distribution(tables, k=k, ks=ks, resamples=resamples, seed=seed, found=found)
    return percentiles(resampled, level)


def difference(
    ours: Sequence[Resampled],
    theirs: Sequence[Resampled],
    *,
    k: int = 1,
    ks: Sequence[int] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Ours minus theirs, metric by metric, on identical items: every draw is shared by both.

    Raises:
        ScoreTableError: the two do not hold the same items.

    """
    same_items(ours[0], theirs[0])
    a, b = (distribution(t, k=k, ks=ks, resamples=resamples, seed=seed) for t in (ours, theirs))
    return percentiles(subtract(a, b), level)


def distribution(
    tables: Sequence[Resampled],
    *,
    k: int = 1,
    ks: Sequence[int] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    found: Sequence[Ranks | None] = (),
) -> Distribution:
    """Resampled metrics, averaged over seeds; the same `seed` draws the same items for every table of this size.

    Arguments as of `intervals`.
    """
    if not tables:
        raise ScoreTableError("there is no table to resample; give one a training seed")
    for table in tables[1:]:
        same_items(tables[0], table)
    known = found or [None] * len(tables)
    estimators = [estimator(table, k, ks, r) for table, r in zip(tables, known, strict=True)]
    n = len(strata(tables[0]))
    once = [measure(np.ones((1, n))) for measure in estimators]
    parts = [
        [measure(weights) for measure in estimators]
        for weights in draws(strata(tables[0]), resamples, seed, clusters(tables[0]))
    ]
    chosen = np.random.default_rng((seed, 1)).multinomial(
        len(tables), np.full(len(tables), 1 / len(tables)), size=resamples
    )
    values: dict[str, Float[np.ndarray, " r"]] = {}
    items: dict[str, Float[np.ndarray, " r"]] = {}
    for name in once[0]:
        of_seeds = np.stack(
            [np.concatenate([part[s][name] for part in parts]) for s in range(len(tables))]
        )
        values[name] = (of_seeds * chosen.T).sum(0) / len(tables)
        items[name] = of_seeds.mean(0)
    seeds = {name: np.array([o[name][0] for o in once]) for name in once[0]}
    estimate = {name: float(np.mean(found)) for name, found in seeds.items()}
    return Distribution(estimate, values, items, seeds)


def percentiles(resampled: Distribution, level: float = 0.95) -> dict[str, Interval]:
    """The central `level` of every metric's values; draws in which a metric does not exist are left out."""
    edges = [50 * (1 - level), 50 * (1 + level)]
    result: dict[str, Interval] = {}
    for name, values in resampled.values.items():
        low, high = np.nanpercentile(values, edges)
        result[name] = Interval(resampled.estimate[name], float(low), float(high), level)
    return result


def subtract(ours: Distribution, theirs: Distribution) -> Distribution:
    """Differences draw by draw, of the metrics that both have."""
    names = [name for name in ours.values if name in theirs.values]
    return Distribution(
        {name: ours.estimate[name] - theirs.estimate[name] for name in names},
        {name: ours.values[name] - theirs.values[name] for name in names},
        {name: ours.items[name] - theirs.items[name] for name in names},
    )


def same_items(a: Resampled, b: Resampled) -> None:
    """Raise unless two tables ask the same questions in the same order.

    Raises:
        ScoreTableError: says in what they differ.

    """
    if type(a) is not type(b) and not (isinstance(a, Composition) and isinstance(b, Composition)):
        raise ScoreTableError(f"{type(a).__name__} and {type(b).__name__} cannot be compared")
    if isinstance(a, BothDirections) and isinstance(b, BothDirections):
        same_items(a.i2t, b.i2t)
        same_items(a.t2i, b.t2i)
        return
    assert not isinstance(a, BothDirections)
    assert not isinstance(b, BothDirections)
    if isinstance(a, ComposedScores) and isinstance(b, ComposedScores):
        _same_questions(a, b)
        return
    for name in ("split", "world", "ids", "target", "pairs", "seen", "category", "positives"):
        mine, other = (np.asarray(getattr(t, name, "")) for t in (a, b))
        if name == "ids" and 0 in (mine.size, other.size):
            continue  # unnamed rows: labels and shapes have to do
        if mine.shape != other.shape or not (mine == other).all():
            raise ScoreTableError(
                f"the two tables differ in {name} ({mine.shape} and {other.shape} values): paired differences need "
                "identical items in the same order; score both on the same cache split"
            )
    if a.shape != b.shape:
        raise ScoreTableError(f"the two tables have {a.shape} and {b.shape} scores")


def _same_questions(a: ComposedScores, b: ComposedScores) -> None:
    """Raise unless two composed tables ask the same queries of the same candidates."""
    mine, other = a.queries.facts(), b.queries.facts()
    differ = [name for name in mine if mine[name] != other[name]]
    if not np.array_equal(np.asarray(a.candidates), np.asarray(b.candidates)):
        differ.append("candidates")
    if differ:
        raise ScoreTableError(
            f"the two tables differ in {', '.join(differ)} ({a.shape} and {b.shape} scores): paired differences "
            "need identical queries and candidates in the same order; score both on the same cache split"
        )


def estimator(
    table: Resampled, k: int = 1, ks: Sequence[int] | None = None, found: Ranks | None = None
) -> Callable[[Float[np.ndarray, "r n"]], dict[str, Float[np.ndarray, " r"]]]:
    """A function from item counts to metrics; with all ones it gives what the task's `evaluate` gives."""
    if isinstance(table, Composition):
        return _czsl_estimator(table, k)
    if isinstance(table, MatchingScores):
        parts = matching.outcomes(table)
        return lambda weights: matching.summarise(table, _weighted_means(parts, weights))
    if isinstance(table, ComposedScores):
        parts = composed.outcomes(table, ks=ks, found=found)
        return lambda weights: composed.summarise(table.queries, _weighted_means(parts, weights))
    if isinstance(table, BothDirections):
        parts = retrieval.outcomes_both(table, ks=ks)
        return lambda weights: retrieval.summarise_both(_weighted_means(parts, weights))
    parts = retrieval.outcomes(table, ks=ks)
    return lambda weights: _weighted_means(parts, weights)


def _czsl_estimator(
    table: Composition, k: int
) -> Callable[[NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """Curve metrics from thresholds, accuracies as means."""
    reduced = table.thresholds(k)
    hits = {name: hit.astype(np.float64) for name, hit in czsl.unbiased_hits(table).items()}

    def measure(weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        s, u, _ = curve.hit_rates(reduced, weights)
        n_seen, n_unseen = table.counts
        if n_seen and n_unseen:
            metrics = curve.summarise(s, u)
        else:
            metrics = {"best_seen": s.max(1)} if n_seen else {"best_unseen": u.max(1)}
        return metrics | (_weighted_means(hits, weights) if k == 1 else {})

    return measure


def _weighted_means(
    parts: dict[str, NDArray[np.float64]], weights: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Mean of every metric over the items it applies to (those not NaN); NaN where none of them was drawn."""
    values = np.stack(list(parts.values()), axis=1)
    applies = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means = (weights @ np.where(applies, values, 0)) / (weights @ applies.astype(np.float64))
    return dict(zip(parts, means.T, strict=True))
