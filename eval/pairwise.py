"""All differences between the rows of a comparison, with p-values that hold for all of them together.

    d_r   difference of two rows' metrics on draw r of R, items and seeds drawn as in `eval.bootstrap`
    p     min(1, 2 · (1 + min(#{d_r ≤ 0}, #{d_r ≥ 0})) / (R + 1))

That is the percentile interval turned round: p is below 0.05 where the 95 % interval leaves 0 out. The observed items
count as one more draw, so p is never 0; its smallest value is 2 / (R + 1).

Holm (1979): of m p-values in ascending order the i-th is multiplied by m − i + 1, and none may be smaller than the one
before it. A pair is *decided* where the product is at most 0.05; that even one of all the pairs that are in truth equal
comes out as decided happens then in at most 5 of 100 reports, whatever depends on what. `scipy.stats` has Benjamini and
Hochberg's correction, which lets a share of the decided ones be wrong; a leaderboard needs the stricter one.

With many pairs 1,000 draws are too few: m · 2 / 1001 is above 0.05 from 26 pairs on, and nothing could be decided. So
the draws are `resamples_for(m)`; where these would be more than is affordable, the limit is said (`Pairs.can_decide`).

Not for: rows with one seed each as a claim about the methods, as the draws know nothing then of what training varies.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from eval.bootstrap import Distribution, Interval, percentiles, subtract

LEVEL = 0.05
"""Chance of one false decision or more among all pairs of a question."""

RESAMPLES, MOST_RESAMPLES = 1000, 20_000
"""Draws of the intervals, which do for few pairs; and the most that are ever drawn."""

MOST_COUNTS = 1_000_000_000
"""Item counts drawn for the p-values of one question, over all tables: some minutes of one core."""

ROOM = 2
"""Draws on the other side of 0, the observed one counted, with which a pair can still be decided before all others."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One row minus another.

    Attributes:
        ours, theirs: numbers of the two rows in the comparison, ours < theirs.
        interval: of the difference, uncorrected, fractions.
        p: of this pair alone.
        corrected: by Holm, over all pairs of the question.

    """

    ours: int
    theirs: int
    interval: Interval
    p: float
    corrected: float

    @property
    def is_decided(self) -> bool:
        """Is it known which is larger, all pairs considered?"""
        return self.corrected <= LEVEL

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
        resamples: R of the p-values.
        all: by ours, then theirs.

    """

    metric: str
    resamples: int
    all: tuple[Difference, ...]

    @property
    def can_decide(self) -> bool:
        """Is the smallest p-value small enough for any decision among so many pairs?"""
        return len(self.all) * smallest_p(self.resamples) <= LEVEL

    def between(self, ours: int, theirs: int) -> Difference | None:
        """Row `ours` minus row `theirs`; None where it is not there."""
        for found in self.all:
            if (found.ours, found.theirs) == (ours, theirs):
                return found
            if (found.theirs, found.ours) == (ours, theirs):
                return found.turned()
        return None


def pairs(
    shown: Sequence[Distribution],
    metric: str,
    redraw: Callable[[int], Sequence[Distribution]] | None = None,
    items: int = 1,
) -> Pairs | None:
    """Every pair of rows that have the metric; None where there is no pair.

    Args:
        shown: of every row, what its intervals come from, all on the same draws: intervals of differences come from
            them too, so that a page never shows two of one difference.
        metric: what to compare.
        redraw: the same rows on so many draws; asked where those of `shown` are too few for p-values.
        items: counts in one draw of all rows, which limits how many draws are affordable.

    """
    rows = [i for i, found in enumerate(shown) if metric in found.values]
    n = len(rows) * (len(rows) - 1) // 2
    if not n:
        return None
    resamples = len(shown[rows[0]].values[metric])
    needed, fine = resamples_for(n, items), shown
    if redraw is not None and needed > resamples:
        resamples, fine = needed, redraw(needed)
    found: list[tuple[int, int, Interval, float]] = []
    for at, i in enumerate(rows):
        for j in rows[at + 1 :]:
            interval = percentiles(_only(subtract(shown[i], shown[j]), metric))[metric]
            difference = fine[i].values[metric] - fine[j].values[metric]
            found.append((i, j, interval, p_value(difference)))
    corrected = holm([p for *_, p in found])
    return Pairs(
        metric,
        resamples,
        tuple(Difference(*known, better) for known, better in zip(found, corrected, strict=True)),
    )


def _only(resampled: Distribution, metric: str) -> Distribution:
    return Distribution({metric: resampled.estimate[metric]}, {metric: resampled.values[metric]})


def p_value(differences: Float[np.ndarray, " r"]) -> float:
    """Two-sided, of a difference on R draws; draws in which the metric does not exist are left out."""
    known = differences[~np.isnan(differences)]
    other_side = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(1.0, 2 * (1 + other_side) / (len(known) + 1))


def smallest_p(resamples: int) -> float:
    """What p is where every draw lies on one side."""
    return 2 / (resamples + 1)


def resamples_for(n_pairs: int, items: int = 1) -> int:
    """Draws with which the first of so many pairs can be decided with `ROOM`, as far as `items` allow."""
    needed = math.ceil(2 * ROOM * n_pairs / LEVEL) - 1
    affordable = min(MOST_RESAMPLES, MOST_COUNTS // items)
    return max(RESAMPLES, min(math.ceil(needed / 1000) * 1000, affordable))


def holm(p: Sequence[float]) -> list[float]:
    """Corrected p-values, in the order given: rejecting those ≤ α keeps the chance of any false rejection ≤ α."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in corrected]
