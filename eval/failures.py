"""The items that rows get wrong, and what each row answers instead.

Which items: those that are wrong most often, over the seeds of a row and then over rows (`eval.correctness`); of equal
ones, those whose answers are furthest off in the mean over rows; then the first in the table. None is picked by hand.

    task        how far off an answer is, from 0, whatever the score space
    czsl        half for a wrong attribute, half for a wrong object
    matching    share of the comparisons that are wrong
    retrieval   rank of the best right candidate, as a share of what competes
    composed    rank of the best right image, likewise

Answers and distances are those of each row's first seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from eval import matching
from eval.any_table import Table
from eval.comparison import Comparison, Row
from eval.composed import Ranks
from eval.composed_table import ComposedScores
from eval.composition import Composition
from eval.correctness import right_items, right_seeds, wrong_share
from eval.diagnostics import best_hm_bias
from eval.matching import MatchingScores
from eval.retrieval import RetrievalScores, positive_ranks

SHOWN = 12

COMPARISONS = {
    "i2t_0": "image 1 → caption 2",
    "i2t_1": "image 2 → caption 1",
    "t2i_0": "caption 1 → image 2",
    "t2i_1": "caption 2 → image 1",
}
"""What is wrong where a comparison of a 2×2 item is lost, or tied."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one row says to one item.

    Attributes:
        words: the answer; of matching, what is wrong with it.
        is_right: by the rule of `eval.correctness`.
        image, caption: id of what is ranked first, of retrieval; empty where the table names no candidates.

    """

    words: str
    is_right: bool
    image: str = ""
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """An item that some row gets wrong.

    Attributes:
        number: of it in the tables, from 0.
        name: its id, or its number where the tables have none.
        asked: true pair, category, or kinds of the edit; empty of retrieval, where the item itself is the query.
        wrong: how often it is wrong, over seeds and rows.
        answers: of every row, in their order.
        reference, target: ids of pictures: of a composed query; a right one for a caption.

    """

    number: int
    name: str
    asked: str
    wrong: float
    answers: tuple[Answer, ...]
    reference: str = ""
    target: str = ""


def hardest(c: Comparison, most: int = SHOWN) -> list[Failure]:
    """The items that go wrong most often, at most so many; none where every row gets everything right."""
    wrong = wrong_share([right_seeds(row) for row in c.rows])
    far = np.mean([_distance(*_first(row)) for row in c.rows], axis=0)
    # Rounded: the same shares in another order of rows sum up differently in their last bit.
    order = np.lexsort((np.arange(len(wrong)), -far.round(9), -wrong.round(9)))
    chosen = [int(i) for i in order[:most] if wrong[i] > 0]
    answers = [_answers(*_first(row), chosen) for row in c.rows]
    table = c.rows[0].group.tables[0]
    return [
        _failure(table, i, float(wrong[i]), tuple(of_row[n] for of_row in answers))
        for n, i in enumerate(chosen)
    ]


def _first(row: Row) -> tuple[Table, Ranks | None]:
    """The table of a row's first seed, with its ranks."""
    return row.group.tables[0], row.ranks[0] if row.ranks else None


def _distance(table: Table, found: Ranks | None) -> Float[np.ndarray, " q"]:
    """How far off each answer is; see above."""
    if isinstance(table, Composition):
        predicted = table.sides().at(best_hm_bias(table))
        pairs = np.asarray(table.pairs)
        wrong = (predicted < 0)[:, None] | (pairs[predicted] != pairs[table.target])
        return wrong.mean(1)
    if isinstance(table, MatchingScores):
        every = matching.outcomes(table)
        names = ["accuracy"] if table.scores.ndim == 2 else list(COMPARISONS)
        return np.mean([1 - every[name] for name in names], axis=0)
    if isinstance(table, RetrievalScores):
        ranks, n = positive_ranks(table, 1)[:, 0], _competing(table)
        return np.minimum(ranks, n) / np.maximum(n, 1)
    assert found is not None
    return found.right[:, 0] / np.maximum(found.n, 1)


def _competing(table: RetrievalScores) -> Int[np.ndarray, " q"]:
    """Candidates of every query."""
    return np.count_nonzero(table.scores > -np.inf, axis=1)


