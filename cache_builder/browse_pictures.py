"""Pictures for `headstart browse`: found again through the data set's reader, and shown with a map over them.

Where the data set has moved or a picture is gone, a grey square stands in and the reason is said: ids, neighbours and
maps need no pixels. A map is stretched between its smallest and its largest cosine, the patch itself left out.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw

from cache_builder import load_dataset
from cache_builder.browse import Grid
from cache_builder.cache import FeatureCache
from cache_builder.covered import Box
from cache_builder.datasets.base import ImageRecord
from cache_builder.errors import CacheError
from cache_builder.header import NO_DATASET

LARGE, SMALL = 480, 144
"""Pixels of the longer side of the picture that is pointed at, and of one in a list."""

MIX = 0.6
"""Share of the map's colour over a picture."""

GREY = (128, 128, 128)

MEDIA = "image/jpeg"
"""What is sent to the browser."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """Where pixels come from.

    Attributes:
        records: image id → how to open it; empty where the data set cannot be read.
        missing: why it cannot, in a sentence; empty if it can.
    """

    records: Mapping[str, ImageRecord]
    missing: str = ""


def pictures_of(cache: FeatureCache, root: str | None = None) -> Pictures:
    """Pictures of a cache's data set, from where it was built or from `root`."""
    name, header = cache.spec.dataset.name, cache.header
    if name == NO_DATASET:
        return Pictures({}, "these features belong to no data set, so there are no pictures")
    try:
        found = load_dataset(name, root or header.root or None, **header.options)
    except (CacheError, OSError, ImportError, TypeError) as error:
        return Pictures(
            {},
            f"the pictures of {name} cannot be read ({error}); if the data set has moved, say --root FOLDER",
        )
    return Pictures({record.id: record for record in found.images})


def opened(pictures: Pictures, name: str) -> Image.Image | None:
    """The picture of an image id; None where it cannot be had."""
    record = pictures.records.get(name)
    if record is None:
        return None
    try:
        return record.open().convert("RGB")
    except (ValueError, OSError):
        return None


def scaled(picture: Image.Image | None, longest: int) -> Image.Image:
    """A picture, or a grey square for none, whose longer side has so many pixels."""
    picture = picture or Image.new("RGB", (1, 1), GREY)
    ratio = longest / max(picture.size)
    size = max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio))
    return picture.resize(size, Image.Resampling.LANCZOS)


def mapped(
    picture: Image.Image,
    grid: Grid,
    box: Box,
    cosines: Float[np.ndarray, "p q"],
    patch: int | None = None,
) -> Image.Image:
    """A picture under its map; what the backbone does not see is dark.

    Args:
        picture: as it is shown.
        grid, box: how patches lie, and over which part of the picture.
        cosines: with the patch that was pointed at.
        patch: where that is in this picture, framed; None in another picture.
    """
    pixels = np.asarray(picture, np.float32)
    (height, width), (p, q) = pixels.shape[:2], grid.shape
    columns = _cells(width, box.left, box.right, grid.xs)
    rows = _cells(height, box.upper, box.lower, grid.ys)
    seen = ((rows >= 0) & (rows < p))[:, None] & ((columns >= 0) & (columns < q))
    colours = _colours(cosines, patch)[rows.clip(0, p - 1)][:, columns.clip(0, q - 1)]
    mixed = np.where(seen[..., None], (1 - MIX) * pixels + MIX * colours, pixels * 0.25)
    shown = Image.fromarray(mixed.round().astype(np.uint8))
    if patch is not None:
        _frame(shown, grid, box, patch)
    return shown


def _cells(
    pixels: int, first: float, last: float, borders: Float[np.ndarray, " p1"]
) -> Int[np.ndarray, " pixels"]:
    """In which row or column of the grid each line of pixels lies; -1 before the first."""
    middles = (np.arange(pixels) + 0.5) / pixels
    return np.searchsorted(borders, (middles - first) / (last - first), side="right") - 1


def span(cosines: Float[np.ndarray, "p q"], patch: int | None = None) -> tuple[float, float]:
    """Smallest and largest cosine, without the patch itself; of a grid of one patch, its own."""
    flat = cosines.ravel()
    others = flat if patch is None else np.delete(flat, patch)
    others = others if len(others) else flat
    return float(others.min()), float(others.max())


def _colours(cosines: Float[np.ndarray, "p q"], patch: int | None) -> UInt8[np.ndarray, "p q 3"]:
    low, high = span(cosines, patch)
    share = ((cosines - low) / max(high - low, 1e-9)).clip(0, 1)
    return (mpl.colormaps["magma"](share)[..., :3] * 255).round().astype(np.uint8)


def _frame(shown: Image.Image, grid: Grid, box: Box, patch: int) -> None:
    row, column = divmod(patch, grid.shape[1])

    def at(share: float, first: float, last: float, pixels: int) -> float:
        return (first + share * (last - first)) * pixels

    left, right = (at(x, box.left, box.right, shown.width) for x in grid.xs[column : column + 2])
    upper, lower = (at(y, box.upper, box.lower, shown.height) for y in grid.ys[row : row + 2])
    draw = ImageDraw.Draw(shown)
    draw.rectangle((left, upper, right - 1, lower - 1), outline="black", width=4)
    draw.rectangle((left + 1, upper + 1, right - 2, lower - 2), outline="white", width=2)


def encoded(picture: Image.Image) -> bytes:
    """As a file of the type `MEDIA`."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=92, subsampling=0)
    return out.getvalue()
