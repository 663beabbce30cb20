"""Checkpoints of another family, tokenizers and processors of another model; and published files of other layouts."""

import shutil
from pathlib import Path
from typing import Any

import kinds
import pytest
from kinds import FAMILIES, HUB, KINDS, LLAVA, OPEN_CLIP
from refusals import SOURCES, change, refusal, weights
from safetensors.torch import load_file, save_file

from cache_builder.backbones import llava
from cache_builder.backbones.checkpoints import CheckpointError
from cache_builder.backbones.hub_files import silently
from cache_builder.backbones.tiny_files import clip_tokenizer, gemma_tokenizer
from cache_builder.testing import check_backbone


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    return {kind: kinds.directory(kind) for kind in KINDS}


@pytest.fixture
def copy(source: str, made: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(made[source.partition("@")[0]], tmp_path / "tiny")
    return tmp_path / "tiny"


every = pytest.mark.parametrize("source", SOURCES)


@pytest.mark.parametrize(
    ("source", "family"),
    [(kind, family) for kind, how in KINDS.items() for family in FAMILIES if family != how.family],
)
def test_a_checkpoint_of_another_family_is_refused(source: str, family: str, copy: Path) -> None:
    message = refusal(source, copy, family)
    assert message.startswith(f"{family}:{copy}")
    own, there = KINDS[source].family, source in OPEN_CLIP
    what = {
        "clip": "native open_clip tower",
        "siglip2": "SigLIP" if family == "clip" else "siglip",
        "pe": "Perception Encoder" if family == "clip" else "vit_pe_core",
        "llava": "is a llava model",
    }[own]
    what = "vit_mini_patch8_clip_32" if source == "clip-mobile" else what
    if there and family == "llava":
        what = "in open_clip's format; family llava reads llava in transformers' format"
    if not there and family in ("clip", "pe"):
        what = "has no open_clip_config.json (it holds config.json"
    assert what in message


@pytest.mark.parametrize("source", ["clip", "clip-mobile", "pe", "siglip2", *HUB, "llava"])
def test_a_tokenizer_of_another_model_is_refused(source: str, copy: Path) -> None:
    """As large or larger, or with other special tokens: texts would be pooled at random, or have no embedding."""
    other = gemma_tokenizer(64) if source in ("clip", "clip-mobile", "pe") else clip_tokenizer(64)
    if source == "llava":
        other.add_tokens([f"<word {i}>" for i in range(9)])
    for file in copy.glob("tokenizer*"):
        file.unlink()
    other.save_pretrained(copy)
    message = refusal(source, copy)
    assert "tokenizer" in message
    assert "does not fit" in message or "largest" in message


@pytest.mark.parametrize("source", ["clip-eos"])
def test_texts_pooled_at_an_id_that_does_not_end_them_are_refused(source: str, copy: Path) -> None:
    def move(config: dict[str, Any]) -> None:
        config["model_cfg"]["text_cfg"]["eos_id"] = 3

    kinds.reconfigure(copy, move, "open_clip_config.json")
    message = refusal(source, copy)
    assert "pools at id 3, but its tokenizer's end-of-text is 2" in message


@every
def test_a_missing_tokenizer_is_named(source: str, copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    if source.endswith("@vision"):  # which reads no texts
        llava.load(f"{copy}@vision")
    else:
        assert "has no tokenizer.json" in refusal(source, copy)


@pytest.mark.parametrize("source", [*HUB, *LLAVA])
def test_a_missing_picture_processor_is_named(source: str, copy: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        (copy / name).unlink(missing_ok=True)
    assert "its image processor could not be loaded" in refusal(source, copy)


@pytest.mark.parametrize("source", ["siglip2-naflex"])
def test_a_processor_of_other_patches_is_refused(source: str, copy: Path) -> None:
    kinds.reconfigure(copy, lambda c: c.update(patch_size=16), "preprocessor_config.json")
    message = refusal(source, copy)
    assert "its processor cuts patches of 16 pixels, its tower reads 8" in message


@pytest.mark.parametrize("source", ["llava"])
def test_a_llava_that_joins_layers_is_refused(source: str, copy: Path) -> None:
    kinds.reconfigure(copy, lambda c: c.update(vision_feature_layer=[-2, -1]), "config.json")
    assert "joins the layers [-2, -1]" in refusal(source, copy)


@pytest.mark.parametrize("source", ["llava"])
def test_another_projector_is_refused(source: str, copy: Path) -> None:
    kinds.reconfigure(copy, lambda c: c.update(projector_hidden_act="relu"), "config.json")
    assert "its projector computes ReLU" in refusal(source, copy)


@pytest.mark.parametrize("source", [*OPEN_CLIP, *HUB, *LLAVA])
def test_a_bare_weights_file_is_refused(source: str, copy: Path) -> None:
    family = KINDS[source].family
    with pytest.raises(CheckpointError) as caught:
        FAMILIES[family].load(str(weights(copy)))
    assert "bare weights file" in str(caught.value)
    assert family in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_that_is_not_there_or_empty_is_named(family: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{family}:/no/such: there is no such directory"):
        FAMILIES[family].load("/no/such")
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json.*holds nothing"):
        FAMILIES[family].load(str(tmp_path))


# --- other files that are good ---


@pytest.mark.parametrize("source", [*HUB, *LLAVA])
def test_weights_in_several_files_are_the_same_model(
    source: str, copy: Path, made: dict[str, Path]
) -> None:
    whole = kinds.load(source, made[source])
    weights(copy).unlink()
    with silently():
        whole.model.save_pretrained(copy, max_shard_size="100KB")
    assert len([*copy.glob("*.safetensors")]) > 2
    assert (copy / "model.safetensors.index.json").is_file()
    assert kinds.load(source, copy).spec == whole.spec
    if source in LLAVA:
        alone = [llava.load(f"{d}@vision").spec for d in (copy, made[source])]
        assert alone[0] == alone[1]
        last = max(copy.glob("model-*.safetensors"))
        last.unlink()
        assert last.name in refusal(f"{source}@vision", copy)
    else:
        min(copy.glob("model-*.safetensors")).unlink()
        assert "could not be loaded" in refusal(source, copy)


@pytest.mark.parametrize("source", ["llava"])
def test_llava_s_newer_names_of_tensors_are_read_like_the_published(
    source: str, copy: Path, made: dict[str, Path]
) -> None:
    """Published: language_model.model.…, vision_tower.…; since transformers 5 in memory: model.language_model.…"""
    model = kinds.load(source, made[source])
    assert "language_model.model.norm.weight" in load_file(weights(copy))
    save_file(model.model.state_dict(), weights(copy), {"format": "pt"})
    assert "model.language_model.norm.weight" in load_file(weights(copy))
    assert llava.load(str(copy)).spec == model.spec
    assert llava.load(f"{copy}@vision").spec == llava.load(f"{made['llava']}@vision").spec
    change(copy, lambda state: [state.update({with_inner(n): state.pop(n)}) for n in sorted(state)])
    assert llava.load(f"{copy}@vision").spec == llava.load(f"{made['llava']}@vision").spec


def with_inner(name: str) -> str:
    """The vision tower's oldest names."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("kind", KINDS)
def test_making_and_loading_are_silent(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    KINDS[kind].write(tmp_path / "tiny")
    model = kinds.load(kind, tmp_path / "tiny")
    model.truncated(["x" * 900])
    model.encode_images(kinds.stacked(model))
    model.encode_texts(model.tokenize(["a red mug"]))
    shown = capfd.readouterr()
    assert not shown.out + shown.err
    assert not [r for r in caplog.records if r.levelname != "DEBUG"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bundled_model_is_found_by_name_and_conforms(family: str) -> None:
    model = FAMILIES[family].load("demo")
    assert model.spec.checkpoint == "demo"
    assert max(check_backbone(model).values()) < 1e-5