def _answers(table: Table, found: Ranks | None, chosen: Sequence[int]) -> list[Answer]:
    """What a table says to the items chosen."""
    right = right_items(table, found)
    if isinstance(table, Composition):
        predicted = table.sides().at(best_hm_bias(table))
        words = [
            " ".join(np.asarray(table.pairs)[predicted[i]].tolist())
            if predicted[i] >= 0
            else "nothing"
            for i in chosen
        ]
        return [Answer(w, bool(right[i])) for w, i in zip(words, chosen, strict=True)]
    if isinstance(table, MatchingScores):
        return [Answer(_lost(table, i), bool(right[i])) for i in chosen]
    if isinstance(table, RetrievalScores):
        ranks = positive_ranks(table, 1)[:, 0]
        return [_ranked(table, i, float(ranks[i]), bool(right[i])) for i in chosen]
    assert isinstance(table, ComposedScores)
    assert found is not None
    best = _best_images(table, chosen)
    return [
        Answer(
            f"right one: rank {found.right[i, 0]:,.0f} of {found.n[i]:,}", bool(right[i]), best[i]
        )
        for i in chosen
    ]


def _ranked(table: RetrievalScores, i: int, rank: float, is_right: bool) -> Answer:
    """The candidate ranked first, a wrong one where the best are equal, and where the best right one ranks."""
    row, right = table.scores[i], table.positives[i]
    tied = np.flatnonzero(row == row.max())
    first = next((c for c in tied if not right[c]), tied[0])
    names = table.meta.get("candidates") or []
    name = str(names[first]) if len(names) == len(row) else ""
    n = np.count_nonzero(row > -np.inf)
    words = f"right one: rank {rank:,.0f} of {n:,}" if rank < np.inf else "no right one competes"
    is_image = table.meta.get("direction") == "t2i"
    return Answer(words, is_right, *((name, "") if is_image else ("", name)))


def _lost(table: MatchingScores, i: int) -> str:
    """The comparisons of an item that are lost or tied."""
    part = MatchingScores(
        table.scores[i : i + 1], np.asarray(table.category)[i : i + 1], table.space, table.split
    )
    every = matching.outcomes(part)
    if part.scores.ndim == 2:
        return "right" if every["accuracy"][0] else "the false caption"
    lost = [words for name, words in COMPARISONS.items() if not every[name][0]]
    return "all four" if len(lost) == len(COMPARISONS) else ", ".join(lost) or "right"


def _best_images(table: ComposedScores, chosen: Sequence[int]) -> dict[int, str]:
    """The image ranked first of each query, a wrong one where the best are equal; one pass over the rows."""
    wanted, found = set(chosen), dict[int, str]()
    for i, row in table.rows():
        if i not in wanted:
            continue
        names, right = table.names(i), set(table.queries.right(i))
        tied = [str(names[column]) for column in np.flatnonzero(row == row.max())]
        found[i] = next((name for name in tied if name not in right), tied[0])
    return found


def _failure(table: Table, i: int, wrong: float, answers: tuple[Answer, ...]) -> Failure:
    """An item with what is known of it."""
    name = str(table.ids[i]) if len(table.ids) else f"item {i + 1}"
    if isinstance(table, Composition):
        asked = " ".join(np.asarray(table.pairs)[table.target[i]].tolist())
        return Failure(i, name, asked, wrong, answers)
    if isinstance(table, MatchingScores):
        return Failure(i, name, str(np.asarray(table.category)[i]), wrong, answers)
    if isinstance(table, RetrievalScores):
        names = table.meta.get("candidates") or []
        right = np.flatnonzero(table.positives[i])
        is_image = table.meta.get("direction") == "t2i" and len(names) and len(right)
        target = str(names[right[0]]) if is_image else ""
        return Failure(i, name, "", wrong, answers, target=target)
    assert isinstance(table, ComposedScores)
    asked = table.queries
    kinds = ", ".join(asked.categories[i])
    return Failure(i, name, kinds, wrong, answers, asked.reference[i], asked.right(i)[0])
