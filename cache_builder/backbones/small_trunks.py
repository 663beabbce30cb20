"""Small timm trunks of the true classes, registered where open_clip looks them up: by name. No family itself.

open_clip builds a timm tower from a name alone, so a small SigLIP2 or PE has to be a name timm knows. They are plain
`VisionTransformer` and `Eva` models, made by what timm makes its own by, which has no public name; only the sizes
are ours. `…_mini_…` are the families' `tiny()`, `…_toy_…` the
bundled ones.
"""

from functools import partial
from typing import Any

from timm.layers.norm import LayerNorm
from timm.models import generate_default_cfgs, register_model
from timm.models.eva import Eva
from timm.models.eva import _create_eva as create_eva  # pyright: ignore[reportPrivateUsage]
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import (
    _create_vision_transformer as create_vision_transformer,  # pyright: ignore[reportPrivateUsage]
)

SIZES = {
    "vit_mini_patch8_siglip_32": 32,
    "vit_toy_patch8_siglip_56": 56,
    "vit_pe_core_mini_patch8_32": 32,
    "vit_pe_core_toy_patch8_56": 56,
}
"""Name → pixels."""

default_cfgs = (
    generate_default_cfgs(  # timm looks for this name, and warns of a trunk that is not in it
        {
            name: {"input_size": (3, size, size), "num_classes": 0, "fixed_input_size": True}
            for name, size in SIZES.items()
        }
    )
)


@register_model
def vit_mini_patch8_siglip_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """16 patches × 48, pooled by attention, no class token."""
    return _siglip("vit_mini_patch8_siglip_32", 32, 48, 2, 4, pretrained, kwargs)


@register_model
def vit_toy_patch8_siglip_56(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """49 patches × 128, pooled by attention, no class token."""
    return _siglip("vit_toy_patch8_siglip_56", 56, 128, 4, 4, pretrained, kwargs)


@register_model
def vit_pe_core_mini_patch8_32(pretrained: bool = False, **kwargs: Any) -> Eva:
    """16 patches × 48 and a class token, rotary positions."""
    return _pe("vit_pe_core_mini_patch8_32", 32, 48, 2, 4, pretrained, kwargs)


@register_model
def vit_pe_core_toy_patch8_56(pretrained: bool = False, **kwargs: Any) -> Eva:
    """49 patches × 128 and a class token, rotary positions."""
    return _pe("vit_pe_core_toy_patch8_56", 56, 128, 4, 4, pretrained, kwargs)


def _siglip(
    name: str,
    size: int,
    width: int,
    depth: int,
    heads: int,
    pretrained: bool,
    kwargs: dict[str, Any],
) -> VisionTransformer:
    shape: dict[str, Any] = {"img_size": size, "patch_size": 8, "embed_dim": width, "depth": depth}
    shape |= {"num_heads": heads, "class_token": False, "global_pool": "map"}
    return create_vision_transformer(name, pretrained=pretrained, **{**shape, **kwargs})


def _pe(
    name: str,
    size: int,
    width: int,
    depth: int,
    heads: int,
    pretrained: bool,
    kwargs: dict[str, Any],
) -> Eva:
    """As timm's own `vit_pe_core_*`, which set all but the sizes like this."""
    shape = {
        "img_size": size,
        "patch_size": 8,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": 4.0,
        "global_pool": "map",
        "attn_type": "rope",
        "use_pre_transformer_norm": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (size // 8, size // 8),
        "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy",
        "attn_pool_num_heads": heads,
        "attn_pool_mlp_ratio": 4.0,
        "norm_layer": partial(LayerNorm, eps=1e-5),
    }
    return create_eva(name, pretrained=pretrained, **{**shape, **kwargs})
