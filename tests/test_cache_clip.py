"""CLIP: what goes into a cache equals the library's own numbers, and nothing is loaded other than as asked.

References are open_clip's public calls on the same weights. Equality is exact where the same operations run on the same
batch; the stated tolerances are those of a different batch shape, or of fp16 storage.
"""

import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

from cache_builder import load_backbone
from cache_builder.backbones import checkpoints, clip
from cache_builder.backbones.checkpoints import CheckpointError, weights_digest
from cache_builder.errors import UnknownName
from cache_builder.readout import logits, pool_image, pool_text, project_patches, project_tokens
from cache_builder.spec import differences
from cache_builder.testing import NonConformance, captions, check_backbone, pictures

TEXTS = ["a red mug", "A photo of two ancient buildings!", "!!", "", "x" * 75]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return clip.tiny()


@pytest.fixture(scope="module")
def demo() -> Any:
    return clip.load("demo")


@pytest.fixture(scope="module")
def library_transform() -> Any:
    return open_clip.create_model_and_transforms(f"local-dir:{clip.DEMO}")[2]


@pytest.fixture(scope="module")
def pixels(tiny: Any) -> torch.Tensor:
    rng = np.random.default_rng(3)
    sizes = [(45, 61), (80, 33), (32, 32), (224, 303), (5, 7)]
    images = [Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]
    return torch.stack([tiny.preprocess(i) for i in images])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    clip.tiny(tmp_path / "tiny")
    return tmp_path / "tiny"


def configure(directory: Path, **changes: Any) -> Path:
    """Change keys of a directory's model_cfg; a dict is merged."""
    path = directory / "open_clip_config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        model = config["model_cfg"]
        model[key] = {**model[key], **value} if isinstance(value, dict) and key in model else value
    path.write_text(json.dumps(config))
    return directory


def test_the_tiny_model_conforms(tiny: Any) -> None:
    found = check_backbone(tiny)
    assert "image/patches resumed at block 1" in found
    assert "text/pooled resumed at block 2" in found


def test_the_bundled_model_conforms() -> None:
    backbone = load_backbone("clip:demo")
    assert "text/pooled resumed at block 1" in check_backbone(backbone)
    assert backbone.spec.checkpoint == "demo"


def test_pooled_equals_the_library_s_exactly(tiny: Any, pixels: torch.Tensor) -> None:
    ids = tiny.tokenize(TEXTS)
    with torch.no_grad():
        assert torch.equal(tiny.encode_images(pixels)["pooled"], tiny.model.encode_image(pixels))
        assert torch.equal(tiny.encode_texts(ids)["pooled"], tiny.model.encode_text(ids))


def test_tokens_are_the_inputs_of_the_final_norms(tiny: Any, pixels: torch.Tensor) -> None:
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        norm.register_forward_pre_hook(lambda _, args, side=side: seen.update({side: args[0]}))
        for side, norm in (("image", tiny.image.visual.ln_post), ("text", tiny.text.text.ln_final))
    ]
    ids = tiny.tokenize(TEXTS)
    with torch.no_grad():
        tiny.model.encode_image(pixels)
        tiny.model.encode_text(ids)
    for hook in hooks:
        hook.remove()
    image, text = tiny.encode_images(pixels), tiny.encode_texts(ids)
    assert torch.equal(torch.cat([image["prefix"], image["patches"]], 1), seen["image"])
    assert torch.equal(text["tokens"], seen["text"])


def test_zero_shot_logits_from_tokens_and_readout_equal_the_library_s_exactly(
    tiny: Any, pixels: torch.Tensor
) -> None:
    ids = tiny.tokenize(TEXTS)
    image, text, r = tiny.encode_images(pixels), tiny.encode_texts(ids), tiny.readout()
    last = text["tokens"][torch.arange(len(ids)), text["length"] - 1]
    ours = logits(r, pool_image(r, image["prefix"], image["patches"]), pool_text(r, last))
    with torch.no_grad():
        theirs, _ = tiny.model.get_logits(pixels, ids)
    assert torch.equal(ours, theirs)
    assert ours.std() > 0.1  # constant logits would agree with anything


