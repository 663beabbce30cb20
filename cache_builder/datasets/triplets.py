"""What readers of composed retrieval share: rows, pictures in folders, found counts beside published ones. No `load`.

A triplet is a reference image, a modification in words and a target image. Marks on counts, here and in the readers:
A was counted in the public files and is asserted, P stands in papers and is only printed.
"""

import os
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image

from cache_builder.datasets.base import ComposedExample, Gallery, ImageRecord
from cache_builder.errors import UnknownName
from cache_builder.images import UnsafeName, check_name, image_path, image_size, open_image
from cache_builder.records import DatasetError, DatasetNotFound, read_json

SPLITS = ("train", "val", "test")
CHECKS = ("auto", "official", "none")

MAX_NUMBER = 10**12
"""Numbers that make file names are below it."""

Place = tuple[Path, str]
"""An image folder, which may be a link, and a file name below it, which may not lead out of it."""


@dataclass(frozen=True, slots=True)
class Count:
    """A line of a count table.

    Attributes:
        found: in the files read.
        expected: published, or None.
        asserted: mark A; otherwise P.

    """

    found: int
    expected: int | None = None
    asserted: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """An annotation with its place, which every complaint about it names."""

    place: str
    cells: Mapping[str, Any]

    def text(self, key: str, *, empty: bool = False) -> str:
        """A text without outer blanks; it may be empty only if that is said."""
        value = self.cells.get(key)
        if not isinstance(value, str) or not (empty or value.strip()):
            raise DatasetError(f"{self.place}: {key} is {value!r:.80}; it must be a text")
        return value.strip()

    def number(self, key: str) -> int:
        """An integer that may stand in a file name."""
        return checked_number(self.cells.get(key), f"{self.place}: {key}")

    def numbers(self, key: str) -> tuple[int, ...]:
        """A list of such integers."""
        return tuple(checked_number(one, f"{self.place}: {key}") for one in self.list(key))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, as they are."""
        return tuple(checked_text(one, f"{self.place}: {key}") for one in self.list(key))

    def list(self, key: str) -> Sequence[Any]:
        """A list of anything."""
        value = self.cells.get(key)
        if not isinstance(value, list):
            raise DatasetError(f"{self.place}: {key} is {value!r:.80}, not a list")
        return value

    def inner(self, key: str) -> "Row":
        """An object within this one."""
        return as_row(self.cells.get(key), f"{self.place}: {key}")


def as_row(value: Any, place: str) -> Row:
    """A JSON object as a row."""
    if not isinstance(value, dict):
        raise DatasetError(f"{place} is {value!r:.80}, not a JSON object")
    return Row(place, value)


def checked_number(value: Any, what: str) -> int:
    """The value, if it is an integer in [0, 10¹²); booleans are none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_NUMBER:
        raise DatasetError(
            f"{what} is {value!r:.80}, not an integer from 0 to below {MAX_NUMBER:,}"
        )
    return value


