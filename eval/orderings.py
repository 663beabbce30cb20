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
from itertools import product
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
        world: "closed" or "open", where it was made; None is wherever the metric is.

    """

    better: str
    than: str
    metric: str
    says: str
    world: str | None = None

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
        seeds: of the better and of the other row.
        single: does each have one seed, and are both trained? Then the interval knows nothing of what training varies.
        spaces: score spaces of the two; None where each name has one row here, so that they tell nothing apart.

    """

    ordering: Ordering
    comparison: Comparison
    backbone: str
    interval: Interval
    seeds: tuple[int, int]
    single: bool = False
    spaces: tuple[str, str] | None = None

    @property
    def decision(self) -> Decision:
        """What the interval says of the claim."""
        if self.interval.low > 0:
            return "holds"
        return "does not hold" if self.interval.high < 0 else "not decided"

    def words(self) -> str:
        """The decision for people, with a word of warning where one seed of each row has to do."""
        alone = self.single and self.decision != "not decided"
        return f"{self.decision} (one seed)" if alone else self.decision


def judge(comparisons: Sequence[Comparison], orderings: Sequence[Ordering]) -> list[Verdict]:
    """Every ordering in every comparison of its world and on every backbone that has both rows and the metric.

    In this order. A row in several score spaces is judged in each. The legacy curve has no intervals and is passed
    over.

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
    """One verdict a backbone and pair of score spaces."""
    if ordering.world not in (None, comparison.question.world):
        return []
    found: list[Verdict] = []
    for backbone in dict.fromkeys(row.group.backbone for row in comparison.rows):
        mine = [row for row in comparison.rows if row.group.backbone == backbone]
        named = ([r for r in mine if r.group.method == n] for n in (ordering.better, ordering.than))
        pairs = list(product(*named))
        for better, than in pairs:
            interval = _difference(better, than, ordering.metric)
            if interval is None:
                continue
            groups = better.group, than.group
            seeds = len(better.group.runs), len(than.group.runs)
            single = seeds == (1, 1) and all(group.varies for group in groups)
            spaces = (better.group.space, than.group.space) if len(pairs) > 1 else None
            found.append(Verdict(ordering, comparison, backbone, interval, seeds, single, spaces))
    return found


def _difference(better: Row, than: Row, metric: str) -> Interval | None:
    """Of what both rows have resampled; None where one lacks the metric or, on the legacy curve, everything."""
    if better.resampled is None or than.resampled is None:
        return None
    same_items(better.group.tables[0], than.group.tables[0])
    both = subtract(better.resampled, than.resampled)
    return percentiles(both)[metric] if metric in both.values else None


def unmeasured(orderings: Sequence[Ordering], verdicts: Sequence[Verdict]) -> list[Ordering]:
    """Orderings without any verdict: no backbone has both rows with the metric, in the world of the claim."""
    measured = {verdict.ordering for verdict in verdicts}
    return [ordering for ordering in orderings if ordering not in measured]
