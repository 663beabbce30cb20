"""Every family, and every shape of it that its towers read, in small; and the library's own numbers beside ours.

`KINDS` maps a name to a function that writes the published format into a directory; `load` reads it back through the
family. `library` runs the library's public calls, and takes its inner tensors by hooks of its own: no call of ours.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import CustomTextCLIP
from PIL import Image
from timm.models import generate_default_cfgs, register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from torch import Tensor
from torch.utils.data import default_collate

from cache_builder.backbones import clip, llava, pe, siglip2, small_trunks
from cache_builder.backbones.hub_files import save_model
from cache_builder.backbones.tiny_files import (
    END,
    PAD,
    START,
    _byte_tokenizer,
    clip_tokenizer,
    perturb,
    write_tiny,
)
from cache_builder.backbones.two_towers import TwoTowers

TEXTS = ["a red mug", "A photo of two ancient buildings!", "!!", "", "x" * 45]
"""Differing lengths, capitals, ids that look like padding, nothing, and one that fills or nearly fills a context."""

WORDS = ["red", "ancient building", "cup"]

FAMILIES: dict[str, Any] = {"clip": clip, "siglip2": siglip2, "pe": pe, "llava": llava}

default_cfgs = generate_default_cfgs(
    {
        name: {"input_size": (3, 32, 32), "num_classes": 0, "fixed_input_size": True}
        for name in ("vit_mini_patch8_clip_32", "vit_pe_core_mini_bare_patch8_32")
    }
)


@register_model
def vit_mini_patch8_clip_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """As timm's `vit_large_patch14_clip_224`, MobileCLIP2-L's trunk: class token, norm before the blocks, no pool."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    shape |= {"pre_norm": True, "norm_layer": partial(torch.nn.LayerNorm, eps=1e-5)}
    return _create_vision_transformer(
        "vit_mini_patch8_clip_32", pretrained=pretrained, **{**shape, **kwargs}
    )


@register_model
def vit_pe_core_mini_bare_patch8_32(pretrained: bool = False, **kwargs: Any) -> Eva:
    """As timm's `vit_pe_core_gigantic_patch14_448`: no class token."""
    bare = {"class_token": False, **kwargs}
    return small_trunks._pe("vit_pe_core_mini_bare_patch8_32", 32, 48, 2, 4, pretrained, bare)


