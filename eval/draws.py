"""What a bootstrap draws: the items of a table again, within strata, in clusters; some resamples at a time."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from eval.any_table import Resampled
from eval.composed_table import ComposedScores
from eval.composition import Composition
from eval.retrieval import BothDirections, RetrievalScores

CELLS_PER_DRAW = 1 << 21
"""Item counts drawn in one go (16 MB of float64)."""


def strata(table: Resampled) -> Int[np.ndarray, " n"]:
    """Groups whose sizes the split fixes: seen- and unseen-labelled images, FashionIQ's categories, GeneCIS' tasks."""
    if isinstance(table, Composition):
        return table.seen_labelled.astype(np.int64)
    if isinstance(table, BothDirections):
        return np.zeros(sum(table.i2t.positives.shape), dtype=np.int64)
    if isinstance(table, ComposedScores) and table.queries.protocol in ("fashioniq", "genecis"):
        kinds = table.queries.kinds
        return np.array([kinds.index(row[0]) for row in table.queries.categories], dtype=np.int64)
    return np.zeros(table.shape[0], dtype=np.int64)


def clusters(table: Resampled) -> Int[np.ndarray, " n"]:
    """Items with one number are drawn together: queries connected by shared right answers; elsewhere each is alone."""
    if isinstance(table, RetrievalScores):
        query, candidate = np.nonzero(table.positives)
        return _connected(query, candidate, table.positives.shape)[0]
    if isinstance(table, BothDirections):
        image, caption = np.nonzero(table.i2t.positives)
        return np.append(*_connected(image, caption, table.i2t.positives.shape))
    if isinstance(table, ComposedScores):
        groups = strata(table).tolist()
        links = [
            (i, (group, name)) for i, group in enumerate(groups) for name in table.queries.right(i)
        ]
        number = {answer: j for j, answer in enumerate(dict.fromkeys(a for _, a in links))}
        query = np.array([i for i, _ in links], dtype=np.int64)
        answer = np.array([number[a] for _, a in links], dtype=np.int64)
        return _connected(query, answer, (len(groups), len(number)))[0]
    return np.arange(len(strata(table)))


def _connected(
    row: Int[np.ndarray, " l"], column: Int[np.ndarray, " l"], shape: tuple[int, ...]
) -> tuple[Int[np.ndarray, " r"], Int[np.ndarray, " c"]]:
    """The smallest row that every row and every column is linked to, over any number of links.

    A column without a link gets a number of its own, above those of the rows.
    """
    mine = np.arange(shape[0])
    while True:  # the smallest number spreads over shared columns: one round more than the longest chain of them
        smallest = shape[0] + np.arange(shape[1])
        np.minimum.at(smallest, column, mine[row])
        spread = mine.copy()
        np.minimum.at(spread, row, smallest[column])
        if (spread == mine).all():
            return mine, smallest
        mine = spread


def draws(
    groups: Int[np.ndarray, " n"],
    resamples: int,
    seed: int,
    together: Int[np.ndarray, " n"] | None = None,
) -> Iterator[Float[np.ndarray, "r n"]]:
    """How often each item is drawn, some resamples at a time; each group keeps its number of clusters.

    Args:
        groups: strata of the items.
        resamples: number of draws.
        seed: of the draws.
        together: cluster of each item, inside one group; None: every item is its own.

    """
    rng = np.random.default_rng((seed, 0))
    if together is None:
        together = np.arange(len(groups))
    _, first, unit = np.unique(together, return_index=True, return_inverse=True)
    members = [np.flatnonzero(groups[first] == g) for g in np.unique(groups)]
    step = max(1, CELLS_PER_DRAW // len(groups))
    for start in range(0, resamples, step):
        r = min(step, resamples - start)
        counts = np.zeros((r, len(first)))
        for rows in members:
            n = len(rows)
            drawn = rng.integers(n, size=(r, n)) + n * np.arange(r)[:, None]
            counts[:, rows] = np.bincount(drawn.ravel(), minlength=r * n).reshape(r, n)
        yield counts[:, unit]