def test_zero_shot_logits_from_fp16_tokens_stay_within_the_rounding(
    tiny: Any, pixels: torch.Tensor
) -> None:
    """Half precision rounds each token value by up to 2**-11; pooled embeddings then differ by about 2.3e-4 of their
    norm, and logits by that times the scale."""
    ids = tiny.tokenize(TEXTS)
    image, text, r = tiny.encode_images(pixels), tiny.encode_texts(ids), tiny.readout()
    last = text["tokens"][torch.arange(len(ids)), text["length"] - 1].half().float()
    half = {k: v.half().float() for k, v in image.items()}
    stored = logits(r, pool_image(r, half["prefix"], half["patches"]), pool_text(r, last))
    live = logits(r, image["pooled"], text["pooled"])
    bound = 1e-3 * float(r["logit_scale"].exp())
    assert 0 < (stored - live).abs().max() < bound


def test_the_joint_space_of_all_tokens_holds_the_pooled_ones(
    tiny: Any, pixels: torch.Tensor
) -> None:
    r, ids = tiny.readout(), tiny.tokenize(TEXTS)
    image, text = tiny.encode_images(pixels), tiny.encode_texts(ids)
    everything = project_patches(r, torch.cat([image["prefix"], image["patches"]], 1))
    torch.testing.assert_close(everything[:, 0], image["pooled"], atol=2e-6, rtol=0)
    words = project_tokens(r, text["tokens"])[torch.arange(len(ids)), text["length"] - 1]
    torch.testing.assert_close(words, text["pooled"], atol=2e-6, rtol=0)


def test_ids_cut_after_the_longest_text_change_rows_by_rounding_only(tiny: Any) -> None:
    ids = tiny.tokenize(TEXTS[:3])
    whole = tiny.encode_texts(ids)
    longest = int(whole["length"].max())
    cut = tiny.encode_texts(ids[:, :longest])
    torch.testing.assert_close(cut["pooled"], whole["pooled"], atol=4e-6, rtol=0)
    assert torch.equal(cut["length"], whole["length"])


def test_a_projection_with_bias_is_read_out_too(directory: Path) -> None:
    configure(directory, text_cfg={"proj_bias": True}, init_logit_bias=-10.0)
    weights = directory / "open_clip_model.safetensors"
    state = load_file(weights)
    projection = state.pop("text_projection")
    state |= {
        "text_projection.weight": projection.T.contiguous(),
        "text_projection.bias": torch.linspace(-1, 1, 24),
        "logit_bias": torch.tensor(-3.0),
    }
    save_file(state, weights)
    backbone = clip.load(str(directory))
    check_backbone(backbone)
    r = backbone.readout()
    pixels, ids = torch.randn(2, 3, 32, 32), backbone.tokenize(TEXTS[:3])
    with torch.no_grad():
        theirs, _ = backbone.model.get_logits(pixels, ids)
    image, text = backbone.encode_images(pixels), backbone.encode_texts(ids)
    assert torch.equal(logits(r, image["pooled"], text["pooled"]), theirs)


def test_gradients_pass_through_the_frozen_text_tower(tiny: Any) -> None:
    ids = tiny.tokenize(["a red mug"])
    embedded = tiny.embed_tokens(ids).requires_grad_()
    tiny.encode_embedded(embedded, tiny.text.tokens.ends(ids))["pooled"].sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.abs().sum() > 0
    assert all(p.grad is None for p in tiny.model.parameters())


# --- texts ---


@pytest.fixture
def small_vit_b_32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Random weights for a small model under a published name: real tags and OpenAI's vocabulary apply to it."""
    sizes = {"context_length": 77, "vocab_size": 49408, "width": 20, "heads": 2, "layers": 2}
    config = {"embed_dim": 12, "vision_cfg": clip.TINY["vision_cfg"], "text_cfg": sizes}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(open_clip.CLIP(**config).state_dict(), tmp_path / "random.safetensors")
    return tmp_path / "random.safetensors"


def test_rows_up_to_the_end_token_are_stored_though_id_0_is_also_a_word(
    small_vit_b_32: Path,
) -> None:
    """OpenAI's vocabulary: id 0 pads, and is also the word "!" where no space follows."""
    backbone = clip.load(f"ViT-B-32/openai@{small_vit_b_32}")
    assert backbone.spec.tokenizer.startswith(SimpleTokenizer.__name__)
    ids = backbone.tokenize(["!#!", "a cat"])
    assert 0 in ids[0, 1:4]
    assert backbone.encode_texts(ids)["length"].tolist() == [
        (ids[0] == 49407).int().argmax() + 1,
        4,
    ]
    check_backbone(backbone)
    for special in ("<end_of_text>", "<start_of_text>"):
        with pytest.raises(CheckpointError, match="spells a special token"):
            backbone.tokenize([f"a {special} cat"])


