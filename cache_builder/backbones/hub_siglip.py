"""SigLIP2 in transformers: fixed resolution (`SiglipModel`) and NaFlex (`Siglip2Model`). No family itself.

NaFlex        480 × 640 → 14 × 18 = 252 of at most 256 patches     rows behind the picture's own are padding: masked
p 16          square    → 16 × 16                                  while they are encoded, never stored
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

from cache_builder.backbones.base import Blocks, Pixels
from cache_builder.backbones.checkpoints import CheckpointError
from cache_builder.backbones.open_clip_text import from_hub_tokenizer, placed
from cache_builder.backbones.scaling import Scaling, of_processor
from cache_builder.backbones.timm_image import pool_readout
from cache_builder.errors import UnknownName


class HubSiglipImage:
    """An `ImageTower` over transformers' `SiglipVisionModel` or `Siglip2VisionModel`.

    Args:
        vision: the tower.
        processor: its image processor, which of NaFlex keeps the picture's shape.
        name: of the checkpoint, for messages.
    """

    pools = True
    n_prefix = 0

    def __init__(self, vision: Any, processor: Any, name: str) -> None:
        self.vision, self.processor = vision, processor
        self.ragged = vision.config.model_type == "siglip2_vision_model"
        if not vision.use_head:
            raise CheckpointError(f"{name} has no pooling head, so nothing can be matched with it")
        self.module: nn.Module = vision.encoder
        self.blocks: Blocks = vision.encoder.layers
        patch = processor.patch_size if self.ragged else vision.config.patch_size
        if patch != vision.config.patch_size:
            raise CheckpointError(
                f"{name}: its processor cuts patches of {patch} pixels, its tower reads {vision.config.patch_size}"
            )

    @property
    def dims(self) -> dict[str, int]:
        """Its part of `BackboneSpec.dims`; NaFlex bounds the patches instead of fixing them."""
        config = self.vision.config
        if self.ragged:
            size = {"patch_size": config.patch_size, "most_patches": self.most_patches}
        else:
            side = config.image_size // config.patch_size
            size = {"image_size": config.image_size, "patches": side * side}
        return {**size, "prefix": 0, "image_width": config.hidden_size, "joint": config.hidden_size}

    @property
    def most_patches(self) -> int:
        """Patches of the largest picture."""
        return int(self.processor.max_num_patches)

    @property
    def activation(self) -> str:
        """Of the feed-forward part."""
        return repr(self.vision.encoder.layers[0].mlp.activation_fn)

    def preprocess(self, image: Image) -> Pixels:
        """The processor's own result for one picture."""
        found = self.processor(images=[image], return_tensors="pt")
        pixels = found["pixel_values"][0]
        if not self.ragged:
            return pixels
        mask, shape = found["pixel_attention_mask"][0], found["spatial_shapes"][0]
        return {"pixels": pixels, "mask": mask, "shape": torch.as_tensor(shape)}

    def scaling(self) -> Scaling:
        """How the processor scales 8-bit levels; `UnknownName` of NaFlex."""
        if self.ragged:
            raise UnknownName(
                "pictures of this backbone keep their shape, so image/pixels has no fixed size"
            )
        return of_processor(self.processor)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of that size."""
        config = self.vision.config
        if not self.ragged:
            side = config.image_size // config.patch_size
            return side, side
        patch = config.patch_size
        h, w = get_image_size_for_max_num_patches(height, width, patch, self.most_patches)
        return h // patch, w // patch

    def embed(self, pixels: Any) -> tuple[Tensor, Tensor | None]:
        """Patches with positions, and which of them are real where pictures keep their shape."""
        if not self.ragged:
            return self.vision.embeddings(pixels), None
        states = self.vision.embeddings(pixels["pixels"], pixels["shape"])
        return states, pixels["mask"].bool()

    def run(self, block: nn.Module, states: Tensor, mask: Tensor | None, n_prompts: int) -> Tensor:
        """One layer, padding masked."""
        del n_prompts
        whole = None
        if mask is not None:
            whole = create_bidirectional_mask(
                config=self.vision.config, inputs_embeds=states, attention_mask=mask
            )
        return block(states, attention_mask=whole)

    def pool(self, raw: Tensor, mask: Tensor | None) -> Tensor:
        """The library's norm and pooling head."""
        normed = self.vision.post_layernorm(raw)
        return self.vision.head(normed, mask) if self.ragged else self.vision.head(normed)

    def readout(self) -> dict[str, Tensor]:
        """Final norm and attention pool."""
        head, norm = self.vision.head, self.vision.post_layernorm
        found = {"norm.weight": norm.weight, "norm.bias": norm.bias, "eps": torch.tensor(norm.eps)}
        attention = head.attention
        found |= {
            "pool.in_proj.weight": attention.in_proj_weight,
            "pool.in_proj.bias": attention.in_proj_bias,
        }
        parts = {"out": attention.out_proj, "norm": head.layernorm}
        return found | pool_readout(
            {**parts, "fc1": head.mlp.fc1, "fc2": head.mlp.fc2},
            latent=head.probe,
            heads=attention.num_heads,
            tanh="tanh" in self.vision.config.hidden_act,
        )


