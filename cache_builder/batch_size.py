"""How many images to encode at once: as many as an accelerator's memory takes, found by trying."""

import logging
from collections.abc import Collection
from typing import Any

import torch
from PIL import Image
from torch.utils.data import default_collate

from cache_builder.backbones.base import Backbone
from cache_builder.beside import each
from cache_builder.encoders import PictureEncoder
from cache_builder.loading import AHEAD

log = logging.getLogger(__name__)

MOST = 1024
"""More than this gains nothing on any accelerator, and a kill costs more."""

ON_A_CPU = 64
"""A CPU gains nothing from larger batches."""

HELD = AHEAD + 2
"""Batches of which a build holds inputs and streams at once: those that wait to be stored, the one that is stored, and
the one that is encoded."""

BROUGHT = AHEAD + 1
"""Batches whose inputs the loader has brought to the accelerator before they are asked for."""


def fitting_batch_size(backbone: Backbone, streams: Collection[str]) -> int:
    """The largest power of two of which an accelerator's memory takes all that a build holds at once. On a CPU 64.

    Args:
        backbone: on its device.
        streams: what is stored: views bring inputs of their own, blocks more states.

    Raises:
        torch.OutOfMemoryError: not even single images fit.
    """
    if torch.device(backbone.device).type == "cpu":
        return ON_A_CPU
    pictures = [s for s in streams if s.startswith("image/")]
    encoder = PictureEncoder(pictures or ["image/pooled"], backbone)
    looks = encoder.looks(0, Image.new("RGB", (640, 480), "gray"))
    one = {home: backbone.preprocess(look) for home, look in looks.items()}
    size = MOST
    while True:
        try:
            _hold(encoder, default_collate([one] * size))
            break
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    log.info("batches of %d: no more than that fit the memory of %s", size, backbone.device)
    return size


def _hold(encoder: PictureEncoder, batch: Any) -> None:
    """Have as much on the accelerator as a build has."""
    device = encoder.backbone.device
    with torch.inference_mode():
        brought = [each(batch, lambda t: t.to(device, copy=True)) for _ in range(HELD + BROUGHT)]
        _ = [encoder.encode(inputs) for inputs in brought[:HELD]]
