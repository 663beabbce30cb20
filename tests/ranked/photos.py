"""A data set and a backbone that another process can load by name, slow enough to be killed half-way.

As a data set: `ranked.photos`, root = how many pictures. As a backbone: `ranked.photos:wait0.1`, which waits so
long at every batch of pictures, and leaves a file that says which process has begun.
"""

import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from stand_in import StandIn, dataset
from torch import Tensor

from cache_builder.datasets.base import Dataset

N_TEXTS = 30


class Slow(StandIn):
    """Waits at every batch of pictures, and says that it has begun."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def encode_images(self, pixels: Any, blocks: Collection[int] = ()) -> dict[str, Tensor]:
        if folder := os.environ.get("HEADSTART_TEST_SIGNS"):
            (Path(folder) / f"begun-{os.getpid()}").touch()
        time.sleep(self.seconds)
        return super().encode_images(pixels, blocks)


def load(what: Any, **_: Any) -> Any:
    """The data set of that many pictures, or the backbone that waits so long."""
    text = str(what)
    if text.startswith("wait"):
        return Slow(float(text.removeprefix("wait")))
    return photos(int(text))


def photos(n: int) -> Dataset:
    """Single-coloured pictures, two of which cannot be opened."""
    return dataset(n, N_TEXTS, bad=(3, 8))
