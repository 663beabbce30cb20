"""A block of scores → the best of each image: seen pairs, and unseen ones at each level of feasibility.

Letters: `C` candidate pairs, `K` kept, `L` levels: thresholds plus one, `B` images of a block.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from eval.errors import ScoreTableError
from eval.table import checked_scores


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Candidates in the order in which they are reduced: seen ones, then unseen ones, the most feasible first.

    Attributes:
        order: (C,) columns; inside a level ascending, so that ties go to the lowest.
        seen: (C,) bool, by column.
        starts: (L + 2,): the seen ones are `order[:starts[1]]`, those of level L - 1 - i are
            `order[starts[i + 1]:starts[i + 2]]`.
        rho: (C,) feasibility by column, or None.
        levels: (L - 1,) thresholds, ascending; level j holds the pairs that pass the first j of them and no more.

    """

    order: Int[np.ndarray, " c"]
    seen: Bool[np.ndarray, " c"]
    starts: Int[np.ndarray, " l_plus_2"]
    rho: NDArray[np.float64] | None
    levels: tuple[float, ...]

    @classmethod
    def of(
        cls,
        seen: Bool[np.ndarray, " c"],
        rho: Float[np.ndarray, " c"] | None = None,
        levels: Sequence[float] = (),
    ) -> "Layout":
        """The layout for candidates; without feasibility there is one level.

        Args:
            seen: of the columns.
            rho: of the columns.
            levels: thresholds that will be asked for, e.g. `eval.feasibility.grid(rho, seen)`.

        Raises:
            ScoreTableError: levels without feasibility, or not ascending.

        """
        if list(levels) != sorted(levels) or (rho is None and len(levels)):
            raise ScoreTableError(
                f"{len(levels)} feasibility levels need feasibility values and ascending order"
            )
        exact = None if rho is None else rho.astype(np.float64)
        passed = 0 if exact is None else np.searchsorted(np.asarray(levels), exact, side="right")
        part = np.where(seen, 0, 1 + len(levels) - passed)
        edges = np.searchsorted(np.sort(part), np.arange(len(levels) + 3))
        return cls(np.argsort(part, kind="stable"), seen, edges, exact, tuple(levels))


def checked_rows(rows: Iterable[NDArray[Any]], c: int) -> Iterator[NDArray[Any]]:
    """Blocks of rows as they come.

    Raises:
        ScoreTableError: other than (B, c) float32 or float64.

    """
    for block in rows:
        values = checked_scores(block)
        if values.ndim != 2 or values.shape[1] != c:
            raise ScoreTableError(f"a block of rows must be (images, {c}), but is {values.shape}")
        yield values


def any_candidate(block: NDArray[Any]) -> Bool[np.ndarray, " c"]:
    """True where a column is above -inf in some row; where no score is -inf, a look at the smallest is enough."""
    some = np.asarray(block[:1] > -np.inf)
    if float(block.min()) > -np.inf:
        return some[0]
    return np.asarray((block > -np.inf).any(0))


def best(
    block: Float[np.ndarray, "b c"], layout: Layout, keep: int
) -> tuple[tuple[NDArray[Any], ...], tuple[NDArray[Any], ...]]:
    """(B, K) of the seen and (B, L, K) of the unseen candidates, scores and columns, of a block in layout order.

    Raises:
        FloatingPointError: NaN or +inf.

    """
    b, n = len(block), len(layout.levels) + 1
    parts = [slice(*layout.starts[i : i + 2].tolist()) for i in range(n + 1)]
    seen, unseen = (
        (
            np.full((b, *size, keep), -np.inf, dtype=block.dtype),
            np.full((b, *size, keep), -1, np.int32),
        )
        for size in ((), (n,))
    )
    _insert(block[:, parts[0]], layout.order[parts[0]], *seen)
    running = tuple(x[:, 0].copy() for x in unseen)
    for level, part in zip(range(n - 1, -1, -1), parts[1:], strict=True):
        _insert(block[:, part], layout.order[part], *running)
        for out, now in zip(unseen, running, strict=True):
            out[:, level] = now
    return seen, unseen


def _insert(
    values: Float[np.ndarray, "b n"],
    columns: Int[np.ndarray, " n"],
    top: Float[np.ndarray, "b k"],
    top_columns: Int[np.ndarray, "b k"],
) -> None:
    """Merge candidates into a running list of the best, in place.

    The largest of a row is taken out until it no longer enters the row's list: for most rows and levels that is once.
    """
    most = min(top.shape[1], values.shape[1])
    rows, left = np.arange(len(values)), np.ascontiguousarray(values)
    for taken in range(most):
        at = left.argmax(1)  # the first of equals; NaN counts as the largest
        score, column = left[np.arange(len(left)), at], columns[at]
        if not taken and not (score < np.inf).all():
            raise FloatingPointError
        last, last_column = top[rows, -1], top_columns[rows, -1]
        enters = (score > last) | ((score == last) & (column < last_column))
        entering = rows[enters]
        if not len(entering):
            return
        scores = np.column_stack([top[entering], score[enters]])
        found = np.column_stack([top_columns[entering], column[enters].astype(np.int32)])
        by = np.lexsort((found, -scores), axis=1)[:, :-1]
        top[entering] = np.take_along_axis(scores, by, 1)
        top_columns[entering] = np.take_along_axis(found, by, 1)
        if taken + 1 < most:
            if not taken or len(entering) < len(rows):
                left = left[enters]  # a copy: the caller's block keeps what is taken out below
            left[np.arange(len(left)), at[enters]] = -np.inf
            rows = entering
