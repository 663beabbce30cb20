"""Other looks at a picture that a cache may hold: fixed views, and the square crops of structure-guided inference.

A look is deterministic, so that it can be cached, and its rule as canonical text is part of a cache's spec.

    crops       short side 224, cells of 32 pixels, every square window of whole cells:
    7 × 7       1 × 1: 49 · 2 × 2: 36 · 3 × 3: 25 · … · 7 × 7: 1      140 windows (11 × 7 cells: 252; 12 × 7: 280)

Crops: "Adding simple structure at inference improves Vision-Language Compositionality", arXiv 2506.09691.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cache_builder.errors import UnknownName

SHORT, CELL = 224, 32
"""Pixels of the resized picture's short side, and of a cell."""

LONGEST = 8
"""A picture longer than this many short sides has no crops: a strip of one pixel would have millions."""

CROP_SIZES = {"all": tuple(range(1, SHORT // CELL + 1)), "fast": (1, 2, SHORT // CELL)}
"""Rule → sides of the windows, in cells. `fast` (our choice) leaves 86 of 140."""


@dataclass(frozen=True)
class View:
    """A fixed look: what it does, as canonical text, and the doing."""

    rule: str
    apply: Callable[[Image.Image], Image.Image]


def _window(across: float, down: float) -> Callable[[Image.Image], Image.Image]:
    """A window of seven eighths of both sides; 0 … 1 says where it lies."""

    def cut(image: Image.Image) -> Image.Image:
        width, height = (max(1, side * 7 // 8) for side in image.size)
        left = round((image.width - width) * across)
        upper = round((image.height - height) * down)
        return image.crop((left, upper, left + width, upper + height))

    return cut


VIEWS = {
    "flip": View("mirrored left to right", ImageOps.mirror),
    "center": View("window of 7/8 of both sides, center", _window(0.5, 0.5)),
    "upper_left": View("window of 7/8 of both sides, upper left", _window(0.0, 0.0)),
    "upper_right": View("window of 7/8 of both sides, upper right", _window(1.0, 0.0)),
    "lower_left": View("window of 7/8 of both sides, lower left", _window(0.0, 1.0)),
    "lower_right": View("window of 7/8 of both sides, lower right", _window(1.0, 1.0)),
}
"""Name → view; its streams are called `image/view_<name>/…`."""


def crop_rule(name: str) -> str:
    """The crops of a rule as canonical text, which begins with its name.

    Raises:
        UnknownName: there is no such rule.
    """
    if name not in CROP_SIZES:
        raise UnknownName(f"no crops called {name!r} (known: {', '.join(CROP_SIZES)})")
    sides = " ".join(map(str, CROP_SIZES[name]))
    return (
        f"{name}: short side {SHORT} bicubic, cells of {CELL}, square windows of {sides} cells, row by row; none of a "
        f"picture longer than {LONGEST} short sides"
    )


def crop_boxes(width: int, height: int, rule: str) -> NDArray[np.int32]:
    """Windows of a picture of that size, (crops, 4): left, upper, right, lower in pixels of the resized picture.

    Small ones first, each size row by row; none of a very long picture.
    """
    if max(width, height) > LONGEST * min(width, height):
        return np.zeros((0, 4), np.int32)
    columns, rows = (side // CELL for side in _resized(width, height))
    return _windows(columns, rows, rule)


@cache
def _windows(columns: int, rows: int, rule: str) -> NDArray[np.int32]:
    """Of a grid of cells; grids are few, pictures many."""
    found = [
        (x, y, x + k, y + k)
        for k in CROP_SIZES[rule]
        for y in range(rows - k + 1)
        for x in range(columns - k + 1)
    ]
    return np.array(found, np.int32) * CELL


def resize_for_crops(image: Image.Image) -> Image.Image:
    """The picture that boxes are cut from: its short side is 224 pixels."""
    return image.resize(_resized(*image.size), Image.Resampling.BICUBIC)


def _resized(width: int, height: int) -> tuple[int, int]:
    short = min(width, height)
    return max(SHORT, round(width * SHORT / short)), max(SHORT, round(height * SHORT / short))
