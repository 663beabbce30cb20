"""How many images to encode at once: as many as an accelerator's memory takes, found by trying."""

import logging
from collections.abc import Collection

import torch
from PIL import Image
from torch.utils.data import default_collate

from cache_builder.backbones.base import Backbone

log = logging.getLogger(__name__)

MOST = 1024
"""More than this gains nothing on any accelerator, and a kill costs more."""

ON_A_CPU = 64
"""A CPU gains nothing from larger batches."""


HELD = 4
"""Batches whose streams a build holds at once: the one that is encoded, and those that wait to be stored."""


def fitting_batch_size(backbone: Backbone, blocks: Collection[int] = ()) -> int:
    """The largest power of two whose streams fit the accelerator's memory as often as a build holds them. On a CPU 64.

    Args:
        backbone: on its device.
        blocks: the states that are stored besides its own streams.

    Raises:
        torch.OutOfMemoryError: not even two images fit.
    """
    if torch.device(backbone.device).type == "cpu":
        return ON_A_CPU
    one = backbone.preprocess(Image.new("RGB", (640, 480), "gray"))
    size = MOST
    while size >= 1:
        pixels = default_collate([one] * size)
        asked = {"blocks": blocks} if blocks else {}
        try:
            with torch.inference_mode():
                held = [backbone.encode_images(pixels, **asked) for _ in range(HELD)]
            del held
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
            continue
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        break
    log.info("batches of %d: no more than that fit the memory of %s", size, backbone.device)
    return size
