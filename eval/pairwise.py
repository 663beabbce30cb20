"""All differences between the rows of a comparison, with p-values that hold for all of them together.

    d    difference of two rows' metrics, each the mean over its seeds
    v₀   its variance over draws of the items (`eval.bootstrap`), every seed as it is
    v₁   variance of a row's seeds (divisor S − 1), over S; v₂ that of the other row
    p    where d² = Σ qᵢ(p)² · vᵢ, qᵢ two-sided quantiles: normal for v₀, Student's with S − 1 degrees for v₁ and v₂

Each variance has the quantile of how well it is known (Banerjee 1961): for normal variation that keeps the level
whichever variance is the larger. Two simpler ways do not do. Draws of S seeds cannot leave the range of these S; and
one t of Welch's and Satterthwaite's degrees of freedom comes out wrong in up to 25 of 100 simulated reports with two
seeds a row, as seeds that agree by chance pass for small variance. Seeds of two rows count as independent.

Holm (1979): of m p-values in ascending order the i-th is multiplied by m − i + 1, and none may be smaller than the one
before it. A pair is *decided* where the product is at most 0.05. `scipy.stats` has Benjamini and Hochberg's correction,
which lets a share of the decided ones be wrong; a leaderboard needs the stricter one.

Simulated (`tests/test_eval_leaderboard.py`): of reports on 2 or 5 equal rows with 100 or 2,000 items and 2, 3 or 5
seeds, whose std is 7 points, fewer than 5 of 100 have a false decision; on equal untrained rows about 4 of 100.

A row that is trained (`Group.varies`) under one seed has an unknown v: its pairs have no p and are never decided. Nor
have any where there are fewer than `FEW` items.

The price: with few seeds only large differences are decided. Student's quantile for the first of ten pairs is 127 with
two seeds, 14 with three, 6 with five.

Not for: rates at 0 or 1, as of `eval.bootstrap`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from eval.bootstrap import Distribution, Interval, percentiles, subtract

LEVEL = 0.05
"""Chance of one false decision or more among all pairs of a question, as far as the simulations go."""

FEW = 30
"""Items, or clusters of them, below which no difference is judged."""

SMALLEST = 1e-12
"""No p is looked for below it."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One row minus another.

    Attributes:
        ours, theirs: numbers of the two rows in the comparison, ours < theirs.
        interval: of the difference, uncorrected, fractions.
        p: of this pair alone; None where a row is trained under one seed only, or items are few.
        corrected: by Holm, over all pairs of the question that have a p.

    """

    ours: int
    theirs: int
    interval: Interval
    p: float | None
    corrected: float | None

    @property
    def is_decided(self) -> bool:
        """Is it known which is larger, all pairs considered?"""
        return self.corrected is not None and self.corrected <= LEVEL

    def turned(self) -> "Difference":
        """The other way round."""
        i = self.interval
        return Difference(
            self.theirs,
            self.ours,
            Interval(-i.estimate, -i.high, -i.low, i.level),
            self.p,
            self.corrected,
        )


@dataclass(frozen=True, slots=True)
class Pairs:
    """All pairs of a question.

    Attributes:
        metric: what the differences are of.
        items: how many, or clusters.
        all: by ours, then theirs.

    """

    metric: str
    items: int
    all: tuple[Difference, ...]

    @property
    def unknown(self) -> int:
        """How many have no p."""
        return sum(found.p is None for found in self.all)

    def between(self, ours: int, theirs: int) -> Difference | None:
        """Row `ours` minus row `theirs`; None where it is not there."""
        for found in self.all:
            if (found.ours, found.theirs) == (ours, theirs):
                return found
            if (found.theirs, found.ours) == (ours, theirs):
                return found.turned()
        return None


def pairs(
    shown: Sequence[Distribution], metric: str, varies: Sequence[bool], items: int
) -> Pairs | None:
    """Every pair of rows that have the metric; None where there is no pair.

    Args:
        shown: of every row, what its intervals come from, all on the same draws of items.
        metric: what to compare.
        varies: could another seed of the row have come out otherwise?
        items: how many the metric is of, or clusters where some are drawn together.

    """
    rows = [i for i, found in enumerate(shown) if metric in found.values]
    both = [(i, j) for at, i in enumerate(rows) for j in rows[at + 1 :]]
    if not both:
        return None
    seeds = [found.seeds.get(metric, np.empty(0)) for found in shown]
    single = [len(found) < 2 for found in seeds]
    of_seeds = [
        0.0 if alone else float(found.var(ddof=1)) / len(found)
        for alone, found in zip(single, seeds, strict=True)
    ]
    intervals: list[Interval] = []
    variances: list[tuple[float, float, float]] = []
    for i, j in both:
        difference = subtract(shown[i], shown[j])
        intervals.append(percentiles(_only(difference, metric))[metric])
        variances.append((float(np.nanvar(difference.items[metric])), of_seeds[i], of_seeds[j]))
    freedom = [(np.inf, max(1, len(seeds[i]) - 1), max(1, len(seeds[j]) - 1)) for i, j in both]
    p = p_values(
        np.array([interval.estimate for interval in intervals]),
        np.array(variances),
        np.array(freedom, dtype=np.float64),
    )
    known = [
        items >= FEW
        and not np.isnan(of_pair)
        and not any(varies[row] and single[row] for row in pair)
        for pair, of_pair in zip(both, p, strict=True)
    ]
    corrected = iter(holm(p[np.array(known)].tolist()))
    return Pairs(
        metric,
        items,
        tuple(
            Difference(
                i, j, interval, *((float(of_pair), next(corrected)) if has else (None, None))
            )
            for (i, j), interval, of_pair, has in zip(both, intervals, p, known, strict=True)
        ),
    )


def _only(resampled: Distribution, metric: str) -> Distribution:
    return Distribution(
        {metric: resampled.estimate[metric]},
        {metric: resampled.values[metric]},
        {metric: resampled.items[metric]},
    )


def p_values(
    differences: Float[np.ndarray, " m"],
    variances: Float[np.ndarray, "m parts"],
    freedom: Float[np.ndarray, "m parts"],
) -> Float[np.ndarray, " m"]:
    """Two-sided, by halving on a logarithmic scale.

    Args:
        differences: d.
        variances: its parts; where all are 0, p is 1 for no difference and `SMALLEST` for any; NaN gives NaN.
        freedom: degrees of freedom of each part, infinite where it is known.

    """
    from scipy import special

    low, high = np.full(len(differences), np.log(SMALLEST)), np.zeros(len(differences))
    for _ in range(48):
        middle = (low + high) / 2
        quantiles = special.stdtrit(freedom, np.exp(middle)[:, None] / 2)
        reached = differences**2 <= (quantiles**2 * variances).sum(1)
        low, high = np.where(reached, middle, low), np.where(reached, high, middle)
    return np.where(np.isnan(differences) | np.isnan(variances).any(1), np.nan, np.exp(high))


def holm(p: Sequence[float]) -> list[float]:
    """Corrected p-values, in the order given: rejecting those ≤ α keeps the chance of any false rejection ≤ α."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in corrected]
