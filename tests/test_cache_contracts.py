"""What a backbone, a loader and the conformance suite promise each other, where a mistake would be silent."""

import json
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stand_in import StandIn, dataset
from torch.utils.checkpoint import checkpoint

from cache_builder import FeatureCache, build
from cache_builder.backbones import clip, llava, pe, siglip2
from cache_builder.backbones.checkpoints import CheckpointError, weights_digest
from cache_builder.datasets.base import Dataset, ImageRecord, Tasks
from cache_builder.errors import BadOutput, CacheError, CacheMismatch, UnknownName
from cache_builder.readout import final_norm, project_patches
from cache_builder.spec import differences
from cache_builder.testing import check_backbone
from heads.base import Needs
from heads.errors import MissingStream
from heads.source import check_streams


class Bare:
    """A backbone that shows nothing but what the contract names."""

    NAMES = (
        *("spec", "device", "streams", "depth", "model", "preprocess", "grid", "tokenize", "ends"),
        *("tokenize_words", "vocabulary", "truncated", "lengths", "encode_images", "encode_texts"),
        *("encode_words", "readout", "tower", "blocks", "embed_pixels", "embed_tokens"),
        *("encode_embedded", "resume_from", "levels", "normalised", "branches"),
    )

    def __init__(self, inner: Any) -> None:
        for name in self.NAMES:
            setattr(self, name, getattr(inner, name))


@pytest.mark.parametrize("family", [clip, siglip2, pe, llava], ids=lambda f: f.__name__[-6:])
def test_the_suite_needs_nothing_but_the_contract(family: Any) -> None:
    assert check_backbone(Bare(family.tiny()))


def test_llava_s_text_is_causal_under_any_attention_kernel(tmp_path: Path) -> None:
    llava.tiny(tmp_path / "tiny")
    file = tmp_path / "tiny" / "config.json"
    config = json.loads(file.read_text())
    config["attn_implementation"] = config["text_config"]["attn_implementation"] = "eager"
    file.write_text(json.dumps(config))
    model: Any = llava.load(str(tmp_path / "tiny"))
    model.model.model.language_model.set_attn_implementation("eager")
    ids = model.tokenize(["a red cup"])
    raw: list[torch.Tensor] = []
    lm = model.model.model.language_model
    hook = lm.norm.register_forward_pre_hook(lambda _, args: raw.append(args[0]))
    with torch.no_grad():
        lm(input_ids=ids)
    hook.remove()
    torch.testing.assert_close(model.encode_texts(ids)["tokens"], raw[0], atol=1e-6, rtol=0)
    first = model.encode_texts(ids[:, :2])["tokens"]
    torch.testing.assert_close(first, raw[0][:, :2], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("part", "other"), [("text_config", "granite"), ("vision_config", "pixtral")]
)
def test_a_llava_made_of_other_parts_is_refused_by_name(
    tmp_path: Path, part: str, other: str
) -> None:
    llava.tiny(tmp_path / "tiny")
    file = tmp_path / "tiny" / "config.json"
    config = json.loads(file.read_text())
    config[part] = {"model_type": other}
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{part.replace('_', ' ')} is a {other}"):
        llava.load(str(tmp_path / "tiny"))


def test_a_block_or_a_word_that_a_family_lacks_is_refused() -> None:
    model = clip.tiny()
    with pytest.raises(UnknownName, match=r"blocks 0 … 2, asked for the states that enter 9"):
        model.encode_images(torch.zeros(1, 3, 32, 32), (9,))
    for call in (
        lambda: model.tokenize_words(["red"]),
        lambda: model.encode_words(model.tokenize(["a"])),
    ):
        with pytest.raises(UnknownName, match="family clip has no word/states"):
            call()


def test_a_readout_that_lacks_a_tensor_is_not_the_identity() -> None:
    rows = torch.ones(1, 2, 3)
    with pytest.raises(KeyError, match=r"no image/norm\.weight"):
        final_norm({}, "image", rows)
    with pytest.raises(KeyError, match=r"no image/norm\.weight"):
        project_patches({}, rows)


