"""Orderings that somebody claims ("A is above B"), each held against a comparison of runs: does it hold here?

    holds              the 95 % interval of A − B lies above 0
    does not hold      it lies below 0
    not decided        it contains 0: more seeds or items might tell

The difference is paired, as that to zero_shot is (`eval/bootstrap.py`): both rows on the same draws of test items, and
of training seeds, whose first is paired with the other's first where both have equally many.

Not for: a search among many orderings for some that hold. Nothing is corrected for their number: of a hundred between
rows that are equally good, about five come out as decided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eval.bootstrap import Interval, percentiles, same_items, subtract
from eval.comparison import Comparison, Row

Decision = Literal["holds", "does not hold", "not decided"]
DECISIONS: tuple[Decision, ...] = ("holds", "does not hold", "not decided")


@dataclass(frozen=True, slots=True)
class Ordering:
    """A claim.

    Attributes:
        better, than: names of two rows of a comparison.
        metric: the one that it is about, e.g. "best_hm".
        says: who claims it, and how that is known.

    """

    better: str
    than: str
    metric: str
    says: str

    def words(self) -> str:
        """For people."""
        return f"{self.better} above {self.than}"


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """An ordering on one backbone, in one comparison.

    Attributes:
        ordering: what was claimed.
        comparison: where it was held against.
        backbone: the frozen model that both rows have.
        interval: of the difference better − than, fractions.
        seeds: of the better and of the other row; of one alone, the interval is over items only.

    """

    ordering: Ordering
    comparison: Comparison
    backbone: str
    interval: Interval
    seeds: tuple[int, int]

    @property
    def difference(self) -> float:
        """On the items as they are, averaged over seeds; a fraction."""
        return self.interval.estimate

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.interval.low

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.interval.high

    @property
    def verdict(self) -> Decision:
        """What the interval says of the claim."""
        if self.interval.low > 0:
            return "holds"
        return "does not hold" if self.interval.high < 0 else "not decided"


def judge(comparisons: Sequence[Comparison], orderings: Sequence[Ordering]) -> list[Verdict]:
    """Every ordering in every comparison and on every backbone that has both rows and the metric; in this order.

    The legacy curve has no intervals and is passed over.

    Raises:
        ScoreTableError: two rows of one comparison are not on the same items.
    """
    return [
        verdict
        for ordering in orderings
        for comparison in comparisons
        for verdict in _in_comparison(comparison, ordering)
    ]


def _in_comparison(comparison: Comparison, ordering: Ordering) -> list[Verdict]:
    """One verdict a backbone."""
    rows = {(row.group.backbone, row.group.method): row for row in comparison.rows}
    found: list[Verdict] = []
    for backbone in dict.fromkeys(row.group.backbone for row in comparison.rows):
        better, than = (rows.get((backbone, name)) for name in (ordering.better, ordering.than))
        if better is None or than is None:
            continue
        interval = _difference(better, than, ordering.metric)
        if interval is not None:
            seeds = len(better.group.runs), len(than.group.runs)
            found.append(Verdict(ordering, comparison, backbone, interval, seeds))
    return found


def _difference(better: Row, than: Row, metric: str) -> Interval | None:
    """Of what both rows have resampled; None where one lacks the metric or, on the legacy curve, everything."""
    if better.resampled is None or than.resampled is None:
        return None
    same_items(better.group.tables[0], than.group.tables[0])
    both = subtract(better.resampled, than.resampled)
    return percentiles(both)[metric] if metric in both.values else None


def unmeasured(orderings: Sequence[Ordering], verdicts: Sequence[Verdict]) -> list[Ordering]:
    """Orderings without any verdict: no backbone has both rows with the metric."""
    measured = {verdict.ordering for verdict in verdicts}
    return [ordering for ordering in orderings if ordering not in measured]
