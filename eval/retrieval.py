"""Retrieval with one or several right answers a query: recall@K and mean average precision.

`recall@K` is the share of queries with *any* right candidate among the K best (Karpathy & Fei-Fei, arXiv 1412.2306);
`map@K` is CIRCO's (arXiv 2303.15247), which divides by min(number right, K) and may fall as K grows.
Ties are pessimistic: rank of a right candidate = 1 + wrong ones with a score ≥ its own + right ones ahead of it.
Letters: `Q` queries, `C` candidates, `K` top-k.

Not for: claims about compositional binding (a gallery's captions differ in far more than the binding).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from eval.errors import ScoreTableError
from eval.table import (
    blocks,
    chance_of_hit,
    checked_facts,
    checked_k,
    checked_scores,
    largest,
    refuse_nan,
)

KS = (1, 5, 10)
"""The K reported unless told otherwise, as far as there are candidates."""


@dataclass(frozen=True, slots=True, eq=False)
class RetrievalScores:
    """Scores of queries against a gallery.

    Attributes:
        scores: (Q, C) float32 or float64, larger is better, -inf where something is not a candidate.
        positives: (Q, C) bool, True where the candidate is a right answer. A query without any is a miss.
        space: "cosine", "logit" or "probability".
        split: train, val or test.
        ids: names of the queries, or empty.
        meta: anything else worth keeping: run, cache fingerprint, direction ("i2t", "t2i").

    Raises:
        ScoreTableError: shapes that disagree, NaN or +inf.

    """

    scores: NDArray[Any]
    positives: NDArray[Any]
    space: str
    split: str = "test"
    ids: Sequence[str] = ()
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        scores, positives = checked_scores(self.scores), np.asarray(self.positives)
        if scores.ndim != 2 or positives.shape != scores.shape or positives.dtype != np.bool_:
            raise ScoreTableError(
                f"scores must be (queries, candidates) and positives bool of the same shape, but they are "
                f"{scores.shape} and {positives.dtype} {positives.shape}"
            )
        ids = checked_facts(self.split, self.space, self.ids, len(scores))
        refuse_nan(scores, ids, ["candidate"] * scores.shape[1])
        for name, value in zip(
            ("scores", "positives", "ids"), (scores, positives, ids), strict=True
        ):
            object.__setattr__(self, name, value)

    @property
    def n_candidates(self) -> int:
        """Candidates of the query that has most of them."""
        return int((self.scores > -np.inf).sum(1).max())


def evaluate(scores: RetrievalScores, *, ks: Sequence[int] | None = None) -> dict[str, float]:
    """`recall@K` and `map@K` for every K, as fractions.

    Args:
        scores: the table.
        ks: None takes 1, 5 and 10, leaving out those above the number of candidates.

    Raises:
        ScoreTableError: a K in `ks` is above the number of candidates.

    """
    return {name: float(values.mean()) for name, values in outcomes(scores, ks=ks).items()}


def outcomes(
    scores: RetrievalScores, *, ks: Sequence[int] | None = None
) -> dict[str, Float[np.ndarray, " q"]]:
    """Per metric and query: hit or miss for recall, average precision for map."""
    n = scores.n_candidates
    if not n:
        raise ScoreTableError(
            "every score is -inf: no query has a candidate, so there is nothing to rank"
        )
    chosen = [k for k in KS if k <= n] if ks is None else [checked_k(k, n, "K") for k in ks]
    if not chosen:
        raise ScoreTableError("no K at all was asked for; give at least one, such as 1")
    ranks = positive_ranks(scores, max(chosen))
    n_positive = scores.positives.sum(1)
    precision = np.arange(1, max(chosen) + 1) / ranks
    parts: dict[str, Float[np.ndarray, " q"]] = {}
    for k in chosen:
        parts[f"recall@{k}"] = (ranks[:, 0] <= k).astype(np.float64)
    for k in chosen:
        total = np.where(ranks <= k, precision, 0).sum(1)
        parts[f"map@{k}"] = total / np.maximum(np.minimum(n_positive, k), 1)
    return parts


def positive_ranks(scores: RetrievalScores, k: int) -> Float[np.ndarray, "q k"]:
    """Ranks of each query's k best right candidates, ascending; +inf where there are fewer.

    Only k of them can be in the top k, so the cost is O(k·Q·C) whatever the number of right answers.
    """
    ranks = np.full((len(scores.scores), k), np.inf)
    for rows in blocks(*scores.scores.shape):
        s, right = scores.scores[rows], scores.positives[rows]
        best = largest(np.where(right, s, -np.inf), k)
        wrong = np.where(right, -np.inf, s)
        for g in range(min(k, int(right.sum(1).max()))):
            ahead = (wrong >= best[:, g, None]).sum(1)
            ranks[rows, g] = np.where(best[:, g] > -np.inf, 1 + g + ahead, np.inf)
    return ranks


def chance(scores: RetrievalScores, *, ks: Sequence[int] | None = None) -> dict[str, float]:
    """What a random order of the candidates gets, averaged over the queries with their own numbers of right answers.

    recall@K: 1 − C(n−c, K)/C(n, K). map@K: sum over ranks i ≤ K of c/n · (1 + (i−1)(c−1)/(n−1)) / i, over min(c, K).
    """
    alive = scores.scores > -np.inf
    sizes = list(
        zip(alive.sum(1).tolist(), (alive & scores.positives).sum(1).tolist(), strict=True)
    )
    owed = scores.positives.sum(1)
    lines: dict[str, float] = {}
    for name in outcomes(scores, ks=ks):
        metric, k = name.split("@")[0], int(name.split("@")[1])
        if metric == "recall":
            values = [chance_of_hit(min(k, n), c, n) for n, c in sizes]
        else:
            values = [
                _chance_precision(min(k, n), c, n) / min(int(g), k) if g else 0.0
                for (n, c), g in zip(sizes, owed, strict=True)
            ]
        lines[name] = float(np.mean(values))
    return lines


def _chance_precision(k: int, c: int, n: int) -> float:
    """Expected sum over ranks i ≤ k of precision(i)·rel(i), with c right among n in random order."""
    both = (c - 1) / (n - 1) if n > 1 else 0.0
    return sum(c / n * (1 + (i - 1) * both) / i for i in range(1, k + 1))