def test_pe_blocks_may_be_checkpointed_and_wrapped_under_prompts() -> None:
    model: Any = pe.tiny()
    states, _ = model.embed_pixels(torch.randn(2, 3, 32, 32))
    prompts = torch.randn(2, 3, states.shape[-1], requires_grad=True)
    plain = model.resume_from("image", 0, states, prompts=prompts)["pooled"]
    run = model.image.run
    model.image.run = lambda block, s, mask, n_prompts: checkpoint(
        run, block, s, mask, n_prompts, use_reentrant=False
    )
    again = model.resume_from("image", 0, states, prompts=prompts)["pooled"]
    again.sum().backward()
    assert torch.equal(again, plain)
    assert prompts.grad is not None


def test_a_family_s_own_fault_stops_the_build_and_blames_no_file(fast_path: Path) -> None:
    class Broken(StandIn):
        def preprocess(self, image: Image.Image) -> Any:
            raise ValueError("no such mean")

    with pytest.raises(
        BadOutput, match=r"stand_in could not preprocess image 'i\d+'.*no such mean"
    ):
        build(dataset(), Broken(), fast_path / "c", progress=False)
    cache = build(dataset(), StandIn(), fast_path / "c", progress=False)
    assert not cache.quarantined


def test_a_picture_lost_after_some_of_it_was_written_stops_a_repair(fast_path: Path) -> None:
    """Its streams must agree: numbers in one and NaN in another would be neither."""
    whole = dataset()
    cache = build(whole, StandIn(), fast_path / "c", batch_size=4, progress=False, chunk_bytes=100)
    row = int(cache.rows("image", ["i3"])[0])
    layout = cache.layout("image/patches")
    cache.chunks.file("image/patches", row // layout.chunk).unlink()

    def gone() -> Image.Image:
        raise OSError("picture 3 is cut off")

    records = tuple(ImageRecord(r.id, gone) if r.id == "i3" else r for r in whole.images)
    broken = Dataset(
        **{**{f: getattr(whole, f) for f in whole.__dataclass_fields__}, "images": records}
    )
    with pytest.raises(
        CacheError, match=r"'i3' cannot be used: .*could be when image/\w+ was written"
    ):
        build(broken, StandIn(), fast_path / "c", progress=False)
    digest = cache.header.digest
    assert build(whole, StandIn(), fast_path / "c", progress=False).header.digest == digest
    assert FeatureCache.open(fast_path / "c").verify().ok


def test_no_thread_outlives_a_build_that_failed(fast_path: Path) -> None:
    class Fails(StandIn):
        def encode_images(self, pixels: Any, blocks: Any = ()) -> Any:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError) as kept:
        build(dataset(60), Fails(), fast_path / "c", batch_size=2, progress=False)
    left = [t.name for t in threading.enumerate() if t.name.startswith(("decode", "stack"))]
    assert not left
    del kept


def test_the_weights_digest_covers_names_dtypes_and_shapes() -> None:
    def digest(**tensors: torch.Tensor) -> str:
        model = torch.nn.Module()
        for name, value in tensors.items():
            model.register_buffer(name, value)
        return weights_digest(model)

    value = torch.arange(6, dtype=torch.int32)
    found = [
        digest(a=value),
        digest(b=value),
        digest(a=value.reshape(2, 3)),
        digest(a=value.view(torch.float32)),
        digest(a=value[:3], b=value[3:]),
    ]
    assert len(set(found)) == len(found)