def checked_text(value: Any, what: str) -> str:
    """The value, if it is a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise DatasetError(f"{what} holds {value!r:.80}, not a text")
    return value


def read_list(path: Path) -> list[Any]:
    """A JSON file that is one list."""
    raw = read_json(path)
    if not isinstance(raw, list):
        raise DatasetError(f"{path} holds a {type(raw).__name__}, not a list")
    return raw


def read_rows(path: Path) -> list[Row]:
    """A JSON list of objects; their numbers count from 0."""
    return [as_row(raw, f"{path} row {number}") for number, raw in enumerate(read_list(path))]


def some_of(option: str, value: str | Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """What an option names, in the order of the known; a text lists several with commas.

    >>> some_of("splits", "test,val", ("train", "val", "test"))
    ('val', 'test')
    """
    listed = value.split(",") if isinstance(value, str) else value
    asked = [n.strip() if isinstance(n, str) else n for n in listed] if listed else []
    if not asked or not set(asked) <= set(known):
        raise UnknownName(f"{option}={value!r} is not known; choose among {', '.join(known)}")
    return tuple(one for one in known if one in asked)


def check_options(known: Mapping[str, Sequence[object]], **values: object) -> None:
    """Refuse a value that its option does not know."""
    for option, value in values.items():
        if value not in known[option]:
            allowed = ", ".join(str(v).lower() for v in known[option])
            raise UnknownName(f"{option}={value!r} is not known; choose one of {allowed}")


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


def require_root(name: str, root: str | Path | None, source: str) -> Path:
    """The folder of a data set, which must be there."""
    if root is None:
        raise DatasetNotFound(f"{name} needs the folder it lies in (--root); {source}")
    if not Path(root).is_dir():
        raise DatasetNotFound(f"{name}: there is no folder {root}; {source}")
    return Path(root)


def require_some_image(
    name: str, what: str, images: Iterable[Sequence[Place]], source: str
) -> None:
    """A folder without a single listed image is a half-downloaded set, not so many bad files."""
    tried = list(images)
    if tried and not any(os.path.exists(base / file) for places in tried for base, file in places):
        first = " and ".join(str(base / file) for base, file in tried[0])
        raise DatasetNotFound(
            f"{name} found none of its {len(tried):,} images of {what}; the first was looked for at {first}; {source}; "
            "or pass require_images=false to read texts and tasks only"
        )


def not_looked_for(require_images: bool) -> dict[str, str]:
    """What the counts say where a set is read without its images."""
    return {} if require_images else {"images on disk": "images not looked for"}


def image_record(image: str, places: Sequence[Place], *, follow_links: bool) -> ImageRecord:
    """An image that lies at the first of the places where there is a file."""
    first = partial(first_path, tuple(places), follow_links)
    return ImageRecord(image, partial(_open, first), partial(_measure, first), first)


def first_path(places: Sequence[Place], follow_links: bool) -> Path:
    """The first of the places where there is a file.

    Raises:
        FileNotFoundError: there is none; names all of them.
        UnsafeName: a name leads out of its folder.
    """
    tried = [image_path(base, file, follow_links=follow_links) for base, file in places]
    for path in tried:
        if path.exists():
            return path
    raise FileNotFoundError(f"no such file: {' nor '.join(map(str, tried))}")


def harmless(name: str, place: str) -> str:
    """A file name from an annotation, if it leads nowhere else."""
    try:
        return check_name(name)
    except UnsafeName as error:
        raise DatasetError(f"{place}: {error}") from error


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


def compare_counts(
    name: str,
    root: Path,
    counts: Mapping[str, Count],
    *,
    marks: Collection[Hashable],
    found: Collection[Hashable],
    check: str,
    source: str,
) -> dict[str, str]:
    """Found counts for people, beside the published ones if this is the published set.

    Args:
        name: of the data set.
        root: where it was read.
        counts: its table.
        marks: a few things that hardly another set has; half of them are enough to recognise it, even when damaged.
        found: the things of that kind in the files read.
        check: "official" asserts counts of mark A, "none" does not, "auto" does if the set is recognised.
        source: how to get the set.

    Raises:
        DatasetError: an asserted count differs.
    """
    published = 2 * sum(mark in found for mark in marks) >= len(marks)
    certain = {what: c for what, c in counts.items() if c.asserted and c.expected is not None}
    official = check == "official" or (check == "auto" and published)
    wrong = [
        f"{what}: {c.expected:,} expected, {c.found:,} found"
        for what, c in certain.items()
        if c.found != c.expected
    ]
    if official and wrong:
        raise DatasetError(
            f"{root} is not the published {name}: {'; '.join(wrong)}. Get the whole set ({source}), or pass "
            'check="none" if this is a subset or a set of your own'
        )
    if official:
        identity = (
            "the published one, its counts asserted" if certain else "no count of it is certain"
        )
    else:
        identity = (
            "published names, counts not asserted" if published else "another set in this layout"
        )
    lines = {"set": identity}
    for what, c in counts.items():
        label = "published" if c.asserted else "papers"
        beside = f" ({label} {c.expected:,})" if published and c.expected is not None else ""
        lines[what] = f"{c.found:,}{beside}"
    return lines


def _open(first: partial[Path]) -> Image:
    return open_image(first())


def _measure(first: partial[Path]) -> tuple[int, int]:
    return image_size(first())
