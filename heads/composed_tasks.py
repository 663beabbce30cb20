"""Composed retrieval as row numbers of a cache: what is asked, and what heads that answer it learn from.

    composed    reference image + modification → images of a gallery       scored, never trained on
    triplets    image + modification → caption of the edited picture       text-anchored: no second picture is needed
    images      the pictures of a split, whatever task they belong to      inversion from pictures alone

Row numbers are of one cache, as in tasks.py.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int

from cache_builder import FeatureCache
from cache_builder.datasets.base import ComposedExample, TripletExample
from eval.composed_queries import PROTOCOLS, ComposedQueries
from eval.errors import ScoreTableError
from heads.errors import TaskError
from heads.overlap import images_of
from heads.task_examples import of_split, usable

COSINES = (0.5, 0.98)
"""Cosine of reference and target caption of a triplet worth training on: related, and not the same (our choice)."""


@dataclass(frozen=True, slots=True)
class ComposedData:
    """Queries of a split, and the images that they are asked of.

    Attributes:
        queries: what is asked, by id, as `eval` takes it.
        references: (Q,) image rows.
        modifications: (Q, M) text rows, -1 after the last; several say the same in other words.
        image_ids, images: every image that some query ranks, and their rows; ties are broken in this order.
        columns: (Q,) the columns that compete in each query.
        own_columns: has each query a few candidates of its own, and no gallery?
        dropped: queries left out because an image of theirs is quarantined, and such images of galleries.

    """

    kind: ClassVar = "composed"
    cache: FeatureCache
    split: str
    queries: ComposedQueries
    references: Int[np.ndarray, " q"]
    modifications: Int[np.ndarray, "q m"]
    image_ids: tuple[str, ...]
    images: Int[np.ndarray, " c"]
    columns: tuple[Int[np.ndarray, " _"], ...]
    own_columns: bool
    dropped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.references)


@dataclass(frozen=True, slots=True)
class TripletData:
    """Text-anchored triplets of a split.

    Attributes:
        images: (n,) image rows of the references.
        modifications, targets, references: (n,) text rows: of the edit, of the caption of the edited picture, and of
            the reference's own.
        category: kind of edit, "" where nobody said.
        filtered: left out for the cosine of their two captions (`COSINES`), by reason.
        dropped: left out because their image is quarantined.

    """

    kind: ClassVar = "triplets"
    cache: FeatureCache
    split: str
    ids: tuple[str, ...]
    images: Int[np.ndarray, " n"]
    modifications: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"]
    references: Int[np.ndarray, " n"]
    category: tuple[str, ...]
    filtered: dict[str, int]
    dropped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of triplets."""
        return len(self.images)


@dataclass(frozen=True, slots=True)
class ImageData:
    """Pictures of a split, each once."""

    kind: ClassVar = "images"
    cache: FeatureCache
    split: str
    images: Int[np.ndarray, " n"]
    dropped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.images)


