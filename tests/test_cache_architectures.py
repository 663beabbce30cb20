"""Published architectures at their true width: the towers read them, and their sizes are those of the published models.

All of them are made on torch's meta device, which has shapes and no numbers. Those whose trunk is another class, or
computes something the small models do not, are also run: two of their blocks, with random weights.
"""

from collections.abc import Iterator
from typing import Any

import kinds
import open_clip
import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import SimpleTokenizer

from cache_builder.backbones import clip
from cache_builder.backbones.checkpoints import CheckpointError
from cache_builder.backbones.open_clip_text import OpenClipText
from cache_builder.backbones.timm_image import TimmImage
from cache_builder.backbones.tiny_files import perturb
from cache_builder.readout import pool_image

DIMS = {
    # name: px, N, W, prefix, D, L, V, blocks of image and text, M parameters of the image tower and of all
    "ViT-B-32": (224, 49, 768, 1, 512, 77, 512, 12, 12, 88, 151),
    "ViT-B-16": (224, 196, 768, 1, 512, 77, 512, 12, 12, 86, 150),
    "ViT-L-14": (224, 256, 1024, 1, 768, 77, 768, 24, 12, 304, 428),
    "ViT-L-14-336": (336, 576, 1024, 1, 768, 77, 768, 24, 12, 304, 428),
    "ViT-H-14": (224, 256, 1280, 1, 1024, 77, 1024, 32, 24, 632, 986),
    "ViT-H-14-378-quickgelu": (378, 729, 1280, 1, 1024, 77, 1024, 32, 24, 633, 987),
    "ViT-H-14-worldwide": (224, 256, 1280, 1, 1024, 77, 1024, 32, 24, 632, 1859),
    "MobileCLIP2-B": (224, 196, 768, 1, 512, 77, 512, 12, 12, 86, 150),
    "MobileCLIP2-L-14": (224, 256, 1024, 1, 768, 77, 768, 24, 12, 304, 428),
    "EVA02-L-14-336": (336, 576, 1024, 1, 768, 77, 768, 24, 12, 304, 428),
    "ViT-B-32-SigLIP2-256": (256, 64, 768, 0, 768, 64, 768, 12, 12, 95, 377),
    "ViT-B-16-SigLIP2": (224, 196, 768, 0, 768, 64, 768, 12, 12, 93, 375),
    "ViT-B-16-SigLIP2-256": (256, 256, 768, 0, 768, 64, 768, 12, 12, 93, 375),
    "ViT-B-16-SigLIP2-384": (384, 576, 768, 0, 768, 64, 768, 12, 12, 93, 375),
    "ViT-B-16-SigLIP2-512": (512, 1024, 768, 0, 768, 64, 768, 12, 12, 94, 376),
    "ViT-L-16-SigLIP2-256": (256, 256, 1024, 0, 1024, 64, 1024, 24, 24, 316, 882),
    "ViT-L-16-SigLIP2-384": (384, 576, 1024, 0, 1024, 64, 1024, 24, 24, 316, 882),
    "ViT-L-16-SigLIP2-512": (512, 1024, 1024, 0, 1024, 64, 1024, 24, 24, 317, 882),
    "ViT-SO400M-14-SigLIP2": (224, 256, 1152, 0, 1152, 64, 1152, 27, 27, 428, 1135),
    "ViT-SO400M-14-SigLIP2-378": (378, 729, 1152, 0, 1152, 64, 1152, 27, 27, 428, 1136),
    "ViT-SO400M-16-SigLIP2-384": (384, 576, 1152, 0, 1152, 64, 1152, 27, 27, 428, 1136),
    "ViT-SO400M-16-SigLIP2-512": (512, 1024, 1152, 0, 1152, 64, 1152, 27, 27, 429, 1137),
    "ViT-gopt-16-SigLIP2-256": (256, 256, 1536, 0, 1536, 64, 1152, 40, 27, 1163, 1871),
    "ViT-gopt-16-SigLIP2-384": (384, 576, 1536, 0, 1536, 64, 1152, 40, 27, 1164, 1872),
    "PE-Core-T-16-384": (384, 576, 192, 1, 512, 32, 512, 12, 12, 6, 70),
    "PE-Core-S-16-384": (384, 576, 384, 1, 512, 32, 512, 12, 12, 24, 87),
    "PE-Core-B-16": (224, 196, 768, 1, 1024, 32, 1024, 12, 24, 94, 448),
    "PE-Core-L-14-336": (336, 576, 1024, 1, 1024, 32, 1024, 24, 24, 317, 671),
    "PE-Core-bigG-14-448": (448, 1024, 1536, 0, 1280, 72, 1280, 50, 24, 1882, 2419),
}

