"""What a cache holds equals the library's own tensors, in every family and every shape of it that the towers read.

References are public calls of open_clip and transformers on the same weights, their inner tensors taken by hooks. Where
the same operations run on the same batch, nothing may differ; each other bound is stated with its reason.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kinds
import numpy as np
import pytest
import torch
from kinds import HUB, KINDS, LLAVA, OPEN_CLIP, POOLING, TEXTS, largest, library, stacked

from cache_builder import FeatureCache, build
from cache_builder.datasets.base import (
    CompositionExample,
    CompositionTask,
    Dataset,
    ImageRecord,
    Tasks,
    TextRecord,
)
from cache_builder.readout import (
    logits,
    pool_image,
    pool_text,
    pool_words,
    project_patches,
)
from cache_builder.testing import check_backbone

LOGITS = 2e-7
"""transformers multiplies by the scale after the matrix product, open_clip and we before it; of a cosine."""

UNPADDED = 1e-6
"""NaFlex pools padded rows under a mask, a reader of ragged rows has no padding: products of another shape."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str) -> Any:
    return kinds.model(kind)


@pytest.fixture(scope="module")
def pixels(model: Any) -> Any:
    return stacked(model)


@pytest.fixture(scope="module")
def ids(kind: str, model: Any) -> torch.Tensor:
    return model.tokenize([t for t in TEXTS if t or kind not in LLAVA])


