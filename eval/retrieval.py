"""Retrieval with one or several right answers a query: recall@K and mean average precision.

`recall@K` is the share of queries with *any* right candidate among the K best (Karpathy & Fei-Fei, arXiv 1412.2306);
`map@K` is CIRCO's (arXiv 2303.15247), which divides by min(number right, K) and may fall as K grows.
Ties are pessimistic: rank of a right candidate = 1 + wrong ones with a score ≥ its own + right ones ahead of it.
Images and captions are asked both ways, `i2t` and `t2i`; one table of images × captions holds both (`both_directions`).
Letters: `Q` queries, `C` candidates, `K` top-k.

Not for: claims about compositional binding (a gallery's captions differ in far more than the binding); comparing all
captions of COCO with the first five, or a full ranking with a reranked one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from eval.errors import ScoreTableError
from eval.table import (
    blocks,
    chance_of_hit,
    chance_precision,
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
        meta: anything else worth keeping: run, cache fingerprint, direction ("i2t", "t2i"), names of the candidates.

    Raises:
        ScoreTableError: shapes that disagree, NaN or +inf.

    """

    kind: ClassVar[str] = "retrieval"
    world: ClassVar[str] = ""

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
    def shape(self) -> tuple[int, ...]:
        """Numbers of queries and of candidates."""
        return self.scores.shape

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
    chosen = _chosen(scores, ks)
    return _by_rank(scores, positive_ranks(scores, max(chosen)), chosen)


def _chosen(scores: RetrievalScores, ks: Sequence[int] | None) -> list[int]:
    """The K asked for, or those of the default that exist."""
    n = scores.n_candidates
    if not n:
        raise ScoreTableError(
            "every score is -inf: no query has a candidate, so there is nothing to rank"
        )
    chosen = [k for k in KS if k <= n] if ks is None else [checked_k(k, n, "K") for k in ks]
    if not chosen:
        raise ScoreTableError("no K at all was asked for; give at least one, such as 1")
    return chosen


def _by_rank(
    scores: RetrievalScores, ranks: Float[np.ndarray, "q k"], chosen: Sequence[int]
) -> dict[str, Float[np.ndarray, " q"]]:
    """`recall@K` and `map@K` of every query from the ranks of its right candidates."""
    n_positive = scores.positives.sum(1)
    precision = np.arange(1, len(ranks[0]) + 1) / ranks
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


@dataclass(frozen=True, slots=True, eq=False)
class BothDirections:
    """The same images and captions asked both ways; `both_directions` makes it of one table.

    Attributes:
        i2t: (images, captions): images ask for their captions.
        t2i: (captions, images): captions ask for their images. With reranking it is a ranking of its own.

    Raises:
        ScoreTableError: the two differ in right answers, split, space, or in how many were reranked.

    """

    i2t: RetrievalScores
    t2i: RetrievalScores

    def __post_init__(self) -> None:
        a, b = self.i2t, self.t2i
        if not np.array_equal(a.positives, b.positives.T):
            raise ScoreTableError(
                f"i2t {a.positives.shape} and t2i {b.positives.shape} are not the same images and captions the other "
                "way round: their right answers differ; give the two tables of one split"
            )
        for name, table in (("i2t", a), ("t2i", b)):
            if table.meta.get("direction", name) != name:
                raise ScoreTableError(
                    f"{name} is a table of direction {table.meta['direction']}; swap them"
                )
        for what, mine, other in (
            ("split", a.split, b.split),
            ("space", a.space, b.space),
            ("rerank", a.meta.get("rerank"), b.meta.get("rerank")),
        ):
            if mine != other:
                raise ScoreTableError(
                    f"i2t and t2i differ in {what} ({mine} and {other}), so they are not one result; score both alike"
                )


