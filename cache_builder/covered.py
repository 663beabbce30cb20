"""Which part of a picture a backbone's patches cover, as its preprocessing says.

shortest   the centre square; what lies beside it is not seen
longest    all of it, padded to a square
squash     all of it, pressed into the grid; also pictures that keep their shape
"""

import re
from typing import NamedTuple

RESIZE_MODE = re.compile(r'"resize_mode": "(\w+)"')
"""Within a cache's `preprocessing`: open_clip's word for how a picture becomes a square."""


class Box(NamedTuple):
    """A part of a picture, in fractions of its width and height; beyond 0 … 1 where it was padded."""

    left: float
    upper: float
    right: float
    lower: float

    def within(self, x: float, y: float) -> tuple[float, float]:
        """A point of the picture in fractions of this part."""
        return (
            (x - self.left) / (self.right - self.left),
            (y - self.upper) / (self.lower - self.upper),
        )


def resize_mode(preprocessing: str) -> str:
    """Shortest, longest or squash, in open_clip's words or by a transformers image processor's settings."""
    if found := RESIZE_MODE.search(preprocessing):
        return found[1]
    if '"do_pad": true' in preprocessing:
        return "longest"
    return "shortest" if '"do_center_crop": true' in preprocessing else "squash"


def covered(width: int, height: int, preprocessing: str) -> Box:
    """What the patch grid covers of a picture of that size."""
    sides = {"shortest": min(width, height), "longest": max(width, height)}
    side = sides.get(resize_mode(preprocessing))
    if side is None:
        return Box(0.0, 0.0, 1.0, 1.0)
    across, down = side / width, side / height
    return Box((1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2)