def test_a_renamed_directory_is_the_same_backbone(tmp_path: Path) -> None:
    clip.tiny(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = (clip.load(str(tmp_path / name)).spec for name in ("one", "two"))
    assert (one.checkpoint, two.checkpoint) == ("one", "two")
    assert one.fingerprint() == two.fingerprint()
    assert not [*differences(one, two)]


def test_the_side_on_which_texts_are_cut_is_in_the_fingerprint(tmp_path: Path) -> None:
    before = clip.tiny(tmp_path / "one").spec
    file = tmp_path / "one" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncation_side": "left"}))
    after = clip.load(str(tmp_path / "one")).spec
    assert [name for name, *_ in differences(before, after)] == ["tokenizer"]


@pytest.mark.parametrize("layer", [-9, 9])
def test_a_layer_that_llava_s_tower_lacks_is_refused(tmp_path: Path, layer: int) -> None:
    llava.tiny(tmp_path / "tiny")
    file = tmp_path / "tiny" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vision_feature_layer": layer}))
    with pytest.raises(CheckpointError, match=f"hidden state {layer}, but .* 0 … 3"):
        llava.load(str(tmp_path / "tiny"))


def test_a_llava_tokenizer_with_another_begin_is_refused(tmp_path: Path) -> None:
    llava.tiny(tmp_path / "tiny")
    file = tmp_path / "tiny" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["bos_token_id"] = 2
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"texts begin with 1 \(configured: 2\)"):
        llava.load(str(tmp_path / "tiny"))


def test_a_refusal_shows_where_two_long_texts_differ(fast_path: Path) -> None:
    spec = StandIn().spec
    long = "x" * 300
    first = StandIn()
    first.spec = spec.model_copy(update={"preprocessing": f"{long} mean 0.5"})
    build(dataset(), first, fast_path / "c", progress=False)
    second = StandIn()
    second.spec = spec.model_copy(update={"preprocessing": f"{long} mean 0.4"})
    with pytest.raises(
        CacheMismatch, match=r"preprocessing: expected …x+ mean 0\.4', found …x+ mean 0\.5'"
    ):
        build(dataset(), second, fast_path / "c", progress=False)


def test_a_method_without_a_joint_space_is_not_sent_to_build_one(fast_path: Path) -> None:
    class Blind(StandIn):
        streams = frozenset({"image/patches", "text/tokens"})

        def encode_images(self, pixels: Any, blocks: Any = ()) -> Any:
            return {"patches": super().encode_images(pixels, blocks)["patches"]}

    blind = Blind()
    dims = {k: v for k, v in blind.spec.dims.items() if k != "joint"}
    blind.spec = blind.spec.model_copy(update={"dims": dims})
    cache = build(dataset(), blind, fast_path / "c", progress=False)
    needs = Needs(frozenset({"image/pooled"}), frozenset())
    with pytest.raises(MissingStream, match="has no joint space, so no pooled embeddings"):
        check_streams(cache, needs, "zero_shot")


def test_a_negative_seed_of_the_order_writes_nothing(fast_path: Path) -> None:
    with pytest.raises(CacheError, match="order_seed -1 at least 0"):
        build(dataset(), StandIn(), fast_path / "c", order_seed=-1, progress=False)
    assert not (fast_path / "c").exists()


def test_a_build_says_how_many_texts_are_cut(
    fast_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(dataset(texts=["short", "x" * 50]), StandIn(), fast_path / "c", progress=False)
    assert "1 of 2 texts have more than 11 tokens and are cut" in caplog.text


@pytest.mark.parametrize("append", [False, True])
def test_texts_are_tokenised_to_plan_and_to_encode_and_not_to_count_what_is_cut(
    append: bool, fast_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only texts as long as the context are looked at again."""
    texts = [*(f"text {i}" for i in range(20)), "x" * 50, "y" * 9]

    class Counting(StandIn):
        tokenised, counted = 0, 0

        def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
            self.tokenised += len(texts)
            return super().tokenize(texts)

        def truncated(self, texts: Sequence[str]) -> int:
            self.counted += len(texts)
            return super().truncated(texts)

    if append:
        build(dataset(texts=texts[:5]), StandIn(), fast_path / "c", progress=False)
    backbone = Counting()
    build(dataset(texts=texts), backbone, fast_path / "c", append=append, progress=False)
    assert backbone.tokenised == 2 * (len(texts) - (5 if append else 0))
    assert backbone.counted == 2
    assert "1 of 22 texts have more than 11 tokens and are cut" in caplog.text


def test_a_data_set_without_texts_is_built(fast_path: Path) -> None:
    data = replace(dataset(2), texts=(), tasks=Tasks())
    cache = build(data, siglip2.tiny(), fast_path / "c", progress=False)
    assert cache.read("text/pooled").shape == (0, 48)
