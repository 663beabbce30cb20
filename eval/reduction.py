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

    def kept(self, level: int) -> int:
        """How many candidates there are, the first of `order`, where unseen ones pass that many thresholds."""
        return int(self.starts[len(self.levels) + 2 - level])

    def sizes(self) -> list[int]:
        """The different numbers of candidates of all levels, descending; 0 is none."""
        return sorted({self.kept(i) for i in range(len(self.levels) + 1)} - {0}, reverse=True)


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


def checked_levels(
    levels: Iterable[NDArray[Any]], layout: Layout
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Each number of candidates with the scores of a block of rows among as many.

    Raises:
        ScoreTableError: other than (B, n) float32 or float64, for every n of `layout.sizes()` in turn.

    """
    sizes = layout.sizes()
    for n, block in zip(sizes, levels, strict=True):
        (values,) = checked_rows([block], n)
        yield n, values


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
        FloatingPointError: NaN or +inf; its argument is the block.

    """
    b, n = len(block), len(layout.levels) + 1
    parts = [slice(*layout.starts[i : i + 2].tolist()) for i in range(n + 1)]
    seen, unseen = (_empty((b, *size, keep), block.dtype) for size in ((), (n,)))
    _insert_part(block, parts[0], layout, *seen)
    running = tuple(x[:, 0].copy() for x in unseen)
    for level, part in zip(range(n - 1, -1, -1), parts[1:], strict=True):
        _insert_part(block, part, layout, *running)
        for out, now in zip(unseen, running, strict=True):
            out[:, level] = now
    return seen, unseen


def best_of_levels(
    levels: Iterable[tuple[int, NDArray[Any]]],
    layout: Layout,
    keep: int,
    at: Int[np.ndarray, " b"],
    candidates: Bool[np.ndarray, " c"],
) -> tuple[NDArray[Any], ...]:
    """What `best` keeps, where a score depends on who else is a candidate, so that each level has scores of its own.

    Args:
        levels: from `checked_levels`, of a block of rows in layout order; each may be overwritten by the next.
        layout, keep: as for `best`.
        at: place of each row's true pair in layout order.
        candidates: True at places known to be candidates of some row; learns of more.

    Returns:
        (B, L) scores of the true pairs, -inf where they are no candidates; (B, L, K) scores and columns of the seen,
        then of the unseen candidates.

    Raises:
        FloatingPointError: NaN or +inf; its argument is the block.

    """
    rows, out = np.arange(len(at)), None
    for n, block in levels:
        if out is None:
            size = (len(at), len(layout.levels) + 1)
            own = np.full(size, -np.inf, dtype=block.dtype)
            out = (own, *(x for _ in range(2) for x in _empty((*size, keep), block.dtype)))
        if not candidates[:n].all():
            candidates[:n] |= any_candidate(block)
        of = np.flatnonzero([layout.kept(i) == n for i in range(len(layout.levels) + 1)])
        kept = np.flatnonzero(at < n)
        out[0][np.ix_(kept, of)] = block[rows[kept], at[kept]][:, None]
        lists = [_empty((len(at), keep), block.dtype) for _ in range(2)]
        starts = np.unique(layout.starts[layout.starts < n]).tolist()
        for start, stop in zip(starts, [*starts[1:], n], strict=True):
            side = lists[int(start >= layout.starts[1])]
            _insert_part(block, slice(start, stop), layout, *side)
        for whole, now in zip(out[1:], (*lists[0], *lists[1]), strict=True):
            whole[:, of] = now[:, None]
    assert out is not None
    return out


def _empty(shape: tuple[int, ...], dtype: Any) -> tuple[NDArray[Any], NDArray[np.int32]]:
    return np.full(shape, -np.inf, dtype=dtype), np.full(shape, -1, np.int32)


def _insert_part(
    block: NDArray[Any], part: slice, layout: Layout, top: NDArray[Any], columns: NDArray[np.int32]
) -> None:
    try:
        _insert(block[:, part], layout.order[part], top, columns)
    except FloatingPointError:
        raise FloatingPointError(block) from None


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
