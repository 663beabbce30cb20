"""Rankings of retrieval in the formats of TREC: a run and its right answers ("qrels").

    run       101 Q0 img7 1 12.5 mine         query, Q0, document, rank, score, name of the run
    qrels     101 0 img7 1                    query, 0, document, relevance; 1 and more is right, 0 and less is not

The scores decide, as in `trec_eval`; ranks that contradict them are noted. Ties are those of `eval.retrieval`
(`trec_eval` orders them by document). A document that a query does not list is below all that it lists (-inf): never
found, and no candidate of chance, which is that of a random order of the documents listed. A query of the qrels without
a list is a miss (`trec_eval -c`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from eval.errors import ScoreTableError
from eval.given import Given, lines_of, number_of, origin
from eval.retrieval import RetrievalScores
from eval.table import plain

CELLS = 1 << 28
"""Most queries × documents of a table (2 GB of float64): a run of few lines can name many of both."""

SHOWN = 3

Relevance = dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class Listed:
    """One line: a query's document with its score and, in a run, its rank."""

    query: str
    document: str
    score: float
    rank: int | None = None


def load_run(path: Path, given: Given) -> RetrievalScores:
    """A table of a run and its qrels.

    Raises:
        ScoreTableError: a line that is none of a run's, a document twice, a query without qrels, a table too large.

    """
    given.only(path, "split", "space", "qrels")
    return ranking(_run(path), path, given)


def ranking(lists: Iterable[Listed], path: Path, given: Given) -> RetrievalScores:
    """Lists of documents and `given.qrels` as a dense table: queries as in the qrels, documents as first named.

    Raises:
        ScoreTableError: as for `load_run`.

    """
    qrels = read_qrels(given.needed("qrels", path, "which documents are right"))
    found: dict[str, list[Listed]] = {}
    listed: set[tuple[str, str]] = set()
    for line in lists:
        key = (line.query, line.document)
        if key in listed:
            raise ScoreTableError(
                f"{path} lists document {plain(line.document)} twice for query {plain(line.query)}; keep one"
            )
        listed.add(key)
        found.setdefault(line.query, []).append(line)
    if not found:
        raise ScoreTableError(f"{path} is empty: it lists no document for any query")
    strangers = [query for query in found if query not in qrels]
    if strangers:
        raise ScoreTableError(
            f"{len(strangers)} queries of {path} are not in {given.qrels} ({_some(strangers)}): nobody knows what is "
            "right there; leave them out, or give the qrels of this split"
        )
    documents: dict[str, int] = {}
    for line in (line for rows in found.values() for line in rows):
        documents.setdefault(line.document, len(documents))
    for answers in qrels.values():
        for document, relevance in answers.items():
            if relevance > 0:
                documents.setdefault(document, len(documents))
    if len(qrels) * len(documents) > CELLS:
        raise ScoreTableError(
            f"{len(qrels):,} queries × {len(documents):,} documents are more than the {CELLS:,} scores that fit; cut "
            "lists or queries, or write blocks of rows as a .zarr (eval.score_io)"
        )
    scores = np.full((len(qrels), len(documents)), -np.inf)
    positives = np.zeros(scores.shape, dtype=np.bool_)
    for row, (query, answers) in enumerate(qrels.items()):
        for line in found.get(query, ()):
            scores[row, documents[line.document]] = line.score
        positives[row, [documents[d] for d, relevance in answers.items() if relevance > 0]] = True
    notes = _notes(found, qrels, len(documents), len(listed))
    split, space = given.fact("split", path), given.fact("space", path)
    return RetrievalScores(scores, positives, space, split, tuple(qrels), origin(path, notes))


def read_qrels(path: Path) -> Relevance:
    """Query → document → relevance.

    Raises:
        ScoreTableError: a line that is none of qrels, a document twice for a query, nothing at all.

    """
    found: Relevance = {}
    for number, line in lines_of(path, "file of qrels"):
        parts = line.split()
        if len(parts) != 4 or not _whole(parts[3]):
            raise ScoreTableError(
                f"{path} line {number} must be 'query 0 document relevance', but is {plain(line)!r}"
            )
        answers = found.setdefault(parts[0], {})
        if parts[2] in answers:
            raise ScoreTableError(
                f"{path} line {number} judges document {plain(parts[2])} of query {plain(parts[0])} a second time"
            )
        answers[parts[2]] = int(parts[3])
    if not found:
        raise ScoreTableError(f"{path} is empty: it judges no document")
    return found


def _run(path: Path) -> Iterable[Listed]:
    """The lines of a run."""
    for number, line in lines_of(path, "run"):
        parts = line.split()
        if len(parts) != 6 or not _whole(parts[3]):
            raise ScoreTableError(
                f"{path} line {number} must be 'query Q0 document rank score name', but is {plain(line)!r}"
            )
        query, _, document, rank, score, _ = parts
        value = number_of(score, f"{path} line {number}", query, f"document {document}")
        yield Listed(query, document, value, int(rank))


def _whole(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and len(digits) < 19


def _notes(
    found: dict[str, list[Listed]], qrels: Relevance, n_documents: int, n_lines: int
) -> list[str]:
    """What a reader of the numbers should know about the lists."""
    notes: list[str] = []
    absent = [query for query in qrels if query not in found]
    if absent:
        notes.append(
            f"{len(absent)} of {len(qrels)} queries have no list and are misses ({_some(absent)})"
        )
    empty = [query for query, answers in qrels.items() if max(answers.values()) < 1]
    if empty:
        notes.append(
            f"{len(empty)} of {len(qrels)} queries have no right document and are misses ({_some(empty)})"
        )
    against = [query for query, rows in found.items() if _contradicts(rows)]
    if against:
        notes.append(
            f"in {len(against)} of {len(found)} lists the ranks contradict the scores ({_some(against)}): the scores "
            "decide"
        )
    if n_lines < len(qrels) * n_documents:
        notes.append(
            f"a query lists {n_lines / len(found):.4g} of {n_documents:,} documents on average; the others are never "
            "found, and chance is that of a random order of those listed"
        )
    return notes


def _contradicts(rows: Sequence[Listed]) -> bool:
    """Does a better rank stand beside a lower score?"""
    ranked = sorted((row.rank, -row.score) for row in rows if row.rank is not None)
    best: dict[int, float] = {}
    worst: dict[int, float] = {}
    for rank, cost in ranked:
        best[rank], worst[rank] = min(cost, best.get(rank, cost)), max(cost, worst.get(rank, cost))
    return any(best[later] < worst[earlier] for earlier, later in pairwise(best))


def _some(names: Sequence[str]) -> str:
    more = ", …" if len(names) > SHOWN else ""
    return f"{', '.join(plain(name) for name in names[:SHOWN])}{more}"
