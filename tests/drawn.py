"""A small drawn data set with every task, and its cache under the tiny CLIP: what heads are tested on."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cache_builder import FeatureCache, build
from cache_builder.backbones import clip
from cache_builder.datasets.base import (
    CompositionExample,
    CompositionTask,
    Dataset,
    ImageRecord,
    MatchingExample,
    RetrievalExample,
    Tasks,
    TextRecord,
)
from cache_builder.plugins import find

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

PAIRS = tuple(product(("blue", "green", "red"), ("bag", "cup", "fan", "hat", "toy")))
"""3 attrs × 5 objs; the first eleven occur in training."""
N_IMAGES = {"train": 37, "val": 13, "test": 13}
N_ITEMS = {"train": 7, "val": 3, "test": 5}


def make_drawn(path: Path, broken: tuple[str, ...] = (), **options: Any) -> FeatureCache:
    """The cache of `drawn(broken)`; patches lie in several chunks. Options go to `build`."""
    return build(
        drawn(broken), clip.tiny(), path, **{"progress": False, "chunk_bytes": 20_000, **options}
    )


LIVE_FAMILIES = ("clip", "siglip2", "pe")
"""Families whose text tower heads can run."""


def make_live(folder: Path, family: str) -> FeatureCache:
    """The cache of `drawn()` under a family's miniature, whose files stay, so that heads can run its text tower."""
    files = folder / f"{family}-files"
    backbone = find("cache_builder.backbones", family).tiny(files)
    named = {"backbone_name": f"{family}:{files}", "progress": False}
    return build(drawn(), backbone, folder / f"{family}.zarr", **named)


def drawn(broken: tuple[str, ...] = ()) -> Dataset:
    """Noise pictures with all kinds of tasks; the files of `broken` images cannot be decoded."""

    def record(seed: int, name: str) -> ImageRecord:
        def draw() -> Image.Image:
            if name in broken:
                raise OSError("truncated file")
            pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            return Image.fromarray(pixels)

        return ImageRecord(name, draw)

    names = {split: [f"{split}{i}" for i in range(n)] for split, n in N_IMAGES.items()}
    texts = {f"prompt {a} {o}": f"a photo of {a} {o}" for a, o in PAIRS}
    examples: list[CompositionExample] = []
    matching: list[MatchingExample] = []
    two_by_two: list[MatchingExample] = []
    retrieval: list[RetrievalExample] = []
    for split, images in names.items():
        known = PAIRS[:11] if split == "train" else PAIRS[:13]
        for i, image in enumerate(images):
            examples.append(CompositionExample(image, *known[i % len(known)], split))
        for k in range(N_ITEMS[split]):
            one, two = f"{split} caption {k} one", f"{split} caption {k} two"
            texts |= {one: f"{split} cup {k} on a hat", two: f"{split} hat number {k} on a red cup"}
            texts |= {f"{split} echo {k}": "the same words", "shared": "one caption of them all"}
            pair = (images[2 * k], images[2 * k + 1])
            kind = ("swap", "add")[k % 2]
            two_by_two.append(MatchingExample(f"{split} {k}", pair, (one, two), kind, split))
            matching.append(MatchingExample(f"{split} {k}", pair[:1], (one, two), kind, split))
            captions = (one, f"{split} echo {k}", "shared")
            retrieval.append(RetrievalExample(images[k], captions, split))
    return Dataset(
        name="drawn",
        images=tuple(record(i, n) for i, n in enumerate(n for s in names.values() for n in s)),
        texts=tuple(TextRecord(key, text) for key, text in texts.items()),
        tasks=Tasks(
            czsl=CompositionTask(
                examples=tuple(examples),
                pairs={"train": PAIRS[:11], "val": PAIRS[:13], "test": PAIRS[:13]},
                prompts={(a, o): f"prompt {a} {o}" for a, o in PAIRS},
            ),
            matching=tuple(matching),
            two_by_two=tuple(two_by_two),
            retrieval=tuple(retrieval),
        ),
        decode="drawn with numpy",
    )
