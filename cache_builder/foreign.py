"""Features from somebody else's file become a real cache: joined by id, checked, sealed.

    mapping.toml ─▶ arrays (feature_files.py) ─▶ joined with ids, texts and tasks of a data set ─▶ receive.py ─▶ cache

Two passes: the first reads every number once, in order, and refuses what cannot be stored before anything is written;
its sha256 is the cache's `weights`, so other features are another fingerprint. The second writes chunk after chunk.
Letters: N rows, P patches, W image width, V text width, D joint dimension.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cache_builder.cache import Contents, FeatureCache
from cache_builder.datasets.base import Dataset, ImageRecord, Tasks, TextRecord
from cache_builder.durable import make_folder
from cache_builder.errors import BadInput
from cache_builder.feature_files import ForeignError
from cache_builder.foreign_rows import Joined, Side, joined, read_side
from cache_builder.format import Bad
from cache_builder.header import FOREIGN, NO_DATASET, check_spec
from cache_builder.mapping import UNSTATED, FeatureMapping, read_mapping
from cache_builder.place import Folder, at
from cache_builder.receive import receive
from cache_builder.spec import BackboneSpec, CacheSpec, DatasetSpec
from cache_builder.storage import MODES

DECODE = "not decoded here: features were imported"


def import_features(
    mapping: str | Path,
    path: str | Path,
    *,
    dataset: Dataset | None = None,
    progress: bool = False,
) -> FeatureCache:
    """Make a sealed cache of foreign features; repeating the call after any interruption finishes it.

    Args:
        mapping: a TOML file, see `cache_builder/mapping.py` and docs/exchange.md.
        path: folder of the cache: free, or what an earlier call left.
        dataset: gives ids, texts and tasks, to which features are joined by id (texts without ids: by string). Its
            pictures are not opened; one without features is quarantined. None: rows of the file, and no task.
        progress: show a bar.

    Returns:
        The cache; `header.counts` says what was joined and what was left over.

    Raises:
        ForeignError: the mapping or a file cannot be used; names file, array and row.
        BadInput: not one picture of the data set has features.
        CacheMismatch: the path holds something else, which is not touched.
    """
    mapping, place = Path(mapping), at(path)
    given = read_mapping(mapping)
    scratch = Path(tempfile.gettempdir())
    if isinstance(place, Folder):
        make_folder(scratch := place.path.parent)
    sides = {
        "image": read_side(given.image, mapping.parent, scratch),
        "text": read_side(given.text, mapping.parent, scratch),
    }
    data = dataset or _rows_only(sides["image"], sides["text"])
    data = replace(data, decode=DECODE)
    ids, text_ids = [i.id for i in data.images], [t.id for t in data.texts]
    if dataset is None:
        images, texts = (Joined(np.arange(len(n)), {}) for n in (ids, text_ids))
    else:
        images = joined(sides["image"], "image", ids, None, data.name)
        texts = joined(sides["text"], "text", text_ids, [t.text for t in data.texts], data.name)
    spec = _spec(given, sides, data)
    order = np.random.default_rng(spec.order_seed).permutation(len(data.images))
    images = replace(images, rows=images.rows[order])
    contents = _contents(given, data, order, images, texts, sides["text"])
    if len(contents.bad) == len(data.images) and data.images:
        raise BadInput(
            f"not one of the {len(data.images)} pictures of {data.name} has features in {mapping}: the data set has "
            f"ids like {data.images[0].id!r}, the file like {sides['image'].names[0]!r}"
        )

    def begin() -> FeatureCache:
        return FeatureCache.create(
            place,
            spec,
            contents,
            counts={**data.counts, **images.notes, **texts.notes},
            root=data.root,
            options=data.options,
            backbone_name=str(mapping),
        )

    bounds = np.asarray(contents.arrays.get("text/offsets", [0]))

    def chunk(array: str, number: int) -> NDArray[Any]:
        layout = layouts[array]
        start, stop = layout.bounds(number)
        out = np.zeros(layout.chunk_shape, layout.dtype)
        side, _, key = array.partition("/")
        if array == "text/tokens":
            found = sides[side].tokens_at(texts.rows, bounds, start, stop)
        else:
            found = sides[side].at(key, (images if side == "image" else texts).rows[start:stop])
        out[: stop - start] = found
        return out

    layouts: dict[str, Any] = {}

    def check(cache: FeatureCache) -> None:
        check_spec(place, cache.spec, spec)
        layouts.update(cache.header.arrays)

    return receive(path, begin, check, chunk, progress=progress)


def _rows_only(image: Side, text: Side) -> Dataset:
    """The rows of the files as a data set without tasks."""

    def opener(name: str) -> ImageRecord:
        def nothing() -> NoReturn:
            raise OSError(f"{name} is known by its features alone")

        return ImageRecord(name, nothing)

    if text.names and not text.strings:
        raise ForeignError("[text] needs strings where no --dataset gives them")
    ids = text.ids or [str(i) for i in range(len(text.strings))]
    records = tuple(TextRecord(i, s) for i, s in zip(ids, text.strings, strict=True))
    images = tuple(opener(i) for i in image.names)
    return Dataset(name=NO_DATASET, images=images, texts=records, tasks=Tasks(), decode=DECODE)


def _contents(
    given: FeatureMapping,
    data: Dataset,
    order: NDArray[np.int64],
    images: Joined,
    texts: Joined,
    text: Side,
) -> Contents:
    """All of the cache but its embeddings; pictures without a row are in quarantine from the start."""
    names = [data.images[i].id for i in order]
    arrays: dict[str, Any] = {
        "image/id": names,
        "text/id": [t.id for t in data.texts],
        "text/string": [t.text for t in data.texts],
    }
    for key in ("logit_scale", "logit_bias"):
        value = getattr(given.backbone, key)
        if value is not None:
            stored = np.log(value) if key == "logit_scale" else value
            arrays[f"readout/{key}"] = np.asarray(stored, np.float32)
    if text.tokens is not None:
        sizes = np.diff(text.offsets)[texts.rows]
        arrays["text/offsets"] = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    without = np.flatnonzero(images.rows < 0).tolist()
    bad = [Bad(id=names[row], reason="has no features in the file", row=row) for row in without]
    return Contents(data.tasks, arrays, bad)


def _spec(given: FeatureMapping, sides: Mapping[str, Side], data: Dataset) -> CacheSpec:
    """What the cache claims: nothing but what the mapping says and the numbers show."""
    arrays = {f"{side}/{key}": a for side in sides for key, a in sides[side].arrays.items()}
    types = {a.values.dtype for a in arrays.values()}
    storage = given.store or ("fp16" if types == {np.dtype(np.float16)} else "fp32")
    dims = _dims(sides)
    stated = given.backbone
    digests = [
        [
            name,
            sides[name.split("/")[0]].digest(
                name.split("/")[1], MODES[storage].dtype, _unit(given, name)
            ),
        ]
        for name in sorted(arrays)
    ]
    rows = [
        [side, sides[side].ids or sides[side].strings, sides[side].shape_digest()]
        for side in sorted(sides)
    ]
    body = json.dumps([digests, rows], ensure_ascii=False, separators=(",", ":"))
    lengths = {True: "of length 1", False: "not normalised", None: UNSTATED}
    backbone = BackboneSpec(
        family=FOREIGN,
        checkpoint=stated.name,
        weights=hashlib.sha256(body.encode()).hexdigest(),
        preprocessing=stated.preprocessing,
        tokenizer=stated.tokenizer,
        layer=stated.layer,
        dims=dims,
        architecture={
            "pooled": lengths[stated.normalised],
            "logit_scale": UNSTATED if stated.logit_scale is None else repr(stated.logit_scale),
            "logit_bias": UNSTATED if stated.logit_bias is None else repr(stated.logit_bias),
        },
        activation=UNSTATED,
        compute=stated.compute,
        versions={},
    )
    found = DatasetSpec(
        name=data.name,
        digest=data.digest(),
        decode=data.decode,
        n_images=len(data.images),
        n_texts=len(data.texts),
    )
    return CacheSpec(
        backbone=backbone, dataset=found, streams=tuple(sorted(arrays)), storage=storage
    )


def _unit(given: FeatureMapping, name: str) -> bool:
    return bool(given.backbone.normalised) and name.endswith("/pooled")


def _dims(sides: Mapping[str, Side]) -> dict[str, int]:
    """Sizes that the arrays show; where two show another size, they do not belong together."""
    shown: list[tuple[str, int, str]] = []
    for side, keys in (("image", ("pooled", "patches", "prefix")), ("text", ("pooled", "tokens"))):
        for key in keys:
            if (array := sides[side].arrays.get(key)) is None:
                continue
            rest = sides[side].row_shape(key)
            axes = {"pooled": ("joint",), "patches": ("patches", "image_width")}
            axes |= {"prefix": ("prefix", "image_width"), "tokens": ("text_width",)}
            shown += [(axis, n, array.where) for axis, n in zip(axes[key], rest, strict=True)]
    dims: dict[str, tuple[int, str]] = {}
    for axis, n, where in shown:
        before = dims.setdefault(axis, (n, where))
        if before[0] != n:
            raise ForeignError(
                f"{where} has {axis} {n}, but {before[1]} has {before[0]}: they do not share a space"
            )
    found = {axis: n for axis, (n, _) in dims.items()}
    if sides["text"].tokens is not None:
        found["context"] = int(np.diff(sides["text"].offsets).max(initial=0))
    return found
