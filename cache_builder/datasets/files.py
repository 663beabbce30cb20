"""Where a set and its pictures lie: the root, the first of several places with a file, what is missing. No `load`."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PIL.Image import Image

from cache_builder.datasets.base import ImageRecord
from cache_builder.images import image_path, image_size, open_image
from cache_builder.records import DatasetNotFound

Place = tuple[Path, str]
"""An image folder, which may be a link, and a file name below it, which may not lead out of it."""

WITHOUT = "require_images=false reads texts and tasks without them"
"""What to do without pictures, for messages of readers that have the option."""

NOT_LOOKED_FOR = {"images missing": "images not looked for"}
"""What the counts say where a set is read without its pictures."""


def require_root(name: str, root: str | Path | None, source: str) -> Path:
    """The folder of a data set.

    Raises:
        DatasetNotFound: none was named, or it is not there; says how to get the set.
    """
    if root is None:
        raise DatasetNotFound(f"{name} needs the folder it lies in (--root); {source}")
    if not Path(root).is_dir():
        raise DatasetNotFound(f"{name}: there is no folder {root}; {source}")
    return Path(root)


def image_record(
    image: str,
    places: Sequence[Place],
    step: str = "",
    *,
    follow_links: bool,
    upright: bool = False,
) -> ImageRecord:
    """An image that lies at the first of its places where there is a file.

    Args:
        image: its id.
        places: where to look, in order.
        step: added to the message when it is nowhere; "" for nothing.
        follow_links: open it through a link that leaves its folder.
        upright: turn it by its EXIF orientation.
    """
    find = partial(first_path, tuple(places), follow_links, step)
    return ImageRecord(image, partial(_open, find, upright), partial(_measure, find, upright), find)


def first_path(places: Sequence[Place], follow_links: bool, step: str = "") -> Path:
    """The first of the places where there is a file.

    Raises:
        FileNotFoundError: there is none; names all of them.
        UnsafeName: a name leads out of its folder.
    """
    tried = [image_path(base, file, follow_links=follow_links) for base, file in places]
    for path in tried:
        if path.exists():
            return path
    missed = " nor ".join(map(str, tried))
    raise FileNotFoundError(f"no such file: {missed}{'; ' + step if step else ''}")


def require_some_image(
    name: str, images: Sequence[ImageRecord], remedy: str, *, of: str = ""
) -> None:
    """A folder without a single listed image is a half-downloaded set, not 30,000 bad files.

    Args:
        name: of the data set.
        images: what it lists; none is fine.
        remedy: how to get them, or to do without.
        of: the part of the set that they are, for the message.

    Raises:
        DatasetNotFound: none of the images is there; says where the first was looked for.
    """
    if images and all(map(absence, images)):
        raise DatasetNotFound(
            f"{name} found none of its {len(images):,} images{' of ' + of if of else ''}: of the first, "
            f"{absence(images[0])}; {remedy}"
        )


def missing_images(name: str, images: Sequence[ImageRecord], remedy: str) -> str:
    """How many pictures have no file, for people; likewise refuses a set without a single one."""
    require_some_image(name, images, remedy)
    return listed([record.id for record in images if absence(record)])


def absence(record: ImageRecord) -> str:
    """Why a picture has no file; "" if it has one, or none is needed. A link that is refused is left to the build."""
    try:
        return "" if record.path is None or os.path.exists(record.path()) else "no such file"
    except FileNotFoundError as error:
        return str(error)
    except (OSError, ValueError):
        return ""


def listed(names: Sequence[str]) -> str:
    """A count and the first three names, escaped.

    >>> listed(["a", "b"])
    "2: 'a', 'b'"
    """
    if not names:
        return "none"
    shown = ", ".join(map(repr, names[:3]))
    return f"{len(names):,}: {shown}{', …' if len(names) > 3 else ''}"


def _open(find: Callable[[], Path], upright: bool) -> Image:
    return open_image(find(), upright=upright)


def _measure(find: Callable[[], Path], upright: bool) -> tuple[int, int]:
    return image_size(find(), upright=upright)