def both_directions(table: RetrievalScores) -> BothDirections:
    """One table of images × captions (or, if its `meta["direction"]` is "t2i", captions × images), read both ways.

    Raises:
        ScoreTableError: a reranked table: what is the best of every image is not the best of every caption.

    """
    if "rerank" in table.meta:
        raise ScoreTableError(
            f"only the {table.meta['rerank']} best of every query were rescored (rerank), so this table ranks in one "
            "direction; give BothDirections the tables of both"
        )
    back = {"i2t": "t2i", "t2i": "i2t"}
    mine = str(table.meta.get("direction", "i2t"))
    if mine not in back:
        raise ScoreTableError(f"a table's direction is i2t or t2i, but this one's is {mine!r}")
    other = RetrievalScores(
        table.scores.T,
        table.positives.T,
        table.space,
        table.split,
        ids=table.meta.get("candidates", ()),
        meta={**table.meta, "direction": back[mine], "candidates": list(table.ids)},
    )
    return BothDirections(table, other) if mine == "i2t" else BothDirections(other, table)


def evaluate_both(scores: BothDirections, *, ks: Sequence[int] | None = None) -> dict[str, float]:
    """Both directions: `i2t_recall@K`, `t2i_recall@K`, the `map@K` alike, `i2t_true_recall@K` and `rsum`.

    `i2t_true_recall@K` is the share of an image's own captions among the K best, averaged over images: with five
    captions it is at most 1/5 at K = 1, and never to be called recall@K. `rsum` is the sum of the six recalls at 1, 5
    and 10, so up to 6; it is left out where one of them is.

    Args:
        scores: the two tables.
        ks: as for `evaluate`.

    """
    return summarise_both(
        {name: float(np.nanmean(values)) for name, values in outcomes_both(scores, ks=ks).items()}
    )


def outcomes_both(
    scores: BothDirections, *, ks: Sequence[int] | None = None
) -> dict[str, Float[np.ndarray, " n"]]:
    """As `outcomes`, for the images and then the captions; NaN where the other side asks."""
    n_images, n_captions = scores.i2t.positives.shape
    chosen = _chosen(scores.i2t, ks)
    ranks = positive_ranks(scores.i2t, max(chosen))
    own = np.maximum(scores.i2t.positives.sum(1), 1)
    images = {f"i2t_{name}": v for name, v in _by_rank(scores.i2t, ranks, chosen).items()}
    images |= {f"i2t_true_recall@{k}": (ranks <= k).sum(1) / own for k in chosen}
    captions = {f"t2i_{name}": v for name, v in outcomes(scores.t2i, ks=ks).items()}
    parts = {m: np.append(v, np.full(n_captions, np.nan)) for m, v in images.items()}
    return parts | {m: np.append(np.full(n_images, np.nan), v) for m, v in captions.items()}


def summarise_both(shares: Mapping[str, Any]) -> dict[str, Any]:
    """The shares of `outcomes_both` with `rsum` added, if all six recalls are there."""
    six = [f"{direction}_recall@{k}" for direction in ("i2t", "t2i") for k in KS]
    if not all(name in shares for name in six):
        return dict(shares)
    return {**shares, "rsum": sum(shares[name] for name in six)}


def chance_both(scores: BothDirections, *, ks: Sequence[int] | None = None) -> dict[str, float]:
    """What random orders get in both directions; true recall: K/n of the captions that are candidates at all."""
    lines = {f"i2t_{name}": v for name, v in chance(scores.i2t, ks=ks).items()}
    alive = scores.i2t.scores > -np.inf
    n = np.maximum(alive.sum(1), 1)
    own = np.maximum(scores.i2t.positives.sum(1), 1)
    there = (alive & scores.i2t.positives).sum(1) / own
    for k in _chosen(scores.i2t, ks):
        lines[f"i2t_true_recall@{k}"] = float((np.minimum(k / n, 1) * there).mean())
    lines |= {f"t2i_{name}": v for name, v in chance(scores.t2i, ks=ks).items()}
    return summarise_both(lines)


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
    chosen = _chosen(scores, ks)
    for k in chosen:
        hits = [chance_of_hit(min(k, n), c, n) for n, c in sizes]
        lines[f"recall@{k}"] = float(np.mean(hits))
    for k in chosen:
        precisions = [
            chance_precision(min(k, n), c, n) / min(int(g), k) if g else 0.0
            for (n, c), g in zip(sizes, owed, strict=True)
        ]
        lines[f"map@{k}"] = float(np.mean(precisions))
    return lines
