"""What conformance suites share: how a broken promise is told, how near numbers must be, and what they are tried on."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

BATCH_TOLERANCE = 1e-5
"""Largest difference of an item alone and in a batch, float32, of values up to 1 (larger ones: times the largest):
matrix kernels are tiled by shape, so equality across batch sizes cannot be promised; measured 4e-6."""

EXACT = 0.0
"""Same rows, same batch, same operations: nothing may differ."""

CAPTIONS = ("a red mug", "A photo of two ancient buildings!", "!!", "ripe orange", "it")
"""Differing lengths, capitals, and "!!", whose ids look like CLIP's padding."""


class NonConformance(AssertionError):
    """A plugin breaks its contract."""


def must(holds: bool, otherwise: str) -> None:
    """`NonConformance` unless a promise holds."""
    if not holds:
        raise NonConformance(otherwise)


def near(name: str, got: Any, expected: Any, tolerance: float) -> dict[str, float]:
    """The largest difference, by name; `NonConformance` if it is above the tolerance."""
    must(got.shape == expected.shape, f"{name}: {tuple(got.shape)} against {tuple(expected.shape)}")
    difference = float((got.float() - expected.float()).abs().max())
    tolerance *= max(1.0, float(expected.float().abs().max()))
    must(difference <= tolerance, f"{name}: differs by {difference:.3g}, more than {tolerance:g}")
    return {name: difference}


def sample_pixels(backbone: Any) -> Any:
    """Three pictures of differing shapes through the backbone's own transform, stacked."""
    import torch
    from torch.utils.data import default_collate

    rng = np.random.default_rng(0)
    shapes = [(45, 61, 3), (80, 33, 3), (64, 64, 3)]
    images = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    pixels, again = (default_collate([backbone.preprocess(i) for i in images]) for _ in range(2))
    same = tensors(pixels).items()
    must(
        all(torch.equal(value, tensors(again)[name]) for name, value in same),
        "preprocess: two calls on one picture differ",
    )
    if "length" in backbone.encode_images(pixels):
        counts = [math.prod(backbone.grid(*image.size)) for image in images]
        real = backbone.encode_images(pixels)["length"].tolist()
        must(counts == real, f"grid: promises {counts} patches, encode_images gives {real}")
    return pixels


def tensors(pixels: Any) -> dict[str, Any]:
    """Pixels by name: of towers that keep shapes several tensors, else one without a name."""
    return dict(pixels) if isinstance(pixels, Mapping) else {"": pixels}
