"""Composed retrieval from ranked lists: made of a score table, and measured as a benchmark's server does.

A list holds image ids, best first. In lists made of scores, of equal scores the lower column comes first; in measuring,
the order counts as it is given, and a list that ends early misses what it does not hold. So ties, which
`eval.composed` counts against a head, are broken here by the order of the gallery.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from eval.composed import KS, SEMANTIC_K, empty_ranks, measure, refuse_unanswered, summarise
from eval.composed_queries import ComposedQueries
from eval.composed_table import ComposedScores
from eval.errors import ScoreTableError

Lists = Mapping[str, Sequence[str]]
"""Query id → image ids, best first."""

Candidates = Collection[str] | Mapping[str, Collection[str]]
"""Image ids that may be listed: one gallery for all queries, or one for each gallery name."""


def ranked(scores: ComposedScores, k: int) -> dict[str, tuple[str, ...]]:
    """The k best candidates of every query that compete, fewer where there are fewer."""
    return {
        scores.ids[i]: tuple(scores.names(i)[_best(row, k)].tolist()) for i, row in scores.rows()
    }


def ranked_subset(scores: ComposedScores, k: int) -> dict[str, tuple[str, ...]]:
    """The k best of every query's subset, the reference left out; of equal ones the lower column first."""
    lists: dict[str, tuple[str, ...]] = {}
    for i, row in scores.rows():
        known = scores.lookup(i)
        columns = sorted(known[name] for name in scores.queries.others(i))
        few = np.array(columns, dtype=np.int64)
        lists[scores.ids[i]] = tuple(scores.names(i)[few[_best(row[few], k)]].tolist())
    return lists


def _best(row: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Columns of the k highest scores above -inf: score descending, then column ascending."""
    if len(row) > k:
        last = np.partition(row, len(row) - k)[len(row) - k]
        columns = np.flatnonzero((row >= last) & (row > -np.inf))
    else:
        columns = np.flatnonzero(row > -np.inf)
    return columns[np.argsort(-row[columns], kind="stable")][:k]


def evaluate_lists(
    queries: ComposedQueries,
    lists: Lists,
    candidates: Candidates,
    subset_lists: Lists | None = None,
) -> dict[str, float]:
    """The protocol's metrics of ranked lists.

    Args:
        queries: what is asked, with its targets.
        lists: one list a query.
        candidates: what may be listed, the reference included where it competes.
        subset_lists: cirr and own: the ranking of the subset alone; None leaves recall_subset out.

    Raises:
        ScoreTableError: targets that are unpublished; lists that do not name exactly the queries, or hold an image
            twice, one that is not known, or a reference that does not compete; a target that is no candidate.

    """
    refuse_unanswered(queries)
    known = _sets(candidates)
    check_lists(queries, lists, known)
    if subset_lists is not None:
        check_lists(queries, subset_lists, known, subset=True)
    k = max(*KS[queries.protocol], SEMANTIC_K)
    found = empty_ranks(len(queries.ids), k)
    for i, name in enumerate(queries.ids):
        right = queries.right(i)
        competing = _competing(queries, i, known, subset=False)
        lost = next((t for t in right if t not in competing), None)
        if lost is not None:
            raise ScoreTableError(
                f"the target {lost!r} of query {name!r} is none of the {len(competing)} candidates; give the gallery "
                "that is ranked"
            )
        left_out = queries.protocol == "cirr" and queries.reference[i] in competing
        found.n[i] = len(competing) - left_out
        places = {image: rank for rank, image in enumerate(lists[name], 1)}
        mine = sorted(places[t] for t in right if t in places)[:k]
        found.right[i, : len(mine)] = mine
        found.first[i] = places.get(right[0], np.inf)
        few = queries.others(i)
        if subset_lists is not None and few:
            places = {image: rank for rank, image in enumerate(subset_lists[name], 1)}
            found.subset[i] = min((places[t] for t in right if t in places), default=np.inf)
            found.subset_n[i] = len(few)
    parts = measure(queries, found)
    return summarise(queries, {name: float(np.nanmean(v)) for name, v in parts.items()})


def check_lists(
    queries: ComposedQueries,
    lists: Lists,
    candidates: Candidates | None,
    *,
    subset: bool = False,
    length: int | None = None,
) -> None:
    """Raise unless the lists are rankings of what competes, one for each query.

    Args:
        queries: whose ids are the keys.
        lists: to check.
        candidates: what may be listed; None where it is not known.
        subset: are they lists of the subset alone?
        length: exact number of images in each; None allows any.

    Raises:
        ScoreTableError: says which query, and what is wrong.

    """
    asked = set(queries.ids)
    missing = [name for name in queries.ids if name not in lists]
    extra = [name for name in lists if name not in asked]
    if missing or extra:
        raise ScoreTableError(
            f"lists are needed for exactly the {len(queries.ids)} queries, but {len(missing)} have none "
            f"({', '.join(map(repr, missing[:3])) or '–'}) and {len(extra)} are no query "
            f"({', '.join(map(repr, extra[:3])) or '–'})"
        )
    known = None if candidates is None else _sets(candidates)
    for i, name in enumerate(queries.ids):
        listed = lists[name]
        if length is not None and len(listed) != length:
            raise ScoreTableError(
                f"the list of query {name!r} holds {len(listed)} images, but must hold {length}"
            )
        if len(set(listed)) != len(listed):
            twice = next(image for j, image in enumerate(listed) if image in listed[:j])
            raise ScoreTableError(f"the list of query {name!r} holds {twice!r} twice")
        if queries.protocol == "cirr" and queries.reference[i] in listed:
            raise ScoreTableError(
                f"the list of query {name!r} holds its own reference {queries.reference[i]!r}, which cirr leaves out"
            )
        if known is None and not subset:
            continue
        competing = _competing(queries, i, known or frozenset(), subset)
        unknown = next((image for image in listed if image not in competing), None)
        if unknown is not None:
            raise ScoreTableError(
                f"the list of query {name!r} holds {unknown!r}, which is none of its {len(competing)} candidates"
            )


def _sets(candidates: Candidates) -> frozenset[str] | dict[str, frozenset[str]]:
    """As sets: membership is asked of them once for every image listed."""
    if isinstance(candidates, frozenset):
        return candidates
    if isinstance(candidates, Mapping):
        galleries = cast("Mapping[str, Collection[str]]", candidates)
        return {name: frozenset(images) for name, images in galleries.items()}
    return frozenset(candidates)


def _competing(
    queries: ComposedQueries,
    i: int,
    candidates: frozenset[str] | dict[str, frozenset[str]],
    subset: bool,
) -> Collection[str]:
    """The images that query i ranks."""
    if subset or not queries.gallery[i]:
        return queries.others(i)
    if isinstance(candidates, dict):
        if queries.gallery[i] not in candidates:
            raise ScoreTableError(
                f"query {queries.ids[i]!r} ranks the gallery {queries.gallery[i]!r}, but there are only "
                f"{', '.join(map(repr, candidates))}"
            )
        return candidates[queries.gallery[i]]
    return candidates