@settings(derandomize=True, deadline=None, max_examples=30)
@given(text=captions())
def test_any_caption_ends_at_its_own_end_token(demo: Any, text: str) -> None:
    ids = demo.tokenize([text])
    length = int(demo.encode_texts(ids)["length"][0])
    assert ids[0, length - 1] == demo.text.tokens.end
    assert demo.text.tokens.end not in ids[0, : length - 1]
    assert (ids[0, length:] == demo.text.tokens.pad).all()


@pytest.mark.parametrize("special", ["<end_of_text>", "<START_of_text>", "<pad>"])
def test_a_caption_that_spells_a_special_token_is_named(tiny: Any, special: str) -> None:
    with pytest.raises(CheckpointError, match="spells a special token") as caught:
        tiny.tokenize(["fine", f"a {special} cat"])
    assert f"'a {special} cat'" in str(caught.value)


def test_captions_that_are_cut_are_counted(tiny: Any) -> None:
    assert tiny.truncated(["x" * 75, "x" * 76, "x" * 500, "", "a"]) == 2
    assert tiny.tokenize(["x" * 500])[0, -1] == tiny.text.tokens.end


@settings(derandomize=True, deadline=None, max_examples=20)
@given(image=pictures())
def test_preprocess_is_the_library_s_transform_pixel_for_pixel(
    demo: Any, library_transform: Any, image: Image.Image
) -> None:
    assert torch.equal(demo.preprocess(image), library_transform(image))


# --- loading ---


def test_the_same_files_give_the_same_spec_wherever_they_lie(directory: Path, tiny: Any) -> None:
    assert clip.load(str(directory)).spec == tiny.spec


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"quick_gelu": False}, "activation"),
        ({"text_cfg": {"tokenizer_kwargs": {"clean": "canonicalize"}}}, "tokenizer"),
    ],
    ids=["activation", "normaliser"],
)
def test_what_weights_do_not_show_is_in_the_spec(
    directory: Path, tiny: Any, change: dict[str, Any], field: str
) -> None:
    other = clip.load(str(configure(directory, **change))).spec
    assert [name for name, *_ in differences(tiny.spec, other)] == [field]


def test_mean_and_crop_are_in_the_spec(directory: Path, tiny: Any) -> None:
    path = directory / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    path.write_text(json.dumps(config))
    other = clip.load(str(directory)).spec
    assert [name for name, *_ in differences(tiny.spec, other)] == ["preprocessing"]


def test_one_changed_weight_changes_the_digest(tiny: Any) -> None:
    before = weights_digest(tiny.model)
    bias = tiny.image.visual.ln_post.bias
    kept = bias[0].item()
    bias[0] += 1e-3
    changed = weights_digest(tiny.model)
    bias[0] = kept
    assert before == tiny.spec.weights == weights_digest(tiny.model)
    assert changed != before


def test_a_tokenizer_whose_end_is_not_the_largest_id_is_refused(directory: Path) -> None:
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][-1], "id": 259, "content": "<mask>"}
    )
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="end-of-text is 258 and its largest 259"):
        clip.load(str(directory))