def merged(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of a nested configuration with some keys changed."""
    both = {k: {**config.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()}
    return {**config, **both}


def write_eos(directory: Path) -> None:
    """MetaCLIP 2: pooled at the end of text, which is not the largest id; padding is not 0."""
    tokenizer = _byte_tokenizer(77, [START, PAD, END, "<unk>"], [], f"{START} $A {END}")
    text = {"pool_type": "eos", "eos_id": 2, "vocab_size": len(tokenizer)}
    write_tiny(directory, open_clip.CLIP, merged(clip.TINY, text_cfg=text), tokenizer)


def write_mobile(directory: Path) -> None:
    """MobileCLIP2-L: a timm ViT pooled at its class token with a biased head; a text tower without mask, argmax."""
    vision = {"image_size": 32, "timm_model_name": "vit_mini_patch8_clip_32"}
    vision |= {"timm_model_pretrained": False, "timm_pool": "token", "timm_proj": None}
    config = merged(clip.TINY, text_cfg={"no_causal_mask": True}, custom_text=True)
    config = {**config, "quick_gelu": False, "vision_cfg": vision}
    plain = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}
    write_tiny(directory, CustomTextCLIP, config, clip_tokenizer(77), plain)


def write_bare(directory: Path) -> None:
    """PE bigG: no class token."""
    vision = {"timm_model_name": "vit_pe_core_mini_bare_patch8_32"}
    write_tiny(
        directory,
        CustomTextCLIP,
        merged(pe.TINY, vision_cfg=vision),
        clip_tokenizer(48),
        {"interpolation": "bilinear", "resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3},
    )


def write_interleave(directory: Path) -> None:
    """LLaVA with a SigLIP tower: no class token, layer −1; the words of a Qwen 2, whose texts have no begin."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipImageProcessor

    tokenizer = _byte_tokenizer(64, [PAD, START, END], [], "$A", ("input_ids", "attention_mask"))
    vision = {"model_type": "siglip_vision_model", "hidden_size": 48, "intermediate_size": 96}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
    vision |= {"patch_size": 8, "vision_use_head": False}
    text = {"model_type": "qwen2", "vocab_size": 300, "hidden_size": 40, "intermediate_size": 80}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=3,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        perturb(model)
    save_model(model, directory)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@dataclass(frozen=True)
class Kind:
    """A family, a writer of a directory in its format, and what the directory is called in `spec.checkpoint`."""

    family: str
    write: Callable[[Path], object]


KINDS = {
    "clip": Kind("clip", clip.tiny),
    "clip-eos": Kind("clip", write_eos),
    "clip-mobile": Kind("clip", write_mobile),
    "pe": Kind("pe", pe.tiny),
    "pe-bare": Kind("pe", write_bare),
    "siglip2": Kind("siglip2", siglip2.tiny),
    "siglip2-hub": Kind("siglip2", partial(siglip2.tiny_hub, naflex=False)),
    "siglip2-naflex": Kind("siglip2", siglip2.tiny_hub),
    "llava": Kind("llava", llava.tiny),
    "llava-siglip": Kind("llava", write_interleave),
}

OPEN_CLIP = ("clip", "clip-eos", "clip-mobile", "pe", "pe-bare", "siglip2")
HUB = ("siglip2-hub", "siglip2-naflex")
LLAVA = ("llava", "llava-siglip")
POOLING = (*OPEN_CLIP, *HUB)
WHOLE = ("clip-mobile", "siglip2", *HUB)
"""Kinds whose text tower has no mask, so that padding takes part."""


@cache
def directory(kind: str) -> Path:
    """The kind's files, written once; whoever changes them copies them first."""
    made = Path(tempfile.mkdtemp(prefix="headstart-kinds-"))
    atexit.register(shutil.rmtree, made)
    KINDS[kind].write(made / "tiny")
    return made / "tiny"


@cache
def model(kind: str) -> TwoTowers:
    """The kind's model, loaded once; whoever changes it loads another."""
    return load(kind, directory(kind))


def load(kind: str, directory: Path, **options: Any) -> TwoTowers:
    """The kind's model from a directory of it, through its family's `load`."""
    return FAMILIES[KINDS[kind].family].load(str(directory), **options)


def pictures() -> list[Image.Image]:
    """Five pictures of noise, of awkward sizes."""
    rng = np.random.default_rng(3)
    sizes = [(45, 61), (80, 33), (32, 32), (224, 303), (5, 7)]
    return [Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]


def stacked(backbone: TwoTowers, images: Sequence[Image.Image] = ()) -> Any:
    """Pixels of pictures, through the backbone's transform."""
    return default_collate([backbone.preprocess(i) for i in images or pictures()])


def final_norm(backbone: TwoTowers, side: str) -> torch.nn.Module:
    """The module whose input is what the cache calls raw."""
    image: Any = backbone.image
    text: Any = backbone.text
    if side == "text":
        for holder, name in (
            (getattr(text, "text", None), "ln_final"),
            (getattr(text, "text", None), "final_layer_norm"),
            (getattr(text, "lm", None), "norm"),
        ):
            if hasattr(holder, name):
                return getattr(holder, name)
    if hasattr(image, "visual"):
        return image.visual.ln_post
    if hasattr(image, "trunk"):
        return image.trunk.norm
    return image.vision.post_layernorm


class Seen:
    """While it is entered, records the input of modules by name."""

    def __init__(self, modules: dict[str, torch.nn.Module]) -> None:
        self.modules, self.states, self.hooks = modules, dict[str, Tensor](), list[Any]()

    def __enter__(self) -> dict[str, Tensor]:
        for name, module in self.modules.items():

            def note(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
                self.states[name] = args[0] if args else kwargs["hidden_states"]

            self.hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
        return self.states

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def hub_pixels(pixels: Any) -> dict[str, Tensor]:
    """Pixels by the names of transformers' models."""
    if isinstance(pixels, Tensor):
        return {"pixel_values": pixels}
    return {
        "pixel_values": pixels["pixels"],
        "pixel_attention_mask": pixels["mask"],
        "spatial_shapes": pixels["shape"],
    }


@torch.no_grad()
def library(kind: str, backbone: TwoTowers, pixels: Any, ids: Tensor) -> dict[str, Tensor]:
    """The library's own: raw rows, block inputs, pooled embeddings and logits, as far as it has them."""
    model: Any = backbone.model
    watched = {f"image/block_{k}": b for k, b in enumerate(backbone.blocks("image"))}
    watched |= {f"text/block_{k}": b for k, b in enumerate(backbone.blocks("text"))}
    watched |= {"text/raw": final_norm(backbone, "text")}
    depth = backbone.depth["image"]
    if kind not in LLAVA:
        watched |= {"image/raw": final_norm(backbone, "image")}
    elif kind == "llava":  # the last block is loaded, and not run by us
        watched |= {"image/raw": model.model.vision_tower.encoder.layers[depth]}
    else:
        watched |= {"image/raw": model.model.vision_tower.post_layernorm}
    with Seen(watched) as states:
        if kind in OPEN_CLIP:
            found = {"image/pooled": model.encode_image(pixels)}
            found |= {"text/pooled": model.encode_text(ids)}
            found |= {"logits": model.get_logits(pixels, ids)[0]}
        elif kind in HUB:
            given = hub_pixels(pixels)
            found = {"image/pooled": model.get_image_features(**given).pooler_output}
            found |= {"text/pooled": model.get_text_features(input_ids=ids).pooler_output}
            found |= {"logits": model(input_ids=ids, **given).logits_per_image}
        else:
            features = model.model.get_image_features(pixel_values=pixels).pooler_output
            found = {"image/projected": torch.stack(list(features))}
            mask = torch.arange(ids.shape[1]) < backbone.lengths(ids)[:, None]
            model.model.language_model(input_ids=ids, attention_mask=mask.long())
    states |= {f"image/block_{depth}": states["image/raw"]}
    return {**found, **states}


def entering(kind: str, model: TwoTowers, side: str, m: int) -> tuple[Tensor, Any, Tensor, int]:
    """What enters block 0, the mask, where texts are pooled, and where prompts stand; room for m rows is left."""
    if side == "image":
        pixels = stacked(model)
        mask = pixels["mask"].bool() if isinstance(pixels, dict) else None
        return model.embed_pixels(pixels)[0], mask, torch.tensor(0), model.image.n_prefix
    assert model.text is not None
    ids = model.tokenize(["a red mug", "two"])
    width = model.spec.dims["context"] - m if kind in WHOLE else ids.shape[1] - m
    end = model.text.tokens.ends(ids[:, :width])
    return model.embed_tokens(ids[:, :width]), None, end, model.text.tokens.first_free


def largest(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; shapes must be equal."""
    assert got.shape == expected.shape, f"{tuple(got.shape)} against {tuple(expected.shape)}"
    return float((got.detach().float() - expected.detach().float()).abs().max())


def reconfigure(directory: Path, change: Callable[[dict[str, Any]], None], name: str) -> Path:
    """Change a JSON file of a directory in place."""
    file = directory / name
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    return directory
