"""What composed retrieval asks: a reference image with an edit in words, and the right answers.

A query ranks the images of a gallery, and where it has a subset, these few by themselves. Everything goes by image id.
Protocols differ in what competes, and in what is measured (`eval.composed`):

    cirr        the split's images without the reference; the first target; five others of the subset (arXiv 2108.04024)
    fashioniq   the category's images with the reference; the first target (arXiv 1905.12794)
    circo       all images with the reference; every target (arXiv 2303.15247)
    genecis     the row's candidates; the first target (arXiv 2306.07969)
    own         what is not -inf; every target

Letters: `Q` queries.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from eval.errors import ScoreTableError
from eval.table import checked_facts

CATEGORIES: dict[str, tuple[str, ...]] = {
    "fashioniq": ("dress", "shirt", "toptee"),
    "genecis": ("focus_attribute", "change_attribute", "focus_object", "change_object"),
    "circo": (
        "cardinality",
        "addition",
        "negation",
        "direct_addressing",
        "compare_change",
        "comparative_statement",
        "statement_with_conjunction",
        "spatial_relations_background",
        "viewpoint",
    ),
}
"""Kinds of query a protocol knows: FashionIQ's categories, GeneCIS' tasks, CIRCO's semantic aspects."""

PROTOCOLS = ("cirr", "fashioniq", "circo", "genecis", "own")

Names = Sequence[str]


