"""What one epoch of a task goes through: which images, which captions, and what is true.

czsl           images × all train pairs; hard negatives share one primitive with the true pair
two_by_two     an example is an item (image_text) or one of its images (text, none)
matching       an example is an item
retrieval      an example is an image; one of its captions is drawn for every epoch
triplets       an example is an image with a modification; with `text`, the image's own caption is the hard negative
images         an example is an image, and so is its candidate
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Int

from heads.errors import ConfigError
from heads.tasks import (
    ComposedData,
    CompositionData,
    ImageData,
    MatchingData,
    RetrievalData,
    TaskData,
    TripletData,
)

Negatives = Literal["auto", "none", "text", "image_text"]
Captions = Callable[[np.random.Generator], Int[np.ndarray, "e t"]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one epoch goes through, in the order of the data.

    Attributes:
        images: image rows of each example, (E, 1) or (E, 2).
        texts: text row beside each example's image, of composed queries.
        captions: text rows of each example for one epoch, (E, T); T = 0 when all batches share their candidates.
        true: (image row, text row) of every true match, of composed queries (number of the example, text row); what is
            in here is never a negative. None where `target` says it all, or candidates are images.
        labels: of each example's image.
        target: column of each example, with shared candidates.
        pairs: (C, 2) labels of the shared candidates, and `prompts` (C,) their text rows.
        hard: (C, K) columns of the hard negatives of each shared candidate, -1 where there is none.

    """

    images: Int[np.ndarray, "e i"]
    captions: Captions
    text_rows: Int[np.ndarray, " t"]
    true: Int[np.ndarray, "m 2"] | None = None
    texts: Int[np.ndarray, " e"] | None = None
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    target: Int[np.ndarray, " e"] | None = None
    pairs: Int[np.ndarray, "c 2"] | None = None
    hard: Int[np.ndarray, "c k"] | None = None


def usual_negatives(data: TaskData) -> Negatives:
    """The hard negatives that examples of this kind bring."""
    if data.kind == "two_by_two":
        return "image_text"
    return "text" if data.kind == "matching" else "none"


def plan_of(data: TaskData, negatives: Negatives) -> Plan:
    """The plan of a task; `ConfigError` if its examples have no such hard negatives."""
    if isinstance(data, CompositionData):
        return _composition(data, negatives)
    if isinstance(data, MatchingData):
        return _matching(data, negatives)
    if isinstance(data, TripletData):
        return _triplets(data, negatives)
    if isinstance(data, ComposedData):
        raise ConfigError(
            "composed queries are scored, not trained on: heads of composed retrieval learn from triplets or images"
        )
    if isinstance(data, ImageData):
        if negatives != "none":
            raise ConfigError(f"pictures alone have no hard negatives; negatives is {negatives!r}")
        empty = np.empty(0, dtype=np.int64)
        return Plan(data.images[:, None], lambda _: empty[None], empty)
    if negatives != "none":
        raise ConfigError(f"retrieval data have no hard negatives; negatives is {negatives!r}")
    return _retrieval(data)


def _composition(data: CompositionData, negatives: Negatives) -> Plan:
    if negatives == "image_text":
        raise ConfigError(
            "negatives 'image_text' is for matching data with two images; czsl has 'none', 'text'"
        )
    none = np.empty((len(data.images), 0), dtype=np.int64)
    return Plan(
        images=data.images[:, None],
        captions=lambda _: none,
        text_rows=data.prompts,
        labels={"attr": data.attr, "obj": data.obj},
        target=data.target,
        pairs=data.pair_index,
        hard=_sharing_one(data.pair_index, with_any=negatives == "text"),
    )


def _sharing_one(pairs: Int[np.ndarray, "c 2"], *, with_any: bool) -> Int[np.ndarray, "c k"]:
    """Columns of the pairs that share exactly one primitive with each pair, padded with -1."""
    if not with_any:
        return np.empty((len(pairs), 0), dtype=np.int64)
    shared = (pairs[:, None] == pairs[None]).sum(-1) == 1
    out = np.full((len(pairs), max(1, shared.sum(1).max())), -1, dtype=np.int64)
    for row, columns in zip(out, shared, strict=True):
        found = np.flatnonzero(columns)
        row[: len(found)] = found
    return out


def _matching(data: MatchingData, negatives: Negatives) -> Plan:
    two = data.images.shape[1] == 2
    if negatives == "image_text" and not two:
        raise ConfigError(
            f"negatives 'image_text' needs two images an item, but the {data.split} items of {data.cache.place} have "
            "one; use 'text' or 'none'"
        )
    own = data.captions if two else data.captions[:, :1]
    true = np.stack([data.images.reshape(-1), own.reshape(-1)], axis=1)
    if negatives == "image_text":
        images, captions = data.images, data.captions
    else:
        # Every image is an example of its own: its caption, and the item's other caption as the negative.
        images = data.images.reshape(-1, 1)
        captions = np.concatenate([data.captions, data.captions[:, ::-1]], axis=1).reshape(-1, 2)
        captions = captions if two else data.captions
        captions = captions if negatives == "text" else captions[:, :1]
    return Plan(images, lambda _: captions, np.unique(data.captions), true)


def _triplets(data: TripletData, negatives: Negatives) -> Plan:
    if negatives == "image_text":
        raise ConfigError(
            "negatives 'image_text' is for matching data with two images; triplets have 'none', 'text'"
        )
    captions = data.targets[:, None]
    if negatives == "text":
        captions = np.stack([data.targets, data.references], axis=1)
    return Plan(
        images=data.images[:, None],
        captions=lambda _: captions,
        text_rows=np.unique(np.concatenate([captions.reshape(-1), data.modifications])),
        true=np.stack([np.arange(len(data)), data.targets], axis=1),
        texts=data.modifications,
    )


def _retrieval(data: RetrievalData) -> Plan:
    """An image without captions has no positive and is no training example."""
    captions = data.captions[data.matches[:, 1]]
    with_captions, start, count = np.unique(
        data.matches[:, 0], return_index=True, return_counts=True
    )

    def draw(rng: np.random.Generator) -> Int[np.ndarray, "e t"]:
        return captions[start + rng.integers(0, count)][:, None]

    true = np.stack([data.images[data.matches[:, 0]], captions], axis=1)
    return Plan(data.images[with_captions][:, None], draw, np.unique(captions), true)