TRUNKS = {
    # name → what is unlike the small models
    "ViT-gopt-16-SigLIP2-384": "GELU by tanh, feed-forward part of another width",
    "ViT-SO400M-14-SigLIP2-378": "a patch that does not divide the picture",
    "ViT-B-32-SigLIP2-256": "GELU by tanh",
    "PE-Core-L-14-336": "576 patches, rotary",
    "PE-Core-bigG-14-448": "no class token, rotary, another number of heads",
    "PE-Core-T-16-384": "positions resampled",
    "MobileCLIP2-B": "a convolutional stem",
    "MobileCLIP2-L-14": "a norm before the blocks",
    "EVA01-g-14": "no rotary positions, biases apart",
    "EVA02-L-14-336": "rotary with absolute positions, gated feed-forward part",
    "EVA02-E-14": "norms behind the parts of a block",
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return open_clip.create_model(name, load_weights=False, device="meta").eval()


@pytest.mark.parametrize("name", DIMS)
def test_a_published_architecture_has_its_published_sizes(name: str) -> None:
    model = on_meta(name)
    tower = TimmImage if hasattr(model.visual, "trunk") else clip.NativeImage
    image = tower(model.visual, None, name)
    text = model.text if hasattr(model, "text") else model
    found = {**image.dims, "blocks": len(image.blocks)}
    wanted = ("image_size", "patches", "image_width", "prefix", "joint")
    got = [found[key] for key in wanted]
    got += [text.context_length, text.ln_final.normalized_shape[0]]
    got += [len(image.blocks), len(text.transformer.resblocks)]
    got += [round(sum(p.numel() for p in m.parameters()) / 1e6) for m in (model.visual, model)]
    assert tuple(got) == DIMS[name]
    if "tokenizer_name" not in str(
        open_clip.get_model_config(name)
    ):  # CLIP's own is in the package
        tower = OpenClipText(model, SimpleTokenizer(context_length=text.context_length), name)
        assert tower.dims == {"text_width": got[6], "context": got[5]}
        assert (text.attn_mask is None) == (name == "MobileCLIP2-L-14") == tower.whole


@pytest.mark.parametrize("name", TRUNKS)
def test_two_blocks_of_a_published_trunk_are_read_exactly(name: str) -> None:
    torch.manual_seed(0)
    config: Any = open_clip.get_model_config(name)
    vision, joint = config["vision_cfg"], config["embed_dim"]
    with torch.device("meta"):
        visual = TimmModel(
            vision["timm_model_name"],
            joint,
            image_size=vision["image_size"],
            pool=vision["timm_pool"],
            proj=vision["timm_proj"],
        )
    visual.trunk = timm.create_model(
        vision["timm_model_name"],
        num_classes=0 if vision["timm_proj"] == "none" else joint,
        global_pool=vision["timm_pool"],
        depth=2,
    )
    visual.eval().requires_grad_(False)
    perturb(visual.trunk)
    image = TimmImage(visual, None, name)
    pixels = torch.randn(1, 3, image.size, image.size)
    raw, mask = image.embed(pixels)
    for block in image.blocks:
        raw = image.run(block, raw, mask, 0)
    norm: Any = visual.trunk.norm
    with kinds.Seen({"raw": norm}) as seen:
        pooled = visual(pixels)
    assert torch.equal(raw, seen["raw"])
    assert raw.shape[1] == image.n_prefix + image.shape[0] * image.shape[1]
    assert torch.equal(image.pool(raw, None), pooled)
    r = {f"image/{key}": value for key, value in image.readout().items()}
    prefix = raw[:, : image.n_prefix] if image.n_prefix else None
    assert kinds.largest(pool_image(r, prefix, raw[:, image.n_prefix :]), pooled) == 0.0
    assert pooled.std() > 0.01


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("vit_base_patch16_224", "pooled by avg"),
        ("fastvit_mci0", "FastVit"),
        ("vit_medium_patch16_reg4_gap_256", "pooled by avg"),
    ],
)
def test_another_trunk_is_refused_by_what_it_is(name: str, what: str) -> None:
    with torch.device("meta"):
        visual = TimmModel(name, 512, pool="avg", proj="")
    with pytest.raises(CheckpointError, match=what):
        TimmImage(visual, None, "clip:some")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda text: setattr(text, "use_pad_mask", True), "masks padding"),
        (lambda text: setattr(text, "text_projection", None), "has no projection"),
        (lambda text: setattr(text, "cls_emb", text.positional_embedding), "appends a class token"),
        (lambda text: delattr(text, "ln_final"), "is a TextTransformer"),
    ],
)
def test_another_text_tower_is_refused_by_what_it_is(change: Any, what: str) -> None:
    model = on_meta("PE-Core-T-16-384")
    change(model.text)
    with pytest.raises(CheckpointError, match=f"pe:some: its text tower {what}"):
        OpenClipText(model, SimpleTokenizer(context_length=32), "pe:some")
