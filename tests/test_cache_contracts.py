"""What a backbone, a loader and the conformance suite promise each other, where a mistake would be silent."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stand_in import StandIn, dataset
from torch.utils.checkpoint import checkpoint

from cache_builder import FeatureCache, build
from cache_builder.backbones import clip, llava, pe, siglip2
from cache_builder.backbones.checkpoints import CheckpointError
from cache_builder.datasets.base import Dataset, ImageRecord
from cache_builder.errors import BadOutput, CacheError, UnknownName
from cache_builder.readout import final_norm, project_patches
from cache_builder.testing import check_backbone


class Bare:
    """A backbone that shows nothing but what the contract names."""

    NAMES = (
        *("spec", "device", "streams", "depth", "model", "preprocess", "grid", "tokenize", "ends"),
        *("tokenize_words", "vocabulary", "truncated", "lengths", "encode_images", "encode_texts"),
        *("encode_words", "readout", "tower", "blocks", "embed_pixels", "embed_tokens"),
        *("encode_embedded", "resume_from"),
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
