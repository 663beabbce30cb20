"""The small TOML file that says what is what in somebody else's feature files.

    [backbone]                          [image]                          [text]
    name = "ViT-B-32/openai"            file = "features.h5"             file = "features.h5"
    normalised = true                   ids = "image_ids"                strings = "captions"
    logit_scale = 100.0                 pooled = "image_features"        pooled = "text_features"

A name is an array inside `file`; one that ends in .npy, or in .txt (a string a line), is a file of its own. Paths are
relative to the mapping. An unknown key is an error that names the nearest one.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cache_builder.feature_files import ForeignError
from cache_builder.records import read_text

MOST_BYTES = 16 << 20
"""Of a mapping; ids may be listed in it."""

UNSTATED = "not stated"


class Table(BaseModel):
    """A table of the mapping: no key is ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BackboneTable(Table):
    """What the user says of the features; it becomes part of the cache's fingerprint, but for the name."""

    name: str = Field(description="what they come from; only a name")
    normalised: bool | None = Field(None, description="are pooled embeddings of length 1? checked")
    logit_scale: float | None = Field(None, gt=0, description="factor on cosines, e.g. 100.0")
    logit_bias: float | None = Field(None, description="added to every logit (SigLIP)")
    preprocessing: str = Field(UNSTATED, description="what was done to pictures")
    tokenizer: str = Field(UNSTATED, description="what was done to texts")
    layer: str = Field(UNSTATED, description="where patches and tokens are taken")
    compute: str = Field(UNSTATED, description="e.g. float16, one crop")


class ImageTable(Table):
    """Features of pictures; rows of all arrays are the ids, in their order."""

    file: str | None = Field(None, description=".h5, .hdf5 or .npz that holds the arrays")
    ids: str | list[str] = Field(description="array, .txt file or list")
    pooled: str | None = Field(None, description="(N, D)")
    patches: str | None = Field(None, description="(N, P, W), or as `layout` says")
    prefix: str | None = Field(None, description="class and register tokens, (N, P, W)")
    layout: Literal["n p w", "n w p", "n h w c", "n c h w"] = Field(
        "n p w",
        description="axes of patches: pictures, patches, width; or pictures, rows h, columns w, channels c",
    )


class TextTable(Table):
    """Features of texts; rows of all arrays are the texts, in their order."""

    file: str | None = Field(None, description=".h5, .hdf5 or .npz that holds the arrays")
    ids: str | list[str] | None = Field(None, description="array, .txt file or list")
    strings: str | list[str] | None = Field(None, description="array, .txt file or list")
    pooled: str | None = Field(None, description="(N, D)")
    tokens: str | None = Field(
        None, description="(all tokens, V) with offsets, or (N, L, V) with mask"
    )
    offsets: str | None = Field(None, description="(N + 1): text i has tokens offsets[i] …")
    mask: str | None = Field(None, description="(N, L): true where a token is real")


class FeatureMapping(Table):
    """The whole file."""

    backbone: BackboneTable
    image: ImageTable | None = None
    text: TextTable | None = None
    store: Literal["fp16", "fp32"] | None = Field(
        None, description="stored type (default: fp16 if all arrays are float16, else fp32)"
    )


def read_mapping(file: Path) -> FeatureMapping:
    """Read and check a mapping.

    Raises:
        ForeignError: not TOML, an unknown key (with the nearest), a missing or wrong value.
        FileNotFoundError: there is no such file.
    """
    if not file.is_file():
        raise ForeignError(f"no mapping at {file}; docs/exchange.md shows one to begin with")
    try:
        found = tomllib.loads(read_text(file, MOST_BYTES))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ForeignError(f"{file} is not TOML: {error}") from error
    tables = {"backbone": BackboneTable, "image": ImageTable, "text": TextTable}
    _check_keys(found, FeatureMapping, file, "")
    for name, table in tables.items():
        if isinstance(found.get(name), dict):
            _check_keys(found[name], table, file, f"{name}.")
    try:
        mapping = FeatureMapping.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ForeignError(
            f"{file}: {key}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        ) from error
    _check_sense(mapping, file)
    return mapping


def _check_keys(found: dict[str, Any], table: type[BaseModel], file: Path, prefix: str) -> None:
    known = table.model_fields
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ForeignError(f"{file}: no key {prefix}{key}{hint} (known: {', '.join(known)})")


def _check_sense(mapping: FeatureMapping, file: Path) -> None:
    image, text = mapping.image, mapping.text
    streams = [
        image and (image.pooled, image.patches, image.prefix),
        text and (text.pooled, text.tokens),
    ]
    if not any(any(s) for s in streams if s):
        raise ForeignError(
            f"{file} names no features: give image.pooled, image.patches, image.prefix, text.pooled or text.tokens"
        )
    if text is not None:
        if text.ids is None and text.strings is None:
            raise ForeignError(f"{file}: [text] needs ids or strings, by which its rows are known")
        if (text.tokens is None) != (text.offsets is None and text.mask is None):
            raise ForeignError(
                f"{file}: text.tokens comes with text.offsets (ragged) or text.mask (padded), and neither without it"
            )
        if text.offsets is not None and text.mask is not None:
            raise ForeignError(
                f"{file}: text.tokens is ragged (offsets) or padded (mask), not both"
            )
