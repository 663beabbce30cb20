"""What is encoded of a picture, by the home of the streams it fills: the picture itself, and its views."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from cache_builder.backbones.base import Backbone, Pixels
from cache_builder.errors import BadOutput
from cache_builder.format import Stream, stream
from cache_builder.views import VIEWS


class PictureEncoder:
    """The picture streams of a cache, under one backbone.

    Args:
        streams: of the cache.
        backbone: fills them.
    """

    def __init__(self, streams: Sequence[str], backbone: Backbone) -> None:
        self.backbone = backbone
        found = [one for one in map(stream, streams) if one.side == "image"]
        self._blocks: dict[str, list[int]] = defaultdict(list)
        for one in found:
            if one.block is not None:
                self._blocks[_home(one)].append(one.block)
        levels = [one for one in found if one.kind == "pixels"]
        self._levels = {_home(one) for one in levels}
        self._encoded = {_home(one) for one in found if one not in levels}
        self._views = sorted({one.view for one in found if one.view is not None})
        self._plain = any(one.view is None for one in found)

    def looks(self, row: int, image: Image) -> dict[str, Image]:
        """The picture by the home of its streams, `""` for those of the image itself."""
        shown = {f"view_{view}": VIEWS[view].apply(image) for view in self._views}
        return {"": image, **shown} if self._plain else shown

    def encode(self, inputs: Mapping[str, Pixels]) -> dict[str, Tensor]:
        """Preprocessed looks → streams, by their names without the side.

        The backbone runs only on looks of which more than the pixels is wanted.

        Raises:
            BadOutput: the library's own pixels do not come back from their levels, bit for bit.
        """
        out: dict[str, Tensor] = {}
        for home, pixels in inputs.items():
            streams: dict[str, Tensor] = {}
            if (
                home in self._levels
            ):  # first: its check waits for the device, which then has nothing else to do
                streams["pixels"] = self._levels_of(pixels)
            if home in self._encoded:
                asked = {"blocks": self._blocks[home]} if self._blocks[home] else {}
                streams |= self.backbone.encode_images(pixels, **asked)
            out |= {f"{home}/{k}" if home else k: v for k, v in streams.items()}
        return out

    def _levels_of(self, pixels: Pixels) -> Tensor:
        levels = self.backbone.levels(pixels)
        if not torch.equal(self.backbone.normalised(levels), pixels):
            spec = self.backbone.spec
            raise BadOutput(
                f"image/pixels: {spec.family}:{spec.checkpoint} prepares pictures in a way that 8-bit levels do not "
                f"give back bit for bit ({spec.preprocessing[:80]}): leave the stream out"
            )
        return levels


def _home(one: Stream) -> str:
    """What a look is called: `""` for the image itself, `view_<view>` for a view."""
    return one.key.rpartition("/")[0]
