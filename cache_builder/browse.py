"""What `headstart browse` asks of caches: the images nearest to an image or a text, and where a patch has its like.

    image/pooled (n, D)    unit rows · one of them, or a text/pooled    ─▶  the k nearest images, per backbone
    image/patches (N, W)   unit rows · the patch that was pointed at    ─▶  a map over the picture's grid

Cosines are of what is stored: pooled embeddings, and raw patch tokens without the prefix tokens. Nothing is trained,
scored or written. numpy only; pixels are in browse_pictures.py. Letters: n images looked at, k nearest, `p q` rows and
columns of a grid.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from cache_builder.browse_samples import Samples
from cache_builder.cache import FeatureCache
from cache_builder.errors import UnknownName
from cache_builder.storage import pooled_patches

BLOCK = 64
"""Pictures whose patches are held at once while their means are taken."""

PATCHES, POOLED, TEXTS = "image/patches", "image/pooled", "text/pooled"


@dataclass(frozen=True, slots=True)
class Space:
    """The images looked at, as one backbone sees them.

    Attributes:
        name: of the backbone; with the place of the cache where several are of one backbone.
        cache: what it is read from.
        rows: of the images in it.
        images: unit vectors; None where the cache holds nothing to compare images by.
        of: what they are of, in words.
        lacks: what this cache cannot answer, as sentences.
    """

    name: str
    cache: FeatureCache
    rows: Int[np.ndarray, " n"]
    images: Float[np.ndarray, "n d"] | None
    of: str
    lacks: tuple[str, ...]

    @property
    def is_joint(self) -> bool:
        """Can a cached text be compared with its images?"""
        return {POOLED, TEXTS} <= {*self.cache.streams}

    @property
    def has_patches(self) -> bool:
        """Can its patches be compared?"""
        return PATCHES in self.cache.streams


@dataclass(frozen=True, slots=True)
class Grid:
    """How the patches of a picture lie, row by row.

    Attributes:
        ys, xs: borders of the grid's rows and columns, from 0 to 1 over what the backbone sees of the picture.
    """

    ys: Float[np.ndarray, " p1"]
    xs: Float[np.ndarray, " q1"]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.ys) - 1, len(self.xs) - 1

    def patch_at(self, x: float, y: float) -> int | None:
        """The patch at a point; None where it is outside."""
        if not (0 <= x <= 1 and 0 <= y <= 1):
            return None
        row, column = (
            min(int(np.searchsorted(borders, at, side="right")), len(borders) - 1) - 1
            for borders, at in ((self.ys, y), (self.xs, x))
        )
        return row * self.shape[1] + column


def uses_means(cache: FeatureCache) -> bool:
    """Are its images compared by the means of their patches, as it holds no pooled embeddings?"""
    return POOLED not in cache.streams and PATCHES in cache.streams


def spaces_of(caches: Sequence[FeatureCache], samples: Samples) -> list[Space]:
    """The images under each cache's backbone; embeddings are read once, patches as they are asked for."""
    plain = [_name(cache) for cache in caches]
    names = [
        f"{name} ({cache.place})" if plain.count(name) > 1 else name
        for name, cache in zip(plain, caches, strict=True)
    ]
    return [_space(name, cache, samples) for name, cache in zip(names, caches, strict=True)]


def _name(cache: FeatureCache) -> str:
    backbone = cache.spec.backbone
    return f"{backbone.family}:{backbone.checkpoint}"


def _space(name: str, cache: FeatureCache, samples: Samples) -> Space:
    rows = cache.rows("image", samples.ids)
    images, of = None, ""
    lacks: list[str] = []
    if POOLED in cache.streams:
        images, of = unit(cache.read(POOLED, rows).astype(np.float32)), "pooled embeddings"
    elif uses_means(cache):
        images, of = unit(_means(cache, rows, name)), "means of raw patch tokens"
        lacks.append(
            "no pooled embeddings: images are compared by the means of their raw patch tokens"
        )
    else:
        lacks.append("neither pooled embeddings nor patches: no neighbours")
    if POOLED not in cache.streams or TEXTS not in cache.streams:
        lacks.append("no joint space of images and texts in this cache: texts find no images")
    if PATCHES not in cache.streams:
        lacks.append("no patches: no map of similar patches")
    return Space(name, cache, rows, images, of, tuple(lacks))


