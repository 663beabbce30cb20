"""ROOM 1: pixels and strings → embeddings on disk.

`build` and `FeatureCache` are imported when first used: opening a cache costs numpy and zarr, building one also the
backbone's library.
"""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cache_builder.errors import UnknownName

if TYPE_CHECKING:
    from cache_builder.backbones.base import Backbone
    from cache_builder.build import build
    from cache_builder.cache import FeatureCache
    from cache_builder.datasets.base import Dataset

__all__ = ["FeatureCache", "build", "load_backbone", "load_dataset"]

ADDED = ("words", "negatives", "segments", "triplets")
"""Options of `load_dataset` that are no reader's own, in the order in which they add to a data set."""

LAZY = {"build": "cache_builder.build", "FeatureCache": "cache_builder.cache"}


def load_backbone(
    name: str, *, dtype: str = "float32", device: str = "cpu", compiled: bool = False
) -> "Backbone":
    """A frozen backbone by `family:checkpoint`, e.g. `clip:ViT-B-32/openai`.

    Args:
        name: the file of the family, and what it loads.
        dtype: it computes in it; float32, or bfloat16 or float16 by autocast.
        device: torch's name of it.
        compiled: run its blocks through torch.compile.

    Raises:
        UnknownName: no such family or device, or no checkpoint named.
    """
    from cache_builder.plugins import find, names

    family, colon, checkpoint = name.partition(":")
    if not (colon and checkpoint):
        known = ", ".join(names("cache_builder.backbones"))
        raise UnknownName(
            f"backbone {name!r} names no checkpoint; write family:checkpoint, for instance clip:ViT-B-32/openai "
            f"(families: {known})"
        )
    module = find("cache_builder.backbones", family)
    check_device(device)
    return module.load(checkpoint, dtype=dtype, device=device, compiled=compiled)


def load_dataset(name: str, root: str | Path | None = None, **options: Any) -> "Dataset":
    """A data set by its file's name, read from `root`, with the options its `load` takes.

    Besides, options of every data set, which add to what was read (`ADDED`): `words` where there is a czsl task, a file
    of auxiliary attributes or "vocabulary" (words.py); `negatives` where there are captions of train or val, "rules"
    (negatives.py); `segments` where there are captions, "rules" (segments.py); `triplets` where there are captions of
    train or val, "rules", or a file of triplets about its images (triplets.py).
    """
    from cache_builder.negatives import with_negatives
    from cache_builder.plugins import find
    from cache_builder.segments import with_segments
    from cache_builder.triplets import with_triplets
    from cache_builder.words import with_words

    own = {key: value for key, value in options.items() if key not in ADDED}
    dataset = find("cache_builder.datasets", name).load(root, **own)
    adding = (with_words, with_negatives, with_segments, with_triplets)
    for key, add in zip(ADDED, adding, strict=True):
        if key in options:
            dataset = add(dataset, str(options[key]))
    return replace(dataset, options=options)


def check_device(device: str) -> None:
    """Refuse a device that cannot be used here: `UnknownName`."""
    import torch

    try:
        torch.empty(1, device=device).cpu()  # a device without memory has nothing to store
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0][:200]
        raise UnknownName(
            f"device {device!r} cannot be used here: {reason}; cpu always can"
        ) from error


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(importlib.import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps `cache_builder.build` the function: importing the file build.py would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.build if name == "build" else value)


sys.modules[__name__].__class__ = _Package
