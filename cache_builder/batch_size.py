"""How many images to encode at once: as many as an accelerator's memory takes, found by trying."""

import logging

import torch
from PIL import Image
from torch.utils.data import default_collate

from cache_builder.backbones.base import Backbone

log = logging.getLogger(__name__)

MOST = 1024
"""More than this gains nothing on any accelerator, and a kill costs more."""

ON_A_CPU = 64
"""A CPU gains nothing from larger batches."""


def fitting_batch_size(backbone: Backbone) -> int:
    """Half of the largest power of two whose forward pass fits the accelerator's memory; the log says which, and why.

    Half, because a build holds the next batch and the last one's streams beside the one that is encoded. On a CPU 64.

    Raises:
        torch.OutOfMemoryError: not even two images fit.
    """
    if torch.device(backbone.device).type == "cpu":
        return ON_A_CPU
    one = backbone.preprocess(Image.new("RGB", (640, 480), "gray"))
    size = MOST
    while size >= 1:
        pixels = default_collate([one] * 2 * size)
        try:
            with torch.inference_mode():
                backbone.encode_images(pixels)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
            continue
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        break
    log.info("batches of %d: twice as many images fit the memory of %s", size, backbone.device)
    return size
