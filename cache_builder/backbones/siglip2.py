"""SigLIP2 through open_clip and timm, or through transformers: fixed resolution, or NaFlex.

Paper:     "SigLIP 2: Multilingual Vision-Language Encoders …", arXiv 2502.14786.
Library:   open_clip 3.3 `CustomTextCLIP` over timm's `VisionTransformer`; transformers 5 `SiglipModel`, `Siglip2Model`.
Raw:       image = input of `trunk.norm` (`post_layernorm`); text = input of `ln_final`. No prefix.
Pooled:    attention pool over all patches; text at the last position, mostly a pad: pads take part, there is no mask.
Logits:    exp(logit_scale) · cos + logit_bias.
NaFlex:    pictures keep their shape, so `image/patches` is ragged and the cache also holds `image/grid`.
Texts:     open_clip's `canonicalize` (lower case, no punctuation), or lower case in transformers; 64 ids, padded right.
"""

import tempfile
from pathlib import Path
from typing import Any

from open_clip.model import CustomTextCLIP

# Registers trunks under their names.
from cache_builder.backbones import small_trunks  # noqa: F401  # pyright: ignore[reportUnusedImport]
from cache_builder.backbones.cards import Card, hub_folder, open_clip_card, skeleton
from cache_builder.backbones.checkpoints import (
    CheckpointError,
    architecture,
    check_dtype,
    check_finite,
    flat,
    load_checkpoint,
    releases,
    weights_digest,
)
from cache_builder.backbones.hub_files import (
    canonical_name,
    describe_hub_tokenizer,
    describe_processor,
    is_hub_directory,
    kernels_of,
    load_model,
    load_processor,
    load_tokenizer,
    looks_like_a_hub_name,
    read_config,
    save_model,
)
from cache_builder.backbones.open_clip_model import assembled, both_activations, compute_text
from cache_builder.backbones.timm_image import TimmImage
from cache_builder.backbones.tiny_files import gemma_tokenizer, perturb, write_tiny
from cache_builder.backbones.two_towers import TwoTowers
from cache_builder.spec import BackboneSpec, with_depth

SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
GEMMA = {"vocab_size": 256000}
HUB: dict[str, dict[str, Any]] = {
    "google/siglip2-base-patch16-naflex": {"text_config": GEMMA},
    "google/siglip2-so400m-patch16-naflex": {
        "vision_config": SO400M,
        "text_config": {**SO400M, **GEMMA},
    },
}
"""Checkpoints in transformers' format, with what their published configuration says beside the defaults of
`Siglip2Config`, as far as it decides what is cached."""

PUBLISHED = (
    "ViT-B-32-SigLIP2-256/webli",
    "ViT-B-16-SigLIP2-256/webli",
    "ViT-L-16-SigLIP2-256/webli",
    "ViT-L-16-SigLIP2-384/webli",
    "ViT-SO400M-14-SigLIP2-378/webli",
    "ViT-SO400M-16-SigLIP2-512/webli",
    "ViT-gopt-16-SigLIP2-384/webli",
    *HUB,
)
"""Checkpoints that people use; `headstart list backbones` computes what their tokens cost. Any other works as well."""

TINY: dict[str, Any] = {
    "embed_dim": 48,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": "vit_mini_patch8_siglip_32",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 64,
        "vocab_size": 260,
        "width": 40,
        "heads": 4,
        "layers": 3,
        "hf_tokenizer_name": "beside this file",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    },
}
"""The architecture of `tiny`: SigLIP2's, in small."""

DEMO = Path(__file__).parent.parent / "demo" / "siglip2"
"""The bundled tiny SigLIP2, called `siglip2:demo`."""


def load(
    checkpoint: str, *, dtype: str = "float32", device: str = "cpu", compiled: bool = False
) -> TwoTowers:
    """A frozen SigLIP2.

    Args:
        checkpoint: open_clip's `arch/tag` or `arch/tag@file`; a hub name in transformers' format; a directory in either
            format; or `demo`.
        dtype: compute type, "float32", "bfloat16" or "float16".
        device: torch's name of it.
        compiled: run the blocks through torch.compile.

    Raises:
        UnknownName: no such architecture, tag, hub name or dtype.
        CheckpointError: not a SigLIP model, or not loadable exactly as asked.
    """
    source = str(DEMO) if checkpoint == "demo" else checkpoint
    directory = Path(source).expanduser()
    config = architecture(source)
    if is_hub_directory(directory) or (config is None and looks_like_a_hub_name(source)):
        return _load_from_hub(source, dtype=dtype, device=device, compiled=compiled)
    vision = (config or {}).get("vision_cfg", {})
    if config is not None and "siglip" not in vision.get("timm_model_name", ""):
        trunk = vision.get("timm_model_name", "a native open_clip tower")
        raise CheckpointError(
            f"siglip2:{checkpoint} is built on {trunk}; family siglip2 reads SigLIP models, whose trunk is a timm "
            "vit_…_siglip; try family clip or pe"
        )
    loaded = load_checkpoint(source, "siglip2", dtype=dtype, device=device)
    image = TimmImage(loaded.visual, loaded.transform, f"siglip2:{checkpoint}")
    return assembled("siglip2", checkpoint, loaded, image, compiled=compiled)


