"""The image tower of open_clip models whose trunk is a timm ViT: SigLIP2, PE, MobileCLIP2, EVA. No family itself.

SigLIP2            patches                       → blocks → norm → attention pool                  → pooled
PE                 class token, patches, rotary  → blocks → norm → attention pool over both → head → pooled
MobileCLIP2-B, L   class token, patches          → blocks → norm → class token → head              → pooled
EVA01, EVA02       the same, some with rotary positions
"""

from collections.abc import Mapping
from typing import Any

import torch
from PIL.Image import Image
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cache_builder.backbones.base import Blocks, Pixels
from cache_builder.backbones.checkpoints import CheckpointError
from cache_builder.backbones.scaling import Scaling, of_transform


class TimmImage:
    """An `ImageTower` over open_clip's `TimmModel`.

    Args:
        visual: open_clip's tower.
        transform: open_clip's evaluation transform.
        name: of the checkpoint, for messages.

    Raises:
        CheckpointError: the trunk is no ViT of a shape this file reads; says what is different.
    """

    pools = True
    ragged = False

    def __init__(self, visual: Any, transform: Any, name: str) -> None:
        self.trunk: Any = visual.trunk
        self.transform = transform
        if fault := _other_shape(visual):
            raise CheckpointError(f"{name}: its timm trunk {fault}; this family cannot read it")
        self.eva = isinstance(self.trunk, Eva)
        self.module: nn.Module = self.trunk
        self.blocks: Blocks = self.trunk.blocks
        self.n_prefix = int(self.trunk.num_prefix_tokens)
        self.size = int(visual.image_size[0])
        self.shape: tuple[int, int] = tuple(self.trunk.patch_embed.grid_size)

    @property
    def dims(self) -> dict[str, int]:
        """Its part of `BackboneSpec.dims`."""
        head = self.trunk.head
        width = int(self.trunk.embed_dim)
        return {
            "image_size": self.size,
            "patches": self.shape[0] * self.shape[1],
            "prefix": self.n_prefix,
            "image_width": width,
            "joint": head.out_features if isinstance(head, nn.Linear) else width,
        }

    @property
    def activation(self) -> str:
        """Of the feed-forward part."""
        return repr(self.trunk.blocks[0].mlp.act)

    @property
    def kernel(self) -> str:
        """Of its attention: timm's fused one is torch's, and can be switched off."""
        parts = [self.trunk.blocks[0].attn, self.trunk.attn_pool]
        fused = {part.fused_attn for part in parts if part is not None}
        return " and ".join(sorted("sdpa" if one else "eager" for one in fused))

    def preprocess(self, image: Image) -> Pixels:
        """open_clip's evaluation transform, pixel for pixel."""
        return self.transform(image)

    def scaling(self) -> Scaling:
        """How open_clip scales 8-bit levels."""
        return of_transform(self.transform)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """The same for every picture: it is resized to one size."""
        del width, height
        return self.shape

    def embed(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Patches with positions, behind the class token if there is one."""
        states = self.trunk._pos_embed(self.trunk.patch_embed(pixels))
        if self.eva:
            states = states[0]  # the rotary table comes with it, if there is one
        return self.trunk.norm_pre(states), None

    def run(self, block: nn.Module, states: Tensor, mask: Tensor | None, n_prompts: int) -> Tensor:
        """One block. Rotary positions turn patch rows only: prompts, which stand before them, are turned by nothing."""
        assert mask is None
        if not self.eva or self.trunk.rope is None:
            return block(states)
        table = self.trunk.rope.get_embed()  # (N, sines and cosines)
        if n_prompts:
            sines = table.new_zeros(n_prompts, table.shape[-1] // 2)
            table = torch.cat([torch.cat([sines, sines + 1], -1), table])
        return block(states, rope=table)

    def pool(self, raw: Tensor, mask: Tensor | None) -> Tensor:
        """The trunk's own norm, pool and head."""
        del mask
        return self.trunk.forward_head(self.trunk.norm(raw))

    def readout(self) -> dict[str, Tensor]:
        """Final norm, pool and head."""
        trunk = self.trunk
        head = trunk.head if isinstance(trunk.head, nn.Linear) else None
        found = {
            "norm.weight": trunk.norm.weight,
            "norm.bias": trunk.norm.bias,
            "eps": torch.tensor(trunk.norm.eps),
        }
        if head is not None:
            found["proj.weight"] = head.weight
            # torch declares a bias even where a layer was made without one
            without = head.bias is None  # pyright: ignore[reportUnnecessaryComparison]
            found |= {} if without else {"proj.bias": head.bias}
        if trunk.attn_pool is None:
            return found
        pool = trunk.attn_pool
        parts = {"q": pool.q, "kv": pool.kv, "out": pool.proj, "norm": pool.norm}
        return found | pool_readout(
            {**parts, "fc1": pool.mlp.fc1, "fc2": pool.mlp.fc2},
            latent=pool.latent,
            heads=pool.num_heads,
            tanh=getattr(pool.mlp.act, "approximate", None) == "tanh"
            or type(pool.mlp.act).__name__ == "GELUTanh",
        )


def pool_readout(
    parts: Mapping[str, Any], *, latent: Tensor, heads: int, tanh: bool
) -> dict[str, Tensor]:
    """The tensors of an attention pool, as cache_builder/readout.py names them."""
    found: dict[str, Tensor] = {
        "pool.latent": latent,
        "pool.heads": torch.tensor(float(heads)),
        "pool.tanh": torch.tensor(float(tanh)),
        "pool.eps": torch.tensor(parts["norm"].eps),
    }
    for name, module in parts.items():
        for part in ("weight", "bias"):
            value = getattr(module, part, None)
            if value is not None:
                found[f"pool.{name}.{part}"] = value
    return found


def _other_shape(visual: Any) -> str:
    """In what a trunk differs from what this file reads; empty if in nothing."""
    trunk = visual.trunk
    if not isinstance(trunk, VisionTransformer | Eva):
        return f"is a {type(trunk).__name__}, whose maps are not ViT tokens"
    pool = trunk.attn_pool
    faults = {
        "is followed by a projection of open_clip's own": len(visual.head) > 0,
        f"is pooled by {trunk.global_pool}": trunk.global_pool not in ("map", "token"),
        "has a norm behind its pool": not isinstance(trunk.fc_norm, nn.Identity),
        "has no final norm": isinstance(trunk.norm, nn.Identity),
        "pools with positions or normed queries": pool is not None
        and (pool.pos_embed is not None or not isinstance(pool.q_norm, nn.Identity)),
        "mixes its rotary positions": getattr(trunk, "rope_mixed", False),
        "pools more than one row": trunk.global_pool == "token" and not trunk.num_prefix_tokens,
    }
    return next((fault for fault, here in faults.items() if here), "")
