"""CLIP through open_clip: OpenAI, LAION, DataComp, DFN, MetaCLIP, MobileCLIP2-B and -L, every ViT with a class token.

Library:   open_clip 3.3 (mlfoundations/open_clip), classes `CLIP` and `CustomTextCLIP` with native or timm ViTs.
Raw:       image = input of `visual.ln_post` (timm: of `trunk.norm`); text = input of `ln_final`. Prefix = class token.
Pooled:    norm(class token) @ proj; ln_final(row of the end-of-text token) @ text_projection.
Refused:   CoCa, HF text towers, ResNets and FastViTs, attention and average pooling, SigLIP2 and PE (own families).
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL.Image import Image
from torch import Tensor, nn

from cache_builder.backbones.base import Blocks, Pixels
from cache_builder.backbones.cards import Card, open_clip_card, skeleton
from cache_builder.backbones.checkpoints import CheckpointError, architecture, load_checkpoint
from cache_builder.backbones.open_clip_model import assembled
from cache_builder.backbones.scaling import Scaling, of_transform
from cache_builder.backbones.timm_image import TimmImage
from cache_builder.backbones.tiny_files import clip_tokenizer, write_tiny
from cache_builder.backbones.two_towers import TwoTowers

PUBLISHED = (
    "ViT-B-32/openai",
    "ViT-B-16/laion2b_s34b_b88k",
    "ViT-L-14/openai",
    "ViT-L-14-336/openai",
    "ViT-L-14-quickgelu/metaclip_fullcc",
    "ViT-H-14-378-quickgelu/dfn5b",
    "MobileCLIP2-B/dfndr2b",
    "MobileCLIP2-L-14/dfndr2b",
)
"""Checkpoints that people use; `headstart list backbones` computes what their tokens cost. Any other works as well."""

TINY: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 259,
        "width": 40,
        "heads": 4,
        "layers": 3,
        "hf_tokenizer_name": "beside this file",
        "tokenizer_kwargs": {"clean": "lower"},
    },
}
"""The architecture of `tiny`; all sizes differ, so that a transposition cannot pass."""

DEMO = Path(__file__).parent.parent / "demo" / "clip"
"""The bundled tiny CLIP, called `clip:demo`."""


def load(
    checkpoint: str, *, dtype: str = "float32", device: str = "cpu", compiled: bool = False
) -> TwoTowers:
    """A frozen CLIP.

    Args:
        checkpoint: `arch/tag`, `arch/tag@file`, a directory, or `demo`.
        dtype: compute type, "float32", "bfloat16" or "float16".
        device: torch's name of it.
        compiled: run the blocks through torch.compile.

    Raises:
        UnknownName: no such architecture, tag or dtype.
        CheckpointError: not a CLIP of this shape, or not loadable exactly as asked.
    """
    source = str(DEMO) if checkpoint == "demo" else checkpoint
    config = architecture(source)
    if config is not None:
        refuse_other_shapes(config, checkpoint)
    loaded = load_checkpoint(source, "clip", dtype=dtype, device=device)
    name = f"clip:{checkpoint}"
    tower = TimmImage if hasattr(loaded.visual, "trunk") else NativeImage
    image = tower(loaded.visual, loaded.transform, name)
    return assembled("clip", checkpoint, loaded, image, compiled=compiled)


def card(checkpoint: str) -> Card:
    """Shapes of what `load` would give; reads no weights and needs no network.

    Raises:
        UnknownName: no such architecture.
        CheckpointError: not a CLIP of this shape.
    """
    source = str(DEMO) if checkpoint == "demo" else checkpoint
    config = architecture(source)
    if config is not None:
        refuse_other_shapes(config, checkpoint)
    model = skeleton(source, "clip")
    tower = TimmImage if hasattr(model.visual, "trunk") else NativeImage
    return open_clip_card(model, tower(model.visual, None, f"clip:{checkpoint}"))


def tiny(directory: Path | None = None) -> TwoTowers:
    """A random-weight CLIP of the true class: 16 patches × 48, text width 40, joint space 24, 259 byte tokens.

    Args:
        directory: where to leave its files, so that `load` can be tried on them; a temporary one by default.
    """
    with tempfile.TemporaryDirectory() as scratch:
        where = directory or Path(scratch) / "tiny"
        write_tiny(where, open_clip.CLIP, TINY, clip_tokenizer(TINY["text_cfg"]["context_length"]))
        return load(str(where))


class NativeImage:
    """An `ImageTower` over open_clip's own `VisionTransformer` with a class token.

    Args:
        visual: open_clip's tower.
        transform: open_clip's evaluation transform.
        name: of the checkpoint, for messages.
    """

    pools = True
    ragged = False
    n_prefix = 1
    kernel = "nn.MultiheadAttention"

    def __init__(self, visual: Any, transform: Any, name: str) -> None:
        if visual.patch_dropout is not None and not isinstance(visual.patch_dropout, nn.Identity):
            raise CheckpointError(
                f"{name} drops patches while training, which open_clip does not switch off here"
            )
        self.visual, self.transform = visual, transform
        self.module: nn.Module = visual.transformer
        self.blocks: Blocks = visual.transformer.resblocks

    @property
    def dims(self) -> dict[str, int]:
        """Its part of `BackboneSpec.dims`."""
        rows, columns = self.visual.grid_size
        return {
            "image_size": self.visual.image_size[0],
            "patches": rows * columns,
            "prefix": 1,
            "image_width": self.visual.ln_post.normalized_shape[0],
            "joint": self.visual.proj.shape[1],
        }

    @property
    def activation(self) -> str:
        """Of the feed-forward part."""
        return repr(self.visual.transformer.resblocks[0].mlp.gelu)

    def preprocess(self, image: Image) -> Pixels:
        """open_clip's evaluation transform, pixel for pixel."""
        return self.transform(image)

    def scaling(self) -> Scaling:
        """How open_clip scales 8-bit levels."""
        return of_transform(self.transform)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """The same for every picture: it is resized to one size."""
        del width, height
        rows, columns = self.visual.grid_size
        return rows, columns

    def embed(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Class token and patches with positions, through `ln_pre`."""
        return self.visual._embeds(pixels), None

    def run(self, block: nn.Module, states: Tensor, mask: Tensor | None, n_prompts: int) -> Tensor:
        """One residual block; it knows no positions, so prompts are rows like others."""
        del n_prompts
        assert mask is None
        return block(states)

    def pool(self, raw: Tensor, mask: Tensor | None) -> Tensor:
        """Final norm, class token, projection: in the library's order."""
        del mask
        pooled, _ = self.visual._pool(raw)
        return pooled @ self.visual.proj

    def readout(self) -> dict[str, Tensor]:
        """Final norm and projection."""
        return {
            "norm.weight": self.visual.ln_post.weight,
            "norm.bias": self.visual.ln_post.bias,
            "eps": torch.tensor(self.visual.ln_post.eps),
            "proj": self.visual.proj,
        }


def refuse_other_shapes(config: Mapping[str, Any], checkpoint: str) -> None:
    """A `CheckpointError` that names what is different, for every open_clip architecture this file cannot read."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    timm = vision.get("timm_model_name", "")
    faults = {
        "a CoCa, which pools by cross-attention": "multimodal_cfg" in config
        or text.get("embed_cls"),
        f"built on the Hugging Face text tower {text.get('hf_model_name')}": "hf_model_name"
        in text,
        "a SigLIP model, of family siglip2": "siglip" in timm,
        "a Perception Encoder, of family pe": timm.startswith("vit_pe"),
        f"built on the timm tower {timm}, pooled by {vision.get('timm_pool')}": timm
        and vision.get("timm_pool") != "token",
        "a ResNet, whose maps are not tokens": isinstance(vision.get("layers"), list),
        "pooled by attention": vision.get("attentional_pool"),
        f"pooled by {vision.get('pool_type')} over the patches": vision.get("pool_type", "tok")
        != "tok",
        "normed after pooling": vision.get("final_ln_after_pool")
        or text.get("final_ln_after_pool"),
        f"pooled at the {text.get('pool_type')} text position": text.get("pool_type", "argmax")
        not in ("argmax", "eos"),
        "without a text projection": text.get("proj_type", "linear") != "linear",
    }
    found = [what for what, here in faults.items() if here]
    if found:
        raise CheckpointError(
            f"clip:{checkpoint} is {found[0]}; family clip reads ViTs with a class token, and texts pooled at their end"
        )
