"""LLaVA's own: words without begin of text, patches at the layer its projector reads, the tower alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kinds
import pytest
import torch
from kinds import LLAVA, WORDS, largest, stacked

from cache_builder.readout import final_norm
from cache_builder.testing import check_backbone


@pytest.fixture(scope="module", params=LLAVA)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str) -> Any:
    return kinds.model(kind)


@pytest.fixture(scope="module")
def pixels(model: Any) -> Any:
    return stacked(model)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_words_have_no_begin_and_texts_have(kind: str, model: Any) -> None:
    begin = 1 if kind == "llava" else None  # Qwen's texts begin with their first word
    words, texts = model.tokenize_words(WORDS), model.tokenize(WORDS)
    assert 1 not in words
    assert (texts[:, 0] == 1).all() == (begin == 1)
    assert texts.shape[1] - words.shape[1] == (begin == 1)
    shared = texts[:, 1:] if begin else texts
    assert torch.equal(shared, words)


def test_word_states_are_the_input_of_the_language_model_s_norm_alone_and_padded(
    kind: str, model: Any
) -> None:
    found, lm = model.encode_words(model.tokenize_words(WORDS)), model.model.model.language_model
    r = model.readout()
    for i, word in enumerate(WORDS):
        one = torch.tensor([model.text.tokens.tokenizer(word, add_special_tokens=False).input_ids])
        with kinds.Seen({"raw": lm.norm}) as seen, torch.no_grad():
            out = lm(input_ids=one, output_hidden_states=True)
        alone = model.encode_words(one)["states"]
        assert torch.equal(alone, seen["raw"])
        assert torch.equal(final_norm(r, "text", alone), out.hidden_states[-1])  # normed already
        n = int(found["length"][i])
        assert n == one.shape[1]
        assert largest(found["states"][i, :n], seen["raw"][0]) <= 1e-6


def test_patches_are_the_hidden_state_the_projector_reads(
    kind: str, model: Any, pixels: torch.Tensor
) -> None:
    module: Any = model.model
    layer = module.config.vision_feature_layer
    with torch.no_grad():
        states = module.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
    patches = model.encode_images(pixels)["patches"]
    assert torch.equal(patches, states[:, 1:] if kind == "llava" else states)


def test_the_tower_alone_gives_the_same_bits_as_the_whole_model(
    kind: str, model: Any, pixels: torch.Tensor
) -> None:
    alone = kinds.load(kind, Path(f"{kinds.directory(kind)}@vision"))
    assert alone.streams == {s for s in model.streams if s.startswith("image/")}
    assert "text" not in alone.depth
    depth = model.depth["image"]
    whole, ours = model.encode_images(pixels, [depth]), alone.encode_images(pixels, [depth])
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    r = model.readout()
    assert alone.readout().keys() == {n for n in r if n.startswith("image/")}
    assert all(torch.equal(v, r[n]) for n, v in alone.readout().items())
    assert check_backbone(alone)["image/patches repeated"] == 0.0
    fields = ("preprocessing", "layer", "versions", "compute")
    assert all(getattr(alone.spec, f) == getattr(model.spec, f) for f in fields)
    assert alone.spec.fingerprint() != model.spec.fingerprint()
