"""Where the files of a composition set lie: places to look for an image, and a miniature in the layout. No `load`.

An image lies below one of the set's image folders, at the first of a few places that the metadata row allows.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from cache_builder.datasets.base import ImageRecord
from cache_builder.images import check_name, image_path, image_size, open_image
from cache_builder.records import DatasetNotFound

PAIR_FOLDER = "compositional-split-natural"
METADATA = "metadata_compositional-split-natural"

Row = Mapping[str, str]
Place = tuple[str, str]
"""(image folder below ROOT, file name below that)."""


def as_written(found: Row) -> tuple[Place, ...]:
    """The image as the metadata writes it."""
    return (("images", found["image"]),)


def space_or_underscore(found: Row) -> tuple[Place, ...]:
    """The image as written, then with its first folder spelled with spaces, then with underscores."""
    folder, slash, rest = found["image"].partition("/")
    if not slash:
        return as_written(found)
    spellings = (folder, folder.replace("_", " "), folder.replace(" ", "_"))
    return tuple(("images", f"{spelling}/{rest}") for spelling in dict.fromkeys(spellings))


def image_record(
    image: str, root: Path, places: tuple[Place, ...], *, step: str, follow_links: bool
) -> ImageRecord:
    """An image that opens the first of its places that exists.

    Args:
        image: its id.
        root: of the set.
        places: where to look, in order.
        step: added to the message when it is nowhere; "" for nothing.
        follow_links: open it through a link that leaves its folder.

    Raises:
        UnsafeName: a place could lead out of its folder.
    """
    for _, name in places:
        check_name(name)
    find = partial(_first, root, places, step, follow_links)
    return ImageRecord(image, partial(_open, find), partial(_measure, find), find)


def require_some_image(
    root: Path, places: Mapping[str, tuple[Place, ...]], *, name: str, remedy: str
) -> None:
    """A folder without a single listed image is a half-downloaded set, not 30,000 bad files.

    Raises:
        DatasetNotFound: none of the images (id → places) is there; says where the first was looked for.
    """
    if not any(os.path.exists(root / f / file) for tried in places.values() for f, file in tried):
        first = next(iter(places.values()), (("images", "…"),))
        raise DatasetNotFound(
            f"{name} found none of its {len(places):,} images; the first was looked for at "
            f"{' and '.join(str(root / f / file) for f, file in first)}; {remedy}"
        )


def row(image: str, attr: str, obj: str, split: str) -> dict[str, str]:
    """A row of the metadata."""
    return {"image": image, "attr": attr, "obj": obj, "set": split}


def write_miniature(
    root: Path,
    pairs: Mapping[str, Sequence[str]],
    rows: Sequence[Row],
    pictures: Mapping[str, tuple[int, int, int]],
) -> Path:
    """The files of a small set: pair lines by split, metadata rows, a picture of one colour at each path below `root`.

    Picture i has 40 + 3i by 36 pixels, so that no two are alike.
    """
    (root / PAIR_FOLDER).mkdir(parents=True)
    for split, lines in pairs.items():
        (root / PAIR_FOLDER / f"{split}_pairs.txt").write_text("\n".join([*lines, ""]))
    (root / f"{METADATA}.json").write_text(json.dumps(rows, indent=1))
    for index, (path, colour) in enumerate(pictures.items()):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + 3 * index, 36), colour).save(root / path)
    return root


def _first(root: Path, places: tuple[Place, ...], step: str, follow_links: bool) -> Path:
    """The first of the places where an image may lie."""
    tried = [image_path(root / f, name, follow_links=follow_links) for f, name in places]
    for path in tried:
        if path.exists():
            return path
    missed = " nor ".join(str(path) for path in tried)
    raise FileNotFoundError(f"no such file: {missed}{'; ' + step if step else ''}")


def _open(find: partial[Path]) -> Image.Image:
    return open_image(find())


def _measure(find: partial[Path]) -> tuple[int, int]:
    return image_size(find())