def test_half_precision_stays_close(directory: Path, tiny: Any, pixels: torch.Tensor) -> None:
    half = clip.load(str(directory), dtype="bfloat16")
    ids = tiny.tokenize(TEXTS)
    for ours, reference in (
        (half.encode_images(pixels), tiny.encode_images(pixels)),
        (half.encode_texts(ids), tiny.encode_texts(ids)),
    ):
        assert ours["pooled"].dtype == torch.bfloat16
        cosine = torch.cosine_similarity(ours["pooled"].float(), reference["pooled"])
        assert cosine.min() > 0.999
    assert half.spec.compute.startswith("bfloat16")
    assert all(v.dtype == torch.float32 for v in half.readout().values())
    assert half.readout()["logit_scale"] == tiny.readout()["logit_scale"]


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("ViT-B-23/openai", "no architecture 'ViT-B-23'; nearest: ViT-B-32"),
        ("ViT-B-32/opennai", "has no tag 'opennai'; did you mean 'openai'?"),
        ("ViT-B-32", "names no weights; add a tag, clip:ViT-B-32/openai"),
        ("ViT-B/32", "nearest: ViT-B-32"),
        ("dmeo", "nearest: demo"),
    ],
)
def test_an_unknown_name_gets_the_nearest(checkpoint: str, message: str) -> None:
    with pytest.raises(UnknownName) as caught:
        clip.load(checkpoint)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("ViT-L-16-SigLIP2-256/webli", "a SigLIP model, of family siglip2"),
        ("PE-Core-L-14-336/meta", "a Perception Encoder, of family pe"),
        ("coca_ViT-B-32/laion2b_s13b_b90k", "a CoCa"),
        ("roberta-ViT-B-32/laion2b_s12b_b32k", "the Hugging Face text tower roberta-base"),
        ("RN50/openai", "a ResNet"),
        ("ViT-L-14-CLIPA/datacomp1b", "pooled by avg"),
        ("convnext_base/laion400m_s13b_b51k", "the timm tower convnext_base"),
        ("ViT-L-14-quickgelu/laion2b_s32b_b82k", "has no tag"),
        ("ViT-L-14-quickgelu/dfn2b_s39b", "has no tag"),
        ("/no/such/place", "there is no such directory"),
        ("ViT-B-32/openai@/no/such.safetensors", "there is no weights file"),
    ],
)
def test_what_is_not_a_plain_clip_is_refused_by_name(checkpoint: str, message: str) -> None:
    with pytest.raises((CheckpointError, UnknownName)) as caught:
        clip.load(checkpoint)
    assert message in str(caught.value)


def test_a_quickgelu_architecture_with_a_gelu_tag_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "get_pretrained_cfg", lambda arch, tag: {"hf_hub": "x/"})
    with pytest.raises(CheckpointError, match=r"computes QuickGELU .* ask for ViT-L-14/made_up"):
        clip.load("ViT-L-14-quickgelu/made_up")


def test_a_bare_weights_file_is_refused(directory: Path) -> None:
    weights = directory / "open_clip_model.safetensors"
    with pytest.raises(CheckpointError, match=r"bare weights file.*clip:ARCH/TAG@"):
        clip.load(str(weights))


def test_a_torchscript_archive_is_refused_with_the_conversion(tmp_path: Path) -> None:
    path = tmp_path / "ViT-B-32.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ViT-B-32/code/__torch__.py", "")
    with pytest.raises(CheckpointError, match=r"TorchScript.*ViT-B-32\.safetensors"):
        clip.load(f"ViT-B-32/openai@{path}")


def test_weights_of_another_image_size_are_refused_instead_of_resampled(directory: Path) -> None:
    configure(directory, vision_cfg={"image_size": 40})
    with pytest.raises(CheckpointError, match="17 rows where this architecture has 26"):
        clip.load(str(directory))


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (
            "open_clip_config.json",
            "has no open_clip_config.json (it holds open_clip_model.safetensors",
        ),
        ("open_clip_model.safetensors", "has no open_clip_model.safetensors"),
        ("tokenizer.json", "has no tokenizer.json; put the tokenizer files"),
    ],
)
def test_an_incomplete_directory_says_what_it_lacks(
    directory: Path, remove: str, message: str
) -> None:
    (directory / remove).unlink()
    with pytest.raises(CheckpointError) as caught:
        clip.load(str(directory))
    assert message in str(caught.value)


def test_a_directory_without_preprocessing_is_refused(directory: Path) -> None:
    path = directory / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": json.loads(path.read_text())["model_cfg"]}))
    with pytest.raises(CheckpointError, match="lacks preprocess_cfg"):
        clip.load(str(directory))


