"""Scores as comma-separated text: a header, then a row an image, an item, or a query with one candidate.

    czsl        id,attr,obj,red mug,blue mug,…          the true pair, then a column a candidate, also as red+mug
    matching    id,category,positive,negative           scores of the true and the false caption of one image
                id,category,s00,s01,s10,s11             s<image><caption> of two images and two captions
    retrieval   query,candidate,score                   with qrels, as for a run (`eval.trec`)

`id` may be left out. Cells are quoted as in RFC 4180; a pair that is not a candidate of a row is -inf.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from eval.any_table import Table
from eval.composition import CompositionScores
from eval.errors import ScoreTableError
from eval.given import LINE_LIMIT, Given, lines_of, number_of, origin, unknown
from eval.matching import MatchingScores
from eval.pair_files import composition, split_names
from eval.table import plain
from eval.trec import Listed, ranking

CELLS = {
    ("positive", "negative"): (2,),
    ("s00", "s01", "s10", "s11"): (2, 2),
}
"""Columns of a matching table → shape of an item."""

LAYOUTS = (
    "attr,obj,<pairs> (czsl) · category,positive,negative or category,s00,s01,s10,s11 (matching) · "
    "query,candidate,score (retrieval)"
)


def load_csv(path: Path, given: Given) -> Table:
    """A table of a `.csv`, its task told by its header.

    Raises:
        ScoreTableError: an unknown header, a row of another length, a cell that is no score, missing facts.

    """
    rows = _rows(path)
    _, head = next(rows, (0, list[str]()))
    if len(set(head)) != len(head):
        twice = next(name for name in head if head.count(name) > 1)
        raise ScoreTableError(f"{path} has two columns {plain(twice)!r}; name each once")
    if set(head) == {"query", "candidate", "score"}:
        given.only(path, "split", "space", "qrels")
        return ranking(_listed(rows, head, path), path, given)
    if "category" in head:
        given.only(path, "split", "space")
        return _matching(rows, head, path, given)
    if head[:2] == ["attr", "obj"] or head[:3] == ["id", "attr", "obj"]:
        given.only(path, "split", "space", "world", "train_pairs", "split_pairs")
        return _composition(rows, head, path, given)
    shown = plain(",".join(head[:6]))
    raise ScoreTableError(
        f"{path} has the header {shown!r}, which is none of the layouts: {LAYOUTS}; each may begin with id"
    )


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells; every row as long as the first."""
    was = csv.field_size_limit(LINE_LIMIT)
    try:
        length = None
        last = 0

        def lines() -> Iterator[str]:
            nonlocal last
            for number, line in lines_of(path, "CSV file"):
                last = number
                yield line + "\n"

        try:
            for cells in csv.reader(lines(), strict=True):
                length = length or len(cells)
                if len(cells) != length:
                    raise ScoreTableError(
                        f"{path} line {last} has {len(cells)} cells, but the header {length}; quote cells that hold a "
                        "comma"
                    )
                yield last, cells
        except csv.Error as error:
            raise ScoreTableError(f"{path} line {last} is not CSV: {error}") from error
    finally:
        csv.field_size_limit(was)


def _listed(
    rows: Iterator[tuple[int, list[str]]], head: Sequence[str], path: Path
) -> Iterator[Listed]:
    """Rows of query, candidate, score in whatever order the columns have."""
    q, c, s = (head.index(name) for name in ("query", "candidate", "score"))
    for number, row in rows:
        value = number_of(row[s], f"{path} line {number}", row[q], f"candidate {row[c]}")
        yield Listed(row[q], row[c], value)


def _matching(
    rows: Iterator[tuple[int, list[str]]], head: Sequence[str], path: Path, given: Given
) -> MatchingScores:
    """Items of one or of two images."""
    columns = next((names for names in CELLS if set(names) <= set(head)), None)
    if columns is None:
        raise ScoreTableError(
            f"{path} has a category, but neither {' nor '.join(','.join(n) for n in CELLS)} beside it"
        )
    unknown(head, ("id", "category", *columns), "the column", path)
    ids, categories, cells = list[str](), list[str](), list[list[float]]()
    for number, row in rows:
        cell = dict(zip(head, row, strict=True))
        name = cell.get("id", str(len(cells)))
        if "id" in cell:
            ids.append(name)
        categories.append(cell["category"])
        where = f"{path} line {number}"
        cells.append([number_of(cell[c], where, name, f"column {c}") for c in columns])
    scores = np.array(cells, dtype=np.float64).reshape(len(cells), *CELLS[columns])
    split, space = given.fact("split", path), given.fact("space", path)
    return MatchingScores(scores, np.array(categories, str), space, split, ids, origin(path))


def _composition(
    rows: Iterator[tuple[int, list[str]]], head: Sequence[str], path: Path, given: Given
) -> CompositionScores:
    """Images against the pairs that the header names."""
    named = int(head[0] == "id")
    start = named + 2
    pairs = split_names(head[start:], [f"column {i} of {path}" for i in range(start, len(head))])
    ids, truths, scores = list[str](), list[tuple[str, str]](), list[np.ndarray]()
    for number, row in rows:
        name = row[0] if named else str(len(scores))
        where = f"{path} line {number}"
        ids += [name] if named else []
        truths.append((row[named].strip(), row[named + 1].strip()))
        values = [
            number_of(cell, where, name, f"pair {pair}")
            for cell, pair in zip(row[start:], pairs, strict=True)
        ]
        scores.append(np.array(values, dtype=np.float64))
    table = np.stack(scores) if scores else np.empty((0, len(pairs)))
    return composition(table, pairs, path, given, target=truths, ids=ids)