class HubSiglipText:
    """A `TextTower` over transformers' `SiglipTextModel` or `Siglip2TextModel`: no mask, the last position is pooled.

    Args:
        text: the tower.
        tokenizer: a transformers tokenizer; its own padding side is ignored.
        name: of the checkpoint, for messages.
    """

    words = False
    pools = True
    whole = True
    rule = "clean=lower padding=right"

    def __init__(self, text: Any, tokenizer: Any, name: str) -> None:
        self.text = text
        self.module: nn.Module = text.encoder
        self.blocks: Blocks = text.encoder.layers
        context = int(text.config.max_position_embeddings)

        def encode(texts: Sequence[str], length: int) -> Tensor:
            # Lower case is how these were trained; only Siglip2Tokenizer does it by itself. Its default pads left.
            return tokenizer(
                [t.lower() for t in texts],
                padding="max_length",
                padding_side="right",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).input_ids

        def words() -> list[str]:
            return [tokenizer.decode([i]).strip() for i in range(len(tokenizer))]

        self.tokens = from_hub_tokenizer(tokenizer, encode, words, context, "last")
        n_embeddings = text.embeddings.token_embedding.num_embeddings
        self.tokens.check(name, len(tokenizer), n_embeddings)

    @property
    def dims(self) -> dict[str, int]:
        """Its part of `BackboneSpec.dims`."""
        return {"text_width": self.text.config.hidden_size, "context": self.tokens.context}

    @property
    def activation(self) -> str:
        """Of the feed-forward part."""
        return repr(self.text.encoder.layers[0].mlp.activation_fn)

    def embed(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
        """Token embeddings before positions."""
        return self.text.embeddings.token_embedding(ids)

    def place(self, embedded: Float[Tensor, "b l v"]) -> Float[Tensor, "b l v"]:
        """Add positions."""
        return placed(embedded, self.text.embeddings.position_embedding.weight)

    def run(self, block: nn.Module, states: Tensor) -> Tensor:
        """One layer without a mask."""
        return block(states, attention_mask=None)

    def pool(self, raw: Tensor, end: Tensor) -> Tensor:
        """Final norm, then the head of row `end`."""
        normed = self.text.final_layer_norm(raw)
        return self.text.head(normed[torch.arange(len(raw), device=raw.device), end])

    def readout(self) -> dict[str, Tensor]:
        """Final norm and head."""
        norm, head = self.text.final_layer_norm, self.text.head
        return {
            "norm.weight": norm.weight,
            "norm.bias": norm.bias,
            "eps": torch.tensor(norm.eps),
            "proj.weight": head.weight,
            "proj.bias": head.bias,
        }
