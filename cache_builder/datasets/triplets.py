"""What readers of composed retrieval share: annotations with their place, and what queries must not be. No `load`.

A triplet is a reference image, a modification in words and a target image.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_builder.datasets.base import ComposedExample, Gallery
from cache_builder.datasets.checking import number, text
from cache_builder.datasets.files import require_root
from cache_builder.errors import UnknownName
from cache_builder.records import DatasetError, DatasetNotFound, read_json


@dataclass(frozen=True, slots=True)
class Annotation:
    """An annotation with its place, which every complaint about it names."""

    place: str
    cells: Mapping[str, Any]

    def text(self, key: str, *, empty: bool = False) -> str:
        """A text without outer blanks; it may be empty only if that is said."""
        return text(self.cells.get(key), f"{self.place}: {key}", empty=empty)

    def number(self, key: str) -> int:
        """An integer that may stand in a file name."""
        return number(self.cells.get(key), f"{self.place}: {key}")

    def numbers(self, key: str) -> tuple[int, ...]:
        """A list of such integers."""
        return tuple(number(one, f"{self.place}: {key}") for one in self.list(key))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        return tuple(text(one, f"{self.place}: {key}") for one in self.list(key))

    def list(self, key: str) -> Sequence[Any]:
        """A list of anything."""
        value = self.cells.get(key)
        if not isinstance(value, list):
            raise DatasetError(f"{self.place}: {key} is {value!r:.80}, not a list")
        return value

    def inner(self, key: str) -> "Annotation":
        """An object within this one."""
        return as_annotation(self.cells.get(key), f"{self.place}: {key}")


def as_annotation(value: Any, place: str) -> Annotation:
    """A JSON object as a row."""
    if not isinstance(value, dict):
        raise DatasetError(f"{place} is {value!r:.80}, not a JSON object")
    return Annotation(place, value)


def read_list(path: Path) -> list[Any]:
    """A JSON file that is one list."""
    raw = read_json(path)
    if not isinstance(raw, list):
        raise DatasetError(f"{path} holds a {type(raw).__name__}, not a list")
    return raw


def read_rows(path: Path) -> list[Annotation]:
    """A JSON list of objects; their numbers count from 0."""
    return [as_annotation(raw, f"{path} row {n}") for n, raw in enumerate(read_list(path))]


def some_of(option: str, value: str | Sequence[Any], known: Sequence[str]) -> tuple[str, ...]:
    """What an option names, in the order of the known; a text lists several with commas.

    >>> some_of("splits", "test,val", ("train", "val", "test"))
    ('val', 'test')
    """
    listed = value.split(",") if isinstance(value, str) else value
    asked = [n.strip() if isinstance(n, str) else n for n in listed] if listed else []
    if not asked or not set(asked) <= set(known):
        raise UnknownName(f"{option}={value!r} is not known; choose among {', '.join(known)}")
    return tuple(one for one in known if one in asked)


def require_files(
    name: str, root: str | Path | None, wanted: Sequence[str], source: str, remedy: str
) -> Path:
    """The root, once the wanted files are below it.

    Args:
        name: of the data set.
        root: its folder.
        wanted: paths of files below it.
        source: how to get the set.
        remedy: what to ask for if only a part of it is needed.
    """
    folder = require_root(name, root, source)
    missing = [one for one in wanted if not (folder / one).is_file()]
    if missing:
        raise DatasetNotFound(
            f"{name} looked in {folder} for {', '.join(missing)} and found nothing of the kind; {source}. {remedy}"
        )
    return folder


def check_examples(
    name: str, examples: Sequence[ComposedExample], galleries: Mapping[str, Gallery]
) -> None:
    """Refuse what no ranking can be computed for; names the first three of each fault.

    Raises:
        DatasetError: a reference that is its own target, or an image that is not in the gallery or subset asked.
    """
    members = {key: frozenset(gallery.images) for key, gallery in galleries.items()}
    same = [f"query {e.id!r} ({e.reference!r})" for e in examples if e.reference in e.targets]
    _refuse(name, same, "queries with their reference among the targets")
    outside = [
        f"{image!r} of query {e.id!r}"
        for e in examples
        for image in ((e.reference, *e.targets, *e.subset) if e.gallery else e.targets)
        if image not in (members[e.gallery] if e.gallery else e.subset)
    ]
    _refuse(name, outside, "images that queries name are not in their gallery")


def check_unique(name: str, what: str, ids: Iterable[str]) -> None:
    """Refuse an id that occurs twice."""
    seen: set[str] = set()
    twice = [repr(one) for one in ids if one in seen or seen.add(one)]
    _refuse(name, twice, f"{what} occur twice")


def _refuse(name: str, offenders: Sequence[str], what: str) -> None:
    if offenders:
        raise DatasetError(
            f"{name}: {len(offenders):,} {what}, e.g. {', '.join(offenders[:3])}; get the published files again"
        )