def card(checkpoint: str) -> Card:
    """Shapes of what `load` would give; reads no weights and needs no network.

    Raises:
        UnknownName: no such architecture.
        CheckpointError: its trunk is none that this family reads.
    """
    name = f"siglip2:{checkpoint}"
    folder = hub_folder(checkpoint)
    if folder is None and checkpoint not in HUB:
        model = skeleton(str(DEMO) if checkpoint == "demo" else checkpoint, "siglip2")
        return open_clip_card(model, TimmImage(model.visual, None, name))
    import torch
    from transformers import (
        Siglip2Config,
        Siglip2ImageProcessor,
        Siglip2VisionModel,
        SiglipVisionModel,
    )

    from cache_builder.backbones.hub_siglip import HubSiglipImage

    config: Any = Siglip2Config(**HUB.get(checkpoint, {}))
    if folder:
        config = read_config(str(folder), "siglip2", ("siglip", "siglip2"))
    vision, text = config.vision_config, config.text_config
    if folder and any(folder.glob("*processor_config.json")):
        processor = load_processor(str(folder), "siglip2")
    else:
        processor = Siglip2ImageProcessor(patch_size=vision.patch_size)
    with torch.device("meta"):
        kind: Any = Siglip2VisionModel if config.model_type == "siglip2" else SiglipVisionModel
        image = HubSiglipImage(kind(vision), processor, name)
    context = text.max_position_embeddings
    depth = {"image": len(image.blocks), "text": text.num_hidden_layers}
    dims = {**image.dims, "text_width": text.hidden_size, "context": context}
    return Card(with_depth(dims, depth), depth)


def tiny(directory: Path | None = None) -> TwoTowers:
    """A random-weight SigLIP2 of open_clip's class: 16 patches × 48, text width 40, joint space 48, 260 byte tokens.

    Args:
        directory: where to leave its files, so that `load` can be tried on them; a temporary one by default.
    """
    with tempfile.TemporaryDirectory() as scratch:
        where = directory or Path(scratch) / "tiny"
        preprocess = {"interpolation": "bicubic", "resize_mode": "squash", "mean": [0.5] * 3}
        tokenizer = gemma_tokenizer(TINY["text_cfg"]["context_length"])
        write_tiny(where, CustomTextCLIP, TINY, tokenizer, {**preprocess, "std": [0.5] * 3})
        return load(str(where))


def tiny_hub(directory: Path | None = None, *, naflex: bool = True) -> TwoTowers:
    """A random-weight SigLIP2 of transformers' class, at most 12 patches of 8 × 8 pixels (fixed: 16).

    Args:
        directory: where to leave its files; a temporary one by default.
        naflex: `Siglip2Model`, whose pictures keep their shape, or `SiglipModel`.
    """
    import torch
    from transformers import (
        Siglip2Config,
        Siglip2ImageProcessor,
        Siglip2Model,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
    )

    tokenizer = _byte_fallback_tokenizer() if naflex else gemma_tokenizer(64)
    text = {"vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 96}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
    text |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "projection_size": 48}
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "patch_size": 8}
    if naflex:
        config: Any = Siglip2Config(text_config=text, vision_config={**vision, "num_patches": 16})
        model_class: Any = Siglip2Model
        processor: Any = Siglip2ImageProcessor(patch_size=8, max_num_patches=12)
    else:
        config = SiglipConfig(text_config=text, vision_config={**vision, "image_size": 32})
        model_class, size = SiglipModel, {"height": 32, "width": 32}
        processor = SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        perturb(model)
        model.logit_scale.data += 1.0  # transformers starts it at zero
        where = directory or Path(scratch) / "tiny"
        save_model(model, where)
        processor.save_pretrained(where)
        tokenizer.save_pretrained(where)
        return load(str(where))


def _byte_fallback_tokenizer() -> Any:
    """Transformers' own class for these checkpoints, over a vocabulary of bytes and lower-case letters."""
    from tokenizers.processors import TemplateProcessing
    from transformers import Siglip2Tokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words += [f"<0x{i:02X}>" for i in range(256)] + ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Siglip2Tokenizer(vocab=vocabulary, merges=[], model_max_length=64)
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return made


def _load_from_hub(checkpoint: str, *, dtype: str, device: str, compiled: bool) -> TwoTowers:
    """`SiglipModel` or `Siglip2Model` in transformers' format."""
    from transformers import Siglip2Model, SiglipModel

    from cache_builder.backbones.hub_siglip import HubSiglipImage, HubSiglipText

    check_dtype(dtype)
    name = f"siglip2:{checkpoint}"
    config = read_config(checkpoint, "siglip2", ("siglip", "siglip2"))
    model_class = Siglip2Model if config.model_type == "siglip2" else SiglipModel
    processor = load_processor(checkpoint, "siglip2")
    tokenizer = load_tokenizer(checkpoint, "siglip2")
    model: Any = load_model(model_class, checkpoint, "siglip2")
    check_finite(model, name)
    image = HubSiglipImage(model.vision_model, processor, name)
    text = HubSiglipText(model.text_model, tokenizer, name)
    rule = f"{text.rule} context={text.tokens.context}"
    spec = BackboneSpec(
        family="siglip2",
        checkpoint=canonical_name(checkpoint),
        weights=weights_digest(model),
        preprocessing=describe_processor(processor),
        tokenizer=describe_hub_tokenizer(tokenizer, rule),
        layer="last block, before the final norm",
        dims={**image.dims, **text.dims},
        architecture=flat(model.config.to_dict()),
        activation=both_activations(image.activation, text.activation),
        compute=compute_text(
            dtype, kernels_of(model.vision_model, model.text_model), compiled, device
        ),
        versions=releases("torch", "torchvision", "transformers", "tokenizers", "pillow"),
    )
    scalars = {"logit_scale": model.logit_scale, "logit_bias": model.logit_bias}
    return TwoTowers(
        model.to(device),
        image,
        text,
        spec,
        device=device,
        dtype=dtype,
        scalars=scalars,
        compiled=compiled,
    )
