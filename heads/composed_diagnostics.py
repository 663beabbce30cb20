"""Numbers that say what the parts of a composed head do: which experts edits use, and what a modulation moves.

    expert usage     shares (Q, K, E) of queries at K blocks  →  mean share of each expert, a row for each kind of edit
    modality gap     images (I, D), texts (T, D)              →  |μ_i - μ_t| / mean |t|,  |C_i - C_t|_F / |C_t|_F,
                                                                 cosines of images with the texts' mean direction, and
                                                                 of random pairs, counted in bins

Both gaps are divided by numbers of the texts alone, which no modulation of images moves (our choice): what changes
between before and after is then the images' doing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

BINS = 41
"""Bins of a cosine from -1 to 1: an odd number, so that one of them is centred on 0."""

EDGES = np.linspace(-1, 1, BINS + 1)

PAIRS = 10_000
"""Random pairs whose cosine is counted."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Mean shares of experts.

    Attributes:
        kinds: (G,) of edit, the last being all queries together.
        shares: (G, K, E) means at each block; a row sums to 1.
        counts: (G,) queries; one of several kinds counts in each.

    """

    kinds: tuple[str, ...]
    shares: Float[np.ndarray, "g k e"]
    counts: Int[np.ndarray, " g"]


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


ALL = "all queries"
NO_KIND = "no category"


def usage(
    shares: Float[np.ndarray, "q k e"], kinds: Sequence[str], categories: Sequence[Sequence[str]]
) -> Usage:
    """Mean shares of the queries of each kind, of those of none if there are other ones, and of all.

    Args:
        shares: of experts, by query and block.
        kinds: those present, in the order of the rows.
        categories: (Q,) kinds of each query.
    """
    rows = {kind: [i for i, named in enumerate(categories) if kind in named] for kind in kinds}
    without = [i for i, named in enumerate(categories) if not named]
    if kinds and without:
        rows[NO_KIND] = without
    rows[ALL] = list(range(len(shares)))
    means = np.stack([shares[some].mean(0, dtype=np.float64) for some in rows.values()])
    return Usage(tuple(rows), means, np.array([len(some) for some in rows.values()]))


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