def test_damaged_weights_are_one_sentence(directory: Path) -> None:
    (directory / "open_clip_model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="is not a readable weights file"):
        clip.load(str(directory))


def test_weights_of_another_architecture_are_one_sentence(directory: Path) -> None:
    configure(directory, text_cfg={"layers": 2})
    with pytest.raises(CheckpointError, match="could not be loaded"):
        clip.load(str(directory))


def test_without_network_the_message_says_which_weights_and_what_else_to_give(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        clip.load("ViT-B-32/laion2b_s34b_b79k")
    message = str(caught.value)
    assert "clip:ViT-B-32/laion2b_s34b_b79k (laion/CLIP-ViT-B-32-laion2B-s34B-b79K/)" in message
    assert "clip:ViT-B-32/laion2b_s34b_b79k@FILE" in message


def test_an_unknown_dtype_lists_the_known() -> None:
    with pytest.raises(UnknownName, match="float32, bfloat16, float16"):
        clip.load("demo", dtype="int8")


def test_a_tag_with_a_file_takes_activation_and_transform_from_the_tag(
    small_vit_b_32: Path,
) -> None:
    """QuickGELU is a property of the tag, neither of the architecture nor of the file."""
    openai = clip.load(f"ViT-B-32/openai@{small_vit_b_32}").spec
    laion = clip.load(f"ViT-B-32/laion2b_s34b_b79k@{small_vit_b_32}").spec
    assert openai.activation == "QuickGELU()"
    assert laion.activation == "GELU(approximate='none')"
    assert openai.weights == laion.weights
    assert openai.checkpoint == "ViT-B-32/openai"
    assert '"resize_mode": "shortest"' in openai.preprocessing


def test_a_tag_s_own_transform_is_used_with_a_file(
    small_vit_b_32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {
        "mean": (0.4, 0.5, 0.6),
        "std": (0.5,) * 3,
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    monkeypatch.setattr(checkpoints, "get_pretrained_cfg", lambda arch, tag: entry)
    text = clip.load(f"ViT-B-32/made_up@{small_vit_b_32}").spec.preprocessing
    for part in ("[0.4, 0.5, 0.6]", "[0.5, 0.5, 0.5]", '"bilinear"', '"squash"'):
        assert part in text


def test_every_published_name_is_read_or_refused_by_name() -> None:
    """The whole list of open_clip, by configuration alone: which are plain CLIPs is known before any download."""
    read = set()
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        assert config is not None
        with contextlib.suppress(CheckpointError):
            clip.refuse_other_shapes(config, name)
            read.add(name)
    assert {"ViT-B-32", "ViT-L-14-336", "ViT-H-14-378-quickgelu", "ViT-bigG-14-worldwide"} <= read
    assert {"MobileCLIP2-B", "MobileCLIP2-L-14", "MobileCLIP-B"} == {
        n for n in read if "Mobile" in n
    }
    assert len({n for n in read if n.startswith("EVA")}) == 7  # all of them: timm ViTs, class token
    assert not {n for n in read if n.startswith(("RN", "coca", "PE", "convnext"))}
    assert not {n for n in read if "SigLIP" in n or "CLIPA" in n or "roberta" in n}


# --- the conformance suite can fail ---


def test_the_suite_catches_a_model_left_in_training_mode() -> None:
    broken: Any = clip.tiny()
    broken.model.train()
    with pytest.raises(NonConformance, match="training mode"):
        check_backbone(broken)


def test_the_suite_catches_normed_tokens_stored_as_raw() -> None:
    broken: Any = clip.tiny()
    encode, norm = broken.encode_images, broken.image.visual.ln_post

    def encode_normed(*given: Any) -> dict[str, torch.Tensor]:
        out = encode(*given)
        return {**out, "prefix": norm(out["prefix"])}

    broken.encode_images = encode_normed
    with pytest.raises(NonConformance, match="image readout = pooled: differs by"):
        check_backbone(broken)


def test_the_suite_catches_lengths_that_the_pass_does_not_confirm() -> None:
    broken: Any = clip.tiny()
    broken.lengths = lambda ids: (ids != broken.text.tokens.pad).sum(1) - 1
    with pytest.raises(NonConformance, match="lengths: says"):
        check_backbone(broken)


def test_the_suite_catches_a_resume_without_the_causal_mask() -> None:
    broken: Any = clip.tiny()
    broken.text.text.attn_mask = torch.zeros_like(broken.text.text.attn_mask)
    reference = clip.tiny()
    broken.encode_texts = reference.encode_texts
    with pytest.raises(NonConformance, match="embedded = ids"):
        check_backbone(broken)
