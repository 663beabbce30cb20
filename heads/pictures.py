"""Where each word of a caption looks in an image: the files `RUN/pictures/*.npz` that the report draws.

Any method that has a function `attention(head, queries, candidates) -> (B, L, N)` can be pictured. Items are the first
of every category of the split, so nobody chooses the pretty ones.
"""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps

from cache_builder import FeatureCache
from cache_builder.datasets.base import Dataset
from heads import checkpoint
from heads.base import Head
from heads.errors import ConfigError
from heads.score import source_of
from heads.tasks import CompositionData, RetrievalData, TaskData, load_task

LARGEST = 224
"""Pixels of the longer side of a stored picture."""

SPECIAL = re.compile(r"<[^<>]+>")
"""Start, end and padding: tokens that are no words."""

RESIZE_MODE = re.compile(r'"resize_mode": "(\w+)"')
"""Within a cache's `preprocessing`: open_clip's word for how a picture becomes a square."""


def save_attention(
    run: str | Path,
    cache: FeatureCache,
    dataset: Dataset,
    *,
    task: str,
    split: str = "test",
    n: int = 6,
) -> list[Path]:
    """Write up to `n` pictures of a trained run.

    Args:
        run: directory of the run.
        cache: features of the images, of the run's backbone.
        dataset: the same samples, for their pixels.
        task, split: where the items come from.
        n: pictures at most.

    Raises:
        ConfigError: the method has no attention to show, or pictures keep their shape: there is no square to draw.
    """
    if cache.is_ragged("image/patches"):
        raise ConfigError(
            f"{cache.place} holds pictures in their own shapes ({cache.spec.backbone.checkpoint}); attention is drawn "
            "on square grids of patches only"
        )
    head = checkpoint.load(run)
    attention = _attention_of(head)
    data = load_task(cache, task, split, allow_missing=True)
    source = source_of(head, data)
    pieces = cache.vocabulary()
    pixels = {record.id: record for record in dataset.images}
    folder = Path(run) / "pictures"
    folder.mkdir(exist_ok=True)
    paths = []
    for name, image, text in _items(data)[:n]:
        queries, candidates = source.images(image[None]), source.texts(text[None])
        with torch.no_grad():
            weights = attention(head, queries, candidates)[0].float().numpy()
            score = float(head.paired(queries, candidates)[0])
        ids, _ = cache.read_ragged("text/ids", text[None])
        words = [pieces[i] for i in ids]
        kept = [i for i, word in enumerate(words) if not SPECIAL.fullmatch(word)]
        side = math.isqrt(weights.shape[-1])
        picture = pixels[cache.image_ids[int(image)]].open()
        path = folder / f"{len(paths):02d}-{name}.npz"
        np.savez(
            path,
            image=_square(picture, cache.spec.backbone.preprocessing),
            words=np.array([words[i] for i in kept]),
            weights=weights[kept].reshape(len(kept), side, side),
            caption=np.array(cache.texts[int(text)]),
            score=np.array(score),
        )
        paths.append(path)
    return paths


def _attention_of(head: Head) -> Callable[..., torch.Tensor]:
    method = sys.modules[type(head).__module__]
    if not hasattr(method, "attention"):
        raise ConfigError(f"{checkpoint.method_name(head)} has no attention to show; tf_local has")
    return method.attention


def _items(data: TaskData) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, image row, text row) of the first item of every category, its own caption with its own image."""
    if isinstance(data, CompositionData):
        kinds = [data.pairs[t] for t in data.target]
        rows = [(data.images[i], data.prompts[data.target[i]]) for i in range(len(data))]
        names = ["-".join(pair) for pair in kinds]
    elif isinstance(data, RetrievalData):
        names = [f"{i:04d}" for i in range(len(data.matches))]
        rows = [(data.images[i], data.captions[t]) for i, t in data.matches]
    else:
        names = list(data.category)
        rows = [(data.images[i, 0], data.captions[i, 0]) for i in range(len(data))]
    first = dict(reversed(list(zip(names, rows, strict=True))))
    order = sorted(first, key=names.index)
    return [
        (re.sub(r"\W+", "_", name), np.asarray(first[name][0]), np.asarray(first[name][1]))
        for name in order
    ]


def _square(picture: Image.Image, preprocessing: str) -> UInt8[np.ndarray, "s s 3"]:
    """What the patch grid covers: the centre square, all of it padded, or (also by default) all of it squashed."""
    found = RESIZE_MODE.search(preprocessing)
    mode = found[1] if found else _mode_of_a_processor(preprocessing)
    side = min(*picture.size, LARGEST)
    shapes = {"shortest": ImageOps.fit, "longest": ImageOps.pad}
    return np.asarray(shapes.get(mode, Image.Image.resize)(picture.convert("RGB"), (side, side)))


def _mode_of_a_processor(preprocessing: str) -> str:
    """The same word for a transformers image processor."""
    if '"do_pad": true' in preprocessing:
        return "longest"
    return "shortest" if '"do_center_crop": true' in preprocessing else "squash"
