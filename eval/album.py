"""Pictures and words of the items that a report names, from the runs of a comparison that hold them.

    pictures/failures*.npz    items (m,) their ids; shows (m, k) ids of their pictures; says (m, t) their texts;
                              names (n,) and images (n, side, side, 3) uint8: the pictures themselves; texts (u,) and
                              strings (u,): captions that are answers; kind, variant, split, dataset: what is asked
    pictures/query-*.npz      a composed query with its best images (`eval.composed_pictures`)

The first are written by `headstart compare … --pictures N`, one for each question, the others by `headstart score` too.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval.comparison import Comparison
from eval.composed_pictures import QUERY, Found, read_query
from eval.composed_table import ComposedScores
from eval.errors import RunError, ScoreTableError
from eval.failures import Failure
from eval.markup import data_image, png, text
from eval.npz import read_npz

FAILURES = re.compile(r"failures(-\w+)?\.npz")
FACTS = ("kind", "variant", "split", "dataset")
ARRAYS = ("items", "shows", "says", "names", "images", "texts", "strings")


@dataclass(frozen=True, slots=True)
class Album:
    """What runs hold of a comparison's items.

    Attributes:
        images: image id → picture, as a data URI, each once.
        shows: item id → ids of its pictures.
        says: item id → its texts.
        texts: caption id → words, of captions that are answers.

    """

    images: dict[str, str] = field(default_factory=dict[str, str])
    shows: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    says: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    texts: dict[str, str] = field(default_factory=dict[str, str])

    def style(self) -> str:
        """Every picture once, under the name that `thumb` uses."""
        return "".join(f"--shot-{n}:url({uri});" for n, uri in enumerate(self.images.values()))

    def thumb(self, image: str, says: str) -> str:
        """A small picture; the id alone where no run holds it, and nothing where `says` is empty then."""
        below = f"<small class=soft>{says}</small>" if says else ""
        if image not in self.images:
            return f"<small class=soft>{says}: {text(image)}</small>" if says else ""
        number = list(self.images).index(image)
        return (
            f'<span class="thumb"><span role="img" aria-label="{text(f"{says} {image}".strip())}" '
            f'title="{text(image)}" style="background-image:var(--shot-{number})"></span>{below}</span>'
        )


def album_of(c: Comparison, shown: Sequence[Failure]) -> Album:
    """What the runs of a comparison hold of these failures: of the same question, or queries of its split by their id.

    Raises:
        RunError: a file that holds something else; names it.
    """
    wanted = {f.reference for f in shown} | {f.target for f in shown}
    wanted |= {a.image for f in shown for a in f.answers}
    items = {f.name for f in shown}
    scored = c.rows[0].group.tables[0]
    reference: dict[str, str] = {}
    if isinstance(scored, ComposedScores):
        reference = dict(zip(scored.ids, scored.queries.reference, strict=True))
    album = Album()
    for run in (run for row in c.rows for run in row.group.runs):
        for path in run.pictures:
            if FAILURES.fullmatch(path.name):
                _add_items(_failures(path), c, items, wanted, album)
            elif reference and QUERY.fullmatch(path.name):
                _add_query(read_query(path), c.question.split, wanted, reference, album)
    return album


def _failures(path: Path) -> Found:
    """The arrays of a file of failures.

    Raises:
        RunError: it is no such file, or its arrays do not fit each other.
    """
    try:
        found = read_npz(path)
    except ScoreTableError as error:
        raise RunError(f"{path} holds no pictures of items: {error}") from error
    if not {*FACTS, *ARRAYS} <= found.keys():
        lacking = ", ".join(sorted({*FACTS, *ARRAYS} - found.keys()))
        raise RunError(f"{path} holds no pictures of items: {lacking} is missing; draw them again")
    images, m = found["images"], len(np.atleast_1d(found["items"]))
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] != 3
        or found["names"].shape != images.shape[:1]
        or found["texts"].ndim != 1
        or found["strings"].shape != found["texts"].shape
        or any(found[name].ndim != 2 or len(found[name]) != m for name in ("shows", "says"))
    ):
        shapes = ", ".join(f"{name} {found[name].dtype} {found[name].shape}" for name in ARRAYS)
        raise RunError(
            f"{path} must hold items (m,), shows (m, k), says (m, t), names (n,), images (n, side, side, 3) uint8, "
            f"texts (u,) and strings (u,), but it holds {shapes}; draw them again"
        )
    return found


def _add_items(
    found: Found, c: Comparison, items: set[str], wanted: set[str], album: Album
) -> None:
    """Add the items that are shown, if the file is of the same question; one world of czsl shows the other's too."""
    if not _is_of(found, c):
        return
    for item, shows, says in zip(*(found[name].tolist() for name in ARRAYS[:3]), strict=True):
        if item in items:
            album.shows[item], album.says[item] = tuple(shows), tuple(says)
            wanted |= set(shows)
    album.texts.update(zip(found["texts"].tolist(), found["strings"].tolist(), strict=True))
    _add_images(zip(found["names"].tolist(), found["images"], strict=True), wanted, album)


def _is_of(found: Found, c: Comparison) -> bool:
    """Does a file say that it is of what a comparison asks?"""
    return all(str(found[fact]) == getattr(c.question, fact) for fact in FACTS)


def _add_query(
    found: Found, split: str, wanted: set[str], reference: Mapping[str, str], album: Album
) -> None:
    """Add what a file of this split holds of the pictures wanted, and its edit."""
    query = str(found.get("id", ""))
    if query not in reference or str(found.get("split", split)) != split:
        return
    album.says[query] = (" / ".join(str(words) for words in np.atleast_1d(found["edit"])),)
    images = [(reference[query], found["reference"])]
    images += zip(found["names"].tolist(), found["images"], strict=True)
    _add_images(images, wanted, album)


def _add_images(images: Iterable[tuple[str, np.ndarray]], wanted: set[str], album: Album) -> None:
    """Add those that are wanted and not there yet."""
    for name, pixels in images:
        if name in wanted and name not in album.images:
            album.images[name] = data_image(png(pixels))