@dataclass(frozen=True, slots=True)
class ComposedQueries:
    """What is asked, and the right answers where they are published.

    Attributes:
        ids: (Q,) names of the queries, all different.
        reference: (Q,) image that the edit starts from.
        targets: (Q,) right images of each query, the one that it was written for first; none in any row where they are
            unpublished. Only circo and own count the others as right (CIRR's soft targets may even be the reference).
        protocol: one of `PROTOCOLS`.
        split: train, val or test.
        gallery: name of what is ranked: one for all, or (Q,), as FashionIQ's `split` and `union` give other numbers.
            "" in a row that ranks its subset only.
        categories: (Q,) kinds of each query: exactly one for fashioniq and genecis; empty for none.
        subset: (Q,) a few images ranked by themselves, with or without the reference (never ranked); or empty.

    Raises:
        ScoreTableError: lengths that disagree, anything named twice, a reference that is a target, a first target
            outside the subset, a row with nothing to rank, an unknown protocol, category or aspect.

    """

    ids: Names
    reference: Names
    targets: Sequence[Names]
    protocol: str
    split: str
    gallery: str | Names
    categories: Sequence[Names] = ()
    subset: Sequence[Names] = ()

    def __post_init__(self) -> None:
        n = len(self.ids)
        if not n:
            raise ScoreTableError("there is no query: an empty split has no metric")
        if self.protocol not in PROTOCOLS:
            raise ScoreTableError(
                f"protocol {self.protocol!r} is unknown; it is one of {', '.join(PROTOCOLS)}"
            )
        names: dict[str, tuple[str, ...]] = {
            "ids": checked_facts(self.split, "cosine", self.ids, n),
            "reference": tuple(self.reference),
            "gallery": (self.gallery,) * n if isinstance(self.gallery, str) else (*self.gallery,),
        }
        rows = {
            name: _listed(name, getattr(self, name)) or ((),) * n
            for name in ("targets", "categories", "subset")
        }
        for name, value in (names | rows).items():
            if len(value) != n:
                raise ScoreTableError(
                    f"{n} queries need {name} for each of them, but there are {len(value)}"
                )
            object.__setattr__(self, name, value)
        for name, values in rows.items():
            for i, row in enumerate(values):
                if len(set(row)) != len(row) or "" in row:
                    raise ScoreTableError(
                        f"the {name} of query {self.ids[i]!r} hold an empty name or one twice: {_some(row)}"
                    )
        self._check_answers()
        self._check_protocol()

    def _check_answers(self) -> None:
        """Targets in every row or in none, apart from the reference, and the first within the subset."""
        without = [i for i, row in enumerate(self.targets) if not row]
        if 0 < len(without) < len(self.ids):
            raise ScoreTableError(
                f"{len(without)} of {len(self.ids)} queries have no target, the first is {self.ids[without[0]]!r}: "
                "leave them out, or give none where the split's are unpublished"
            )
        for i, (start, few) in enumerate(zip(self.reference, self.subset, strict=True)):
            right = self.right(i)
            if start in right:
                raise ScoreTableError(
                    f"the reference {start!r} of query {self.ids[i]!r} is also its target; leave the query out"
                )
            if right and few and right[0] not in few:
                raise ScoreTableError(
                    f"the target {right[0]!r} of query {self.ids[i]!r} is not in its subset {_some(few)}"
                )
            if not few and not self.gallery[i]:
                raise ScoreTableError(
                    f"query {self.ids[i]!r} names no gallery and has no subset, so nothing is ranked; name one"
                )

    def _check_protocol(self) -> None:
        """What only one benchmark demands."""
        taken = next((k for k in self.kinds if re.fullmatch(r"macro_\d+", k)), None)
        if taken is not None:
            raise ScoreTableError(
                f"a category may not be called {taken!r}, as a mean over categories is; rename it"
            )
        known = CATEGORIES.get(self.protocol)
        one = self.protocol in ("fashioniq", "genecis")
        for i, kinds in enumerate(self.categories):
            unknown = [k for k in kinds if known and k not in known]
            if unknown or (one and len(kinds) != 1):
                raise ScoreTableError(
                    f"the categories of query {self.ids[i]!r} are {_some(kinds)}, but {self.protocol} knows "
                    f"{'exactly one of ' if one else ''}{', '.join(known or ())}"
                )
        if self.protocol not in ("genecis", "own") and not all(self.gallery):
            i = self.gallery.index("")
            raise ScoreTableError(
                f"query {self.ids[i]!r} names no gallery; {self.protocol} ranks one, so name it"
            )
        if self.protocol == "cirr" and any(self.subset) and not all(self.subset):
            i = self.subset.index(())
            raise ScoreTableError(
                f"query {self.ids[i]!r} has no subset, but others have; give all or none"
            )
        if self.protocol == "fashioniq" and len(self.gallery_names) > 1:
            raise ScoreTableError(
                f"the categories rank different kinds of gallery ({', '.join(self.gallery_names)}), whose numbers are "
                "not to be averaged; use one for all"
            )

    @property
    def answered(self) -> bool:
        """True where the right answers are known."""
        return bool(self.targets[0])

    def right(self, i: int) -> tuple[str, ...]:
        """The images that count as right for query i in this protocol."""
        row = tuple(self.targets[i])
        return row if self.protocol in ("circo", "own") else row[:1]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The categories present: in the protocol's order, else sorted."""
        found = set(chain.from_iterable(self.categories))
        return tuple(k for k in CATEGORIES.get(self.protocol, sorted(found)) if k in found)

    @property
    def gallery_names(self) -> tuple[str, ...]:
        """The galleries ranked, sorted; FashionIQ's without the category ("val split" of "val/dress/split")."""
        if self.protocol != "fashioniq":
            return tuple(sorted({name for name in self.gallery if name}))
        words = [re.split(r"[ /:._-]+", name) for name in self.gallery]
        named = zip(words, self.categories, strict=True)
        return tuple(sorted({" ".join(w for w in row if w != kind[0]) for row, kind in named}))

    def others(self, i: int) -> list[str]:
        """The subset of query i without its reference."""
        return [name for name in self.subset[i] if name != self.reference[i]]

    def facts(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def _listed(name: str, rows: Sequence[Names]) -> tuple[tuple[str, ...], ...]:
    """Rows of names; a bare text would fall apart into its letters."""
    bare = next((row for row in rows if isinstance(row, str)), None)
    if bare is not None:
        raise ScoreTableError(
            f"{name} must hold a list of names for each query, but one is the text {bare!r}"
        )
    return tuple(tuple(row) for row in rows)


def _some(names: Names) -> str:
    """The first few of many, for a message."""
    shown = ", ".join(repr(n) for n in names[:6])
    return f"({shown}{', …' if len(names) > 6 else ''})"