@pytest.fixture(scope="module")
def theirs(kind: str, model: Any, pixels: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return library(kind, model, pixels, ids)


def test_the_suite_is_passed(model: Any) -> None:
    found = check_backbone(model)
    assert max(found.values()) < 4e-6  # those that are not 0.0 compare other batches
    assert "image/patches resumed at block 2" in found
    assert "text/tokens resumed at block 2" in found


def test_what_enters_a_block_is_what_enters_it_in_the_library(
    model: Any, pixels: Any, theirs: dict[str, torch.Tensor]
) -> None:
    depth = model.depth["image"]
    ours = model.encode_images(pixels, range(depth + 1))
    for k in range(depth + 1):
        assert torch.equal(ours[f"block_{k}"], theirs[f"image/block_{k}"])


def test_image_tokens_are_the_input_of_the_final_norm(
    kind: str, model: Any, pixels: Any, theirs: dict[str, torch.Tensor]
) -> None:
    ours = model.encode_images(pixels)
    rows = [ours["prefix"], ours["patches"]] if "prefix" in ours else [ours["patches"]]
    assert torch.equal(torch.cat(rows, 1), theirs["image/raw"])
    assert ("prefix" in ours) == (kind in ("clip", "clip-eos", "clip-mobile", "pe", "llava"))


def test_stored_text_rows_are_the_inputs_of_the_final_norm(
    model: Any, ids: torch.Tensor, theirs: dict[str, torch.Tensor]
) -> None:
    """Up to the pooled row, in order; the pooled row comes last."""
    ours, ends = model.encode_texts(ids), model.text.tokens.ends(ids) if model.text else None
    assert ends is not None
    bound = (
        1e-7 if model.text is not None and model.text.words else 0.0
    )  # the library masks padding
    for i, n in enumerate(ours["length"].tolist()):
        assert largest(ours["tokens"][i, : n - 1], theirs["text/raw"][i, : n - 1]) <= bound
        assert largest(ours["tokens"][i, n - 1], theirs["text/raw"][i, ends[i]]) <= bound


@pytest.mark.parametrize("kind", POOLING, scope="module")
def test_pooled_is_the_library_s(
    model: Any, pixels: Any, ids: torch.Tensor, theirs: dict[str, torch.Tensor]
) -> None:
    assert torch.equal(model.encode_images(pixels)["pooled"], theirs["image/pooled"])
    assert torch.equal(model.encode_texts(ids)["pooled"], theirs["text/pooled"])


@pytest.mark.parametrize("kind", OPEN_CLIP, scope="module")
def test_tokens_are_open_clip_s_raw_intermediates(
    model: Any, pixels: torch.Tensor, ids: torch.Tensor
) -> None:
    module: Any = model.model
    ours, prefix = model.encode_images(pixels), model.image.n_prefix > 0
    found = module.visual.forward_intermediates(
        pixels, indices=1, output_fmt="NLC", output_extra_tokens=prefix
    )
    assert torch.equal(ours["patches"], found["image_intermediates"][-1])
    if prefix:
        assert torch.equal(ours["prefix"], found["image_intermediates_prefix"][-1])


@pytest.mark.parametrize("kind", HUB, scope="module")
def test_tokens_are_transformers_hidden_states(model: Any, pixels: Any, ids: torch.Tensor) -> None:
    module: Any = model.model
    image = module.vision_model(**kinds.hub_pixels(pixels), output_hidden_states=True)
    assert torch.equal(model.encode_images(pixels)["patches"], image.hidden_states[-1])
    text, ours = (
        module.text_model(input_ids=ids, output_hidden_states=True),
        model.encode_texts(ids),
    )
    for i, n in enumerate(ours["length"].tolist()):
        assert torch.equal(ours["tokens"][i, : n - 1], text.hidden_states[-1][i, : n - 1])
        assert torch.equal(ours["tokens"][i, n - 1], text.hidden_states[-1][i, -1])


# --- from a cache alone ---


def noise_dataset(texts: list[str]) -> Dataset:
    """Five pictures of noise, and the texts."""
    task = CompositionTask(
        examples=(CompositionExample("i0", "red", "ancient_building", "train"),),
        pairs={"train": (("red", "ancient_building"),)},
        prompts={("red", "ancient_building"): "t0"},
    )
    return Dataset(
        name="noise",
        images=tuple(ImageRecord(f"i{k}", lambda p=p: p) for k, p in enumerate(kinds.pictures())),
        texts=tuple(TextRecord(f"t{k}", text) for k, text in enumerate(texts)),
        tasks=Tasks(czsl=task),
        decode="as made",
        counts={},
        root="nowhere",
    )


@pytest.fixture(scope="module")
def cache(kind: str, model: Any, fast_folder: Path) -> FeatureCache:
    texts = [t for t in TEXTS if t.strip()]
    extra = ["image/block_1"]
    return build(
        noise_dataset(texts),
        model,
        fast_folder / f"exact-{kind}.zarr",
        streams=[*model.streams, *extra],
        batch_size=8,
        storage="fp32",
        progress=False,
    )


def in_row_order(cache: FeatureCache, model: Any) -> Any:
    """Pixels of the cache's batch."""
    pictures = kinds.pictures()
    return stacked(model, [pictures[int(name[1:])] for name in cache.image_ids])


@pytest.mark.parametrize("kind", POOLING, scope="module")
def test_pooled_and_logits_from_a_cache_alone_are_the_library_s(
    kind: str, cache: FeatureCache, model: Any
) -> None:
    pixels, ids = in_row_order(cache, model), model.tokenize(cache.texts)
    expected = library(kind, model, pixels, ids)
    r = {name: torch.from_numpy(value) for name, value in cache.readout().items()}
    rows, offsets = cache.read_ragged("text/tokens")
    text = pool_text(r, torch.from_numpy(rows[offsets[1:] - 1]))
    if cache.is_ragged("image/patches"):
        rows, offsets = cache.read_ragged("image/patches")
        each = np.split(rows, offsets[1:-1])
        image = torch.cat([pool_image(r, None, torch.from_numpy(one)[None]) for one in each])
        assert [math_product(g) for g in cache.grid()] == [len(one) for one in each]
    else:
        prefix = torch.from_numpy(cache.read("image/prefix")) if model.image.n_prefix else None
        image = pool_image(r, prefix, torch.from_numpy(cache.read("image/patches")))
    naflex = kind == "siglip2-naflex"
    assert largest(text, expected["text/pooled"]) == 0.0
    assert largest(image, expected["image/pooled"]) <= (UNPADDED if naflex else 0.0)
    assert largest(torch.from_numpy(cache.read("image/pooled")), expected["image/pooled"]) == 0.0
    ours, rounding = logits(r, image, text), LOGITS if kind in HUB else 0.0
    assert largest(ours, expected["logits"]) <= rounding * float(r["logit_scale"].exp())
    assert ours.std() > 0.01  # constant logits would agree with anything


def math_product(pair: np.ndarray) -> int:
    return int(pair[0]) * int(pair[1])


def test_a_cache_holds_what_enters_a_block(kind: str, cache: FeatureCache, model: Any) -> None:
    pixels = in_row_order(cache, model)
    expected = library(kind, model, pixels, model.tokenize(["a"]))["image/block_1"]
    if cache.is_ragged("image/block_1"):
        rows, offsets = cache.read_ragged("image/block_1")
        for i, one in enumerate(np.split(rows, offsets[1:-1])):
            assert torch.equal(torch.from_numpy(one), expected[i, : len(one)])
    else:
        assert torch.equal(torch.from_numpy(cache.read("image/block_1")), expected)


@pytest.mark.parametrize("kind", LLAVA, scope="module")
def test_projected_patches_and_words_from_a_cache_alone_are_the_library_s(
    kind: str, cache: FeatureCache, model: Any
) -> None:
    """Words: one call of the language model per part, no padding at all; then norm, then means."""
    pixels = in_row_order(cache, model)
    expected = library(kind, model, pixels, model.tokenize(["a"]))["image/projected"]
    r = {name: torch.from_numpy(value) for name, value in cache.readout().items()}
    patches = torch.from_numpy(cache.read("image/patches"))
    assert torch.equal(project_patches(r, patches), expected)
    rows, offsets = cache.read_ragged("word/states")
    lm, means = model.model.model.language_model, []
    for part in cache.word_strings:
        one = torch.tensor([model.text.tokens.tokenizer(part, add_special_tokens=False).input_ids])
        means.append(lm(input_ids=one).last_hidden_state[0].mean(0))
    ours = pool_words(
        r,
        torch.from_numpy(rows),
        torch.from_numpy(offsets),
        torch.from_numpy(cache.word_parts),
    )
    bounds = cache.word_parts.tolist()
    words = torch.stack([torch.stack(means[a:b]).mean(0) for a, b in itertools.pairwise(bounds)])
    assert "ancient building" not in cache.word_strings  # its parts run apart
    assert largest(ours, words) <= 1e-6  # parts of other lengths share its batch


@pytest.fixture(scope="module", autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
