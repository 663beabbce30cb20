"""The stream `segment/pooled`: the parts of a caption, each with the pooled embedding of its own text.

    caption row 7 "a red cup on a box"  →  segment:a red cup · segment:a box · segment:a red cup on a box
                                           rows 90, 91, 95 of text/pooled  →  (1, 3, D) and a mask

No array of a cache has this name: captions are cut anew when read (`cache_builder/segments.py`), and their parts are
looked up among the texts, where `--set segments=rules` put them at the build.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cache_builder import FeatureCache
from cache_builder.segments import prefixed, segments
from heads.errors import MissingStream

STREAM, PARTS_OF = "segment/pooled", "text/pooled"
"""What a head asks for, and what is read for it."""

Taken = tuple[Tensor, Tensor | None]
"""Values of rows, and the mask of what is real where rows differ in length."""


class Segments:
    """Which texts are the parts of which captions.

    Args:
        cache: with parts among its texts.
        captions: text rows that will be asked for.

    Attributes:
        rows: text rows of all their parts, sorted.

    Raises:
        MissingStream: the cache lacks parts of these captions; names the command that builds one with them.
    """

    def __init__(self, cache: FeatureCache, captions: Int[np.ndarray, " t"]) -> None:
        found = {row: segments(cache.texts[row]) for row in captions.tolist()}
        place = {name: row for row, name in enumerate(cache.text_ids)}
        lacking = [(r, p) for r, parts in found.items() for p in parts if prefixed(p) not in place]
        if lacking:
            row, part = lacking[0]
            raise MissingStream(
                f"{cache.place} lacks {len(lacking)} parts of these {len(found)} captions, the first: {part!r} of "
                f"{cache.texts[row]!r}; parts are there for captions of val and test in a cache built with them: "
                f"{command(cache, cache.streams)}"
            )
        self.parts = {row: [place[prefixed(p)] for p in parts] for row, parts in found.items()}
        self.rows = np.unique([p for parts in self.parts.values() for p in parts]).astype(np.int64)

    def take(self, texts: Callable[[np.ndarray], Taken], captions: Int[np.ndarray, " b"]) -> Taken:
        """Parts of captions (b, m, D), padded with zeros, and the mask (b, m), True where one is real.

        Args:
            texts: values of text rows.
            captions: text rows.
        """
        parts = [self.parts[row] for row in captions.tolist()]
        values, _ = texts(np.array([row for some in parts for row in some], dtype=np.int64))
        lengths = torch.tensor([len(some) for some in parts], dtype=torch.int64)
        mask = torch.arange(int(lengths.max()) if len(parts) else 0) < lengths[:, None]
        return padded(values, mask)


def padded(
    values: Float[Tensor, "total d"], mask: Bool[Tensor, "b m"]
) -> tuple[Float[Tensor, "b m d"], Bool[Tensor, "b m"]]:
    """Parts one after the other → a table of captions × parts, zero where there is none, and the mask beside it."""
    mask = mask.to(values.device)
    out = values.new_zeros(*mask.shape, values.shape[-1])
    out[mask] = values
    return out, mask


def has_segments(cache: FeatureCache) -> bool:
    """Was it built with parts of captions?"""
    return any(name.startswith(prefixed("")) for name in cache.text_ids)


def command(cache: FeatureCache, streams: Sequence[str]) -> str:
    """The command that builds the same cache with parts of captions, and these streams."""
    options = {**cache.header.options, "segments": "rules"}
    header = cache.header.model_copy(update={"options": options})
    return header.command(Path("NEW.zarr"), sorted(streams))
