"""What is encoded of a picture, by the home of the streams it fills: the picture itself, and its views."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from PIL.Image import Image
from torch import Tensor

from cache_builder.backbones.base import Backbone, Pixels
from cache_builder.format import stream
from cache_builder.views import VIEWS


class PictureEncoder:
    """The picture streams of a cache, under one backbone.

    Args:
        streams: of the cache.
        backbone: fills them.
    """

    def __init__(self, streams: Sequence[str], backbone: Backbone) -> None:
        self.backbone = backbone
        found = [stream(s) for s in streams]
        self._blocks: dict[str, list[int]] = defaultdict(list)
        for one in found:
            if one.block is not None:
                self._blocks[one.key.rpartition("/")[0]].append(one.block)
        self._views = sorted({one.view for one in found if one.view is not None})
        self._plain = any(one.side == "image" and one.view is None for one in found)

    def looks(self, row: int, image: Image) -> dict[str, Image]:
        """The picture by the home of its streams, `""` for those of the image itself."""
        shown = {f"view_{view}": VIEWS[view].apply(image) for view in self._views}
        return {"": image, **shown} if self._plain else shown

    def encode(self, inputs: Mapping[str, Pixels]) -> dict[str, Tensor]:
        """Preprocessed looks → streams, by their names without the side."""
        out: dict[str, Tensor] = {}
        for home, pixels in inputs.items():
            asked = {"blocks": self._blocks[home]} if self._blocks[home] else {}
            streams = self.backbone.encode_images(pixels, **asked)
            out |= {f"{home}/{k}" if home else k: v for k, v in streams.items()}
        return out
