"""Composed retrieval: where does the target rank, given a reference image and an edit in words?

    protocol    measured (protocols and what competes: `eval.composed_queries`)
    cirr        recall@1, 5, 10, 50; recall_subset@1, 2, 3; avg = (recall@5 + recall_subset@1) / 2
    fashioniq   recall@10, 50 of each category, their unweighted means macro_3, and avg of the two means
    circo       map@5, 10, 25, 50 over all targets, recall of the first; semantic_map@10 of each aspect
    genecis     recall@1, 2, 3 of each task, and their unweighted means macro_4
    own         recall and map @1, 5, 10, recall_subset@1, 2, 3; each also by category, and as unweighted mean macro_<n>

Means over categories exist only if all of a benchmark's categories are there. Ties are pessimistic: rank of a right
image = 1 + wrong ones with a score ≥ its own + right ones ahead of it (of equal ones the lower column). So a head that
gives one constant score finds nothing, although GeneCIS' files put the target first. `map@K` divides by min(number
right, K) and may fall as K grows.

Not for: claims from CIRR's recall@K about one true answer (unlabelled right images exist; recall_subset is cleaner);
comparing FashionIQ's galleries; quality from CIRCO's recall@K (one target of several); two of GeneCIS' tasks as four.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from eval.composed_queries import CATEGORIES, ComposedQueries
from eval.composed_table import ComposedScores
from eval.errors import ScoreTableError
from eval.table import chance_of_hit, chance_precision, checked_k

KS = {
    "cirr": (1, 5, 10, 50),
    "fashioniq": (10, 50),
    "circo": (5, 10, 25, 50),
    "genecis": (1, 2, 3),
    "own": (1, 5, 10),
}
"""The K of each protocol, as far as there are candidates."""

SUBSET_KS = (1, 2, 3)
SEMANTIC_K = 10


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """Where the right images rank.

    Attributes:
        right: (Q, K) of each query's K best right images, ascending; +inf where there are fewer.
        first: (Q,) of the image that the query was written for.
        subset: (Q,) of the best right image among the subset; NaN where there is none.
        n, subset_n: (Q,) how many compete; `subset_n` is 0 without a subset.
        subset_right: (Q,) right images in the subset.

    """

    right: Float[np.ndarray, "q k"]
    first: Float[np.ndarray, " q"]
    subset: Float[np.ndarray, " q"]
    n: NDArray[np.int64]
    subset_n: NDArray[np.int64]
    subset_right: NDArray[np.int64]


def evaluate(
    scores: ComposedScores, *, ks: Sequence[int] | None = None, found: Ranks | None = None
) -> dict[str, float]:
    """The protocol's metrics, as fractions; see the table above.

    Args:
        scores: the table.
        ks: the K of recall and map; None takes the protocol's, leaving out those above the number of candidates.
        found: the table's `ranks`, where they are known: without them every row is read.

    Raises:
        ScoreTableError: targets that are unpublished, a K in `ks` above the number of candidates, scores that are
            not usable (see `ComposedScores.rows`).

    """
    return summarise(scores.queries, _means(outcomes(scores, ks=ks, found=found)))


def outcomes(
    scores: ComposedScores, *, ks: Sequence[int] | None = None, found: Ranks | None = None
) -> dict[str, Float[np.ndarray, " q"]]:
    """Per metric and query: hit or miss for recall, average precision for map; NaN where it does not apply."""
    return measure(scores.queries, _known(scores, ks, found), ks)


def chance(
    scores: ComposedScores, *, ks: Sequence[int] | None = None, found: Ranks | None = None
) -> dict[str, float]:
    """What random orders of what competes get, averaged like the metrics themselves; arguments as of `evaluate`."""
    expected = measure(scores.queries, _known(scores, ks, found), ks, by_chance=True)
    return summarise(scores.queries, _means(expected))


def _known(scores: ComposedScores, ks: Sequence[int] | None, found: Ranks | None) -> Ranks:
    """The ranks given, if they are of so many queries and deep enough; else those of the table."""
    if found is None:
        return ranks(scores, ks)
    q, k = len(scores.ids), _depth(scores.queries, ks)
    if len(found.right) != q or found.right.shape[1] < k:
        raise ScoreTableError(
            f"ranks of {len(found.right)} queries to K = {found.right.shape[1]} were given for a table of {q} queries, "
            f"measured to K = {k}; give `ranks(scores, ks)` of the same table and K"
        )
    return found


def _means(parts: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    """Over the queries that each applies to."""
    return {name: float(np.nanmean(values)) for name, values in parts.items()}


def ranks(scores: ComposedScores, ks: Sequence[int] | None = None) -> Ranks:
    """One pass over the rows.

    Raises:
        ScoreTableError: there are no targets, or rows are not usable.

    """
    asked = scores.queries
    refuse_unanswered(asked)
    q = len(asked.ids)
    found = empty_ranks(q, _depth(asked, ks))
    k = found.right.shape[1]
    for i, row in scores.rows():
        columns = scores.lookup(i)
        right = asked.right(i)
        mine = np.array([columns[name] for name in right])
        own = row[mine]
        order = np.lexsort((mine, -own))  # highest score first, of equal ones the lower column
        wrong = np.array([np.count_nonzero(row >= own[g]) for g in order[:k]])
        wrong -= np.array([np.count_nonzero(own >= own[g]) for g in order[:k]])
        found.right[i, : len(wrong)] = 1 + np.arange(len(wrong)) + wrong
        place = int(np.flatnonzero(order == 0)[0])
        above = np.count_nonzero(row >= own[0]) - np.count_nonzero(own >= own[0])
        found.first[i] = 1 + place + above
        found.n[i] = np.count_nonzero(row > -np.inf)
        few = asked.others(i)
        if few:
            best = max(row[columns[name]] for name in few if name in right)
            ahead = sum(row[columns[name]] >= best for name in few if name not in right)
            found.subset[i] = 1 + ahead
            found.subset_n[i] = len(few)
            found.subset_right[i] = sum(name in right for name in few)
    return found


def _depth(asked: ComposedQueries, ks: Sequence[int] | None) -> int:
    """The largest K that is measured."""
    return max(*KS[asked.protocol], SEMANTIC_K, *(ks or ()))


def empty_ranks(q: int, k: int) -> Ranks:
    """Ranks of `q` queries before anything was found."""
    counts = [np.zeros(q, dtype=np.int64) for _ in range(3)]
    return Ranks(np.full((q, k), np.inf), np.full(q, np.inf), np.full(q, np.nan), *counts)


def refuse_unanswered(asked: ComposedQueries) -> None:
    """Raise where the right answers are not known."""
    if not asked.answered:
        raise ScoreTableError(
            f"the {asked.split} queries of {asked.protocol} come without targets, so they have no metric here; write a "
            "submission file (eval.submissions), or score a split with targets"
        )


def measure(
    asked: ComposedQueries,
    found: Ranks,
    ks: Sequence[int] | None = None,
    *,
    by_chance: bool = False,
) -> dict[str, Float[np.ndarray, " q"]]:
    """Every metric of every query from the ranks; NaN where it does not apply.

    Args:
        asked: the queries.
        found: their ranks; with `by_chance` only its counts are used.
        ks: as for `evaluate`.
        by_chance: what a random order is expected to give, instead of what was found.

    """
    n = int(found.n.max())
    chosen = (
        [k for k in KS[asked.protocol] if k <= n]
        if ks is None
        else [checked_k(k, n, "K") for k in ks]
    )
    if not chosen:
        raise ScoreTableError(
            f"{asked.protocol} measures at K = {', '.join(map(str, KS[asked.protocol]))}, but no query has more than "
            f"{n} candidates; give `ks` that exist here"
        )
    several = np.array([len(asked.right(i)) for i in range(len(asked.ids))])
    single = np.ones(len(several), dtype=np.int64)

    def recall(
        ranked: NDArray[np.float64], right: NDArray[np.int64], k: int
    ) -> NDArray[np.float64]:
        if by_chance:
            return _expected(chance_of_hit, k, right, found.n)
        return (ranked <= k).astype(np.float64)

    def precision(k: int) -> NDArray[np.float64]:
        if by_chance:
            total = _expected(chance_precision, k, several, found.n)
        else:
            places = np.arange(1, len(found.right[0]) + 1, dtype=np.float64)
            total = np.where(found.right <= k, places / found.right, 0).sum(1)
        return total / np.minimum(several, k)

    parts: dict[str, NDArray[np.float64]] = {}
    if asked.protocol in ("circo", "own"):
        parts |= {f"map@{k}": precision(k) for k in chosen}
    if asked.protocol == "own":
        parts = {f"recall@{k}": recall(found.right[:, 0], several, k) for k in chosen} | parts
    else:
        parts |= {f"recall@{k}": recall(found.first, single, k) for k in chosen}
    if asked.protocol in ("cirr", "own"):
        ranked = found.subset_n > 0
        for k in [k for k in SUBSET_KS if k <= found.subset_n.max(initial=0)]:
            hit = (found.subset <= k).astype(np.float64)
            if by_chance:
                hit = _expected(chance_of_hit, k, found.subset_right, found.subset_n)
            parts[f"recall_subset@{k}"] = np.where(ranked, hit, np.nan)
    if asked.protocol == "circo":
        semantic = precision(SEMANTIC_K) if n >= SEMANTIC_K else None
        aspects = {} if semantic is None else {f"semantic_map@{SEMANTIC_K}": semantic}
        return parts | _by_kind(asked, aspects, found.n)
    of_kind = _by_kind(asked, parts, found.n)
    if asked.protocol in ("fashioniq", "genecis"):
        return of_kind
    return parts | of_kind if asked.protocol == "own" else parts


def _expected(
    formula: Callable[[int, int, int], float],
    k: int,
    right: NDArray[np.int64],
    n: NDArray[np.int64],
) -> Float[np.ndarray, " q"]:
    """A chance line of every query, worked out once for queries of equal numbers."""
    sizes = list(zip(right.tolist(), n.tolist(), strict=True))
    known = {(c, size): formula(min(k, size), c, size) for c, size in set(sizes)}
    return np.array([known[size] for size in sizes])


def _by_kind(
    asked: ComposedQueries, parts: Mapping[str, NDArray[np.float64]], n: NDArray[np.int64]
) -> dict[str, Float[np.ndarray, " q"]]:
    """The metrics of each category, as far as its queries have K candidates; a query counts in each of its own."""
    split: dict[str, NDArray[np.float64]] = {}
    for name, values in parts.items():
        for kind in asked.kinds:
            mine = np.array([kind in row for row in asked.categories])
            k = int(name.partition("@")[2])
            if k <= n[mine].max() and not np.isnan(values[mine]).all():
                split[f"{name}/{kind}"] = np.where(mine, values, np.nan)
    return split


def summarise(asked: ComposedQueries, shares: Mapping[str, Any]) -> dict[str, Any]:
    """The shares with the protocol's means in front, where everything that they are means of exists.

    Args:
        asked: the queries.
        shares: the metrics of `outcomes`, each a fraction or (R,) fractions of R resamples.

    """
    of_kind = [m for m in shares if "/" in m and not m.startswith("semantic_map@")]
    kinds = asked.kinds if asked.protocol == "own" else CATEGORIES.get(asked.protocol, ())
    means: dict[str, Any] = {}
    for name in dict.fromkeys(m.partition("/")[0] for m in of_kind):
        terms = [shares[f"{name}/{kind}"] for kind in kinds if f"{name}/{kind}" in shares]
        if len(terms) == len(kinds):
            means[f"{name}/macro_{len(kinds)}"] = sum(terms) / len(kinds)
    pairs = {"cirr": ("recall@5", "recall_subset@1")}
    pairs |= {"fashioniq": ("recall@10/macro_3", "recall@50/macro_3")}
    known = {**shares, **means}
    ends = [known[name] for name in pairs.get(asked.protocol, ()) if name in known]
    average: dict[str, Any] = {"avg": (ends[0] + ends[1]) / 2} if len(ends) == 2 else {}
    if asked.protocol == "own":
        return {**shares, **means}
    return {**average, **means, **shares}
