"""What the readers of matching data share: captions, picture files, counts, reports. No data set itself, so no `load`.

Reader rules: docs/protocols.md, matching readers.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image

from cache_builder.datasets.base import ImageRecord
from cache_builder.errors import UnknownName
from cache_builder.images import UnsafeName, check_name, image_path, image_size, open_image
from cache_builder.records import DatasetError, DatasetNotFound

CHECKS = ("auto", "official", "none")


@dataclass(frozen=True, slots=True)
class Official:
    """The published set.

    Attributes:
        name: the plugin's file name.
        counts: what → how many, counted in the public files; asserted under `check`.
        source: how to get the set, for the message when it is not there.

    """

    name: str
    counts: Mapping[str, int]
    source: str


def check_options(name: str, check: str | None = None, **flags: object) -> None:
    """Refuse an unknown `check`, and switches that are neither true nor false: `UnknownName`."""
    if check is not None and check not in CHECKS:
        raise UnknownName(f"check={check!r} is not known; choose one of {', '.join(CHECKS)}")
    for flag, value in flags.items():
        if value not in (True, False):
            raise UnknownName(f"{name} was asked for {flag}={value!r}; {flag} is true or false")


def require_root(name: str, root: str | Path | None, source: str) -> Path:
    """The folder, if there is one: `DatasetNotFound` otherwise."""
    if root is None:
        raise DatasetNotFound(f"{name} needs the folder it lies in (--root); {source}")
    if not Path(root).is_dir():
        raise DatasetNotFound(f"{name}: there is no folder {root}; {source}")
    return Path(root)


def text_of(record: Mapping[str, Any], key: str, place: str) -> str:
    """A text without outer whitespace, and nothing else changed; `DatasetError` if it is none or blank."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(
            f"{place}: {key} is {str(value)[:60]!r}; it must be a text that is not blank"
        )
    return value.strip()


def image_name_of(record: Mapping[str, Any], key: str, place: str) -> str:
    """A file name that leads nowhere else; `DatasetError` with its place otherwise."""
    value = record.get(key)
    if not isinstance(value, str):
        raise DatasetError(
            f"{place}: {key} is {str(value)[:60]!r}; it must be the name of an image file"
        )
    try:
        return check_name(value)
    except UnsafeName as error:
        raise DatasetError(f"{place}: {error}") from error


def file_record(
    image_id: str, folder: Path, names: Sequence[str], follow_links: bool
) -> ImageRecord:
    """A picture in the first of some files below a folder that exists."""
    find = partial(_first, folder, tuple(names), follow_links)
    return ImageRecord(image_id, partial(_open, find), partial(_measure, find), find)


def missing_images(images: Sequence[ImageRecord], name: str, source: str) -> str:
    """How many pictures have no file, for people; a folder without a single one is a half-downloaded set.

    Raises:
        DatasetNotFound: none of the pictures is there.
    """
    absent = [(record.id, reason) for record in images if (reason := _absence(record))]
    if images and len(absent) == len(images):
        raise DatasetNotFound(
            f"{name} found none of its {len(images):,} images ({absent[0][1]}); {source}"
        )
    return listed([image_id for image_id, _ in absent])


def listed(names: Sequence[str]) -> str:
    """A count and the first three names, escaped."""
    if not names:
        return "none"
    shown = ", ".join(map(repr, names[:3]))
    return f"{len(names):,}: {shown}{', …' if len(names) > 3 else ''}"


def judge(
    official: Official, found: Mapping[str, int], *, check: str, recognised: bool, root: Path
) -> dict[str, str]:
    """Found and published counts, for people, after asserting them where `check` says so.

    Args:
        official: what was published.
        found: the same keys, and others that are only reported.
        check: "official" asserts, "none" does not, "auto" asserts if the set was `recognised`.
        recognised: whether the set is the published one or part of it, by marks of its own.
        root: where it was read, for the message.

    Raises:
        DatasetError: asserted counts differ; names every one with both values.
    """
    asserted = check == "official" or (check == "auto" and recognised)
    wrong = [
        f"{what} {expected:,} expected, {found.get(what, 0):,} found"
        for what, expected in official.counts.items()
        if found.get(what, 0) != expected
    ]
    if asserted and wrong:
        raise DatasetError(
            f"{root} is not the published {official.name}: {'; '.join(wrong)}. Get the whole set ({official.source}), "
            'or pass check="none" if this is a subset or a set of your own'
        )
    if asserted:
        identity = "the published one, its counts asserted"
    elif recognised:
        identity = "the published one or part of it, counts not asserted"
    else:
        identity = "another set in this layout"
    beside = official.counts if asserted or recognised else {}
    return {"set": identity} | {
        what: f"{n:,}" + (f" (published {beside[what]:,})" if what in beside else "")
        for what, n in found.items()
    }


def _first(folder: Path, names: tuple[str, ...], follow_links: bool) -> Path:
    tried = [image_path(folder, name, follow_links=follow_links) for name in names]
    for path in tried:
        if path.exists():
            return path
    raise FileNotFoundError(f"no such file: {' nor '.join(str(path) for path in tried)}")


def _open(find: Callable[[], Path]) -> Image:
    return open_image(find())


def _measure(find: Callable[[], Path]) -> tuple[int, int]:
    return image_size(find())


def _absence(record: ImageRecord) -> str:
    """Why a picture has no file; "" if it has one, or none is needed. A link that is refused is left to the build."""
    try:
        return "" if record.path is None or os.path.exists(record.path()) else "no such file"
    except FileNotFoundError as error:
        return str(error)
    except (OSError, ValueError):
        return ""