def composed(cache: FeatureCache, split: str, allow_missing: bool) -> ComposedData:
    """Queries of a split that can be ranked.

    Raises:
        TaskError: quarantined images that are not allowed; names what `ComposedQueries` refuses.
    """
    tasks = cache.tasks
    asked: list[ComposedExample] = of_split(cache, "composed", split)
    named = ((e.id, e, e.images) for e in asked)
    kept, dropped = usable(cache, named, allow_missing)
    bad = cache.quarantined
    galleries = {
        name: tuple(i for i in gallery.images if i not in bad)
        for name, gallery in tasks.galleries.items()
        if any(e.gallery == name for e in kept)
    }
    lost = sorted({i for name in galleries for i in tasks.galleries[name].images if i in bad})
    if lost and not allow_missing:
        raise TaskError(
            f"{len(lost)} images of the gallery are quarantined in {cache.place}; repair the files "
            "and build again, or rank without them with allow_missing=True (--allow-missing), "
            "which marks it partial"
        )
    lists = galleries | {f"own {e.id}": e.subset for e in kept if not e.gallery}
    ids = tuple(dict.fromkeys(i for listed in lists.values() for i in listed))
    place = {name: i for i, name in enumerate(ids)}
    of_list = {key: np.array([place[i] for i in listed]) for key, listed in lists.items()}
    columns = [of_list[e.gallery or f"own {e.id}"] for e in kept]
    for k, e in enumerate(kept):
        if not (e.gallery and tasks.galleries[e.gallery].with_reference):
            columns[k] = columns[k][columns[k] != place.get(e.reference, -1)]
    name = cache.spec.dataset.name
    try:
        queries = ComposedQueries(
            ids=tuple(e.id for e in kept),
            reference=tuple(e.reference for e in kept),
            targets=tuple(e.targets for e in kept),
            protocol=name if name in PROTOCOLS else "own",
            split=split,
            gallery=tuple(e.gallery for e in kept),
            categories=tuple(e.categories for e in kept),
            subset=tuple(e.subset for e in kept),
        )
    except ScoreTableError as error:
        raise TaskError(f"{cache.place} cannot be asked its composed queries: {error}") from error
    said = [cache.rows("text", list(e.modifications)) for e in kept]
    most = max(map(len, said))
    return ComposedData(
        cache=cache,
        split=split,
        queries=queries,
        references=cache.rows("image", [e.reference for e in kept]),
        modifications=np.stack([np.pad(r, (0, most - len(r)), constant_values=-1) for r in said]),
        image_ids=ids,
        images=cache.rows("image", list(ids)),
        columns=tuple(columns),
        own_columns=not galleries,
        dropped=(*dropped, *lost),
    )


def triplets(cache: FeatureCache, split: str, allow_missing: bool) -> TripletData:
    """Triplets of a split that are worth training on.

    Raises:
        TaskError: there are none, or none is left.
    """
    if not cache.tasks.triplets:
        raise TaskError(
            f"{cache.place} holds no triplets; build a cache with them: headstart build … --set triplets=rules (from "
            "captions), or --set triplets=FILE"
        )
    listed: list[TripletExample] = of_split(cache, "triplets", split)
    kept, dropped = usable(cache, ((e.id, e, (e.image,)) for e in listed), allow_missing)
    targets = cache.rows("text", [e.target for e in kept])
    references = cache.rows("text", [e.reference for e in kept])
    cosine = _cosines(cache, references, targets)
    low, high = COSINES
    fits = (cosine >= low) & (cosine <= high)
    if not fits.any():
        raise TaskError(
            f"of {len(kept)} {split} triplets in {cache.place} none has captions whose cosine lies in [{low}, {high}]; "
            f"they lie in [{cosine.min():.3f}, {cosine.max():.3f}]"
        )
    chosen = np.flatnonzero(fits)
    return TripletData(
        cache=cache,
        split=split,
        ids=tuple(kept[i].id for i in chosen),
        images=cache.rows("image", [kept[i].image for i in chosen]),
        modifications=cache.rows("text", [kept[i].modification for i in chosen]),
        targets=targets[chosen],
        references=references[chosen],
        category=tuple(kept[i].category for i in chosen),
        filtered={
            f"captions unrelated (cosine below {low})": int((cosine < low).sum()),
            f"captions alike (cosine above {high})": int((cosine > high).sum()),
        },
        dropped=dropped,
    )


def images(cache: FeatureCache, split: str) -> ImageData:
    """Every usable picture that an example of the split shows, of whatever task.

    Raises:
        TaskError: there is none.
    """
    ids = images_of(cache.tasks, "images", split)
    bad = cache.quarantined
    kept = [i for i in ids if i not in bad]
    if not kept:
        raise TaskError(f"{cache.place} has no usable picture in a split {split!r}")
    lost = tuple(i for i in ids if i in bad)
    return ImageData(cache, split, cache.rows("image", kept), lost)


def _cosines(
    cache: FeatureCache, a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Of the pooled embeddings of texts, pair by pair."""
    rows, inverse = np.unique(np.concatenate([a, b]), return_inverse=True)
    values = torch.from_numpy(cache.read("text/pooled", rows)).float()
    unit = torch.nn.functional.normalize(values, dim=-1).numpy()
    return (unit[inverse[: len(a)]] * unit[inverse[len(a) :]]).sum(-1)
