"""Numbers that say what a modulation of images moves.

    modality gap     images (I, D), texts (T, D)              →  |μ_i - μ_t| / mean |t|,  |C_i - C_t|_F / |C_t|_F,
                                                                 cosines of images with the texts' mean direction, and
                                                                 of random pairs, counted in bins

Both gaps are divided by numbers of the texts alone, which no modulation of images moves (our choice): what changes
between before and after is then the images' doing.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

BINS = 41
"""Bins of a cosine from -1 to 1: an odd number, so that one of them is centred on 0."""

EDGES = np.linspace(-1, 1, BINS + 1)

PAIRS = 10_000
"""Random pairs whose cosine is counted."""


@dataclass(frozen=True, slots=True)
class Gap:
    """How far images lie from texts.

    Attributes:
        mean: distance of the means, over the mean length of the texts.
        covariance: Frobenius distance of the covariances, over the norm of the texts'; NaN where texts have no spread.
        to_mean: (`BINS`,) images by their cosine with the mean direction of the texts.
        pairs: (`BINS`,) random pairs by their cosine.

    """

    mean: float
    covariance: float
    to_mean: Int[np.ndarray, " bins"]
    pairs: Int[np.ndarray, " bins"]


def random_pairs(n_images: int, n_texts: int, seed: int = 0) -> Int[np.ndarray, "p 2"]:
    """An image and a text each, drawn with replacement: the same for the same numbers and seed."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(n_images, size=PAIRS), rng.integers(n_texts, size=PAIRS)], 1)


def gap(
    images: Float[np.ndarray, "i d"], texts: Float[np.ndarray, "t d"], pairs: Int[np.ndarray, "p 2"]
) -> Gap:
    """How far the images lie from the texts.

    Args:
        images, texts: vectors of one space, of any length.
        pairs: image and text of those whose cosine is counted.
    """
    images, texts = images.astype(np.float64), texts.astype(np.float64)
    spread = _covariance(texts)
    size = float(np.linalg.norm(spread))
    unit_images, unit_texts = _unit(images), _unit(texts)
    direction = _unit(unit_texts.mean(0))
    cosines = (unit_images[pairs[:, 0]] * unit_texts[pairs[:, 1]]).sum(1)
    return Gap(
        mean=float(
            np.linalg.norm(images.mean(0) - texts.mean(0)) / np.linalg.norm(texts, axis=1).mean()
        ),
        covariance=float(np.linalg.norm(_covariance(images) - spread) / size) if size else np.nan,
        to_mean=_counted(unit_images @ direction),
        pairs=_counted(cosines),
    )


def _covariance(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "d d"]:
    """Divided by n, so that one row has one too."""
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)


def _unit(x: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _counted(cosines: Float[np.ndarray, " n"]) -> Int[np.ndarray, " bins"]:
    """In `EDGES`; rounding may carry a cosine past 1."""
    return np.histogram(cosines.clip(-1, 1), EDGES)[0]
