"""What the tokens of a checkpoint are and cost, from its architecture alone: no weights, no network. No family itself.

    open_clip name or directory       its model, built on torch's `meta` device, which holds shapes and no numbers
    transformers name or directory    its config.json, there or in the hub's cache; else what the family's file says

A family whose file has `PUBLISHED`, names of checkpoints, and `card(name) -> Card` gets a table in
`headstart list backbones`; the handles a family must have are in base.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIP, CustomTextCLIP

from cache_builder.backbones.checkpoints import architecture
from cache_builder.errors import UnknownName
from cache_builder.format import is_ragged, row_shape
from cache_builder.spec import with_depth
from cache_builder.storage import MODES

VALUE_BYTES = np.dtype(MODES["fp16"].dtype).itemsize
"""Of a stored value, as `headstart build` stores it unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Card:
    """Shapes of a checkpoint.

    Attributes:
        dims: what `load` would put into `BackboneSpec.dims`.
        depth: side → blocks, as `Backbone.depth`.
    """

    dims: Mapping[str, int]
    depth: Mapping[str, int]

    @property
    def image_bytes(self) -> int:
        """Patches and prefix rows of one image, in bytes; of the largest image, where they keep their shape."""
        values = 0
        for name in ("image/patches", "image/prefix"):
            entries = self.dims["most_patches"] if is_ragged(name, self.dims) else 1
            values += entries * math.prod(row_shape(name, self.dims))
        return values * VALUE_BYTES

    def columns(self) -> dict[str, str]:
        """Title → text of the columns of the table."""
        dims, n = self.dims, self.image_bytes
        most = "≤ " if is_ragged("image/patches", dims) else ""
        patches = dims["most_patches"] if most else dims["patches"]
        text = f"{dims['context']} × {dims['text_width']}" if "context" in dims else "–"
        return {
            "px": str(dims.get("image_size", "any")),
            "N × W": f"{most}{patches} × {dims['image_width']}",
            "prefix": str(dims["prefix"]),
            "D": str(dims.get("joint", "–")),
            "L × V": text,
            "blocks": "/".join(map(str, self.depth.values())),
            "KiB": f"{most}{n / 2**10:.0f}",
            "GiB/100k": f"{most}{100_000 * n / 2**30:.1f}",
        }


def skeleton(checkpoint: str, family: str) -> Any:
    """The open_clip model that `checkpoint` names, without weights, on torch's `meta` device.

    Raises:
        UnknownName: it names neither an architecture nor a directory of open_clip's.
    """
    config = architecture(checkpoint)
    if config is None:
        raise UnknownName(f"{family}:{checkpoint} names no architecture of open_clip's")
    model_class = CustomTextCLIP if config.get("custom_text") else CLIP
    # Not through `create_model`, which warns that it was given no weights.
    with torch.device("meta"):
        return model_class(**{k: v for k, v in config.items() if k != "custom_text"})


def open_clip_card(model: Any, image: Any) -> Card:
    """The card of a model as `skeleton` makes it, and of the family's image tower over it."""
    text = getattr(model, "text", model)
    width, context = text.ln_final.normalized_shape[0], int(text.context_length)
    depth = {"image": len(image.blocks), "text": len(text.transformer.resblocks)}
    dims = {**image.dims, "text_width": width, "context": context}
    return Card(with_depth(dims, depth), depth)


def hub_folder(checkpoint: str) -> Path | None:
    """The folder on this machine that holds a checkpoint's config.json in transformers' format, if there is one."""
    from huggingface_hub import try_to_load_from_cache

    from cache_builder.backbones.hub_files import is_hub_directory, looks_like_a_hub_name

    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return path if is_hub_directory(path) else None
    if not looks_like_a_hub_name(checkpoint):
        return None
    found = try_to_load_from_cache(checkpoint, "config.json")
    return Path(found).parent if isinstance(found, str) else None
