"""What a head shows of itself on pictures of a data set: the files `RUN/pictures/*.npz` that the report draws.

Any head with `maps` (heads/maps.py) or, of czsl, with `routing` (heads/routing.py) can be pictured. Items are the first
of every category of the split, so nobody chooses the pretty ones, and each says whether the head got it right. Of czsl
the text shown is the pair predicted.

    00-red_cup.npz   image, words (names of the maps), weights, caption, score, says, verdict, right
    strip.npz        strip, words, says: what is the same for every picture; only where the head has it
    routing.npz      kinds, counts, shares (kinds, blocks, experts), …: only where a router mixes experts

All say their `task` and `split` too, and all are of one call: what an earlier one wrote is removed.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps

from cache_builder import FeatureCache, plugins
from cache_builder.covered import resize_mode
from cache_builder.datasets.base import Dataset
from eval.composition import CompositionScores
from heads import checkpoint, load_method
from heads.base import Head
from heads.errors import ConfigError
from heads.features import Features
from heads.maps import Mapped, Maps
from heads.routing import by_attribute
from heads.score import score, source_of
from heads.source import Source
from heads.tasks import CompositionData, MatchingData, RetrievalData, TaskData, load_task

LARGEST = 224
"""Pixels of the longer side of a stored picture."""

WRITTEN = re.compile(r"(\d{2,}-\w*|query-\d{2,}(-\w*)?|strip|routing|modality)\.npz")
"""Names of the files of a call, those of `heads/composed_pictures.py` too."""

SPECIAL = re.compile(r"<[^<>]+>")
"""Start, end and padding: tokens that are no words."""


@dataclass(frozen=True, slots=True)
class Item:
    """An image with the text it is shown with.

    Attributes:
        name: of its category.
        image, text: rows of the cache.
        score: of the two.
        labels: attr and obj of the text, of czsl; else empty.
        verdict: what the head made of it, in words; empty where that is not known.
        right: did it get it right?

    """

    name: str
    image: int
    text: int
    score: float
    labels: Mapping[str, int] = field(default_factory=dict)
    verdict: str = ""
    right: bool = False


def has_pictures(method: str, task: str) -> bool:
    """Has a method maps, or experts by attribute?"""
    head = load_method(method).Head
    return hasattr(head, "maps") or (task == "czsl" and hasattr(head, "routing"))


def check_has_pictures(method: str, task: str) -> None:
    """Refuse a method that has nothing to draw.

    Raises:
        ConfigError: names those that have.
    """
    if not has_pictures(method, task):
        raise ConfigError(
            f"{method} has no maps to draw (no method `maps`, see heads/maps.py); these have: "
            f"{', '.join(_with_maps())}; and eva has experts, of czsl"
        )


def save_pictures(
    run: str | Path,
    cache: FeatureCache,
    dataset: Dataset,
    *,
    task: str,
    split: str = "test",
    n: int = 6,
    backbone: str | None = None,
) -> list[Path]:
    """Write up to `n` pictures of a trained run, and what is the same for all of them, in place of an earlier call's.

    Args:
        run: directory of the run.
        cache: features of the images, of the run's backbone.
        dataset: the same samples, for their pixels.
        task, split: where the items come from.
        n: pictures at most.
        backbone: where the backbone lies that the head runs a side of; None is where it lay in training.

    Raises:
        ConfigError: the method has no maps to show, or pictures keep their shape: there is no square to draw.
    """
    if cache.is_ragged("image/patches"):
        raise ConfigError(
            f"{cache.place} holds pictures in their own shapes ({cache.spec.backbone.checkpoint}); maps are drawn on "
            "square grids of patches only"
        )
    head = checkpoint.load(run, backbone=backbone)
    check_has_pictures(checkpoint.method_name(head), task)
    data = load_task(cache, task, split, allow_missing=True)
    files = _mapped(head, data, dataset, n) if isinstance(head, Mapped) else {}
    shares = by_attribute(head, data) if isinstance(data, CompositionData) else None
    files |= {"routing.npz": shares} if shares else {}
    return replace_files(run, files, {"task": task, "split": split})


def _mapped(head: Mapped, data: TaskData, dataset: Dataset, n: int) -> dict[str, dict[str, Any]]:
    """A file for each picture with its maps, and one for what is the same for all of them."""
    assert isinstance(head, Head)
    cache, source = data.cache, source_of(head, data)
    pixels = {record.id: record for record in dataset.images}
    files: dict[str, dict[str, Any]] = {}
    strip: dict[str, Any] = {}
    with torch.no_grad():
        for item in _items(head, data, source, n):
            query = source.images(np.array([item.image]))
            text = source.texts(np.array([item.text])).streams
            labels = {name: torch.tensor([label]) for name, label in item.labels.items()}
            maps = head.maps(query, Features(text, labels))
            picture = pixels[cache.image_ids[item.image]].open()
            files[f"{len(files):02d}-{item.name}.npz"] = {
                "image": square(picture, cache.spec.backbone.preprocessing),
                "caption": np.array(cache.texts[item.text]),
                "score": np.array(item.score),
                "says": np.array(f"{maps.says}. Pictures are of {data.kind}, split {data.split}"),
                "verdict": np.array(item.verdict),
                "right": np.array(item.right),
                **_named(maps, cache, item.text),
            }
            if maps.strip and not strip:
                strip = {
                    "strip": torch.stack(list(maps.strip.values())).float().numpy(),
                    "words": np.array(list(maps.strip)),
                    "says": np.array(maps.strip_says),
                }
    if strip:
        files["strip.npz"] = strip
    return files


def replace_files(
    run: str | Path, files: Mapping[str, Mapping[str, Any]], facts: Mapping[str, str]
) -> list[Path]:
    """Write `RUN/pictures/NAME` for each of `files`, all with `facts`, in place of what an earlier call wrote."""
    folder = Path(run) / "pictures"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if WRITTEN.fullmatch(path.name):
            path.unlink()
    for name, arrays in files.items():
        arrays = {**arrays, **{fact: np.array(value) for fact, value in facts.items()}}
        np.savez(folder / name, allow_pickle=False, **arrays)
    return [folder / name for name in files]


def _named(maps: Maps, cache: FeatureCache, text: int) -> dict[str, Any]:
    """Names and square maps; those of tokens that are no words are left out."""
    looks = maps.looks.float().numpy()
    names = maps.names
    if names is None:
        ids, _ = cache.read_ragged("text/ids", np.array([text]))
        pieces = cache.vocabulary()
        kept = [i for i, token in enumerate(ids) if not SPECIAL.fullmatch(pieces[token])]
        looks, names = looks[kept], tuple(pieces[ids[i]] for i in kept)
    side = math.isqrt(looks.shape[-1])
    return {"words": np.array(names, dtype=str), "weights": looks.reshape(len(names), side, side)}


def _with_maps() -> list[str]:
    """Methods that have something to draw."""
    known = plugins.names("heads.methods")
    return [name for name in known if hasattr(load_method(name).Head, "maps")]


def _items(head: Head, data: TaskData, source: Source, n: int) -> Iterator[Item]:
    """The first item of every category, `n` at most."""
    if isinstance(data, CompositionData):
        yield from _compositions(head, data, source, n)
    elif isinstance(data, MatchingData):
        yield from _matches(head, data, source, n)
    elif isinstance(data, RetrievalData):
        for at, (i, t) in enumerate(data.matches[:n]):
            image, text = int(data.images[i]), int(data.captions[t])
            yield Item(f"{at:04d}", image, text, _paired(head, source, image, text))


def _compositions(head: Head, data: CompositionData, source: Source, n: int) -> Iterator[Item]:
    """The first image of every pair, with the pair that the head predicts for it among all candidates."""
    first = _first(data.target.tolist())[:n]
    part = replace(
        data,
        images=data.images[first],
        image_ids=tuple(data.image_ids[i] for i in first),
        attr=data.attr[first],
        obj=data.obj[first],
        target=data.target[first],
    )
    table = score(head, part, source=source)
    assert isinstance(table, CompositionScores)
    for row, column in enumerate(table.predicted()):
        target = part.target[row]
        truth = " ".join(part.pairs[target])
        right = bool(column == target)
        yield Item(
            plain_name("-".join(part.pairs[target])),
            int(part.images[row]),
            int(part.prompts[column]),
            float(table.scores[row, column]),
            {"attr": int(part.pair_index[column, 0]), "obj": int(part.pair_index[column, 1])},
            "predicted, which is right"
            if right
            else f"predicted, which is wrong: it is {truth}, with a score of {table.scores[row, target]:.3f}",
            right,
        )


def _matches(head: Head, data: MatchingData, source: Source, n: int) -> Iterator[Item]:
    """The first item of every category, its own caption with its own image."""
    for i in _first(data.category)[:n]:
        image, (own, other) = int(data.images[i, 0]), data.captions[i].tolist()
        mine, theirs = (_paired(head, source, image, text) for text in (own, other))
        right = mine > theirs
        rival = f"“{data.cache.texts[other]}”, with {theirs:.3f}"
        verdict = f"the true caption, {'preferred to' if right else 'not preferred to'} {rival}"
        yield Item(plain_name(data.category[i]), image, own, mine, verdict=verdict, right=right)


def _paired(head: Head, source: Source, image: int, text: int) -> float:
    query, candidate = source.images(np.array([image])), source.texts(np.array([text]))
    return float(head.paired(query, candidate)[0])


def _first(kinds: Iterable[Any]) -> list[int]:
    """Where each kind comes first, in order."""
    found: dict[Any, int] = {}
    for i, kind in enumerate(kinds):
        found.setdefault(kind, i)
    return list(found.values())


def plain_name(name: str) -> str:
    """As part of a file's name."""
    return re.sub(r"\W+", "_", name)


def square(picture: Image.Image, preprocessing: str) -> UInt8[np.ndarray, "s s 3"]:
    """What the patch grid covers: the centre square, all of it padded, or (also by default) all of it squashed."""
    side = min(*picture.size, LARGEST)
    shapes = {"shortest": ImageOps.fit, "longest": ImageOps.pad}
    return np.asarray(
        shapes.get(resize_mode(preprocessing), Image.Image.resize)(
            picture.convert("RGB"), (side, side)
        )
    )
