"""PE core, the Perception Encoder's contrastive models, through open_clip and timm.

Paper:     "Perception Encoder: The best visual embeddings are not at the output of the network", arXiv 2504.13181.
Library:   open_clip 3.3, class `CustomTextCLIP` over timm's `Eva`; rotary positions inside attention, patches only.
Raw:       image = input of `trunk.norm`; text = input of `ln_final`. Prefix = class token, none in bigG.
Pooled:    attention pool over class token *and* patches, then a linear head: without the prefix it is up to 12 % off.
Pixels:    bilinear squash, mean and std 0.5: open_clip's entry of the tag, not timm's.
Texts:     CLIP's tokenizer, causal, 32 tokens (72 in bigG): long captions are cut, and counted.
"""

import tempfile
from pathlib import Path
from typing import Any

from open_clip.model import CustomTextCLIP

# Registers trunks under their names.
from cache_builder.backbones import small_trunks  # noqa: F401  # pyright: ignore[reportUnusedImport]
from cache_builder.backbones.cards import Card, open_clip_card, skeleton
from cache_builder.backbones.checkpoints import CheckpointError, architecture, load_checkpoint
from cache_builder.backbones.open_clip_model import assembled
from cache_builder.backbones.timm_image import TimmImage
from cache_builder.backbones.tiny_files import clip_tokenizer, write_tiny
from cache_builder.backbones.two_towers import TwoTowers

PUBLISHED = (
    "PE-Core-T-16-384/meta",
    "PE-Core-S-16-384/meta",
    "PE-Core-B-16/meta",
    "PE-Core-L-14-336/meta",
    "PE-Core-bigG-14-448/meta",
)
"""All five core models there are; `headstart list backbones` computes what their tokens cost."""

TINY: dict[str, Any] = {
    "embed_dim": 24,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": "vit_pe_core_mini_patch8_32",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": None,
    },
    "text_cfg": {
        "context_length": 48,
        "vocab_size": 259,
        "width": 40,
        "heads": 4,
        "layers": 3,
        "hf_tokenizer_name": "beside this file",
        "tokenizer_kwargs": {"clean": "lower"},
    },
}
"""The architecture of `tiny`; all sizes differ, so that a transposition cannot pass."""

DEMO = Path(__file__).parent.parent / "demo" / "pe"
"""The bundled tiny PE, called `pe:demo`."""


def load(
    checkpoint: str, *, dtype: str = "float32", device: str = "cpu", compiled: bool = False
) -> TwoTowers:
    """A frozen Perception Encoder.

    Args:
        checkpoint: `arch/tag`, `arch/tag@file`, a directory, or `demo`.
        dtype: compute type, "float32", "bfloat16" or "float16".
        device: torch's name of it.
        compiled: run the blocks through torch.compile.

    Raises:
        UnknownName: no such architecture, tag or dtype.
        CheckpointError: not a PE core model, or not loadable exactly as asked.
    """
    source = str(DEMO) if checkpoint == "demo" else checkpoint
    config = architecture(source)
    trunk = (config or {}).get("vision_cfg", {}).get("timm_model_name", "")
    if config is not None and not trunk.startswith("vit_pe_core"):
        raise CheckpointError(
            f"pe:{checkpoint} is built on {trunk or 'a native open_clip tower'}; family pe reads PE core models, whose "
            "trunk is a timm vit_pe_core; try family clip or siglip2"
        )
    loaded = load_checkpoint(source, "pe", dtype=dtype, device=device)
    image = TimmImage(loaded.visual, loaded.transform, f"pe:{checkpoint}")
    return assembled("pe", checkpoint, loaded, image, compiled=compiled)


def card(checkpoint: str) -> Card:
    """Shapes of what `load` would give; reads no weights and needs no network.

    Raises:
        UnknownName: no such architecture.
        CheckpointError: its trunk is none that this family reads.
    """
    model = skeleton(str(DEMO) if checkpoint == "demo" else checkpoint, "pe")
    return open_clip_card(model, TimmImage(model.visual, None, f"pe:{checkpoint}"))


def tiny(directory: Path | None = None) -> TwoTowers:
    """A random-weight PE of the true class: 16 patches × 48, text width 40, joint space 24, 259 byte tokens.

    Args:
        directory: where to leave its files, so that `load` can be tried on them; a temporary one by default.
    """
    with tempfile.TemporaryDirectory() as scratch:
        where = directory or Path(scratch) / "tiny"
        preprocess = {"interpolation": "bilinear", "resize_mode": "squash", "mean": [0.5] * 3}
        tokenizer = clip_tokenizer(TINY["text_cfg"]["context_length"])
        write_tiny(where, CustomTextCLIP, TINY, tokenizer, {**preprocess, "std": [0.5] * 3})
        return load(str(where))
