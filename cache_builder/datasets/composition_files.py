"""Where the files of a composition set lie: places to look for an image, and a miniature in the layout. No `load`.

An image lies below one of the set's image folders, at the first of a few places that the metadata row allows.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

PAIR_FOLDER = "compositional-split-natural"
METADATA = "metadata_compositional-split-natural"

Labels = Mapping[str, str]
Spelling = tuple[str, str]
"""(image folder below ROOT, file name below that)."""


def as_written(found: Labels) -> tuple[Spelling, ...]:
    """The image as the metadata writes it."""
    return (("images", found["image"]),)


def space_or_underscore(found: Labels) -> tuple[Spelling, ...]:
    """The image as written, then with its first folder spelled with spaces, then with underscores."""
    folder, slash, rest = found["image"].partition("/")
    if not slash:
        return as_written(found)
    spellings = (folder, folder.replace("_", " "), folder.replace(" ", "_"))
    return tuple(("images", f"{spelling}/{rest}") for spelling in dict.fromkeys(spellings))


def row(image: str, attr: str, obj: str, split: str) -> dict[str, str]:
    """A row of the metadata."""
    return {"image": image, "attr": attr, "obj": obj, "set": split}


def write_miniature(
    root: Path,
    pairs: Mapping[str, Sequence[str]],
    rows: Sequence[Labels],
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
