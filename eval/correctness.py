"""Which items a row gets right: the same yes or no for every row, so that rows can be held against each other.

    czsl         the pair predicted at the bias of the best harmonic mean is the true one (as in `eval.diagnostics`:
                 without a bias nearly every image goes to a seen pair, and rows would agree for that reason alone)
    matching     the group: all four comparisons; of one image with two captions, the one
    retrieval    a right answer ranks first
    composed     a right image ranks first

Ties are as in the task's own metric. Over seeds the majority decides: right is what more than half of them get right.
So a share of right items here is not the mean over seeds of the table above.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from eval import composed, matching, retrieval
from eval.any_table import Table
from eval.comparison import Row
from eval.composed import Ranks
from eval.composed_table import ComposedScores
from eval.composition import Composition
from eval.diagnostics import best_hm_bias
from eval.matching import MatchingScores

RULES = {
    "czsl": "the true pair is predicted at the bias of the best harmonic mean of that row and seed",
    "matching": "all comparisons of the item are right",
    "retrieval": "a right answer ranks first",
    "composed": "a right image ranks first",
}
"""Kind of task → what right means, in words."""


def right_items(table: Table, found: Ranks | None = None) -> Bool[np.ndarray, " q"]:
    """Per item of a table; `found` are the ranks of a composed one, where they are known."""
    if isinstance(table, Composition):
        return table.sides().at(best_hm_bias(table)) == table.target
    if isinstance(table, MatchingScores):
        every = matching.outcomes(table)
        return every["accuracy" if table.scores.ndim == 2 else "group_score"] == 1
    if isinstance(table, ComposedScores):
        known = composed.ranks(table) if found is None else found
        return known.right[:, 0] <= 1
    return retrieval.outcomes(table, ks=[1])["recall@1"] == 1


def right_seeds(row: Row) -> Bool[np.ndarray, "s q"]:
    """Per seed and item of a row."""
    known: Sequence[Ranks | None] = row.ranks or [None] * len(row.group.tables)
    return np.stack([right_items(t, r) for t, r in zip(row.group.tables, known, strict=True)])


def majority(seeds: Bool[np.ndarray, "s q"]) -> Bool[np.ndarray, " q"]:
    """What more than half of the seeds get right."""
    return 2 * seeds.sum(0) > len(seeds)


def wrong_share(seeds: Sequence[Bool[np.ndarray, "_ q"]]) -> Float[np.ndarray, " q"]:
    """Of every item, how often it is wrong: over the seeds of each row, then over rows."""
    return np.mean([1 - found.mean(0) for found in seeds], axis=0)
