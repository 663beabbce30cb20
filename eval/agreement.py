"""Do two rows get the same items right? Shares, Cohen's kappa, and what an oracle would get that picks the right one.

               B right   B wrong      kappa = (observed − expected) / (1 − expected): observed is the share of items on
    A right     both      first       which both are right or both wrong, expected what two rows of these accuracies
    A wrong     second    neither     share by chance. 1: the same items; 0: no more than by chance; below: fewer

    oracle = both + first + second

Right and wrong as of `eval.correctness`. Not for: the oracle as a reachable accuracy (nobody knows which row is right;
of two rows that guess between two answers it gets 75 %), nor kappa between rows of very different accuracy as distance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from sklearn.metrics import cohen_kappa_score

from eval.comparison import Comparison, Row
from eval.correctness import majority, right_seeds


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two rows on the same items, in fractions of them.

    Attributes:
        ours, theirs: numbers of the rows in the comparison, ours < theirs.
        both, first, second, neither: sum to 1; `first`: only `ours` is right.
        kappa: None where both rows are right everywhere, or both wrong.

    """

    ours: int
    theirs: int
    both: float
    first: float
    second: float
    neither: float
    kappa: float | None

    @property
    def oracle(self) -> float:
        """Items that one of the two gets right, or both."""
        return self.both + self.first + self.second


@dataclass(frozen=True, slots=True)
class Circle:
    """Rows that are held against each other: one method on several backbones, or the methods of one backbone.

    Attributes:
        name: what they share.
        rows: their numbers in the comparison.

    """

    name: str
    rows: tuple[int, ...]


def agreements(c: Comparison) -> tuple[tuple[float, ...], dict[tuple[int, int], Agreement]]:
    """Share of right items of every row, and every pair of rows."""
    right = [majority(right_seeds(row)) for row in c.rows]
    pairs = {
        (i, j): agreement(i, j, right[i], right[j])
        for i in range(len(right))
        for j in range(i + 1, len(right))
    }
    return tuple(float(found.mean()) for found in right), pairs


def agreement(
    ours: int, theirs: int, a: Bool[np.ndarray, " q"], b: Bool[np.ndarray, " q"]
) -> Agreement:
    """Of two rows, from which items they get right."""
    both, first, second, neither = (float(x.mean()) for x in (a & b, a & ~b, ~a & b, ~a & ~b))
    return Agreement(ours, theirs, both, first, second, neither, kappa(a, b))


def kappa(a: Bool[np.ndarray, " q"], b: Bool[np.ndarray, " q"]) -> float | None:
    """Cohen's; None where chance alone would agree on everything."""
    if (a.all() and b.all()) or not (a.any() or b.any()):
        return None
    return float(cohen_kappa_score(a, b))


def circles(rows: Sequence[Row]) -> list[Circle]:
    """Every method that is there on several backbones, then every backbone with several rows."""
    found: list[Circle] = []
    for name in dict.fromkeys(row.group.method for row in rows):
        mine = tuple(i for i, row in enumerate(rows) if row.group.method == name)
        if len({rows[i].group.backbone for i in mine}) > 1:
            found.append(Circle(name, mine))
    for name in dict.fromkeys(row.group.backbone for row in rows):
        mine = tuple(i for i, row in enumerate(rows) if row.group.backbone == name)
        if len(mine) > 1:
            found.append(Circle(name, mine))
    return found
