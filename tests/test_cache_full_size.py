"""One published architecture per family at full size, saved and loaded in its published format, with random weights.

Whatever depends on width, depth, the number of heads or CLIP's own tokenizer is in it. SigLIP2's and LLaVA's tokenizers
are replaced by ones of bytes, since theirs have to be downloaded; SigLIP2 keeps its 256,000 embeddings. LLaVA has its
whole vision tower, ViT-L/14 at 336 pixels, and a language model of two narrow layers.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kinds
import open_clip
import pytest
import torch
from kinds import largest, library, stacked
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from cache_builder.backbones import clip, llava, pe, siglip2
from cache_builder.backbones.hub_files import save_model
from cache_builder.backbones.tiny_files import gemma_tokenizer, llama_tokenizer
from cache_builder.readout import logits, pool_image, pool_text, project_patches

pytestmark = pytest.mark.slow

TEXTS = ["a red mug", "A photo of two ancient buildings!"]


def fill(model: nn.Module) -> nn.Module:
    """Numbers for a model made on the meta device, from one block of a million: a true draw takes ten times as long.

    Norms near one, all else near zero and small enough for 24 blocks.
    """
    block = torch.randn(999_983, generator=torch.Generator().manual_seed(0))
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        n, value = parameter.numel(), parameter.data.view(-1)
        for start in range(0, n, len(block)):
            value[start : start + len(block)] = block[: n - start]
        if parameter.ndim <= 1 or "probe" in name or "latent" in name:
            gain = parameter.ndim == 1 and name.endswith("weight")  # of a norm
            parameter.data.mul_(0.2).add_(float(gain))
        else:
            parameter.data.mul_(0.5 / parameter.shape[-1] ** 0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):
            parameter.data.fill_(4.6)  # a trained model's: 100
    return model


def write_open_clip(arch: str, directory: Path, tokenizer: Any = None, **pixels: Any) -> None:
    """A published architecture in open_clip's format; a tokenizer of ours is put beside it if given."""
    config: Any = json.loads(json.dumps(open_clip.get_model_config(arch)))
    with torch.device("meta"):
        model = open_clip.create_model(arch, load_weights=False, device="meta")
    directory.mkdir()
    save_file(fill(model).state_dict(), directory / "open_clip_model.safetensors")
    if tokenizer is not None:
        config["text_cfg"]["hf_tokenizer_name"] = "beside this file"
        tokenizer.save_pretrained(directory)
    whole = {"model_cfg": config, "preprocess_cfg": pixels}
    (directory / "open_clip_config.json").write_text(json.dumps(whole))


def write_llava(directory: Path) -> None:
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = llama_tokenizer(64)
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 48}
    text |= {"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config: Any = LlavaConfig(text_config=text, image_token_index=3)  # its defaults are LLaVA-1.5's
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1024, 24)
    torch.manual_seed(0)
    save_model(LlavaForConditionalGeneration(config), directory)
    size = {"height": 336, "width": 336}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(directory)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Gone after the test: pytest keeps the folders of three runs, and these are of gigabytes."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made) / "model"


HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}

MODELS: dict[str, tuple[Any, Callable[[Path], None]]] = {
    "clip ViT-B-32": (clip, lambda d: write_open_clip("ViT-B-32", d, resize_mode="shortest")),
    "siglip2 ViT-B-32-SigLIP2-256": (
        siglip2,
        lambda d: write_open_clip("ViT-B-32-SigLIP2-256", d, gemma_tokenizer(64), **HALF),
    ),
    "pe PE-Core-T-16-384": (
        pe,
        lambda d: write_open_clip("PE-Core-T-16-384", d, interpolation="bilinear", **HALF),
    ),
    "pe PE-Core-B-16": (
        pe,
        lambda d: write_open_clip("PE-Core-B-16", d, interpolation="bilinear", **HALF),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_full_size_model_gives_the_library_s_numbers(name: str, folder: Path) -> None:
    family, write = MODELS[name]
    write(folder)
    model = family.load(str(folder))
    pixels, ids = stacked(model, pictures(2)), model.tokenize(TEXTS)
    theirs = library("clip", model, pixels, ids)
    depth, r = model.depth["image"], model.readout()
    image, text = model.encode_images(pixels, [1, depth // 2, depth]), model.encode_texts(ids)
    for k in (1, depth // 2, depth):
        assert torch.equal(image[f"block_{k}"], theirs[f"image/block_{k}"])
    resumed = model.resume_from("image", depth // 2, image[f"block_{depth // 2}"])
    last = text["tokens"][torch.arange(len(ids)), text["length"] - 1]
    pooled = pool_image(r, image.get("prefix"), image["patches"]), pool_text(r, last)
    for got in (image["pooled"], resumed["pooled"], pooled[0]):
        assert torch.equal(got, theirs["image/pooled"])
    for got in (text["pooled"], pooled[1]):
        assert torch.equal(got, theirs["text/pooled"])
    assert torch.equal(logits(r, *pooled), theirs["logits"])
    assert theirs["logits"].std() > 1e-3  # rounding is 5e-7 here


@torch.no_grad()
def test_a_full_size_llava_tower_gives_the_library_s_numbers(folder: Path) -> None:
    write_llava(folder)
    model = llava.load(str(folder))
    module: Any = model.model
    assert model.depth == {"image": 23, "text": 2}
    pixels, ids = stacked(model, pictures(1)), model.tokenize(TEXTS)
    theirs = library("llava", model, pixels, ids)
    ours = model.encode_images(pixels, [1, 23])
    assert ours["patches"].shape == (1, 576, 1024)
    for k in (1, 23):
        assert torch.equal(ours[f"block_{k}"], theirs[f"image/block_{k}"])
    assert torch.equal(project_patches(model.readout(), ours["patches"]), theirs["image/projected"])
    words: Tensor = model.encode_words(ids[:1])["states"]
    normed = module.model.language_model(input_ids=ids[:1]).last_hidden_state
    assert largest(module.model.language_model.norm(words), normed) == 0.0


def pictures(n: int) -> list[Image.Image]:
    return kinds.pictures()[2 : 2 + n]
