"""All rows of a question by their headline, best first, and which of them cannot be told apart from the best.

    place   1 + the rows with a larger mean over seeds
    tied    the difference to the best row is not decided, corrected for all pairs of the question (`eval.pairwise`)

So a row far down may be tied (its seeds differ much), and one just below the best may not. `tied` is no class of
equals: two rows that are tied with the best may well be told apart from each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.comparison import Comparison, Row
from eval.pairwise import Difference


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A line of the leaderboard.

    Attributes:
        place: from 1; equal means share one.
        number: of the row in the comparison.
        row: it.
        behind: the row minus the best; None for the best itself.
        gain: the row minus zero_shot of its backbone, corrected; None where there is none.

    """

    place: int
    number: int
    row: Row
    behind: Difference | None
    gain: Difference | None

    @property
    def is_tied(self) -> bool:
        """Could it be as good as the best, which it is not itself?"""
        return self.behind is not None and not self.behind.is_decided


def leaderboard(c: Comparison) -> tuple[Entry, ...]:
    """The rows by headline; nothing where there is no more than one, or on the legacy curve, which has no intervals."""
    if c.pairs is None:
        return ()
    means = [row.cells[c.headline].mean for row in c.rows]
    order = sorted(
        range(len(means)), key=lambda i: -means[i]
    )  # stable: equal ones in the order of the table
    best = order[0]
    return tuple(
        Entry(
            1 + sum(mean > means[i] for mean in means),
            i,
            c.rows[i],
            None if i == best else c.pairs.between(i, best),
            _gain(c, i),
        )
        for i in order
    )


def _gain(c: Comparison, i: int) -> Difference | None:
    """To the same row of zero_shot that `row.gain` is measured against."""
    row = c.rows[i]
    if row.gain is None or c.pairs is None:
        return None
    base = baseline(c.rows, row)
    return None if base is None else c.pairs.between(i, base)


def baseline(rows: Sequence[Row], row: Row) -> int | None:
    """Number of the row that `row.gain` is measured against: the backbone's zero_shot, if it has just one."""
    mine = [
        j
        for j, r in enumerate(rows)
        if r.group.is_baseline and r.group.backbone == row.group.backbone
    ]
    return mine[0] if len(mine) == 1 else None
