"""What a build is asked for, as the spec of its cache: which streams, of which backbone, under which rules."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from cache_builder.backbones.base import Backbone
from cache_builder.datasets.base import Dataset
from cache_builder.errors import UnknownName
from cache_builder.format import is_ragged, is_stream, stream
from cache_builder.spec import CacheSpec, DatasetSpec
from cache_builder.storage import MODES, pooled_patches
from cache_builder.views import VIEWS, crop_rule
from cache_builder.words import RULE, words_of


def cache_spec(
    dataset: Dataset,
    backbone: Backbone,
    *,
    streams: Sequence[str] | None = None,
    storage: str = "fp16",
    crops: str = "all",
    order_seed: int = 0,
) -> CacheSpec:
    """What the cache of such a build claims to be."""
    usable = backbone.streams - (set() if words_of(dataset.tasks) else {"word/states"})
    wanted = tuple(sorted(usable if streams is None else set(streams)))
    _refuse_pixels_of_any_shape(wanted, backbone)
    unknown = [s for s in wanted if not _is_offered(s, backbone, usable)]
    if unknown or not wanted:
        raise UnknownName(
            f"{backbone.spec.family} does not offer the streams {', '.join(unknown) or '(none asked for)'}; it offers, "
            f"of {dataset.name}, {', '.join(_offered(backbone, usable))}"
        )
    if storage not in MODES:
        raise UnknownName(f"no storage {storage!r} (known: {', '.join(MODES)})")
    if storage == "pool2x2":
        pooled_patches({} if is_ragged("image/patches", backbone.spec.dims) else backbone.spec.dims)
    found = DatasetSpec(
        name=dataset.name,
        digest=dataset.digest(),
        decode=dataset.decode,
        n_images=len(dataset.images),
        n_texts=len(dataset.texts),
    )
    return CacheSpec(
        backbone=backbone.spec,
        dataset=found,
        streams=wanted,
        storage=storage,
        rules=_rules(wanted, crops),
        order_seed=order_seed,
    )


def _is_offered(name: str, backbone: Backbone, usable: Collection[str]) -> bool:
    """Does the format have this stream, and can the backbone fill it?"""
    if not is_stream(name):
        return False
    wanted = stream(name)
    if wanted.view is not None and wanted.view not in VIEWS:
        return False
    if wanted.side == "crop":
        return "image/pooled" in usable
    if wanted.kind == "pixels":
        return _has_pixels(backbone)
    if wanted.block is not None:
        return wanted.block <= _depth(backbone).get("image", -1)
    return f"{wanted.side}/{wanted.kind}" in usable


def _offered(backbone: Backbone, usable: Collection[str]) -> list[str]:
    """All that the backbone can fill, in words."""
    depth = _depth(backbone).get("image", -1)
    return [
        *sorted(usable),
        *([f"image/block_<k> for k = 0 … {depth}"] if depth >= 0 else []),
        *(["image/pixels"] if _has_pixels(backbone) else []),
        *(["crop/pooled"] if "image/pooled" in usable else []),
        f"and those of an image as image/view_<view>/… with the views {', '.join(VIEWS)}",
    ]


def _has_pixels(backbone: Backbone) -> bool:
    """Are its pictures of one size, and can it tell their levels? A minimal backbone need not."""
    return "image_size" in backbone.spec.dims and hasattr(backbone, "levels")


def _refuse_pixels_of_any_shape(wanted: Iterable[str], backbone: Backbone) -> None:
    """`UnknownName` if pixels are asked for of a backbone whose pictures keep their shape."""
    asked = [s for s in wanted if is_stream(s) and stream(s).kind == "pixels"]
    if asked and "image_size" not in backbone.spec.dims:
        raise UnknownName(
            f"{asked[0]} holds pictures of one size, but those of {backbone.spec.family}:{backbone.spec.checkpoint} "
            "keep their shape (it has no image_size): leave the stream out, or choose a backbone of fixed resolution"
        )


def _depth(backbone: Backbone) -> Mapping[str, int]:
    """Blocks by side; a minimal backbone need not say."""
    return getattr(backbone, "depth", {})


def _rules(streams: Iterable[str], crops: str) -> dict[str, str]:
    """What the views, crops and words of a cache are."""
    found = [stream(s) for s in streams]
    rules = {f.view: VIEWS[f.view].rule for f in found if f.view is not None}
    if any(f.side == "crop" for f in found):
        rules["crop"] = crop_rule(crops)
    if any(f.side == "word" for f in found):
        rules["word"] = RULE
    return rules