def _means(cache: FeatureCache, rows: Int[np.ndarray, " n"], name: str) -> Float[np.ndarray, "n w"]:
    """Mean patch of every image, a block of pictures at a time."""
    width = cache.layout(PATCHES).shape[-1]
    found = np.empty((len(rows), width), np.float32)
    for start in tqdm(range(0, len(rows), BLOCK), desc=f"means of patches, {name}", unit="block"):
        part = rows[start : start + BLOCK]
        if cache.is_ragged(PATCHES):
            values, bounds = cache.read_ragged(PATCHES, part)
            tokens = values.astype(np.float32)
            found[start : start + BLOCK] = [tokens[a:b].mean(0) for a, b in pairwise(bounds)]
        else:
            found[start : start + BLOCK] = cache.read(PATCHES, part).astype(np.float32).mean(1)
    return found


def unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows of length 1; a row of zeros, which has no direction, stays one."""
    scaled = vectors / np.maximum(np.abs(vectors).max(-1, keepdims=True, initial=0), 1e-30)
    length = np.linalg.norm(scaled, axis=-1, keepdims=True)
    return (scaled / np.where(length > 0, length, 1)).astype(np.float32)


def nearest(
    images: Float[np.ndarray, "n d"],
    query: Float[np.ndarray, " d"],
    k: int,
    *,
    without: int | None = None,
) -> list[tuple[int, float]]:
    """The k images of the largest cosine, best first, as (place among the images, cosine); ties by place.

    Args:
        images, query: of length 1.
        k: at most.
        without: an image that is left out, as a picture is its own nearest.
    """
    cosines = images @ query
    order = np.argsort(-cosines, kind="stable")
    kept = [int(i) for i in order[: k + 1] if i != without][:k]
    return [(i, float(cosines[i])) for i in kept]


def nearest_to_image(space: Space, image: int, k: int) -> list[tuple[int, float]]:
    """The k images nearest to one of them; none where the cache has nothing to compare them by."""
    if space.images is None:
        return []
    return nearest(space.images, space.images[image], k, without=image)


def nearest_to_text(space: Space, text_id: str, k: int) -> list[tuple[int, float]]:
    """The k images nearest to a cached text; none without a joint space."""
    if not space.is_joint or space.images is None:
        return []
    row = space.cache.rows("text", [text_id])
    return nearest(space.images, unit(space.cache.read(TEXTS, row).astype(np.float32))[0], k)


def grid_of(cache: FeatureCache, row: int) -> Grid:
    """How the patches of an image lie.

    Raises:
        UnknownName: the cache has no patches, or as many as no square grid has.
    """
    if cache.is_ragged(PATCHES):
        p, q = (int(n) for n in cache.grid()[row])
        return Grid(_even(p), _even(q))
    n = cache.layout(PATCHES).shape[1]
    side = math.isqrt(n)
    if side * side != n:
        raise UnknownName(
            f"{cache.place} holds {n} patches an image, which make no square grid: there is no map"
        )
    borders = _even(side)
    if cache.spec.storage == "pool2x2" and n == pooled_patches(cache.spec.backbone.dims):
        whole = math.isqrt(cache.spec.backbone.dims["patches"])
        # a last odd row or column was averaged alone: half as wide as the others
        borders = np.minimum(np.arange(side + 1) * 2, whole) / whole
    return Grid(borders, borders)


def _even(n: int) -> Float[np.ndarray, " n1"]:
    return np.arange(n + 1) / n


def patches_of(cache: FeatureCache, row: int) -> Float[np.ndarray, "n w"]:
    """Raw patch tokens of an image, as unit vectors."""
    at = np.array([row])
    tokens = (
        cache.read_ragged(PATCHES, at)[0]
        if cache.is_ragged(PATCHES)
        else cache.read(PATCHES, at)[0]
    )
    return unit(tokens.astype(np.float32))


def patch_map(
    cache: FeatureCache, row: int, patch: int, other: int | None = None
) -> Float[np.ndarray, "p q"]:
    """Cosine of one patch of an image with every patch of it, or of another image, in its grid.

    Args:
        cache: with patches.
        row: of the image that the patch is of.
        patch: its place in the grid, row by row.
        other: row of another image, whose patches it is compared with.
    """
    query = patches_of(cache, row)[patch]
    shown = row if other is None else other
    cosines = patches_of(cache, shown) @ query
    return np.clip(cosines, -1, 1).reshape(grid_of(cache, shown).shape)


def says_of(samples: Samples, image: int) -> Mapping[str, str]:
    """What people may want to read of an image: its id, split and labels."""
    name = samples.ids[image]
    return {
        "id": name,
        "split": ", ".join(samples.splits.get(name, ())),
        "says": " · ".join(samples.says.get(name, ())),
    }
