"""What a cache claims to be, field by field, so that a mismatch can be named instead of suspected."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field


class Spec(BaseModel):
    """A frozen claim. Two specs with the same fields have the same fingerprint on every machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    NAMES: ClassVar[frozenset[str]] = frozenset()
    """Fields that only say what something is called: not part of the fingerprint, and never a mismatch."""

    LATER: ClassVar[frozenset[str]] = frozenset()
    """Keys that older caches do not state, and that other fields imply: no mismatch where one side lacks them."""

    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of all fields."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def canonical(self) -> str:
        """All fields but names as JSON with sorted keys."""
        return json.dumps(self.claims(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    def claims(self) -> dict[str, Any]:
        """Fields that can change a stored number, as plain values: all but `NAMES`."""
        found = self.model_dump(mode="json", exclude=set(self.NAMES))
        below = {key: getattr(self, key) for key in found}
        return found | {key: v.claims() for key, v in below.items() if isinstance(v, Spec)}


class BackboneSpec(Spec):
    """A frozen backbone, as far as it can change a stored number, and what it is called."""

    NAMES = frozenset({"checkpoint"})
    LATER = frozenset({"image_blocks", "text_blocks"})

    family: str = Field(
        description="file name in cache_builder/backbones: clip, siglip2, pe, llava"
    )
    checkpoint: str = Field(
        description="what was asked for after the colon, without its folder; only a name, not in the fingerprint"
    )
    weights: str = Field(
        description="sha256 over the names, dtypes, shapes and bytes of the tensors loaded"
    )
    preprocessing: str = Field(description="the image transform as canonical text")
    tokenizer: str = Field(
        description="tokenizer class, normaliser, context length and sha256 of its vocabulary"
    )
    layer: str = Field(
        description="where the stored tokens are taken, e.g. 'last block, before the final norm'"
    )
    dims: dict[str, int] = Field(
        description="image_size (pixels), patches N, prefix P, image_width W, text_width V, context L, joint D, "
        "image_blocks and text_blocks (depth of the towers); where pictures keep their shape, patch_size (pixels) and "
        "most_patches instead of image_size and patches"
    )
    architecture: dict[str, str] = Field(
        default_factory=dict,
        description="the model's configuration, e.g. vision_cfg.layers → 12: what else the weights do not show (heads, "
        "eps, masks, where texts are pooled)",
    )
    activation: str = Field(description="e.g. QuickGELU or GELU: not visible in the weights")
    compute: str = Field(
        description="dtype and attention kernel of the forward pass, e.g. 'float32 sdpa'"
    )
    versions: dict[str, str] = Field(
        description="torch, open_clip, transformers, timm: release numbers"
    )


def with_depth(dims: Mapping[str, int], depth: Mapping[str, int]) -> dict[str, int]:
    """Dims that also state how many blocks each tower has: side → blocks, as `Backbone.depth`."""
    return {**dims, **{f"{side}_blocks": n for side, n in depth.items()}}


class DatasetSpec(Spec):
    """The samples: equal digests mean identical ids, strings and tasks."""

    name: str
    digest: str = Field(description="Dataset.digest()")
    decode: str = Field(description="how pixels were obtained, as canonical text")
    n_images: int
    n_texts: int


class CacheSpec(Spec):
    """What a cache claims to hold: samples by id, strings, tasks, backbone. Pixels are not in it; `digest` tells."""

    backbone: BackboneSpec
    dataset: DatasetSpec
    streams: tuple[str, ...] = Field(description="named arrays, e.g. image/pooled; sorted")
    storage: str = Field(
        default="fp16",
        description="how embeddings are stored: fp16, fp32, bf16, int8-channel, fp8-token, pool2x2, lossless",
    )
    rules: dict[str, str] = Field(
        default_factory=dict,
        description="what its views, crops and words are, as canonical text: flip, crop, word → rule",
    )
    order_seed: int = Field(default=0, description="seed of the permutation sample → row")
    generations: tuple[tuple[int, int, int], ...] = Field(
        default=(),
        description="images, texts and parts of words that it held each time before samples were appended",
    )


def differences(
    expected: Spec, found: Spec, prefix: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Fields in which two specs of one class differ, as (dotted name, expected, found)."""
    for name in (n for n in type(expected).model_fields if n not in expected.NAMES):
        a, b = getattr(expected, name), getattr(found, name)
        if isinstance(a, Spec) and isinstance(b, Spec):
            yield from differences(a, b, f"{prefix}{name}.")
        elif isinstance(a, dict) and isinstance(b, dict):
            for key in sorted({*a, *b}):
                unstated = key in expected.LATER and (key not in a or key not in b)
                if a.get(key) != b.get(key) and not unstated:
                    yield f"{prefix}{name}.{key}", a.get(key), b.get(key)
        elif a != b:
            yield f"{prefix}{name}", a, b
