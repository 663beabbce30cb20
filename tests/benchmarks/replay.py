"""A backbone that has seen the pictures before: what it makes of them is read from a cache that was stored exactly.

So caches of other modes need neither pictures nor a forward pass over them. Texts go through the true backbone, in the
same batches. Not for ragged patches. What is stored is what a true build stores, bit for bit; only the statistics of
`int8-channel` are then of activations from other batches, whose last bits may differ.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cache_builder import FeatureCache
from cache_builder.backbones.base import Backbone
from cache_builder.datasets.base import Dataset, ImageRecord


class Replay:
    """Streams of images from a cache.

    Args:
        backbone: the true one.
        cache: of all its streams, stored as fp32.
    """

    def __init__(self, backbone: Backbone, cache: FeatureCache) -> None:
        self._backbone = backbone
        self._rows = {
            s.removeprefix("image/"): torch.from_numpy(cache.read(s))
            for s in cache.streams
            if s.startswith("image/")
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def preprocess(self, image: Image.Image) -> Tensor:
        """The row that a picture of `numbered` stands for."""
        red, green, blue = image.tobytes()
        return torch.tensor(red << 16 | green << 8 | blue)

    def encode_images(self, pixels: Tensor, blocks: Collection[int] = ()) -> dict[str, Tensor]:
        assert not blocks
        return {name: rows[pixels] for name, rows in self._rows.items()}


def replayed(backbone: Backbone, cache: FeatureCache) -> Backbone:
    """A backbone whose streams of images come from a cache."""
    return cast(Backbone, Replay(backbone, cache))


def numbered(dataset: Dataset, cache: FeatureCache) -> Dataset:
    """The same data set with pictures of one pixel, which says in which row of a cache the true one lies."""
    rows = cache.rows("image", [record.id for record in dataset.images])
    return replace(dataset, images=tuple(_numbered(dataset.images, rows)))


def _numbered(records: Sequence[ImageRecord], rows: np.ndarray) -> list[ImageRecord]:
    def opened(row: int) -> Image.Image:
        return Image.new("RGB", (1, 1), (row >> 16, row >> 8 & 255, row & 255))

    return [
        replace(r, open=lambda row=int(row): opened(row), measure=None, path=None)
        for r, row in zip(records, rows, strict=True)
    ]
