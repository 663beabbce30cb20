"""Composed retrieval as a table: what a head answered (`ComposedScores`) to what is asked (`eval.composed_queries`).

Columns are shared by all rows, or every row has its own:

    candidates (C,)      one gallery, or several side by side (FashionIQ: -inf where an image is not in the row's own)
    candidates (Q, C)    own candidates, "" after the last (GeneCIS: 10 or 15 a row)

Letters: `Q` queries, `C` candidates.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from eval.composed_queries import CATEGORIES, ComposedQueries, Names
from eval.errors import ScoreTableError
from eval.table import blocks, checked_facts

__all__ = ["CATEGORIES", "ComposedQueries", "ComposedScores"]


@dataclass(frozen=True, slots=True, eq=False)
class ComposedScores:
    """Scores of composed queries against candidate images.

    Attributes:
        scores: (Q, C) float32 or float64; a numpy array, or anything with `shape`, `dtype` and rows to slice, such as a
            zarr array. -inf where a candidate is not in the row's gallery.
        candidates: (C,) or (Q, C) image ids in the order that breaks ties; see above.
        queries: what is asked.
        space: "cosine", "logit" or "probability".
        meta: anything else worth keeping: run, cache fingerprint, partial.
        columns: image id → column, for shared candidates; else None.

    Raises:
        ScoreTableError: shapes that disagree, half precision, a candidate named twice, a target or a member of a subset
            that is no candidate. NaN, +inf and -inf where a target is are found when rows are read.

    """

    kind: ClassVar[str] = "composed"
    world: ClassVar[str] = ""

    scores: Any
    candidates: NDArray[Any] | Names | Sequence[Names]
    queries: ComposedQueries
    space: str
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])
    columns: Mapping[str, int] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        checked_facts(self.queries.split, self.space, (), 1)
        shape, dtype = tuple(self.scores.shape), np.dtype(self.scores.dtype)
        names = np.asarray(self.candidates).astype(str)
        if dtype not in (np.dtype("float32"), np.dtype("float64")):
            raise ScoreTableError(
                f"scores must be float32 or float64, but they are {dtype}: half precision makes artificial ties. "
                "Compute scores from float32 embeddings."
            )
        if len(shape) != 2 or shape[0] != len(self.queries.ids) or not shape[1]:
            raise ScoreTableError(
                f"{len(self.queries.ids)} queries need scores of (queries, candidates), but their shape is {shape}"
            )
        if names.shape not in (shape, shape[1:]):
            raise ScoreTableError(
                f"scores are {shape}, so candidates must be {shape[1:]} or {shape}, but they are {names.shape}"
            )
        object.__setattr__(self, "candidates", names)
        if names.ndim == 1:
            object.__setattr__(self, "columns", _lookup(names, "the candidates"))
            if "" in (self.columns or {}):
                raise ScoreTableError("a candidate has an empty name; name every column")
        for i in range(shape[0]):
            known = self.lookup(i)
            for what, few in (
                ("target", self.queries.right(i)),
                ("subset", self.queries.others(i)),
            ):
                lost = next((name for name in few if name not in known), None)
                if lost is not None:
                    raise ScoreTableError(
                        f"{lost!r}, in the {what} of query {self.ids[i]!r}, is none of its candidates: a gallery must "
                        "hold every target; drop the query, or add the image"
                    )

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of the queries."""
        return tuple(self.queries.ids)

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of queries and of columns."""
        return tuple(self.scores.shape)

    @property
    def split(self) -> str:
        """Of the queries."""
        return self.queries.split

    def lookup(self, i: int) -> Mapping[str, int]:
        """Image id → column, of query i."""
        if self.columns is not None:
            return self.columns
        row = np.asarray(self.candidates)[i]
        return _lookup(row, f"the candidates of query {self.queries.ids[i]!r}")

    def names(self, i: int) -> NDArray[Any]:
        """(C,) image ids of the columns of query i."""
        names = np.asarray(self.candidates)
        return names if names.ndim == 1 else names[i]

    def rows(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Each query with its scores (C,), a copy in which all that does not compete is -inf; one block at a time.

        Raises:
            ScoreTableError: NaN or +inf; a target or a member of the subset that does not compete; a reference taken
                out where the protocol keeps it in.

        """
        for part in blocks(*self.scores.shape):
            block = np.array(self.scores[part])
            for i, row in zip(range(part.start, part.stop), block, strict=True):
                self._refuse_nan(i, row)
                self._mask(i, row)
                yield i, row

    def _refuse_nan(self, i: int, row: NDArray[Any]) -> None:
        """Raise for the first NaN or +inf of a row."""
        usable = row < np.inf
        if not usable.all():
            where = int(np.argmin(usable))
            raise ScoreTableError(
                f"the score of query {self.ids[i]!r} with {str(self.names(i)[where])!r} (column {where}) is "
                f"{row[where]}: scores must be finite, or -inf for 'not a candidate'. Look for a missing part of the "
                "file, or a division by a zero norm in the head."
            )

    def _mask(self, i: int, row: NDArray[Any]) -> None:
        """Take out what does not compete with query i."""
        asked, known = self.queries, self.lookup(i)
        reference = known.get(asked.reference[i])
        if reference is not None:
            if asked.protocol in ("fashioniq", "circo") and row[reference] == -np.inf:
                raise ScoreTableError(
                    f"the reference of query {self.ids[i]!r} is -inf, but in {asked.protocol} it competes; score it too"
                )
            if asked.protocol == "cirr":
                row[reference] = -np.inf
        few = [known[name] for name in asked.others(i)]
        if not asked.gallery[i]:
            kept = row[few]
            row[:] = -np.inf
            row[few] = kept
        elif self.columns is None:
            row[self.names(i) == ""] = -np.inf
        for what, columns in (("target", [known[t] for t in asked.right(i)]), ("subset", few)):
            lost = next((c for c in columns if row[c] == -np.inf), None)
            if lost is not None:
                raise ScoreTableError(
                    f"{str(self.names(i)[lost])!r}, in the {what} of query {self.ids[i]!r}, has score -inf: it is "
                    f"outside the gallery {asked.gallery[i]!r} that is ranked"
                )

    def digest(self) -> str:
        """sha256 over everything but the scores: equal digests mean the same questions of the same candidates."""
        body = [self.queries.facts(), np.asarray(self.candidates).tolist()]
        text = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _lookup(names: NDArray[Any], what: str) -> dict[str, int]:
    """Name → place, padding left out."""
    listed = names.tolist()
    found = {name: i for i, name in enumerate(listed)}
    if len(found) < len(listed):
        twice = next((n for i, n in enumerate(listed) if n and found[n] != i), None)
        if twice is not None:
            raise ScoreTableError(f"{what} hold {twice!r} twice; every image is ranked once")
        found.pop("", None)
    return found
